"""The attention and mask functions that transformers' AttentionInterface dispatches to.

What a layer must know of the batch travels in the place of the attention mask, made once a forward:

- None: every token of every row is real, one sequence a row;
- int32 (batch, 2): seq_bounds, [begin, end) of the new tokens that are real, by row; where some
  layers keep softmax, (batch, 2 + kv_length), which adds the padding mask of the whole context;
- int32 (N + 1,): cu_seqlens of packed sequences over batch * seqlen tokens;
- int32 (): a mask that linear attention cannot follow. Refused by the layer that is given it, for
  some models make masks (of a sliding window, say) that no layer uses.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .calibration import calibrate_gate
from .modules import AttentionKernel, kernels_of

#: The name convert puts in config._attn_implementation.
NAME = "dijiang"

# Keyword arguments that change what attention computes: (name, what it is).
_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks of its own",
    "sliding_window": "a sliding window of its own",
    "position_bias": "a position bias",
    "alibi": "ALiBi",
    "head_mask": "a head mask",
    "output_attentions": "attention weights as an output",
}


def refused_arguments(kwargs: dict) -> list[str]:
    """What of these keyword arguments asks for more than softmax(q k^T scale) v."""
    return [
        f"{meaning} ({name}={_short(kwargs[name])})"
        for name, meaning in _REFUSED.items()
        if kwargs.get(name) is not None and kwargs[name] is not False
    ]


def dijiang_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs
):
    """query (B, H, T, d), key (B, Hkv, S, d), value (B, Hkv, S, dv) -> (B, T, H, dv), None."""
    asked = refused_arguments(kwargs)
    # Beside a mask, or for one token, False says that nothing is left to hide.
    later = is_causal is False and attention_mask is None and query.shape[2] > 1
    if later or getattr(module, "is_causal", True) is False:
        asked.append("attention to later tokens")
    if asked:
        raise NotImplementedError(
            f"dijiang: {type(module).__name__} asks for {', '.join(asked)}, which linear attention "
            "does not have"
        )
    cu_seqlens, seq_bounds, padding = _unpack(attention_mask)
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_seqlens = kwargs["cu_seq_lens_q"].to(torch.int32)
    kernel: AttentionKernel | None = getattr(module, "dijiang", None)
    if kernel is None:
        call = functools.partial(softmax_attention, dropout=dropout)
    else:
        call = _kernelized
        if dropout:
            warnings.warn(
                f"dijiang: attention dropout ({dropout}) is not applied: linear attention has no "
                "weights to drop. Set the model's attention dropout to 0",
                stacklevel=2,
            )
    if cu_seqlens is None:
        out = call(module, query, key, value, scaling, seq_bounds=seq_bounds, padding=padding)
    else:
        out = _packed(call, module, query, key, value, scaling, cu_seqlens)
    return out.transpose(1, 2).contiguous(), None


def dijiang_mask(
    batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0,
    mask_function=causal_mask_function, attention_mask=None, config=None, use_vmap=False,
    device=None, cache_position=None, **kwargs,
):  # fmt: skip
    """What a layer must know of the batch: see the module's docstring."""
    if q_length is None:  # transformers told the queries' positions before it told their number
        q_length = len(cache_position)
        device = cache_position.device
    if use_vmap:  # a mask function of the model's own on top of the causal one
        return torch.zeros((), dtype=torch.int32, device=device)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(_custom_mask(attention_mask))
    cu_seqlens = None
    if mask_function is not causal_mask_function:
        cu_seqlens = _packed_lengths(mask_function, batch_size, q_length, device)
        if cu_seqlens is None:
            return torch.zeros((), dtype=torch.int32, device=device)
        if len(cu_seqlens) == batch_size + 1:  # one sequence a row: causal after all
            cu_seqlens = None
    if attention_mask is None:
        return cu_seqlens
    if attention_mask.shape[1] < q_length:
        raise ValueError(
            f"dijiang: attention_mask must cover all {kv_length} tokens of the context, got shape "
            f"{tuple(attention_mask.shape)}"
        )
    bounds = padding_bounds(attention_mask[:, -q_length:])
    if config.dijiang.get("layers", "all") == "all":  # at every token: not the whole config
        return bounds
    if bounds is None and bool(attention_mask.all()):
        return None
    if bounds is None:
        bounds = torch.tensor([[0, q_length]], device=attention_mask.device).expand(batch_size, 2)
    padding = attention_mask[:, :kv_length]
    return torch.cat([bounds.to(torch.int32), padding.to(torch.int32)], 1)


