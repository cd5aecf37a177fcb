"""Loads the compiled operators once and remembers why the CUDA part is missing, if it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_REBUILD = "`pip install --no-build-isolation .` in the source tree builds them"


@cache
def load() -> None:
    """Registers torch.ops.dijiang.*; an ImportError names the cure."""
    # A C++ program that embeds Python may have loaded them: a second copy would clash.
    if not hasattr(torch.ops.dijiang, "dct"):
        _load(_FOLDER / "dijiang_ops.so")


def _load(path: Path) -> None:
    if not path.exists():
        raise ImportError(f"dijiang's operators are not built ({path.name} is missing): {_REBUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"{path.name} does not load with torch {torch.__version__}: {error}. It needs "
            f"torch >= 2.10 and the C++ library it was built with; {_REBUILD} anew"
        ) from error


@cache
def why_no_cuda() -> str | None:
    """None when the CUDA operators are there, else what is missing and the cure."""
    path = _FOLDER / "dijiang_ops_cuda.so"
    if not path.exists():
        return f"this is a CPU build of dijiang: where nvcc is on PATH, {_REBUILD} with CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    try:
        from ._core import build_info

        built = build_info()["cuda"]
    except ImportError:
        built = torch.version.cuda  # unknown without _core
    # Where CUDA is installed, a second runtime of another version would load without a word.
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"dijiang's CUDA operators were built with CUDA {built}, torch {torch.__version__} has "
            f"{torch.version.cuda}: install a torch of the same major version, or {_REBUILD} anew"
        )
    try:
        _load(path)
    except ImportError as error:
        return str(error)
    return None
