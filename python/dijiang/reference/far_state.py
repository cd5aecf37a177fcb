"""The state of the far keys: what folds into it and what is read."""

from __future__ import annotations

import math

import torch

from .._types import EMPTY_LOG_SCALE
from .features import log_features
from .sequences import divide

LOG2E = math.log2(math.e)


def empty_far(num_seqs, kv_heads, num_features, dv, acc, device):
    z = torch.zeros(num_seqs, kv_heads, num_features, dtype=acc, device=device)
    return z[..., None].repeat(1, 1, 1, dv), z, torch.full_like(z, EMPTY_LOG_SCALE)


def exponent_of(x):
    """Whole e with |x| <= 2^e, far below every other where x is 0."""
    x = x.detach()
    return torch.where(x == 0, EMPTY_LOG_SCALE, torch.frexp(x)[1].to(x.dtype))


def mantissa_of(x):
    return x * torch.exp2(-exponent_of(x).clamp(min=-1000))


def decay_far(far, log_decay):
    kv, z, log_scale = far
    if log_decay is None:
        return far
    d = LOG2E * log_decay[:, None]
    # Whichever whole number keeps z near 1, so that neither end of the range is ever reached.
    whole = torch.where(z < 1, d.floor(), d.ceil()).detach()
    rest = torch.exp2(d - whole)
    return kv * rest[..., None], z * rest, log_scale + whole


def fold(far, factor, exponent, value, log_decay):
    """Decays the state, then adds the key whose features are factor * 2^exponent."""
    kv, z, old = decay_far(far, log_decay)
    new = torch.maximum(old, exponent.detach().ceil())
    rescale, phi = torch.exp2(old - new), factor * torch.exp2(exponent - new)
    return kv * rescale[..., None] + phi[..., None] * value[:, None, :], z * rescale + phi, new


def fold_exponent(far, exponent, value, log_decay, is_sink):
    if is_sink:
        return decay_far(far, log_decay)
    return fold(far, torch.ones_like(exponent), exponent, value.to(exponent.dtype), log_decay)


def fold_key(far, key, value, log_decay, fk, scale, is_sink):
    acc = far[0].dtype
    exponent = far[1][..., :0]
    if fk is not None:
        exponent = log_features(key[:, None].to(acc), fk, scale)[:, 0] * LOG2E
    return fold_exponent(far, exponent, value, log_decay, is_sink)


def read(far, factor, exponent, scores, values, normalize, eps):
    """Output for features factor 2^exponent (Hkv, G, m) and near scores (Hkv, G, S), base 2."""
    kv, z, log_scale = far
    exponent = exponent + log_scale[:, None]
    if normalize:
        terms = torch.cat([exponent, scores], -1).detach()
        floor = math.log2(eps) if eps else EMPTY_LOG_SCALE
        row_max = torch.nn.functional.pad(terms, (0, 1), value=floor).amax(-1, keepdim=True)
    else:
        row_max = scores.new_zeros(())
    f, near = factor * torch.exp2(exponent - row_max), torch.exp2(scores - row_max)
    num = f @ kv + near @ values
    if not normalize:
        return num
    den = (f @ z[..., None]) + near.sum(-1, keepdim=True)
    return divide(num, den + eps * torch.exp2(-row_max) if eps else den)
