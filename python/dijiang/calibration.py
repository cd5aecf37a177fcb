"""How much the far keys weigh at the start, chosen a head by softmax attention's own output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .modules import CLOSED, AttentionKernel
from .reference import held_keys


@torch.no_grad()
def calibrate_gate(
    kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, teacher: Tensor,
    seq_bounds: Tensor | None = None,
) -> None:  # fmt: skip
    """Adds this batch to what is known of each head's best gate, and sets it.

    With g the gate, a head's output mixes its near and far parts: ``out = near + p (far - near)``,
    ``p = sigmoid(L_far + g - L_near)``, L the logarithm of a part's sum of weights. Every g of a
    grid around the one that gives the far part softmax attention's own mass is tried, and closing
    it: the least squared error against ``teacher`` (B, H, T, dv) wins, so that no head starts worse
    than with window and sinks alone. Of a sequence's queries, at most QUERIES are looked at.
    """
    if kernel.gate is None:
        return
    totals = kernel.calibration
    for row in range(query.shape[0]):
        begin, end = (0, query.shape[2]) if seq_bounds is None else seq_bounds[row].tolist()
        part = slice(begin, end)
        one = _row_errors(
            kernel, query[row, :, part].float(), key[row, :, part].float(),
            value[row, :, part].float(), teacher[row, :, part].float(), totals,
        )  # fmt: skip
        if one is None:
            continue
        centre, errors = one
        totals = (centre, errors) if totals is None else (centre, totals[1] + errors)
    if totals is None:
        return
    kernel.calibration = totals
    centre, errors = totals
    best = errors.argmin(0)  # (heads,)
    gates = centre[None, :] + _SHIFTS.to(centre)[:, None]
    gates = torch.cat([gates, torch.full_like(gates[:1], CLOSED)])
    kernel.gate.copy_(gates.gather(0, best[None])[0])


_SHIFTS = torch.arange(-6.0, 3.01, 0.5)

#: Queries of a sequence that have a say: evenly spread, so that the cost is linear in its length.
QUERIES = 256


def _row_errors(kernel, q, k, v, teacher, totals):
    """One sequence, q (H, T, d): (centre of the grid (H,), squared errors (shifts + 1, H))."""
    window, sinks = kernel.config.window, kernel.config.sinks
    T = q.shape[1]
    t = torch.arange(T, device=q.device)
    # The first key after the sinks is the first to be far.
    t = t[t // window - sinks // window > 1] if window else t[sinks:]
    if not len(t):
        return None
    t = t[:: math.ceil(len(t) / QUERIES), None]
    s = torch.arange(T, device=q.device)[None, :]
    near = s < sinks
    if window:
        near = near | (t // window - s // window <= 1)
    if kernel.config.cache_size:
        near = near | _held(kernel, q, k, v, t[:, 0])
    near, far = near & (s <= t), ~near & (s <= t)
    q, teacher = q[:, t[:, 0]], teacher[:, t[:, 0]]

    fq, fk = kernel.feature_params()
    fq = fq._replace(log_weight=fq.log_weight - kernel.gate.float()[:, None])
    log_q = ops.feature_map(q[None], fq, scale=kernel.scale, log=True)[0]
    log_k = ops.feature_map(k[None], fk, scale=kernel.scale, log=True)[0]
    log_k, k, v = (x.repeat_interleave(kernel.groups, 0) for x in (log_k, k, v))

    scores = kernel.scale * (q @ k.mT)
    weights_near = scores.masked_fill(~near, -torch.inf)
    mass_near = weights_near.logsumexp(-1)
    out_near = weights_near.softmax(-1) @ v
    mass_teacher = scores.masked_fill(~far, -torch.inf).logsumexp(-1)

    max_q, max_k = log_q.amax(-1, keepdim=True), log_k.amax((-2, -1), keepdim=True)
    weights = ((log_q - max_q).exp() @ (log_k - max_k).exp().mT) * far
    total = weights.sum(-1, keepdim=True)
    out_far = weights @ v / total.clamp(min=1e-30)
    mass_far = (total.clamp(min=1e-30).log() + max_q + max_k)[..., 0]
    if kernel.config.cache_size:  # not all keys beyond the window are far, perhaps none
        none = ~far.any(-1)
        mass_teacher, mass_far = (x.masked_fill(none, -1e9) for x in (mass_teacher, mass_far))

    if totals is None:
        share = torch.sigmoid(mass_teacher - mass_near)  # of softmax attention on far keys
        centre = ((mass_teacher - mass_far) * share).sum(1) / share.sum(1).clamp(min=1e-9)
    else:
        centre = totals[0]  # the same grid for every batch, so that errors add up
    # |error + p step|^2 is a parabola in p: three numbers a query serve the whole grid.
    error, step = out_near - teacher, out_far - out_near
    closed, slope, bend = (error**2).sum(-1), (error * step).sum(-1), (step**2).sum(-1)
    log_odds = mass_far + centre[:, None] - mass_near
    p = torch.sigmoid(log_odds + _SHIFTS.to(log_odds)[:, None, None])  # (shifts, H, queries)
    errors = (closed + p * (2 * slope + p * bend)).sum(-1)
    return centre, torch.cat([errors, closed.sum(-1)[None]])


def _held(kernel, q, k, v, t):
    """(H, queries, T): the hard keys that queries t of one sequence see."""
    slots = kernel.hard_keys(q[None], k[None], v[None])[:, t // kernel.config.window]
    return held_keys(slots, k.shape[1]).repeat_interleave(kernel.groups, 0)
