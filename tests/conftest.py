"""What all tests share."""

import pytest


@pytest.fixture(autouse=True)
def one_thread_for_tiny_work(request):
    """A second thread only waits in tests of tiny tensors, and longest where cores are shared."""
    if request.node.get_closest_marker("slow"):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
