"""Training a converted model to attend, and to predict, as its softmax self did."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from .attention import kernel_mode
from .conversion import calibrate as calibrate_model
from .conversion import is_converted, only_last_logits, restore, softmax_mode
from .divergence import kl_divergence
from .hub import quiet
from .modules import AttentionKernel, kernels_of

TRAINABLE = ("dijiang", "attention", "all")


@dataclass
class DistillResult:
    """What distill did. ``history`` has a row a logged step: stage, step, tokens, loss, ..."""

    start: str  # what the model started from, in words
    history: list[dict] = field(default_factory=list)
    tokens: int = 0  # trained on, padding included, both stages
    seconds: float = 0.0

    def losses(self, stage: str = "transfer") -> list[float]:
        """The losses of "transfer" or "lm", in order."""
        return [row["loss"] for row in self.history if row["stage"] == stage]


def transfer_share(config) -> float:
    """The part of distill's tokens that attention transfer gets, unless told.

    Near keys carry the model through KL from the first step, and moving the attention's own weights
    is then the better use of few tokens; far keys alone predict nothing before transfer.
    """
    return 0.0 if config.has_near else 0.25


def distill(
    model, data, *, tokens: int | None = None, transfer_tokens: int | None = None,
    train: str = "attention", lm_weight: float = 0.0, kl_weight: float = 1.0, teacher=None,
    length: int = 1024, batch_size: int = 1, gradient_accumulation_steps: int = 1,
    learning_rate: float = 2e-2, lm_learning_rate: float | None = None, kernel_rate: float = 5.0,
    gate_rate: float = 20.0, warmup_steps: int = 2, calibrate: bool = True, seed: int = 0,
    output_dir=None, save_steps: int | None = None, resume: bool = False,
    progress: bool | Callable[[dict], None] = True, trainer_arguments: Mapping | None = None,
) -> DistillResult:  # fmt: skip
    """Trains a converted model in place, on transformers' Trainer, in up to two stages.

    1. Attention transfer, for ``transfer_tokens``: every layer gets its softmax self's input, and
       its output's squared error, relative to the softmax output's mean square, is the loss
       (averaged over layers). Only ``dijiang`` parameters train and no logits are computed.
    2. Prediction, for the rest of ``tokens``: ``lm_weight`` times the next token's cross entropy
       and ``kl_weight`` times KL(teacher || student).

    Far keys that are closed are calibrated first.

    Args:
        model: a converted model.
        data: token ids: (rows, seqlen) tensor, (n,) tensor or list (cut into rows of ``length``),
            list of lists (padded right where they differ), or a Dataset of {"input_ids": ...}.
        tokens: of both stages. None: the data once; more than the data: in epochs.
        transfer_tokens: of these, stage 1's. None: what was found best for a few ten thousand
            tokens (see transfer_share): none with a window or sinks, a quarter for far keys alone.
        train: what stage 2 trains: ``dijiang`` (what convert added), ``attention`` (the converted
            attention modules whole) or ``all``.
        teacher: stage 2's softmax model. None: the model itself in softmax mode while ``train`` is
            "dijiang", else a copy of it as it is now.
        batch_size, gradient_accumulation_steps, learning_rate, lm_learning_rate, warmup_steps,
            seed: as in Trainer; the rate falls linearly to 0. learning_rate is stage 1's,
            lm_learning_rate stage 2's: None: 2e-4 where near keys are kept and more than
            ``dijiang`` trains, else 1e-3.
        kernel_rate: stage 2's rate of what convert added, as a multiple of the other weights'.
        gate_rate: that of the gates and of a decay a head, likewise, in both stages.
        output_dir: where Trainer's checkpoints go (``stage1``, ``stage2``), every ``save_steps``
            and at each stage's end. ``resume``: goes on from the last one there.
        progress: True: a progress bar; or a function, called with each row of history.
        trainer_arguments: more of TrainingArguments.

    Returns:
        DistillResult

    Raises:
        TypeError: a PEFT model, or data of a kind that is not known.
        ValueError: the model is not converted, or the data or an argument does not fit.

    Source: attention transfer as in LoLCATs (arXiv 2410.10254); DiJiang fine-tunes on text alone.

    >>> result = dijiang.distill(model, ids, tokens=65536)                     # doctest: +SKIP
    >>> result.losses()[-1] < result.losses()[0]                               # doctest: +SKIP
    True
    """
    if not is_converted(model):
        raise ValueError(
            f"distill: this {type(model).__name__} is not converted. Call dijiang.convert(model) "
            "first"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"distill: expected the transformers model that convert was given, got "
            f"{type(model).__name__}. An adapter is trained by Trainer (examples/lora.py), or "
            "merge_and_unload() it first"
        )
    if train not in TRAINABLE:
        raise ValueError(f"distill: train must be one of {', '.join(TRAINABLE)}, got {train!r}")
    if resume and output_dir is None:
        raise ValueError("distill: resume=True needs the output_dir to resume from")
    rows = _as_dataset(data, length)
    row_length = max(len(rows[i]["input_ids"]) for i in range(min(len(rows), 64)))
    kernels = kernels_of(model)
    if tokens is None:
        tokens = max(len(rows) * row_length, transfer_tokens or 0)
    if transfer_tokens is None:
        transfer_tokens = int(tokens * max(transfer_share(kernel.config) for kernel in kernels))
    if not 0 <= transfer_tokens <= tokens:
        raise ValueError(
            f"distill: transfer_tokens must be between 0 and tokens={tokens}, got {transfer_tokens}"
        )
    lm_tokens = tokens - transfer_tokens
    if lm_tokens and not (lm_weight > 0 or kl_weight > 0):
        raise ValueError("distill: stage 2 needs lm_weight or kl_weight above 0")

    started = time.monotonic()
    # A closed gate has no gradient, in either stage.
    if calibrate and any(kernel.closed for kernel in kernels):
        near = max(kernel.config.near_span for kernel in kernels)
        if transfer_tokens or row_length > near:
            # Attention transfer takes away what errors of many heads add up to, KL does not.
            _calibrate(model, rows, choose=not transfer_tokens)
    result = DistillResult(start=model.dijiang_start)
    shared = dict(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, warmup_steps=warmup_steps,
        seed=seed,
    )  # fmt: skip
    row_tokens = batch_size * gradient_accumulation_steps * row_length
    with _left_as_found(model):
        if transfer_tokens and _train_only(model, "dijiang"):
            settings = shared | dict(learning_rate=learning_rate, max_grad_norm=0.0)
            _stage(
                _TransferTrainer, "transfer", "stage1", model, rows, transfer_tokens, row_tokens,
                settings, result, output_dir, save_steps, resume, progress, trainer_arguments,
                gate_rate=gate_rate,
            )  # fmt: skip
        if lm_tokens:
            if teacher is None and kl_weight > 0 and train != "dijiang":
                teacher = restore(copy.deepcopy(model)).eval().requires_grad_(False)
            if not _train_only(model, train):
                raise ValueError("distill: nothing to train: window and sinks have no parameters")
            if lm_learning_rate is None:
                near = all(kernel.config.has_near for kernel in kernels)
                lm_learning_rate = 2e-4 if near and train != "dijiang" else 1e-3
            _stage(
                _PredictionTrainer, "lm", "stage2", model, rows, lm_tokens, row_tokens,
                shared | dict(learning_rate=lm_learning_rate), result, output_dir, save_steps,
                resume, progress, trainer_arguments, teacher=teacher, lm_weight=lm_weight,
                kl_weight=kl_weight, gate_rate=gate_rate,
                kernel_rate=1.0 if train == "dijiang" else kernel_rate,
            )  # fmt: skip
    result.seconds = time.monotonic() - started
    return result


class _KernelTrainer(Trainer):
    """Trainer with rates of their own for what convert added, which is untrained.

    Gates and decays most of all: logarithms of masses and of lengths, they have far to go.
    """

    def __init__(self, *args, gate_rate=1.0, kernel_rate=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate_rate, self.kernel_rate = gate_rate, kernel_rate

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups: dict[float, list] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(self._rate(name), []).append(parameter)
            rate = self.args.learning_rate
            groups = [{"params": group, "lr": rate * by} for by, group in groups.items()]
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def _rate(self, name: str) -> float:
        if name.endswith((".dijiang.gate", ".dijiang.decay")):
            return self.gate_rate
        return self.kernel_rate if ".dijiang." in name else 1.0


class _TransferTrainer(_KernelTrainer):
    """Stage 1: each layer's output against its own softmax's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()  # the teacher's activations, without dropout
        inner = self.accelerator.unwrap_model(model)
        with kernel_mode(inner, "transfer") as kernels:
            model(**inputs, use_cache=False, **only_last_logits(inner))
            loss = torch.stack([kernel.loss for kernel in kernels]).mean()
        return (loss, None) if return_outputs else loss