def padding_bounds(mask: Tensor) -> Tensor | None:
    """Boolean mask (B, T) -> int32 (B, 2) [begin, end) of each row's ones; None if all are ones.

    >>> padding_bounds(torch.tensor([[0, 1, 1], [1, 1, 0]])).tolist()
    [[1, 3], [0, 2]]
    """
    mask = mask.bool()
    if bool(mask.all()):
        return None
    count = mask.sum(1)
    begin = mask.int().argmax(1)  # the first one; 0 for a row without any
    end = begin + count
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    holes = (count > 0) & (last != end)
    if bool(holes.any()):
        raise ValueError(
            f"dijiang: attention_mask has a hole in row {int(holes.nonzero()[0])}: the ones of a "
            "row must follow each other, with padding left or right of them. Drop the masked "
            "tokens, or pad at an end"
        )
    return torch.stack([begin, end], 1).to(torch.int32)


def softmax_attention(
    module, query, key, value, scaling=None, *, seq_bounds=None, padding=None, dropout=0.0
) -> Tensor:
    """softmax(q k^T scale) v, causal: the teacher, and the layers that keep softmax.

    The last T keys are those of the T queries. ``padding`` (B, S) marks the real keys; where it is
    None, ``seq_bounds`` does (no key before the queries' then).
    """
    T, S = query.shape[2], key.shape[2]
    if padding is None and seq_bounds is not None:
        at = torch.arange(T, device=query.device)
        padding = (at >= seq_bounds[:, :1]) & (at < seq_bounds[:, 1:2])
    mask = None
    if padding is not None or (S > T > 1):
        at = torch.arange(S, device=query.device)
        mask = (at[None, :] <= at[S - T :, None])[None, None]
        if padding is not None:
            own = at[None, :] == at[S - T :, None]  # a padded query sees itself: no row is empty
            mask = mask & (padding.bool()[:, None, None, :] | own)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and T > 1, scale=scaling,
        dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


# ---- what the layers of a model do now ----------------------------------------------------------


@contextlib.contextmanager
def kernel_mode(model, mode: str):
    """Within: every converted layer runs in `mode`.

    - "student": linear attention.
    - "softmax": softmax attention, as its own teacher.
    - "transfer": hands softmax attention's output on, and leaves in ``kernel.loss`` its own
      output's squared error, relative to the mean square of softmax attention's.
    - "calibrate": hands softmax attention's output on, and sets the gate by it.
    - "compare": hands softmax attention's output on, and leaves in ``kernel.loss``, (2, heads), the
      sums of squares of its own output's error and of softmax attention's output, the latter above
      0, so that a head without output has no error. Where ``kernel.compared`` has cache sizes, its
      errors with each of them: (sizes + 1, heads).
    """
    kernels = kernels_of(model)
    for kernel in kernels:
        kernel.mode = mode
    try:
        yield kernels
    finally:
        for kernel in kernels:
            kernel.mode, kernel.loss, kernel.compared = "student", None, ()


