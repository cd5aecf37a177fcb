"""Positive feature maps phi with phi(q).phi(k) in the place of exp(q.k)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from ._types import FeatureParams
from .config import FEATURE_MAPS

_KINDS = {"softmax": "softmax", "learned_softmax": "softmax", "elu": "elu"}  # all others: "exp"
_UNBIASED = ("prf", "pff")


class FeatureMap(nn.Module):
    r"""A feature map, one set of parameters a head: ``omega`` built from what is learned.

    With ``x`` the query or key times ``sqrt(scale)``::

        log phi_i(x) = omega_i.x + log D_i - beta |x|^2 - log(m) / 2      i = 1..m

        ====================  ======================================================================
        ``prf``               Gaussian orthogonal directions, beta 1/2 (Performer, arXiv 2009.14794)
        ``pff``, ``wpff``     omega_i = t_i y_i, y on the sphere; the paper's eq. 9; with D, eq. 10
        ``wdcf``              omega_i = t_i (C S)_i, C the DCT-II, S signs; the paper's eq. 12
        ``wdcf_pm``           the same for m / 2 rows, with the features of -x beside those of x
        ``learned``           the m x d matrix itself is learned
        ``learned_pm``        likewise, with the features of -x beside those of x
        ``softmax``           softmax over i of t_i (C^T x)_i / sqrt(scale): the published code's
        ``learned_softmax``   likewise, with a learned m x d matrix in the place of diag(t) C^T
        ``elu``               1 + elu(x) (arXiv 2006.16236)
        ====================  ======================================================================

    Frequencies t_i = F^-1(u_i), F the normal or the chi distribution (``radius``), u stratified or
    i.i.d. (``sampling``). For m > d each further block of d rows has signs of its own. Learned:
    ``log_weight`` = log D (wpff, wdcf, learned), ``frequencies`` t (wpff, wdcf, softmax),
    ``matrix`` (learned, learned_softmax), ``beta`` (wpff, wdcf, learned). Source: arXiv 2403.19928,
    eq. 9 to 12.

    Shapes: x (batch, heads, seqlen, headdim) -> (batch, heads, seqlen, num_features), in the dtype
    of x; parameters are used in float32 (float64 for a float64 x).

    >>> phi = FeatureMap("wdcf", heads=2, headdim=16)
    >>> phi(torch.randn(1, 2, 5, 16)).shape
    torch.Size([1, 2, 5, 16])
    """

    def __init__(
        self, feature_map: str = "wdcf", *, heads: int, headdim: int,
        num_features: int | None = None, radius: str = "normal", random_signs: bool = False,
        sampling: str = "stratified", init: str = "identity", beta: float | str = "auto",
        seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"FeatureMap: feature_map must be one of {', '.join(FEATURE_MAPS)}, "
                f"got {feature_map!r}"
            )
        self.feature_map = feature_map
        self.kind = _KINDS.get(feature_map, "exp")
        self.paired = feature_map.endswith("_pm")
        if num_features is None:
            num_features = headdim + (headdim % 2 if self.paired else 0)
        if self.paired and num_features % 2:
            raise ValueError(
                f"FeatureMap: {feature_map} needs an even num_features, got {num_features}"
            )
        if feature_map == "elu" and num_features != headdim:
            raise ValueError(
                f"FeatureMap: elu has one feature a dimension: num_features must be {headdim} or "
                f"None, got {num_features}"
            )
        self.heads, self.headdim, self.num_features = heads, headdim, num_features

        rng = torch.Generator().manual_seed(seed)
        rows = num_features // 2 if self.paired else num_features
        shape = (heads, rows, headdim)
        weighted = self.kind == "exp" and feature_map not in _UNBIASED
        if feature_map.startswith("learned"):
            if init == "dct":
                t = _frequencies(heads, rows, headdim, radius, sampling, rng)
                signs = _signs(shape, random_signs, rng)
                matrix = t[..., None] * _dct_rows(shape, signs, self.kind == "softmax")
            else:
                matrix = _identity_rows(shape, rng)
            self.matrix = nn.Parameter(matrix.float())  # (heads, rows, headdim)
        elif feature_map == "elu":
            self.register_buffer("directions", torch.eye(headdim).repeat(heads, 1, 1), False)
        elif feature_map.startswith("wdcf") or feature_map == "softmax":
            t = _frequencies(heads, rows, headdim, radius, sampling, rng)
            if feature_map == "softmax":
                t = t * headdim**0.25  # features of the query itself, not of sqrt(scale) times it
            self.frequencies = nn.Parameter(t.float())  # (heads, rows)
            self.register_buffer("signs", _signs(shape, random_signs, rng))  # (heads, blocks, d)
        else:
            directions = _orthogonal_rows if feature_map == "prf" else _sphere_rows
            t = _frequencies(
                heads, rows, headdim, "chi" if feature_map == "prf" else radius, sampling, rng
            )
            self.register_buffer("directions", directions(shape, sampling, rng).float())
            if weighted:
                self.frequencies = nn.Parameter(t.float())
            else:
                self.register_buffer("frequencies", t.float())
        self.log_weight = nn.Parameter(torch.zeros(heads, num_features)) if weighted else None

        self.register_load_state_dict_post_hook(_set_transforms)
        _set_transforms(self)

        if beta == "auto":
            beta = 0.5 if feature_map in _UNBIASED else 0.0
        values = torch.full((heads,), float(beta)) if self.kind == "exp" else None
        if weighted:
            self.beta = nn.Parameter(values)  # (heads,)
        else:
            self.register_buffer("beta", values)

    def extra_repr(self) -> str:
        return (
            f"{self.feature_map!r}, heads={self.heads}, headdim={self.headdim}, "
            f"num_features={self.num_features}"
        )

    def omega(self) -> Tensor:
        """(heads, num_features, headdim), differentiable in what is learned."""
        if self.feature_map.startswith("learned"):
            rows = self.matrix
            if self.kind == "softmax":  # as for frequencies, but the matrix stays as published
                rows = rows * self.headdim**0.25
        elif self.feature_map == "elu":
            return self.directions
        elif self.feature_map.startswith("wdcf") or self.feature_map == "softmax":
            shape = (*self.frequencies.shape, self.headdim)
            # The published map is x C diag(t): column i of C, which is DCT-III.
            dct = _dct_rows(shape, self.signs, transpose=self.feature_map == "softmax")
            rows = self.frequencies[..., None] * dct
        else:
            rows = self.frequencies[..., None] * self.directions
        return torch.cat([rows, -rows], 1) if self.paired else rows

    def params(self, repeats: int = 1, dtype: torch.dtype = torch.float32) -> FeatureParams:
        """What the operators take; each head's row serves `repeats` heads in a row (the query heads
        of a kv head)."""
        log_weight, beta = self.log_weight, self.beta
        if self._transforms and self.frequencies.device.type == "cpu":
            t = self.frequencies
            omega = torch.cat([t, -t], 1) if self.paired else t
        else:
            omega = self.omega()
        if self.kind == "exp":
            # phi.phi is then a mean over the features, an estimate of exp(q.k).
            shift = -0.5 * math.log(self.num_features)
            if log_weight is None:
                log_weight = omega.new_full((self.heads, self.num_features), shift)
            else:
                log_weight = log_weight + shift
        parts = [None if x is None else x.to(dtype) for x in (omega, log_weight, beta)]
        return shared_by(FeatureParams(*parts, self.kind), repeats)

    def repeated(self, repeats: int) -> FeatureMap:
        """A new map that starts equal, each head's parameters `repeats` times."""
        new = FeatureMap(
            self.feature_map, heads=self.heads * repeats, headdim=self.headdim,
            num_features=self.num_features,
        )  # fmt: skip
        new.load_state_dict(
            {name: x.repeat_interleave(repeats, 0) for name, x in self.state_dict().items()}
        )
        return new

    def forward(self, x: Tensor, *, scale: float = 1.0, log: bool = False) -> Tensor:
        """phi(sqrt(scale) x), or its logarithm."""
        from . import ops

        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return ops.feature_map(x, self.params(dtype=dtype), scale=scale, log=log)


