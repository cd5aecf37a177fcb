"""The tuples that the operators take and return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeatureParams(NamedTuple):
    """The learned part of a feature map, one row a head (docs/numerics.md, "Exponentials").

    ``u = omega x`` with ``x = sqrt(scale) q`` or ``sqrt(scale) k``, then by ``kind``

    - ``"exp"``: log phi_i = u_i + log_weight_i - beta \\|x\\|^2
    - ``"softmax"``: log phi_i = u_i - logsumexp_j(u_j) + log_weight_i
    - ``"elu"``: log phi_i = log(1 + elu(u_i)) + log_weight_i
    """

    omega: Tensor  # (heads, num_features, headdim)
    log_weight: Tensor | None = None  # (heads, num_features)
    beta: Tensor | None = None  # (heads,), "exp" alone
    kind: str = "exp"


class LinearAttentionState(NamedTuple):
    """Constant-size memory: S = kv 2^log_scale, z = z 2^log_scale. float32, or float64."""

    kv: Tensor  # (num_seqs, kv_heads, num_features, headdim_v)
    z: Tensor  # (num_seqs, kv_heads, num_features)
    log_scale: Tensor  # (num_seqs, kv_heads, num_features), whole numbers; -1e30: saw no key


class AttentionState(NamedTuple):
    """LinearAttentionState of the far keys, and the near keys themselves.

    Position p of a sequence lies in slot ``p % (2 window)`` of the window buffers.
    """

    kv: Tensor  # (num_seqs, kv_heads, num_features, headdim_v)
    z: Tensor  # (num_seqs, kv_heads, num_features)
    log_scale: Tensor  # (num_seqs, kv_heads, num_features)
    window_k: Tensor  # (num_seqs, kv_heads, 2 window, headdim)
    window_v: Tensor  # (num_seqs, kv_heads, 2 window, headdim_v)
    window_decay: Tensor | None  # (num_seqs, kv_heads, 2 window) log_decay; None: no decay
    sink_k: Tensor  # (num_seqs, kv_heads, sinks, headdim)
    sink_v: Tensor  # (num_seqs, kv_heads, sinks, headdim_v)
    length: Tensor  # (num_seqs,) int64: tokens seen so far