def _kernelized(module, query, key, value, scaling, *, seq_bounds=None, padding=None, cu=None):
    kernel: AttentionKernel = module.dijiang
    layer, hidden = kernel.cache_layer, kernel.hidden
    kernel.cache_layer = kernel.hidden = None
    layout = dict(seq_bounds=seq_bounds, cu_seqlens=cu)
    if kernel.mode == "student":
        if cu is not None and hidden is not None:
            hidden = hidden.flatten(0, 1)[None]
        if layer is None:
            return kernel(query, key, value, hidden=hidden, **layout)
        out, state = kernel(
            query, key, value, hidden=hidden, state=layer.state, return_state=True, **layout
        )
        layer.advance(state, query.shape[2])
        return out

    if layer is not None or cu is not None:
        raise ValueError(
            "dijiang: attention transfer needs plain batches, without a cache or packing"
        )
    with torch.no_grad():
        teacher = softmax_attention(module, query, key, value, scaling, seq_bounds=seq_bounds)
        if seq_bounds is not None:
            at = torch.arange(query.shape[2], device=query.device)
            real = (at >= seq_bounds[:, :1]) & (at < seq_bounds[:, 1:])
            teacher = teacher * real[:, None, :, None]
    if kernel.mode == "softmax":
        return teacher
    if kernel.mode == "calibrate":
        calibrate_gate(kernel, query, key, value, teacher, seq_bounds)
        return teacher
    if kernel.mode == "compare":
        own, squares = kernel.config, []
        try:
            for size in kernel.compared or (own.cache_size,):
                kernel.config = own.replace(cache_size=size)
                with torch.no_grad():
                    student = kernel(query, key, value, hidden=hidden, **layout)
                squares.append((student.float() - teacher.float()).square().sum((0, 2, 3)))
        finally:
            kernel.config = own
        size = teacher.float().square().sum((0, 2, 3))
        kernel.loss = torch.stack([*squares, size.clamp_min(torch.finfo(size.dtype).tiny)])
        return teacher
    with torch.enable_grad():
        query, key, value = query.detach(), key.detach(), value.detach()
        hidden = None if hidden is None else hidden.detach()
        student = kernel(query, key, value, hidden=hidden, **layout)
        error = (student.float() - teacher.float()).square().mean()
        kernel.loss = error / teacher.float().square().mean().clamp(min=1e-12)
    return teacher


# ---- layout -------------------------------------------------------------------------------------


def _unpack(mask):
    """What dijiang_mask made -> (cu_seqlens, seq_bounds, padding)."""
    if mask is None:
        return None, None, None
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim > 2:
        raise NotImplementedError(_custom_mask(mask))
    if mask.ndim == 0:
        raise NotImplementedError(
            "dijiang: this model's mask is neither causal nor of packed sequences (a sliding, "
            "chunked or bidirectional one), which linear attention cannot follow"
        )
    if mask.ndim == 1:
        return mask, None, None
    return None, mask[:, :2].contiguous(), mask[:, 2:] if mask.shape[1] > 2 else None


def _custom_mask(mask) -> str:
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return (
        f"dijiang: attention_mask must be a (batch, context) mask of padding, got {shape}: linear "
        "attention has no score matrix to mask"
    )


def _packed_lengths(mask_function, batch_size, length, device) -> Tensor | None:
    """cu_seqlens over batch * length tokens, from a mask function that tells sequences apart.

    None if it does more than that: not every token sees its sequence's first, or one sees others.
    """
    t = torch.arange(length, device=device)[None, :]
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(row)

    def sees(query, key):
        return mask_function(row, head, query, key).expand(batch_size, length)

    starts = ~sees(t, (t - 1).clamp(min=0))
    starts[:, 0] = True
    first = torch.where(starts, t, 0).cummax(1).values  # of each token's own sequence
    later = (t + 1).clamp(max=length - 1)
    before = (first - 1).clamp(min=0)
    others = (sees(t, later) & (later > t)) | (sees(t, before) & (before < first))
    causal = sees(t, first) & ~others
    if not bool(causal.all()):
        return None
    begins = starts.flatten().nonzero()[:, 0]
    return F.pad(begins, (0, 1), value=batch_size * length).to(torch.int32)


def _packed(call, module, query, key, value, scaling, cu_seqlens):
    """Runs packed sequences: all rows as one, or each sequence alone for softmax."""
    batch, _, T, _ = query.shape
    if int(cu_seqlens[-1]) != batch * T or key.shape[2] != T:
        raise ValueError(
            f"dijiang: packed sequences must fill the batch and go without a cache: cu_seqlens "
            f"ends at {int(cu_seqlens[-1])} of {batch} x {T} tokens, with {key.shape[2]} keys"
        )

    def as_one_row(x):
        return x if batch == 1 else x.transpose(0, 1).flatten(1, 2)[None]

    query, key, value = as_one_row(query), as_one_row(key), as_one_row(value)
    if call is _kernelized:
        out = call(module, query, key, value, scaling, cu=cu_seqlens)
    else:
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        out = torch.cat([call(module, *part, scaling) for part in parts], 2)
    return out[0].unflatten(1, (batch, T)).transpose(0, 1)


def _short(value) -> str:
    return f"a {tuple(value.shape)} tensor" if isinstance(value, Tensor) else repr(value)


AttentionInterface.register(NAME, dijiang_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
