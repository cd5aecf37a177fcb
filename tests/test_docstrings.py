"""The examples in the operators' docstrings run and print what they say."""

import doctest

import pytest
import torch
from dijiang import ops


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n[0].islower()])
def test_examples(name):
    function = getattr(ops, name)
    examples = doctest.DocTestFinder(recurse=False).find(
        function, name, globs={**vars(ops), "torch": torch}
    )
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(r.attempted for r in results) > 0 and not any(r.failed for r in results)
