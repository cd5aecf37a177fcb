"""Modules: what convert hangs under each attention module, and an attention layer of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from ._types import AttentionState, cache_sizes
from .config import DiJiangConfig
from .features import FeatureMap, shared_by
from .position_decay import PositionDecay, positions_of

#: A gate this low closes the far keys: their weight is 0 in every dtype, and so is its gradient.
CLOSED = -1e4


class AttentionKernel(nn.Module):
    """Everything learned between the projections of an attention layer, and the call itself.

    Holds the feature maps of queries and keys, the gate of the far keys (a log-weight a query
    head), decay, and the published code's group norm and output gate, as its config asks.

    Shapes: q (batch, heads, seqlen, headdim), k (batch, kv_heads, seqlen, headdim), v (batch,
    kv_heads, seqlen, headdim_v), hidden (batch, seqlen, hidden_size; needed by decay="token" and
    output_gate) -> (batch, heads, seqlen, headdim_v).
    """

    def __init__(
        self, config: DiJiangConfig, *, heads: int, kv_heads: int, headdim: int,
        headdim_v: int | None = None, hidden_size: int | None = None, scale: float | None = None,
        seed: int | None = None,
    ):  # fmt: skip
        super().__init__()
        headdim_v = headdim if headdim_v is None else headdim_v
        if heads % kv_heads:
            raise ValueError(
                f"AttentionKernel: kv_heads must divide heads, got {heads} heads and "
                f"{kv_heads} kv_heads"
            )
        if hidden_size is None and (config.decay == "token" or config.output_gate):
            raise ValueError("AttentionKernel: decay='token' and output_gate need hidden_size")
        own = len(cache_sizes(config.cache_size))
        if own not in (1, kv_heads):
            raise ValueError(
                "AttentionKernel: cache_size must be a number or one for each of the "
                f"{kv_heads} kv heads, got {config.cache_size}"
            )
        self.config = config
        self.heads, self.kv_heads, self.groups = heads, kv_heads, heads // kv_heads
        self.headdim, self.headdim_v = headdim, headdim_v
        self.scale = headdim**-0.5 if scale is None else scale

        # Set from outside for the length of a forward: see attention.py.
        self.mode = "student"
        self.cache_layer = self.hidden = self.loss = self.calibration = None
        self.compared: tuple[int, ...] = ()
        self.relay = None  # see distributed.py
        self._kept = None  # see _kept_params

        self.features_q = self.features_k = self.gate = None
        if config.feature_map is not None:
            self.features_k = FeatureMap(
                config.feature_map, heads=kv_heads, headdim=headdim,
                num_features=config.num_features, radius=config.radius,
                random_signs=config.random_signs, sampling=config.sampling, init=config.init,
                beta=config.beta, seed=config.seed if seed is None else seed,
            )  # fmt: skip
            if not config.share_qk:
                self.features_q = self.features_k.repeated(self.groups)
            if config.has_near:
                gate = CLOSED if config.gate == "auto" else config.gate
                self.gate = nn.Parameter(torch.full((heads,), float(gate)))

        # log(gamma / (1 - gamma)) for RetNet's gamma, 1 - 1/32 to 1 - 1/512 from head to head. Far
        # keys are a window away at least: with one it is what a window, not a token, takes away.
        forget = torch.linspace(math.log(1 / 32), math.log(1 / 512), kv_heads).exp()
        forget = forget / max(config.window, 1)
        self.decay = self.decay_token = self.decay_position = None
        if config.decay == "head":
            self.decay = nn.Parameter(torch.log((1 - forget) / forget))
        elif config.decay == "token":
            self.decay_token = nn.Linear(hidden_size, kv_heads)
            nn.init.zeros_(self.decay_token.weight)
            with torch.no_grad():
                self.decay_token.bias.copy_(torch.log((1 - forget) / forget))
        elif config.decay == "position":
            self.decay_position = PositionDecay(heads, forget, config.num_positions)
        # As many groups as a head has channels: the published code's, and its checkpoints'.
        self.norm = nn.GroupNorm(headdim_v, heads * headdim_v) if config.group_norm else None
        self.output_gate = None
        if config.output_gate:
            self.output_gate = nn.Linear(hidden_size, heads * headdim_v, bias=False)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, headdim={self.headdim}, "
            f"window={c.window}, sinks={c.sinks}, cache_size={c.cache_size}"
        )

    @property
    def closed(self) -> bool:
        """Whether the far keys are shut out: the same as the exact keys alone."""
        return self.gate is not None and bool((self.gate <= CLOSED / 2).all())

    @property
    def num_features(self) -> int:
        return 0 if self.features_k is None else self.features_k.num_features

    def feature_params(self, dtype=torch.float32):
        """(fq, fk) as the operators take them; the gate is part of fq's log-weights."""
        if self.features_k is None:
            return None, None
        fk = self.features_k.params(dtype=dtype)
        if self.features_q is None:
            fq = shared_by(fk, self.groups)
        else:
            fq = self.features_q.params(dtype=dtype)
        if self.gate is not None:
            gate = self.gate.to(dtype)[:, None]
            shape = (self.heads, self.num_features)
            log_weight = gate.expand(shape) if fq.log_weight is None else fq.log_weight + gate
            fq = fq._replace(log_weight=log_weight)
        return fq, fk

    def _params(self, dtype):
        """feature_params, and the tables of positions."""
        tables = None if self.decay_position is None else self.decay_position.tables(dtype)
        return *self.feature_params(dtype), tables

    def _kept_params(self, dtype, refresh: bool):
        """_params for decoding: made once a generation, not once a token.

        Kept until a longer input comes (``refresh``) or a parameter changes, which its version and
        address tell; a write through ``.data`` keeps both, but does not come between two tokens.
        """
        maps = [x for x in (self.features_q, self.features_k) if x is not None]
        tensors = [x for m in maps for x in m._parameters.values() if x is not None]
        if self.gate is not None:
            tensors.append(self.gate)
        if self.decay_position is not None:
            tensors += self.decay_position.parameters()
        if torch.compiler.is_compiling() or any(x.is_inference() for x in tensors):
            return self._params(dtype)
        key = (dtype, [(x.data_ptr(), x._version) for x in tensors])
        if refresh or self._kept is None or self._kept[0] != key:
            self._kept = key, self._params(dtype)
        return self._kept[1]

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def log_decay(self, hidden: Tensor | None, dtype=torch.float32) -> Tensor | None:
        """(kv_heads,), (batch, kv_heads, seqlen), or None; <= 0."""
        if self.decay is not None:
            return F.logsigmoid(self.decay.to(dtype))
        if self.decay_token is not None:
            hidden = hidden.to(self.decay_token.weight.dtype)
            return F.logsigmoid(self.decay_token(hidden).to(dtype)).transpose(1, 2)
        if self.decay_position is not None:
            raise NotImplementedError(
                "dijiang: decay='position' also weighs queries and values: see PositionDecay.tables"
            )
        return None

    def empty_state(self, batch: int, dtype, device) -> AttentionState:
        return ops.empty_attention_state(
            batch, self.kv_heads, self.num_features, self.headdim, self.headdim_v,
            window=self.config.window, sinks=self.config.sinks, dtype=dtype, device=device,
            decay=self.config.decay is not None, cache_size=self.config.cache_size,
        )  # fmt: skip

    @torch.no_grad()
    def hard_keys(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """The hard keys that are chosen from these tokens (see kernelized_attention), or None."""
        if not self.config.cache_size:
            return None
        _, table = ops.kernelized_attention(
            q, k, v, scale=self.scale, window=self.config.window, sinks=self.config.sinks,
            cache_size=self.config.cache_size, return_hard_keys=True,
        )  # fmt: skip
        return table

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, hidden: Tensor | None = None,
        state: AttentionState | None = None, return_state: bool = False,
        cu_seqlens: Tensor | None = None, seq_bounds: Tensor | None = None,
    ):  # fmt: skip
        """Attends; with return_state also gives the state, which one token updates in place."""
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        if self.relay is not None:
            cached = state is not None or return_state
            self.relay.check(cached or cu_seqlens is not None, seq_bounds is not None)
            state = self.relay.receive(self, q)
        if return_state and not torch.is_grad_enabled():
            fq, fk, tables = self._kept_params(acc, refresh=q.shape[2] > 1)
        else:
            fq, fk, tables = self._params(acc)
        weight = None
        if tables is None:
            log_decay = self.log_decay(hidden, acc)
        else:
            positions = positions_of(q, state, cu_seqlens, seq_bounds)
            weight, weight_v, log_decay = PositionDecay.take(tables, positions)
            v = v * weight_v[..., None].to(v.dtype)
        settings = dict(
            scale=self.scale, window=self.config.window, sinks=self.config.sinks,
            cache_size=self.config.cache_size, log_decay=log_decay,
            normalize=self.config.normalize,
        )  # fmt: skip
        one_token = state is not None and q.shape[2] == 1 and seq_bounds is None
        if self.relay is not None:
            out = self.relay.attend(q, k, v, fq, fk, state, **settings)
        elif one_token and return_state and not torch.is_grad_enabled():
            out = ops.kernelized_attention_update(q, k, v, state, fq, fk, **settings)
        else:
            out = ops.kernelized_attention(
                q, k, v, fq, fk, initial_state=state, return_state=return_state,
                cu_seqlens=cu_seqlens, seq_bounds=seq_bounds, **settings,
            )  # fmt: skip
            if return_state:
                out, state = out
        out = self._finish(out, hidden, weight)
        return (out, state) if return_state else out

    def _finish(self, out: Tensor, hidden: Tensor | None, weight: Tensor | None = None) -> Tensor:
        dtype = out.dtype
        if weight is not None:
            out = out * weight[..., None]
        if self.norm is None and self.output_gate is None:
            return out.to(dtype)
        batch, heads, seqlen, dv = out.shape
        flat = out.transpose(1, 2).reshape(batch, seqlen, heads * dv)
        if self.norm is not None:
            rows = flat.reshape(batch * seqlen, heads * dv).to(self.norm.weight.dtype)
            flat = self.norm(rows).reshape(flat.shape)
        if self.output_gate is not None:
            flat = flat * F.silu(self.output_gate(hidden.to(self.output_gate.weight.dtype)))
        return flat.reshape(batch, seqlen, heads, dv).transpose(1, 2).to(dtype)