class _PredictionTrainer(_KernelTrainer):
    """Stage 2: the next token's cross entropy, and the teacher's predictions."""

    def __init__(self, *args, teacher=None, lm_weight=0.0, kl_weight=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.lm_weight, self.kl_weight = teacher, lm_weight, kl_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits
        # Every token but the last of a row predicts the one after it.
        real = torch.ones_like(ids) if mask is None else mask
        real = F.pad(real[:, 1:] * real[:, :-1], (0, 1)).to(torch.float32)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.lm_weight:
            targets = F.pad(ids[:, 1:], (0, 1))
            entropy = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
            loss = loss + self.lm_weight * (entropy * real).sum() / real.sum()
        if self.kl_weight:
            wanted = self._teacher_logits(model, inputs)
            loss = loss + self.kl_weight * kl_divergence(logits, wanted, real)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, model, inputs) -> Tensor:
        if self.teacher is not None:
            teacher = self.teacher.to(inputs["input_ids"].device)
            return teacher(**inputs, use_cache=False).logits
        inner = self.accelerator.unwrap_model(model)
        training = inner.training
        inner.eval()
        try:
            with softmax_mode(inner):
                return inner(**inputs, use_cache=False).logits
        finally:
            inner.train(training)


class _History(TrainerCallback):
    """Rows of history from Trainer's logs."""

    def __init__(self, stage, row_tokens, result, report):
        self.stage, self.row_tokens, self.result, self.report = stage, row_tokens, result, report
        self.before, self.started = result.tokens, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        tokens = state.global_step * self.row_tokens * args.world_size
        row = dict(
            stage=self.stage, step=state.global_step, steps=state.max_steps, tokens=tokens,
            loss=float(logs["loss"]), learning_rate=logs.get("learning_rate"),
            seconds=time.monotonic() - self.started,
        )  # fmt: skip
        self.result.history.append(row)
        if self.report is not None:
            self.report(row)

    def on_train_end(self, args, state, control, **kwargs):
        self.result.tokens = self.before + state.global_step * self.row_tokens * args.world_size


