"""The operators: CPU and CUDA kernels with gradients, fakes and autocast."""

from __future__ import annotations

from .. import _library

_library.load()

from .._types import (  # noqa: E402
    AttentionState,
    FeatureParams,
    LinearAttentionState,
    empty_attention_state,
)
from . import _autograd, _fakes  # noqa: E402, F401  (they register themselves)
from .causal_linear_attention import (  # noqa: E402
    causal_linear_attention,
    causal_linear_attention_update,
)
from .dct import dct  # noqa: E402
from .feature_map import feature_map  # noqa: E402
from .kernelized_attention import (  # noqa: E402
    kernelized_attention,
    kernelized_attention_update,
)

__all__ = [
    "AttentionState",
    "FeatureParams",
    "LinearAttentionState",
    "causal_linear_attention",
    "causal_linear_attention_update",
    "dct",
    "empty_attention_state",
    "feature_map",
    "kernelized_attention",
    "kernelized_attention_update",
]
