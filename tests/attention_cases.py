"""Inputs, tolerances and devices that the operator tests share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from dijiang import reference
from dijiang._types import FeatureParams
from dijiang.ops import causal_linear_attention, kernelized_attention

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]

# What a result may be off by, relative to the largest element of the truth.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
EXACT_DTYPES = [torch.float64, torch.float32]
LOW_DTYPES = [torch.bfloat16, torch.float16]

KINDS = ["exp", "softmax", "elu"]
DECAYS = [None, "head", "token"]

BATCH, HEADS, KV_HEADS, SEQLEN, HEADDIM, HEADDIM_V, FEATURES = 2, 4, 2, 150, 6, 5, 7


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small: on a busy machine waiting threads cost a hundred times the work.

    Active in every module that imports it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def near_cases(*cases):
    """Which keys are exact: (window, sinks) or (window, sinks, cache_size), as options."""
    names = ("window", "sinks", "cache_size")
    cases = [dict(zip(names, case, strict=False)) for case in cases]
    ids = ["-".join(str(x) for x in case.values()) for case in cases]
    return pytest.mark.parametrize("near", cases, ids=ids)


def skip_unsupported(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is supported on the CPU alone")


def error(got, truth):
    """Largest difference, relative to the largest element of the truth."""
    assert got.shape == truth.shape
    return ((got.double().cpu() - truth.double()).abs().max() / truth.abs().max()).item()


def assert_close(got, truth, dtype):
    assert error(got, truth) <= TOLERANCE[dtype]


def random_params(heads, features, headdim, kind, size=1.0):
    """kind "dct": "exp" with the frequencies of rows of the DCT in place of a matrix."""
    if kind == "dct":
        _, log_weight, beta, kind = random_params(heads, features, headdim, "exp", size)
        t = size * headdim**0.5 * torch.randn(heads, features, dtype=torch.float64)
        return FeatureParams(t, log_weight, beta, kind)
    beta = torch.rand(heads, dtype=torch.float64) if kind == "exp" else None
    omega = size * torch.randn(heads, features, headdim, dtype=torch.float64)
    return FeatureParams(omega, size * torch.randn(heads, features).double(), beta, kind)


def map_params(params, f):
    if params is None:
        return None
    return FeatureParams(*(None if x is None else f(x) for x in params[:3]), params.kind)


@dataclass
class Case:
    """Arguments of either attention; float64 on the CPU until `to`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None = None
    fq: FeatureParams | None = None
    fk: FeatureParams | None = None
    given: bool = False  # q and k are features: causal_linear_attention
    options: dict = field(default_factory=dict)

    def to(self, dtype, device="cpu"):
        """q, k, v rounded to dtype; parameters and decay in float32 (float64 for float64)."""
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v = (x.to(device, dtype) for x in (self.q, self.k, self.v))
        decay = None if self.log_decay is None else self.log_decay.to(device, acc)
        fq, fk = (map_params(f, lambda x: x.to(device, acc)) for f in (self.fq, self.fk))
        return replace(self, q=q, k=k, v=v, log_decay=decay, fq=fq, fk=fk)

    def double(self):
        """The same numbers in float64 on the CPU, for the oracle."""
        as_double = lambda x: None if x is None else x.detach().double().cpu()  # noqa: E731
        q, k, v, decay = map(as_double, (self.q, self.k, self.v, self.log_decay))
        fq, fk = (map_params(f, as_double) for f in (self.fq, self.fk))
        return replace(self, q=q, k=k, v=v, log_decay=decay, fq=fq, fk=fk)

    def slice(self, begin, end):
        """Tokens [begin, end) of every row."""
        cut = lambda x: x[:, :, begin:end]  # noqa: E731
        decay = self.log_decay
        decay = cut(decay) if decay is not None and decay.dim() == 3 else decay
        return replace(self, q=cut(self.q), k=cut(self.k), v=cut(self.v), log_decay=decay)

    def of_head(self, head):
        """One kv head, and the query heads that read it."""
        groups = self.q.shape[1] // self.k.shape[1]
        own, queries = slice(head, head + 1), slice(head * groups, (head + 1) * groups)
        decay = self.log_decay
        if decay is not None:
            decay = decay[own] if decay.dim() == 1 else decay[:, own]
        fq = map_params(self.fq, lambda x: x[queries])
        fk = map_params(self.fk, lambda x: x[own])
        q, k, v = self.q[:, queries], self.k[:, own], self.v[:, own]
        return replace(self, q=q, k=k, v=v, log_decay=decay, fq=fq, fk=fk)

    def with_options(self, **options):
        return replace(self, options={**self.options, **options})

    def inputs(self):
        """Every tensor that has a gradient, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, "log_decay": self.log_decay}
        for side, params in (("fq", self.fq), ("fk", self.fk)):
            if params is not None:
                named |= {
                    f"{side}.{n}": x for n, x in zip(params._fields, params[:3], strict=False)
                }
        return {name: x for name, x in named.items() if x is not None}

    def require_grad(self):
        leaf = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
        decay = None if self.log_decay is None else leaf(self.log_decay)
        fq, fk = map_params(self.fq, leaf), map_params(self.fk, leaf)
        q, k, v = map(leaf, (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, log_decay=decay, fq=fq, fk=fk)

    def run(self, module=None, form="", **extra):
        """The operator, or a form of it in `module` (dijiang.reference)."""
        options = {**self.options, **extra, "log_decay": self.log_decay}
        if self.given:
            f = getattr(module, "causal_linear_attention" + form) if module else None
            return (f or causal_linear_attention)(self.q, self.k, self.v, **options)
        f = getattr(module, "kernelized_attention" + form) if module else None
        return (f or kernelized_attention)(self.q, self.k, self.v, self.fq, self.fk, **options)


def make_case(kind="exp", decay=None, *, batch=BATCH, seqlen=SEQLEN, size=1.0, seed=0, **options):
    """kind "given": causal_linear_attention; None: near keys alone."""
    torch.manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    q, k = randn(batch, HEADS, seqlen, HEADDIM), randn(batch, KV_HEADS, seqlen, HEADDIM)
    v = randn(batch, KV_HEADS, seqlen, HEADDIM_V)
    log_decay = None
    if decay is not None:
        shape = (KV_HEADS,) if decay == "head" else (batch, KV_HEADS, seqlen)
        log_decay = -torch.rand(*shape, dtype=torch.float64)
    if kind == "given":
        return Case(q.abs() * size, k.abs() * size, v, log_decay, given=True, options=options)
    fq = fk = None
    if kind == "shared":  # one omega for the query heads of a kv head
        fq = random_params(HEADS, FEATURES, HEADDIM, "exp", size)
        fk = random_params(KV_HEADS, FEATURES, HEADDIM, "exp", size)
        fq = fq._replace(omega=fq.omega[:KV_HEADS].clone())
    elif kind is not None:
        fq = random_params(HEADS, FEATURES, HEADDIM, kind, size)
        fk = random_params(KV_HEADS, FEATURES, HEADDIM, kind, size)
    return Case(q * size, k * size, v, log_decay, fq, fk, options=options)


def plain(case):
    """The formula as one writes it in plain PyTorch, at the dtype of q throughout.

    Features by exponentials and a matrix product, without a stabiliser: for moderate inputs.
    """
    groups = case.q.shape[1] // case.k.shape[1]
    dtype = case.q.dtype
    k, v = (x.repeat_interleave(groups, 1) for x in (case.k, case.v))
    p = torch.arange(case.q.shape[2])
    t, s = p[:, None], p[None, :]
    if case.given:
        w, near = case.q @ k.mT, torch.zeros_like(t == s)
    else:
        scale = case.options.get("scale") or case.q.shape[-1] ** -0.5
        window = case.options.get("window", 0)
        near = s < case.options.get("sinks", 0)
        if window:
            near = near | (t // window - s // window <= 1)
        if case.options.get("cache_size", 0) != 0:
            near = near | held_as_hard_keys(case, scale)
        fk = map_params(case.fk, lambda x: x.repeat_interleave(groups, 0))
        phi_q = reference.feature_map(case.q, case.fq, scale=scale)
        w = phi_q @ reference.feature_map(k, fk, scale=scale).mT
    if case.log_decay is not None:
        decay = case.log_decay.to(dtype)
        if decay.dim() == 1:
            decay = decay[None, :, None].expand(case.k.shape[:3])
        c = decay.repeat_interleave(groups, 1).cumsum(-1)
        w = w * (c[..., :, None] - c[..., None, :]).masked_fill(s > t, 0).exp()
    if not case.given:
        w = torch.where(near, (scale * (case.q @ k.mT)).exp(), w)
    w = w.masked_fill(s > t, 0)
    out = w @ v
    return out / w.sum(-1, keepdim=True) if case.options.get("normalize", True) else out


def held_as_hard_keys(case, scale):
    """(B, H, T, T): whether query t finds key s in a slot."""
    options = {n: case.options.get(n, 0) for n in ("window", "sinks", "cache_size")}
    q, k, v = (x.detach().double() for x in (case.q, case.k, case.v))
    table = reference.choose_hard_keys(q, k, v, scale=scale, **options)
    p = torch.arange(q.shape[2])
    held = []
    for row in reference.hard_key_rows(q, options["window"])[:-1]:
        held.append(reference.held_keys(table[:, row + p // options["window"]], len(p)))
    return torch.stack(held).repeat_interleave(q.shape[1] // k.shape[1], 1)


def clone_state(state):
    return type(state)(*(None if x is None else x.clone() for x in state))


def true_state(state):
    """kv and z without their scale, in float64."""
    scale = torch.exp2(state.log_scale.double())
    return state.kv.double() * scale[..., None], state.z.double() * scale