def _stage(
    trainer_class, stage, folder, model, rows, tokens, row_tokens, settings, result, output_dir,
    save_steps, resume, progress, trainer_arguments, **trainer_settings,
):  # fmt: skip
    world_size = int(torch.distributed.get_world_size()) if _distributed() else 1
    steps = max(1, math.ceil(tokens / (row_tokens * world_size)))
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            path = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            path = pathlib.Path(output_dir) / folder
        saving = dict(save_strategy="no")
        if output_dir is not None:
            saving = dict(save_strategy="steps", save_steps=save_steps or steps, save_total_limit=1)
        arguments = dict(
            output_dir=str(path), max_steps=steps, lr_scheduler_type="linear", weight_decay=0.0,
            optim="adamw_torch", logging_strategy="steps", logging_steps=1, report_to="none",
            remove_unused_columns=False, disable_tqdm=progress is not True,
            use_cpu=model.device.type == "cpu", dataloader_pin_memory=model.device.type == "cuda",
            label_names=[],
        )  # fmt: skip
        arguments |= settings | saving | dict(trainer_arguments or {})
        trainer = trainer_class(
            model=model, args=TrainingArguments(**arguments), train_dataset=rows,
            data_collator=_Collate(model.config), **trainer_settings,
        )  # fmt: skip
        # Both losses are means over a batch, which Trainer divides by the accumulation steps.
        trainer.model_accepts_loss_kwargs = False
        trainer.loss_is_scaled_for_ga = False
        trainer.remove_callback(PrinterCallback)
        if progress is True:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_Bar())
        report = progress if callable(progress) else None
        trainer.add_callback(_History(stage, row_tokens, result, report))
        last = get_last_checkpoint(str(path)) if resume and path.is_dir() else None
        with quiet():
            if last is not None and _steps_of(last) >= steps:
                trainer._load_from_checkpoint(last)  # this stage is done
            else:
                trainer.train(resume_from_checkpoint=last)


