"""Turns a pretrained causal language model's attention linear, in place, and back."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import find_packed_sequence_indices

from ._types import cache_sizes
from .attention import (
    NAME,
    dijiang_mask,
    kernel_mode,
    refused_arguments,
    softmax_attention,
)
from .cache import DiJiangCache
from .config import DiJiangConfig
from .evaluate import summed_loss
from .modules import CLOSED, AttentionKernel, kernels_of

_PROBE = "dijiang_probe"


class ConversionError(ValueError):
    """This model cannot be converted; the message says why. Nothing was changed."""


def convert(
    model: PreTrainedModel, config: DiJiangConfig | None = None, *, calibration=None,
    spread: bool = True, progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Replaces softmax attention by linear attention, in place; returns the model.

    Works on every causal language model of transformers that dispatches through
    AttentionInterface. Parameter names of the base model stay; new parameters hang under each
    attention module as ``self_attn.dijiang.*``, in float32.

    With a window or sinks the far keys start closed: the model is exactly that of its near and hard
    keys. Give ``calibration`` to have the hard keys in the layers that need them
    (spread_hard_keys), and far keys whose share of the attention follows the softmax's, head by
    head, where that is better than leaving them closed (calibrate).
    ``model.dijiang_start`` says in words what the model started from.

    Args:
        model: a transformers causal language model.
        config: what to convert to; None: the defaults of DiJiangConfig.
        calibration: token ids to calibrate on: a tensor (batch, seqlen), or a list of lists; 4,096
            tokens are enough, in rows at least half as long as the contexts it will serve.
        spread: False: as many hard keys for each head. So it is, too, where ``config.per_layer``
            has cache sizes of its own.
        progress: called with (forwards done, forwards in all) while the hard keys are spread, the
            longest part.

    Raises:
        ValueError: the calibration's rows are too short to have far keys.
        ConversionError: the model is converted already, its class does not dispatch through
            AttentionInterface, or its attention does more than softmax(q k^T scale) v. The model is
            unchanged.

    Source: arXiv 2403.19928.

    >>> model = dijiang.convert(model)                                         # doctest: +SKIP
    >>> model.generate(ids, max_new_tokens=200)                                # doctest: +SKIP
    """
    config = DiJiangConfig() if config is None else config
    if not isinstance(config, DiJiangConfig):
        raise TypeError(f"convert: config must be a DiJiangConfig, got {type(config).__name__}")
    sized = any("cache_size" in own for own in config.per_layer.values())
    sized = sized or not isinstance(config.cache_size, int)
    if calibration is not None and spread and config.cache_size and not sized:
        from .allocation import spread_hard_keys  # here: it converts by this very function

        config = spread_hard_keys(model, calibration, config, progress=progress)
    calls = _probe(model)
    named = {"layers": () if config.layers == "all" else config.layers}
    named["per_layer"] = tuple(config.per_layer)
    for name, layers in named.items():
        if layers and layers[-1] >= len(calls):
            raise ConversionError(
                f"convert: {name} names layer {layers[-1]}, but the model's last is "
                f"{len(calls) - 1}"
            )
    # Everything that may be refused is made before anything is changed.
    kernels = [
        _kernel(call, config.at(layer), model.config.hidden_size)
        for layer, call in enumerate(calls)
        if config.converts(layer)
    ]
    converted = [call for layer, call in enumerate(calls) if config.converts(layer)]

    handles = []
    for call, kernel in zip(converted, kernels, strict=True):
        call.module.add_module(NAME, kernel)
        hook = call.module.register_forward_pre_hook(_before_attention, with_kwargs=True)
        handles.append(hook)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            handles.append(module.register_forward_pre_hook(_before_model, with_kwargs=True))
    model._dijiang_handles = handles
    model._dijiang_softmax = model.config._attn_implementation
    model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)
    model.config.dijiang = config.to_dict()
    _set_attention(model, NAME)

    model.dijiang_start = _start([kernel.config for kernel in kernels])
    if calibration is not None:
        try:
            calibrate(model, calibration)
        except BaseException:
            restore(model)
            raise
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Puts softmax attention back, in place, and drops all that convert added.

    The weights of the base model are left as they are: if they were not trained since convert, the
    model is bit for bit what it was.
    """
    check_converted(model, "restore")
    for handle in model._dijiang_handles:
        handle.remove()
    for module in list(model.modules()):
        if isinstance(getattr(module, NAME, None), AttentionKernel):
            delattr(module, NAME)
    _set_attention(model, model._dijiang_softmax)
    del model.config.dijiang, model._dijiang_handles, model._dijiang_softmax
    del model._prepare_cache_for_generation, model.dijiang_start
    return model


def calibrate(
    model: PreTrainedModel, ids, *, batch_size: int = 1, choose: bool = True
) -> PreTrainedModel:
    """Chooses each head's far gate by softmax attention's output on these tokens.

    A head's gate is the one of a grid with the least squared error of its output, closed being one
    of them (calibration.calibrate_gate). Errors of heads may still add up: with ``choose`` the
    gates as found, one, two and three lower, and all closed are compared by the model's loss on
    these tokens, and the best is kept, so that the model does not start worse than its window and
    sinks. Give rows as long as the contexts it will serve: gates found on short ones let the far
    keys of long ones weigh too much.
    """
    check_converted(model, "calibrate")
    ids = as_batch(ids, "calibrate").to(model.device)
    kernels = [kernel for kernel in kernels_of(model) if kernel.gate is not None]
    if not kernels:
        return model
    window = max(kernel.config.window for kernel in kernels)
    sinks = max(kernel.config.sinks for kernel in kernels)
    if ids.shape[1] <= max(2 * window, sinks):
        raise ValueError(
            f"calibrate: rows of {ids.shape[1]} tokens have no far keys with window={window} and "
            f"sinks={sinks}. Give rows of at least {4 * max(window, sinks)} tokens"
        )
    training = model.training
    model.eval()
    with kernel_mode(model, "calibrate"), torch.no_grad():
        for kernel in kernels:
            kernel.calibration = None
        for rows in ids.split(batch_size):
            model(input_ids=rows, use_cache=False, **only_last_logits(model))
    for kernel in kernels:
        kernel.calibration = None
    if choose:
        _choose_gates(model, kernels, ids, batch_size)
    model.train(training)
    heads = sum(kernel.heads for kernel in kernels)
    opened = sum(int((kernel.gate > CLOSED / 2).sum()) for kernel in kernels)
    exact = _exact_keys([kernel.config for kernel in kernels_of(model)])
    model.dijiang_start = (
        f"{exact}, and far keys calibrated on {ids.numel()} tokens: {opened} of {heads} heads open"
    )
    return model


@torch.no_grad()
def _choose_gates(model, kernels, ids: Tensor, batch_size: int) -> None:
    """Keeps the shift of all gates with the least loss on ids."""
    found = [kernel.gate.clone() for kernel in kernels]
    shifts = (0.0, -1.0, -2.0, -3.0, CLOSED)

    def shift_gates(shift):
        for kernel, gate in zip(kernels, found, strict=True):
            kernel.gate.copy_((gate + shift).clamp(min=CLOSED))

    losses = []
    for shift in shifts:
        shift_gates(shift)
        total = 0.0
        for rows in ids.split(batch_size):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            total += sum(map(summed_loss, logits, rows[:, 1:]))
        losses.append(total)
    shift_gates(shifts[losses.index(min(losses))])


@contextlib.contextmanager
def softmax_mode(model: PreTrainedModel):
    """Within: the converted model attends by softmax, as its own teacher."""
    check_converted(model, "softmax_mode")
    _set_attention(model, model._dijiang_softmax)
    try:
        yield model
    finally:
        _set_attention(model, NAME)


def is_converted(model) -> bool:
    """Whether convert was called on this model (and restore was not)."""
    return hasattr(model, "_dijiang_handles")


def only_last_logits(model) -> dict:
    """Arguments that spare a forward the logits, where the model can."""
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if accepts else {}


# ---- what the model does ------------------------------------------------------------------------


@dataclass
class _Call:
    """One attention module's call of the attention function."""

    name: str
    module: torch.nn.Module
    heads: int
    kv_heads: int
    headdim: int
    headdim_v: int
    scale: float


