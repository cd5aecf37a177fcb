"""Checkpoints of the method's published code, read and written."""

from __future__ import annotations

import copy
import json
import os
import pathlib
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .config import DiJiangConfig
from .conversion import check_converted, convert
from .hub import quiet
from .modules import AttentionKernel, kernels_by_layer

_LAYERS = "gpt_neox.layers."


def import_reference_checkpoint(
    source: Mapping[str, Tensor] | str | os.PathLike, config: GPTNeoXConfig | None = None
) -> GPTNeoXForCausalLM:
    """A converted model from a checkpoint of the method's published code, with the same logits.

    Formula, a head at a time, then a group norm, times ``silu(hidden W_G)``::

        o_t = D1_t sum_{s<=t} D2_s phi(q_t).phi(k_s) v_s          phi(x) = softmax(x proj_matrix)

    Decoding with a cache is the same function; the published code's own is not (see
    docs/reference_checkpoint.md).

    Args:
        source: the state dict; or a .safetensors, .bin or .pt file of it; or a folder with
            model*.safetensors or pytorch_model*.bin.
        config: of the model. None: the config.json beside the file; where there is none, sizes are
            those of the tensors and all else is Pythia's.

    Returns:
        GPTNeoXForCausalLM in float32, on the CPU.

    Raises:
        FileNotFoundError: no such file or folder, or no weights in it.
        TypeError: source or config is something else.
        ValueError: a file is damaged, or the keys, shapes or numbers are not such a checkpoint's;
            the message names every one.

    Source: arXiv 2403.19928 and its published code.

    >>> model = dijiang.import_reference_checkpoint("pytorch_model.bin")       # doctest: +SKIP
    >>> model.save_pretrained("imported")                                      # doctest: +SKIP
    """
    if config is not None and not isinstance(config, GPTNeoXConfig):
        raise TypeError(
            f"import_reference_checkpoint: config must be a GPTNeoXConfig or None, got "
            f"{type(config).__name__}"
        )
    if isinstance(source, Mapping):
        tensors = source
    elif isinstance(source, (str, os.PathLike)):
        tensors, found = _read(pathlib.Path(source))
        config = found if config is None else config
    else:
        raise TypeError(
            f"import_reference_checkpoint: source must be a state dict or a path, got "
            f"{type(source).__name__}"
        )
    config = _from_shapes(tensors) if config is None else _plain(config)
    with torch.device("meta"):
        base = {name: x.shape for name, x in GPTNeoXForCausalLM(config).state_dict().items()}
    _check(tensors, {_published(name): shape for name, shape in base.items()} | _added(config))

    def copied(name):
        return tensors[name].detach().to("cpu", torch.float32, copy=True)

    weights = {name: copied(_published(name)) for name in base}
    with quiet():
        model = GPTNeoXForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32
        )
    convert(model, _kernel_config(config.max_position_embeddings))
    for layer, kernel in kernels_by_layer(model).items():
        prefix = _prefix(layer)
        own = {name: copied(prefix + name) for name in _shapes(config)}
        kernel.load_state_dict(
            {
                "features_k.matrix": own["proj_matrix"].T.expand(kernel.heads, -1, -1),
                "decay_position.query": own["D1"][0, :, :, 0],
                "decay_position.key": own["D2"][0, :, :, 0],
                "norm.weight": own["group_norm.weight"],
                "norm.bias": own["group_norm.bias"],
                "output_gate.weight": own["W_G"].T,
            }
        )
    model.dijiang_start = "imported from a checkpoint of the published code"
    return model.eval()


def export_reference_checkpoint(model: GPTNeoXForCausalLM) -> dict[str, Tensor]:
    """The state dict of the published code for a model that import_reference_checkpoint gives.

    ``import_reference_checkpoint(export_reference_checkpoint(model), model.config)`` has the same
    numbers, bit for bit.

    Args:
        model: as imported, or trained since; its heads must still have one projection a layer.

    Returns:
        Copies of its tensors, by the published code's names.

    Raises:
        TypeError: no GPTNeoXForCausalLM.
        ValueError: the model is not converted, or has what the published code does not.

    >>> torch.save(dijiang.export_reference_checkpoint(model), "model.bin")    # doctest: +SKIP
    """
    if not isinstance(model, GPTNeoXForCausalLM):
        raise TypeError(
            f"export_reference_checkpoint: model must be a GPTNeoXForCausalLM, got "
            f"{type(model).__name__}"
        )
    check_converted(model, "export_reference_checkpoint")
    own = DiJiangConfig.from_dict(model.config.dijiang)
    wanted = _kernel_config(model.config.max_position_embeddings)
    other = [
        f"{name}={getattr(own, name)!r} and not {getattr(wanted, name)!r}"
        for name in _STRUCTURE
        if getattr(own, name) != getattr(wanted, name)
    ]
    if other:
        raise ValueError(
            f"export_reference_checkpoint: the published code has no place for {', '.join(other)}"
        )
    tensors = {
        _published(name): x for name, x in model.state_dict().items() if ".dijiang." not in name
    }
    for layer, kernel in kernels_by_layer(model).items():
        tensors |= {_prefix(layer) + name: x for name, x in _of_kernel(kernel, layer).items()}
    return {name: x.detach().clone(memory_format=torch.contiguous_format)
            for name, x in tensors.items()}  # fmt: skip