def kernels_of(model: nn.Module) -> list[AttentionKernel]:
    """Every kernel in the model."""
    return [module for module in model.modules() if isinstance(module, AttentionKernel)]


def kernels_by_layer(model: nn.Module) -> dict[int, AttentionKernel]:
    """The kernels of a converted model, in the order of its layers."""
    found = {
        module.layer_idx: child
        for module in model.modules()
        for child in module.children()
        if isinstance(child, AttentionKernel)
    }
    return dict(sorted(found.items()))


class KernelizedAttention(nn.Module):
    """Causal multi-head attention of linear cost, for a model of one's own.

    Projects x to queries, keys and values, attends as DiJiangConfig says, and projects back.

    Shapes: x (batch, seqlen, dim) -> (batch, seqlen, dim); with ``return_state=True`` also the
    AttentionState, of constant size, from which the next tokens go on.

    >>> layer = KernelizedAttention(64, num_heads=4, num_kv_heads=2)
    >>> x = torch.randn(1, 10, 64)
    >>> whole = layer(x)
    >>> first, state = layer(x[:, :6], return_state=True)
    >>> rest = layer(x[:, 6:], state=state)
    >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)
    True
    """

    def __init__(
        self, dim: int, num_heads: int, *, num_kv_heads: int | None = None,
        headdim: int | None = None, config: DiJiangConfig | None = None, bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if headdim is None:
            if dim % num_heads:
                raise ValueError(
                    f"KernelizedAttention: num_heads must divide dim, got dim {dim} and "
                    f"{num_heads} heads. Give headdim"
                )
            headdim = dim // num_heads
        if config is None:
            # Nothing is pretrained here, so the far keys start open.
            config = DiJiangConfig(gate=0.0)
        self.q_proj = nn.Linear(dim, num_heads * headdim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * headdim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * headdim, bias=bias)
        self.o_proj = nn.Linear(num_heads * headdim, dim, bias=bias)
        self.kernel = AttentionKernel(
            config, heads=num_heads, kv_heads=num_kv_heads, headdim=headdim, hidden_size=dim
        )
        self.headdim = headdim

    def forward(
        self, x: Tensor, *, state: AttentionState | None = None, return_state: bool = False,
        cu_seqlens: Tensor | None = None, seq_bounds: Tensor | None = None,
    ):  # fmt: skip
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.kernel(
            q, k, v, hidden=x, state=state, return_state=return_state, cu_seqlens=cu_seqlens,
            seq_bounds=seq_bounds,
        )  # fmt: skip
        out, state = out if return_state else (out, None)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return (out, state) if return_state else out