def shared_by(params: FeatureParams, heads: int) -> FeatureParams:
    """The same for `heads` neighbouring heads a row; the CPU reads one omega for all of them."""
    if heads == 1:
        return params
    omega, *rest = params[:3]
    if omega.device.type != "cpu":
        omega = omega.repeat_interleave(heads, 0)
    rest = (None if x is None else x.repeat_interleave(heads, 0) for x in rest)
    return FeatureParams(omega, *rest, params.kind)


def _set_transforms(map: FeatureMap, _=None) -> None:
    """Notes whether feature i is plainly row i mod d of the DCT: the CPU then transforms."""
    map._transforms = (
        map.feature_map.startswith("wdcf")
        and (not map.paired or map.frequencies.shape[1] % map.headdim == 0)
        and not map.signs.is_meta
        and bool((map.signs == 1).all())
    )


def dct_matrix(n: int, device=None) -> Tensor:
    """The orthonormal DCT-II matrix C (n, n) in float64: dct(x) = C x."""
    j = torch.arange(n, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / (2 * n) * (2 * j[None, :] + 1) * j[:, None]) * math.sqrt(2 / n)
    matrix[:1] *= math.sqrt(0.5)
    return matrix


@functools.lru_cache(maxsize=16)
def _cached_dct_matrix(n: int, device, dtype) -> Tensor:
    return dct_matrix(n, device).to(dtype)


