"""DiJiang: linear attention for pretrained language models (arXiv 2403.19928)."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Everything is imported on first use: `import dijiang` alone loads neither torch nor the kernels.
_MODULES = (
    "data", "distributed", "evaluate", "export", "ops", "plots", "reference", "tensor_parallel",
)  # fmt: skip
_NAMES = {
    "AttentionKernel": "modules",
    "ConversionError": "conversion",
    "DiJiangCache": "cache",
    "DiJiangConfig": "config",
    "FeatureMap": "features",
    "KernelizedAttention": "modules",
    "calibrate": "conversion",
    "convert": "conversion",
    "distill": "distillation",
    "export_decode": "export",
    "export_reference_checkpoint": "reference_checkpoint",
    "from_pretrained": "hub",
    "import_reference_checkpoint": "reference_checkpoint",
    "is_converted": "conversion",
    "load_base": "hub",
    "load_state": "states",
    "prefill": "states",
    "restore": "conversion",
    "resume": "states",
    "save_state": "states",
    "softmax_mode": "conversion",
    "split_states": "states",
    "spread_hard_keys": "allocation",
    "stack_states": "states",
}


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