def _probe(model) -> list[_Call]:
    """Runs eight tokens through softmax of our own and finds what the model asks of attention."""
    _check_convertible(model)
    name = type(model).__name__
    names = {id(module): path for path, module in model.named_modules()}
    calls: dict[int, _Call] = {}
    reasons: list[str] = []

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        path = names.get(id(module), type(module).__name__)
        asked = refused_arguments(kwargs)
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            asked.append("attention to later tokens")
        if query.shape[2] != key.shape[2]:
            asked.append("cross attention")
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            asked.append("no layer_idx to find its cache by")
        elif layer in calls:
            asked.append("a second call of attention in the same layer")
        if attention_mask is not None:
            asked.append("a mask that is not causal")
        reasons.extend(f"{path} has {reason}" for reason in asked)
        if not asked:
            calls[layer] = _Call(
                path, module, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1],
                query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            )  # fmt: skip
        out = softmax_attention(module, query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_PROBE, attend)
    AttentionMaskInterface.register(_PROBE, dijiang_mask)
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.vocab_size
    before, training = model.config._attn_implementation, model.training
    try:
        model.eval()
        with torch.no_grad():
            theirs = model(input_ids=ids, use_cache=False).logits
            _set_attention(model, _PROBE)
            ours = model(input_ids=ids, use_cache=False).logits
    finally:
        _set_attention(model, before)
        model.train(training)
    if reasons:
        raise ConversionError(f"convert: {name} cannot be converted: {reasons[0]}")
    layers = model.config.num_hidden_layers
    if sorted(calls) != list(range(layers)):
        raise ConversionError(
            f"convert: {name} cannot be converted: {len(calls)} of its {layers} layers dispatch "
            "through transformers' AttentionInterface"
        )
    # A difference that rounding does not explain: the attention is more than softmax(q k^T s) v.
    tolerance = 200 * torch.finfo(theirs.dtype).eps * theirs.abs().max().clamp(min=1)
    if not bool(((ours - theirs).abs() <= tolerance).all()):
        raise ConversionError(
            f"convert: {name} cannot be converted: its attention is more than "
            f"softmax(q k^T scale) v (logits differ by {float((ours - theirs).abs().max()):.2g})"
        )
    return [calls[layer] for layer in range(layers)]