def _steps_of(checkpoint: str) -> int:
    return json.loads((pathlib.Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


class _Bar(ProgressCallback):
    """Trainer's bar with the loss beside it rather than a line a step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


@dataclass
class _Collate:
    """Rows to a batch: padded right, with a mask, where lengths differ."""

    config: object

    def __call__(self, rows) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        masks = [row.get("attention_mask") for row in rows]
        masks = [
            torch.ones_like(x) if mask is None else torch.as_tensor(mask)
            for x, mask in zip(ids, masks, strict=True)
        ]
        longest = max(len(x) for x in ids)
        pad = getattr(self.config, "pad_token_id", None) or 0
        batch = torch.stack([F.pad(x, (0, longest - len(x)), value=pad) for x in ids])
        mask = torch.stack([F.pad(x, (0, longest - len(x))) for x in masks])
        return {"input_ids": batch} | ({} if bool(mask.all()) else {"attention_mask": mask})


class _Rows(Dataset):
    def __init__(self, rows: Sequence):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i]}


def _as_dataset(data, length: int):
    """Anything distill takes, as a sized dataset of {"input_ids": ...}."""
    if isinstance(data, Tensor) or (isinstance(data, Sequence) and data and _is_ids(data)):
        data = _as_rows(data, length)
    if isinstance(data, (Sequence, Tensor)):
        if not len(data):
            raise ValueError("distill: data is empty")
        first = data[0]
        return data if isinstance(first, Mapping) else _Rows(data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise ValueError("distill: data is empty")
        if not isinstance(data[0], Mapping) or "input_ids" not in data[0]:
            raise ValueError('distill: a Dataset must give {"input_ids": ...}')
        return data
    raise TypeError(
        f"distill: data must be token ids (a tensor, lists) or a Dataset with a length, got "
        f"{type(data).__name__}"
    )


def _is_ids(data) -> bool:
    return isinstance(data[0], int) or (isinstance(data[0], Tensor) and data[0].ndim == 0)


def _as_rows(ids, length: int) -> Tensor:
    ids = torch.as_tensor(ids).cpu()
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise ValueError(
            f"distill: data must be whole numbers of shape (rows, seqlen) or (n,), got "
            f"{ids.dtype} {tuple(ids.shape)}"
        )
    if ids.ndim == 2:
        return ids
    if len(ids) < length:
        raise ValueError(f"distill: {len(ids)} tokens do not fill one row of length={length}")
    return ids[: len(ids) // length * length].view(-1, length)


def _calibrate(model, rows, choose: bool) -> None:
    """On the first rows: 4,096 tokens are enough for one number a head."""
    chosen, total = [], 0
    for i in range(len(rows)):
        chosen.append(torch.as_tensor(rows[i]["input_ids"])[:2048])
        total += len(chosen[-1])
        if total >= 4096:
            break
    shortest = min(len(x) for x in chosen)
    calibrate_model(model, torch.stack([x[:shortest] for x in chosen]), choose=choose)


def _train_only(model, what: str) -> int:
    """Sets requires_grad; the number of parameters that train."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, AttentionKernel):
            root = path if what == "dijiang" else path.rpartition(".")[0]
            own = model.get_submodule(root).named_parameters()
            names.update(f"{root}.{name}" for name, _ in own)
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "all" or name in names)
        count += parameter.numel() if parameter.requires_grad else 0
    return count


@contextlib.contextmanager
def _left_as_found(model):
    """Trainer changes more than weights; puts back what it, and the stages, set."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    training, use_cache = model.training, model.config.use_cache
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        model.train(training)
        model.config.use_cache = use_cache


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