# ---- directions: (heads, rows, headdim), float64 ------------------------------------------------


def _signs(shape, random: bool, rng) -> Tensor:
    heads, rows, d = shape
    blocks = -(-rows // d)
    if not random:
        return torch.ones(heads, blocks, d)
    return torch.randint(0, 2, (heads, blocks, d), generator=rng) * 2.0 - 1.0


def _dct_rows(shape, signs: Tensor, transpose: bool = False) -> Tensor:
    """Rows of C S, one block of d after another, in the dtype of signs."""
    _, rows, d = shape
    matrix = _cached_dct_matrix(d, signs.device, signs.dtype)
    matrix = matrix.T if transpose else matrix
    return (matrix * signs[:, :, None, :]).flatten(1, 2)[:, :rows]


def _identity_rows(shape, rng) -> Tensor:
    """The identity, then DCT blocks with random signs: equal rows would stay equal for ever."""
    heads, rows, d = shape
    blocks = _dct_rows((heads, -(-rows // d) * d, d), _signs(shape, True, rng).double())
    blocks[:, :d] = torch.eye(d)
    return blocks[:, :rows]


def _orthogonal_rows(shape, sampling, rng) -> Tensor:
    """Blocks of d orthonormal rows, uniformly distributed."""
    heads, rows, d = shape
    gaussian = torch.randn(heads, -(-rows // d), d, d, dtype=torch.float64, generator=rng)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT.flatten(1, 2)[:, :rows]


def _sphere_rows(shape, sampling, rng) -> Tensor:
    """Unit vectors: independent, or from a scrambled low-discrepancy sequence."""
    heads, rows, d = shape
    if sampling == "iid":
        points = torch.randn(shape, dtype=torch.float64, generator=rng)
    else:
        seeds = torch.randint(0, 2**31, (heads,), generator=rng).tolist()
        sobol = [torch.quasirandom.SobolEngine(d, scramble=True, seed=seed) for seed in seeds]
        uniform = torch.stack([engine.draw(rows, dtype=torch.float64) for engine in sobol])
        points = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return points / points.norm(dim=-1, keepdim=True)


# ---- frequencies --------------------------------------------------------------------------------


def _frequencies(heads, rows, d, radius, sampling, rng) -> Tensor:
    """t = F^-1(u), (heads, rows)."""
    if sampling == "iid":
        u = torch.rand(heads, rows, dtype=torch.float64, generator=rng).clamp(1e-12, 1 - 1e-12)
    else:
        order = torch.stack([torch.randperm(rows, generator=rng) for _ in range(heads)])
        u = (order + 0.5).double() / rows
    return torch.special.ndtri(u) if radius == "normal" else _chi_quantile(u, d)


def _chi_quantile(u: Tensor, d: int) -> Tensor:
    """Inverse of P(d/2, r^2/2), the chi distribution function with d degrees of freedom."""
    shape = torch.full_like(u, d / 2)
    low, high = torch.zeros_like(u), torch.full_like(u, math.sqrt(d) + 12)
    for _ in range(60):  # bisection to the last bit of float64
        middle = (low + high) / 2
        below = torch.special.gammainc(shape, middle**2 / 2) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