def _check_convertible(model) -> None:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ConversionError(
            f"convert: expected a transformers causal language model (AutoModelForCausalLM), got "
            f"{type(model).__name__}"
        )
    name = type(model).__name__
    if is_converted(model):
        raise ConversionError(
            f"convert: this {name} is converted already. Call dijiang.restore(model) first"
        )
    if hasattr(model.config, "dijiang"):
        raise ConversionError(
            f"convert: this {name}'s config is a converted model's, but its kernels are missing: "
            "load it with dijiang.from_pretrained"
        )
    config = model.config
    reason = None
    if config.is_encoder_decoder:
        reason = "it has an encoder and cross attention"
    elif config.get_text_config() is not config:
        reason = "it has more than one model inside. Convert its language model alone"
    elif not model._can_set_attn_implementation():
        reason = "its attention does not dispatch through transformers' AttentionInterface"
    else:
        layer_types = getattr(config, "layer_types", None) or ()
        kinds = set(layer_types) - {"full_attention"}
        window = None if layer_types else getattr(config, "sliding_window", None)
        if kinds:
            reason = f"it has layers of other kinds: {', '.join(sorted(kinds))}"
        elif window and getattr(config, "use_sliding_window", True):
            reason = (
                f"its layers attend a sliding window of {window} tokens. "
                "model.config.sliding_window = None before convert makes them attend to all"
            )
    if reason:
        raise ConversionError(f"convert: {name} cannot be converted: {reason}")


def _start(configs: list[DiJiangConfig]) -> str:
    """What a model of these layers starts from, in words."""
    if not all(config.has_near for config in configs):
        return "far keys alone, untrained features: expect little before distill"
    exact = _exact_keys(configs)
    if not any(config.has_far for config in configs):
        return f"{exact} alone: there are no far keys"
    gates = sorted({config.gate for config in configs if config.gate != "auto"})
    if gates:
        return f"{exact}, and far keys of log-weight {', '.join(f'{g:g}' for g in gates)}"
    return f"{exact} alone: the far keys are closed until calibrate or distill"


