"""Oracles in plain PyTorch: the definition of truth for every kernel.

Two forms of one function (docs/numerics.md, "The function" and "State"):

- ``causal_linear_attention`` and ``kernelized_attention`` build the T x T matrix of weights;
- ``*_recurrent`` and ``*_update`` walk token by token with the constant-size state.

Give float64 tensors for the truth. The quadratic forms compute in the dtype of q, so that the
error of the same formula at a low precision can be measured; the recurrent forms keep their state
in float32 (float64 for float64). All are differentiable by autograd. None is fast.
"""

from .features import dct, dct_matrix, feature_map, log_features, omega_matrix
from .hard_keys import CARRIED, NOVEL, choose_hard_keys, held_keys
from .quadratic import causal_linear_attention, kernelized_attention
from .recurrent import (
    causal_linear_attention_recurrent,
    causal_linear_attention_update,
    kernelized_attention_recurrent,
    kernelized_attention_update,
)
from .sequences import hard_key_rows, segments_of

__all__ = [
    "CARRIED",
    "NOVEL",
    "causal_linear_attention",
    "causal_linear_attention_recurrent",
    "causal_linear_attention_update",
    "choose_hard_keys",
    "dct",
    "dct_matrix",
    "feature_map",
    "hard_key_rows",
    "held_keys",
    "kernelized_attention",
    "kernelized_attention_recurrent",
    "kernelized_attention_update",
    "log_features",
    "omega_matrix",
    "segments_of",
]
