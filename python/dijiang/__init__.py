"""DiJiang: linear attention for pretrained language models (arXiv 2403.19928)."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Everything is imported on first use: `import dijiang` alone loads neither torch nor the kernels.
_MODULES = ("ops", "reference")


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