def _exact_keys(configs: list[DiJiangConfig]) -> str:
    sizes = [size for config in configs for size in cache_sizes(config.cache_size)]
    least, most = min(sizes), max(sizes)
    if not most:
        return "window and sinks"
    return f"window, sinks and {most if least == most else f'{least} to {most}'} hard keys"


def _kernel(call: _Call, config: DiJiangConfig, hidden_size: int) -> AttentionKernel:
    kernel = AttentionKernel(
        config, heads=call.heads, kv_heads=call.kv_heads, headdim=call.headdim,
        headdim_v=call.headdim_v, hidden_size=hidden_size, scale=call.scale,
        seed=config.seed + 1000003 * call.module.layer_idx,
    )  # fmt: skip
    return kernel.to(next(call.module.parameters()).device)


# ---- hooks: module-level functions, so that a model can be copied and pickled --------------------


def _before_attention(module, args, kwargs):
    """Tells the attention function the cache and the hidden states, which it is not given."""
    if module.config._attn_implementation != NAME:  # softmax_mode: nobody would take them again
        return
    kernel = module.dijiang
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    kernel.cache_layer = None if cache is None else cache.layers[module.layer_idx]
    if kernel.config.decay == "token" or kernel.config.output_gate:
        kernel.hidden = kwargs.get("hidden_states", args[0] if args else None)


def _before_model(model, args, kwargs):
    """Makes the cache a DiJiangCache, or none where it would go unused."""
    if model.config._attn_implementation != NAME:
        return None
    cache = kwargs.get("past_key_values")
    if isinstance(cache, DiJiangCache) or any(isinstance(x, DiJiangCache) for x in args):
        return None
    if cache is not None:
        raise TypeError(
            f"dijiang: past_key_values must be a DiJiangCache or None, got "
            f"{type(cache).__name__}. dijiang.DiJiangCache(model.config) makes one"
        )
    use_cache = kwargs.get("use_cache")
    positions = kwargs.get("position_ids")
    packed = (
        positions is not None
        and positions.ndim == 2
        and kwargs.get("attention_mask") is None
        and find_packed_sequence_indices(positions) is not None
    ) or kwargs.get("cu_seq_lens_q") is not None
    if packed and use_cache:
        raise ValueError("dijiang: packed sequences go without a cache. Give use_cache=False")
    if use_cache is None:
        use_cache = model.config.use_cache and not model.training and not packed
    kwargs["use_cache"] = bool(use_cache)
    if use_cache:
        kwargs["past_key_values"] = DiJiangCache(model.config)
    return args, kwargs


def _prepare_cache(
    model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
):
    """generate()'s own step, but for a DiJiangCache."""
    if model.config._attn_implementation != NAME:
        return type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
        raise NotImplementedError(
            "dijiang: assisted (speculative) decoding takes rejected tokens back, which a state "
            "that folds tokens together cannot do. Generate without assistant_model and "
            "prompt_lookup_num_tokens"
        )
    if generation_config.cache_implementation is not None:
        raise ValueError(
            f"dijiang: cache_implementation={generation_config.cache_implementation!r} is for "
            "softmax models. Leave it out: a converted model's cache is of constant size"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None:
        if not isinstance(cache, DiJiangCache):
            raise TypeError(
                f"dijiang: past_key_values must be a DiJiangCache, got {type(cache).__name__}. "
                "dijiang.DiJiangCache(model.config) makes one"
            )
        cache._is_user_defined = True
    elif generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = DiJiangCache(model.config)


# ---- helpers ------------------------------------------------------------------------------------


def _set_attention(model, name: str) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = name


def check_converted(model, what: str) -> None:
    if not is_converted(model):
        raise ValueError(
            f"{what}: this {type(model).__name__} is not converted. "
            "Call dijiang.convert(model) first"
        )


def as_batch(ids, what: str) -> Tensor:
    """Token ids as (batch, seqlen)."""
    if isinstance(ids, Iterable) and not isinstance(ids, Tensor):
        ids = torch.tensor(list(ids))
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim not in (1, 2):
        raise TypeError(f"{what}: expected token ids of shape (batch, seqlen), got {ids!r}")
    return ids[None] if ids.ndim == 1 else ids
