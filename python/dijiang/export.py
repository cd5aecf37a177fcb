"""Decoding without Python: one step of a converted model as a compiled program."""

from __future__ import annotations

import inspect
import os
import pathlib
import tempfile

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ._types import AttentionState
from .cache import DiJiangCache
from .conversion import check_converted
from .modules import kernels_by_layer
from .states import check_filled, check_shapes, tensors_by_name


def decode_program(model) -> ExportedProgram:
    """One token of each row as a torch.export program: ``logits = step(ids, *state)``.

    ids is int64 (batch, 1), logits (batch, vocab_size). state, which the step writes in place, is
    what decode_state gives, for any batch and each row of its own age. A prompt is read by the
    same step, token by token.

    Args:
        model: a converted model without softmax layers. The program shares its parameters.

    Raises:
        ValueError: the model is not converted, or has layers that kept softmax attention, or takes
            no position_ids.

    >>> step = decode_program(model).module()                                  # doctest: +SKIP
    >>> logits = step(ids, *decode_state(model))                               # doctest: +SKIP
    """
    _check_model("decode_program", model)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=model.device)
    state = _empty_state(model, 2)
    rows = {0: Dim("batch", min=1)}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(
                _Step(model), (ids, *state), dynamic_shapes=(rows, (rows,) * len(state))
            )
    finally:
        model.train(training)


def decode_state(model, cache: DiJiangCache | None = None) -> list[Tensor]:
    """The state that decode_program's step goes on from: copies of the cache's tensors, in order.

    Args:
        model: the converted model.
        cache: what it has read, any number of rows; None: nothing, in one row.

    Raises:
        TypeError, ValueError: the model or the cache is not as decode_program or save_state ask.
    """
    return _state("decode_state", model, cache)


def export_decode(
    model, path: str | os.PathLike, cache: DiJiangCache | None = None
) -> pathlib.Path:
    """Compiles decode_program by AOTInductor into a file that C++ runs without Python.

    The file holds the weights and two programs: ``model``, the step, and ``start``, which takes
    nothing and gives a new decode_state. examples/cpp/generate runs them. Both are for the kind of
    device that the model is on, and for CPUs like this one.

    Args:
        model: as decode_program asks.
        path: ends in .pt2; written whole or not at all.
        cache: what `start` has read: see decode_state.

    Raises:
        TypeError, ValueError: as decode_program and decode_state, or path is no .pt2 in a folder
            that is there.

    >>> dijiang.export_decode(model, "model.pt2")                              # doctest: +SKIP
    >>> step = torch._inductor.aoti_load_package("model.pt2")                  # doctest: +SKIP
    >>> logits = step(ids, *decode_state(model))                               # doctest: +SKIP
    """
    from torch._inductor.package import package_aoti

    path = pathlib.Path(path)
    if path.suffix != ".pt2" or not path.parent.is_dir():
        raise ValueError(
            f"export_decode: path must be a .pt2 file in an existing folder, got {path}"
        )
    start = _Start(_state("export_decode", model, cache))
    programs = {"model": decode_program(model), "start": torch.export.export(start, ())}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        files = {}
        for name, program in programs.items():
            options = {
                "aot_inductor.package": True,
                "aot_inductor.output_path": os.path.join(folder, name),
            }
            files[name] = torch._inductor.aot_compile(
                program.module(), *program.example_inputs, options=options
            )
        made = package_aoti(os.path.join(folder, path.name), files)
        os.replace(made, path)
    return path


class _Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.fields = [
            [name for name, x in kernel.empty_state(1, model.dtype, "meta")._asdict().items()
             if x is not None]
            for kernel in kernels_by_layer(model).values()
        ]  # fmt: skip

    def forward(self, ids: Tensor, *state: Tensor) -> Tensor:
        tensors = iter(state)
        cache = DiJiangCache(self.model.config)
        for layer, names in zip(cache.layers, self.fields, strict=True):
            given = {name: next(tensors) for name in names}
            layer.advance(AttentionState(**dict.fromkeys(AttentionState._fields) | given), 1)
        positions = cache.layers[0].state.length[:, None].clone()  # the step counts on in it
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache)
        return out.logits[:, -1]


class _Start(nn.Module):
    def __init__(self, state: list[Tensor]):
        super().__init__()
        for i, x in enumerate(state):
            self.register_buffer(f"state_{i}", x)

    def forward(self) -> list[Tensor]:
        return [x.clone() for x in self.buffers()]


def _state(what: str, model, cache: DiJiangCache | None) -> list[Tensor]:
    _check_model(what, model)
    if cache is None:
        return _empty_state(model, 1)
    check_filled(what, "cache", cache)
    tensors = tensors_by_name(cache)
    check_shapes(what, "the cache", tensors, model)
    return [x.clone() for x in tensors.values()]


def _empty_state(model, batch: int) -> list[Tensor]:
    states = (
        x.empty_state(batch, model.dtype, model.device) for x in kernels_by_layer(model).values()
    )
    return [x for state in states for x in state if x is not None]


def _check_model(what: str, model) -> None:
    check_converted(model, what)
    kept = sorted(set(range(model.config.num_hidden_layers)) - set(kernels_by_layer(model)))
    if kept:
        raise ValueError(
            f"{what}: layers {', '.join(map(str, kept))} kept softmax attention, whose keys grow "
            "with every token. Convert all layers"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{what}: {type(model).__name__} takes no position_ids, which tell rows of different "
            "ages apart"
        )
