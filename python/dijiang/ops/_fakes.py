"""Shapes and dtypes of every operator's results, for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch.library import register_fake

from .._types import acc_dtype, cache_sizes, hard_key_row, slots_shape, votes_shape


@register_fake("dijiang::dct")
def _(x, type):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("dijiang::feature_map_fwd")
def _(x, omega, log_weight, beta, kind, scale, log):
    return x.new_empty(*x.shape[:3], omega.shape[1])


@register_fake("dijiang::feature_map_bwd")
def _(grad_out, x, out, omega, log_weight, beta, kind, scale, log):
    return x.new_empty(x.shape), *_grads_of(omega, log_weight, beta)


@register_fake("dijiang::linear_attention_fwd")
def _(q, k, v, log_decay, segments, kv, z, log_scale, normalize, eps, return_state):
    return *_rows(q, v), *_far_state(q, k, v, q.shape[3], segments, return_state)


@register_fake("dijiang::linear_attention_bwd")
def _(
    grad_out, q, k, v, log_decay, segments, kv, z, log_scale, out, row_scale, row_sum,
    grad_final_kv, grad_final_z, final_kv, final_z, final_log_scale, normalize, eps, grad_initial,
):  # fmt: skip
    return *_qkv_grads(q, k, v), *_decay_and_state_grads(q, log_decay, kv, z, grad_initial)


@register_fake("dijiang::linear_attention_update")
def _(q, k, v, log_decay, kv, z, log_scale, normalize, eps):
    return q.new_empty(*q.shape[:3], v.shape[3])


@register_fake("dijiang::kernelized_attention_fwd")
def _(
    q, k, v, q_omega, q_log_weight, q_beta, k_omega, k_log_weight, k_beta, log_decay, segments,
    kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v, length, cache_k, cache_v,
    cache_position, cache_decay, cache_votes, cache_sums, hard_keys, kind, scale, window, sinks,
    cache_size, normalize, eps, return_state,
):  # fmt: skip
    acc, heads = acc_dtype(q.dtype), k.shape[1]
    num_features = 0 if k_omega is None else k_omega.shape[1]
    n = _num_seqs(q, segments) if return_state else 0
    return (
        *_rows(q, v),
        *_far_state(q, k, v, num_features, segments, return_state),
        q.new_empty(n, heads, 2 * window, q.shape[3]),
        q.new_empty(n, heads, 2 * window, v.shape[3]),
        q.new_empty(n, heads, 0 if log_decay is None else 2 * window, dtype=acc),
        q.new_empty(n, heads, sinks, q.shape[3]),
        q.new_empty(n, heads, sinks, v.shape[3]),
        q.new_empty(n if window or sinks else 0, dtype=torch.int64),
        *_hard_key_state(q, k, v, log_decay, n, window, cache_size),
        _chosen(q, k, segments, hard_keys, window, cache_size),
    )


@register_fake("dijiang::kernelized_attention_bwd")
def _(
    grad_out, q, k, v, q_omega, q_log_weight, q_beta, k_omega, k_log_weight, k_beta, log_decay,
    segments, kv, z, log_scale, window_k, window_v, window_decay, sink_k, sink_v, length, cache_k,
    cache_v, cache_position, cache_decay, cache_votes, cache_sums, hard_keys, out, row_scale,
    row_sum, grad_final_kv, grad_final_z, final_kv, final_z, final_log_scale, kind, scale, window,
    sinks, cache_size, normalize, eps, grad_params, grad_initial,
):  # fmt: skip
    params = (q_omega, q_log_weight, q_beta, k_omega, k_log_weight, k_beta)
    if not grad_params:
        params = (None,) * 6
    params_like = q.new_empty(0, dtype=acc_dtype(q.dtype))
    return (
        *_qkv_grads(q, k, v),
        *(params_like.new_empty(0 if p is None else p.shape) for p in params),
        *_decay_and_state_grads(q, log_decay, kv, z, grad_initial),
    )


@register_fake("dijiang::kernelized_attention_update")
def _(
    q, k, v, q_omega, q_log_weight, q_beta, k_omega, k_log_weight, k_beta, log_decay, kv, z,
    log_scale, window_k, window_v, window_decay, sink_k, sink_v, length, cache_k, cache_v,
    cache_position, cache_decay, cache_votes, cache_sums, kind, scale, window, sinks, cache_size,
    normalize, eps,
):  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


def _num_seqs(q, segments):
    return q.shape[0] if segments is None else segments.shape[0]


def _rows(q, v):
    row = q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), row, torch.empty_like(row)


def _far_state(q, k, v, num_features, segments, return_state):
    n = _num_seqs(q, segments) if return_state else 0
    z = q.new_empty(n, k.shape[1], num_features, dtype=acc_dtype(q.dtype))
    return z.new_empty(*z.shape, v.shape[3]), z, torch.empty_like(z)


def _hard_key_state(q, k, v, log_decay, n, window, cache_size):
    acc, heads, sizes = acc_dtype(q.dtype), k.shape[1], cache_sizes(cache_size)
    slots = slots_shape(sizes, heads)
    cached = n if max(sizes) else 0
    return (
        q.new_empty(n, *slots, q.shape[3]),
        q.new_empty(n, *slots, v.shape[3]),
        q.new_empty(n, *slots, dtype=torch.int64),
        q.new_empty(0 if log_decay is None else n, *slots, dtype=acc),
        q.new_empty(cached, *votes_shape(sizes, heads, window), dtype=acc),
        q.new_empty(cached, heads, q.shape[3] + v.shape[3], dtype=acc),
    )


def _chosen(q, k, segments, given, window, cache_size):
    most = max(cache_size)
    if most and given is not None:
        return q.new_empty(0, dtype=torch.int32)
    rows = 0
    if most:
        rows = hard_key_row(q.shape[0] * q.shape[2], window, _num_seqs(q, segments))
    return q.new_empty(k.shape[1], rows, most, dtype=torch.int32)


def _grads_of(*params):
    """Like the parameters; no elements where there is none."""
    like = next(p for p in params if p is not None)
    return tuple(like.new_empty(0) if p is None else like.new_empty(p.shape) for p in params)


def _qkv_grads(q, k, v):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _decay_and_state_grads(q, log_decay, kv, z, grad_initial):
    acc = acc_dtype(q.dtype)
    shapes = (
        (0,) if log_decay is None else log_decay.shape,
        kv.shape if grad_initial else (0,),
        z.shape if grad_initial else (0,),
    )
    return tuple(q.new_empty(shape, dtype=acc) for shape in shapes)