# ---- the layout ---------------------------------------------------------------------------------

#: What export compares; the other fields say where a model starts, not what it computes.
_STRUCTURE = (
    "feature_map", "num_features", "share_qk", "window", "sinks", "decay", "num_positions",
    "normalize", "group_norm", "output_gate", "layers", "per_layer",
)  # fmt: skip


def _kernel_config(num_positions: int) -> DiJiangConfig:
    return DiJiangConfig.published(
        feature_map="learned_softmax", init="dct", decay="position", num_positions=num_positions
    )


def _published(name: str) -> str:
    """transformers has named the output matrix anew since."""
    return name.replace("lm_head.", "embed_out.")


def _prefix(layer: int) -> str:
    return f"{_LAYERS}{layer}.attention."


def _shapes(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """What the published code adds to each attention module."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    table = (1, heads, config.max_position_embeddings, 1)
    return {
        "proj_matrix": (hidden // heads, hidden // heads),
        "W_G": (hidden, hidden),
        "D1": table,
        "D2": table,
        "group_norm.weight": (hidden,),
        "group_norm.bias": (hidden,),
    }


def _added(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    return {
        _prefix(layer) + name: shape
        for layer in range(config.num_hidden_layers)
        for name, shape in _shapes(config).items()
    }


def _of_kernel(kernel: AttentionKernel, layer: int) -> dict[str, Tensor]:
    matrix = kernel.features_k.matrix
    if not bool((matrix == matrix[:1]).all()):
        raise ValueError(
            f"export_reference_checkpoint: the heads of layer {layer} were trained to projections "
            "of their own, and the published code has one a layer. To export after training, keep "
            "features_k.matrix out of it (requires_grad_(False))"
        )
    return {
        "proj_matrix": matrix[0].T,
        "W_G": kernel.output_gate.weight.T,
        "D1": kernel.decay_position.query[None, :, :, None],
        "D2": kernel.decay_position.key[None, :, :, None],
        "group_norm.weight": kernel.norm.weight,
        "group_norm.bias": kernel.norm.bias,
    }


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, x in tensors.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            problems.append(f"{name} must be a floating-point tensor, got {got}")
        elif x.shape != expected[name]:
            problems.append(f"{name} must have shape {tuple(expected[name])}, got {tuple(x.shape)}")
        elif not bool(x.isfinite().all()):
            problems.append(f"{name} has numbers that are not finite")
    if problems:
        raise ValueError(
            "import_reference_checkpoint: not a checkpoint of the published code for this config:\n"
            + "\n".join(problems)
        )


# ---- sizes and files ----------------------------------------------------------------------------


def _from_shapes(tensors: Mapping[str, Tensor]) -> GPTNeoXConfig:
    """Sizes from the tensors; what they do not tell is Pythia's, transformers' default."""

    def shape(suffix, dims):
        for name, x in tensors.items():
            if str(name).endswith(suffix) and isinstance(x, Tensor) and x.ndim == dims:
                return x.shape
        raise ValueError(
            f"import_reference_checkpoint: a checkpoint of the published code has tensors "
            f"*{suffix} of {dims} dimensions, and here is none. Softmax models are for "
            "dijiang.convert"
        )

    _, heads, positions, _ = shape(".attention.D1", 4)
    vocab, hidden = shape(".embed_in.weight", 2)
    intermediate, _ = shape(".mlp.dense_h_to_4h.weight", 2)
    if min(heads, positions, vocab, hidden, intermediate) < 1 or hidden % heads:
        raise ValueError(
            f"import_reference_checkpoint: the tensors say {heads} heads, {positions} positions, "
            f"{vocab} tokens, {intermediate} inner and {hidden} hidden dimensions, which no model "
            "has"
        )
    layers = {name.split(".")[2] for name in map(str, tensors) if name.startswith(_LAYERS)}
    return GPTNeoXConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=len(layers),
        num_attention_heads=heads, intermediate_size=intermediate,
        max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _plain(config: GPTNeoXConfig) -> GPTNeoXConfig:
    """A copy without the published code's own classes, and without an earlier conversion."""
    config = copy.deepcopy(config)
    for name in ("auto_map", "dijiang"):
        if hasattr(config, name):
            delattr(config, name)
    config._attn_implementation = None
    config.tie_word_embeddings = False  # the checkpoint has both matrices
    return config


def _read(path: pathlib.Path) -> tuple[dict[str, Tensor], GPTNeoXConfig | None]:
    files, folder = [path], path.parent
    if path.is_dir():
        folder = path
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(
                f"import_reference_checkpoint: there is neither model*.safetensors nor "
                f"pytorch_model*.bin in {path}"
            )
    tensors = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"import_reference_checkpoint: there is no file {file}")
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken archive or pickle leads to
            raise ValueError(
                f"import_reference_checkpoint: {file} is damaged or holds more than a state dict: "
                f"{error}"
            ) from error
    return tensors, _read_config(folder / "config.json")


def _read_config(file: pathlib.Path) -> GPTNeoXConfig | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        kind = values.get("model_type")
        if kind != "gpt_neox":
            raise ValueError(f"model_type must be 'gpt_neox', got {kind!r}")
        return GPTNeoXConfig.from_dict(values)
    except Exception as error:  # whatever the config's own checks raise
        raise ValueError(f"import_reference_checkpoint: {file} is damaged: {error}") from error
