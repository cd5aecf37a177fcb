"""Sequence parallelism: a sequence over several processes, a slice each, in order of rank.

Attention's state is all that a slice must know of those before it, and is as large whatever their
length. Each layer takes it from the rank before and hands it to the next one; the backward sends
its gradient the other way.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._types import AttentionState
from .modules import AttentionKernel, kernels_of
from .ops._checks import autocast
from .ops._slice import attend_slice
from .ops._slice_grads import CARRIED


@contextlib.contextmanager
def sequence_parallel(
    model: nn.Module, group: dist.ProcessGroup | None = None, *,
    timeout: datetime.timedelta | None = None,
) -> Iterator[Relay]:  # fmt: skip
    """Within: each rank gives the model its slice of the same rows, and attends to all before it.

    Outputs, and the sum of the ranks' gradients, are those of one process that is given the whole
    rows. Every rank must run the same forwards, under the same grad mode, and after a forward that
    is to be trained on call ``backward()`` within, on a loss of its own outputs; then sum the
    gradients of the parameters over the ranks. Rank r works on a layer while rank r - 1 works on
    the next: n layers take as long as n + ranks - 1.

    Args:
        model: converted (give it what shard returns), or with KernelizedAttention layers.
        group: ranks in the order of their slices; None: all.
        timeout: how long a rank waits for another; None: the group's own.

    Yields:
        Relay: ``sent_bytes`` counts what this rank has sent. It does not depend on seqlen.

    Raises:
        ValueError: the model has no kernels, or layers with softmax attention; in a forward, what
            is asked goes beyond one unpadded sequence a row, each slice at its position.
        RuntimeError: torch.distributed is not initialised; a rank did not answer in time.

    >>> with dijiang.distributed.sequence_parallel(model):                     # doctest: +SKIP
    ...     model(**dijiang.distributed.shard(ids)).loss.backward()
    >>> for p in model.parameters():                                           # doctest: +SKIP
    ...     dist.all_reduce(p.grad)
    """
    kernels = kernels_of(model)
    _check(model, kernels)
    relay = Relay(group, timeout, len(kernels))
    hook = None
    if hasattr(model, "_dijiang_handles"):
        hook = model.register_forward_pre_hook(relay._before_model, with_kwargs=True, prepend=True)
    for kernel in kernels:
        kernel.relay = relay
    try:
        yield relay
        relay._finish()
    finally:
        relay._open = False
        for kernel in kernels:
            kernel.relay = None
        if hook is not None:
            hook.remove()


def _check(model, kernels) -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "sequence_parallel: torch.distributed is not initialised. Call "
            "torch.distributed.init_process_group first, and start the script with torchrun"
        )
    if not kernels:
        raise ValueError(
            f"sequence_parallel: {type(model).__name__} has no AttentionKernel. Call "
            "dijiang.convert(model) first"
        )
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", len(kernels))
    if len(kernels) < layers:
        raise ValueError(
            f"sequence_parallel: {layers - len(kernels)} of {layers} layers keep softmax, which "
            "would need all keys on every rank. Convert with layers='all'"
        )
    if any(kernel.relay is not None for kernel in kernels):
        raise ValueError("sequence_parallel: the model is within sequence_parallel already")


def shard(
    ids: Tensor, group: dist.ProcessGroup | None = None, *, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """This rank's part of rows that every rank has: the arguments of a transformers model.

    Its loss is the rank's share of the loss of the whole rows, that of one process: their sum.

    Args:
        ids: int64 (batch, seqlen), the same on all ranks, a token a rank at least.
        group: as for sequence_parallel.
        labels: as ids, -100 where there is no loss; None: ids themselves.

    Returns:
        input_ids and position_ids of the slice; labels and shift_labels, which is the next token
        of each, beyond the slice's end, too; num_items_in_batch, of all ranks.

    Raises:
        ValueError: ids have the wrong shape or fewer tokens than there are ranks.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if ids.ndim != 2 or ids.shape[1] < size:
        raise ValueError(
            f"shard: ids must have shape (batch, seqlen) with a token for each of {size} ranks, "
            f"got {tuple(ids.shape)}"
        )
    labels = ids if labels is None else labels
    if labels.shape != ids.shape:
        raise ValueError(
            f"shard: labels must have the shape of ids, {tuple(ids.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def own(x):
        return x.tensor_split(size, dim=1)[rank].contiguous()

    return dict(
        input_ids=own(ids),
        position_ids=own(positions),
        labels=own(labels),
        shift_labels=own(following),
        num_items_in_batch=(following != -100).sum(),
    )


class Relay:
    """What sequence_parallel yields: hands states on between the ranks of a group."""

    def __init__(self, group, timeout, depth: int):
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        #: Bytes that this rank has sent, forward and backward.
        self.sent_bytes = 0
        self._depth = depth  # states that may be under way at a time
        self._under_way = deque()
        self._position = None  # of the slice's first token, where the model is told
        self._open = True

    def check(self, cached_or_packed: bool, padded: bool) -> None:
        """Refuses what a slice of plain rows is not."""
        if cached_or_packed:
            raise ValueError(
                "sequence_parallel: states are handed from rank to rank, without a cache and "
                "packed sequences. Give use_cache=False and one sequence a row"
            )
        if padded:
            raise ValueError(
                "sequence_parallel: rows must have no padding: every rank's slice follows the "
                "one before. Leave attention_mask out"
            )

    def receive(self, kernel: AttentionKernel, q: Tensor) -> AttentionState:
        """The state behind the rank before, which this rank's slice goes on from."""
        (q,) = autocast(q)
        state = kernel.empty_state(q.shape[0], q.dtype, q.device)
        if self.rank > 0:
            state = AttentionState(*_Receive.apply(self, _anchor(), *state))
        start = int(state.length[0])
        if self._position not in (None, start):
            raise ValueError(
                f"sequence_parallel: rank {self.rank}'s position_ids must begin at {start}, the "
                f"number of tokens of the ranks before, got {self._position}. shard makes them"
            )
        return state

    def attend(self, q, k, v, fq, fk, state: AttentionState, **settings) -> Tensor:
        """Attends from a state received; sends the state behind on to the next rank."""
        start = int(state.length[0])
        out, state = attend_slice(q, k, v, fq, fk, state, start=start, **settings)
        if self.rank < self.size - 1:
            out = _Send.apply(self, _anchor(), out, *state)
        return out

    def _before_model(self, model, args, kwargs):
        if model.config._attn_implementation != "dijiang" or any(
            kernel.mode != "student" for kernel in kernels_of(model)
        ):
            raise ValueError(
                "sequence_parallel: softmax attention would need all keys on every rank. Leave "
                "softmax_mode and distill outside"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            raise ValueError(
                "sequence_parallel: position_ids must be given, for without them every slice would "
                "begin at position 0. shard makes them"
            )
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("sequence_parallel: goes without a cache. Give use_cache=False")
        if model.training and any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        ):
            raise ValueError(
                "sequence_parallel: gradient checkpointing would run layers, and send states, a "
                "second time. Call model.gradient_checkpointing_disable()"
            )
        self._position = int(positions.reshape(-1)[0])
        return args, kwargs | {"use_cache": False}

    # ---- messages: the tensors' bytes beside each other, whose number both sides know ----

    def _send(self, tensors, rank: int) -> None:
        self._check_open()
        if len(self._under_way) >= self._depth:
            self._wait(*self._under_way.popleft())
        parts = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in tensors]
        message = self._movable(torch.cat(parts))
        self.sent_bytes += message.numel()
        with self._named("send to", rank):
            work = dist.isend(message, group=self.group, group_dst=rank)
        self._under_way.append((work, "send to", rank, message))

    def _receive(self, like, rank: int) -> list[Tensor]:
        """Tensors of the shapes, dtypes and device of `like`."""
        self._check_open()
        sizes = [x.numel() * x.element_size() for x in like]
        device = like[0].device
        message = self._movable(torch.empty(sum(sizes), dtype=torch.uint8, device=device))
        with self._named("receive from", rank):
            work = dist.irecv(message, group=self.group, group_src=rank)
        self._wait(work, "receive from", rank)
        parts = message.to(device).split(sizes)
        return [
            part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)
        ]

    def _movable(self, message: Tensor) -> Tensor:
        return message.cpu() if dist.get_backend(self.group) == "gloo" else message

    def _wait(self, work, what: str, rank: int, _message=None) -> None:
        with self._named(what, rank):
            work.wait() if self.timeout is None else work.wait(self.timeout)

    @contextlib.contextmanager
    def _named(self, what: str, rank: int):
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"sequence_parallel: rank {self.rank} could not {what} rank {rank}, which died, "
                f"failed, or does not run the same forwards and backwards: {error}"
            ) from error

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("sequence_parallel: call backward() within the context")

    def _finish(self) -> None:
        while self._under_way:
            self._wait(*self._under_way.popleft())


def _anchor() -> Tensor:
    """Keeps a message in the graph on every rank alike, whatever is trained there."""
    return torch.empty(0, requires_grad=torch.is_grad_enabled())


class _Receive(torch.autograd.Function):
    """The state behind the rank before; its gradient goes back there."""

    @staticmethod
    def forward(ctx, relay, anchor, *empty):
        ctx.relay = relay
        given = [x for x in empty if x is not None]
        received = iter(relay._receive(given, relay.rank - 1))
        state = AttentionState(*(None if x is None else next(received) for x in empty))
        constant = [x for n, x in state._asdict().items() if n not in CARRIED and x is not None]
        ctx.mark_non_differentiable(*constant)
        return tuple(state)

    @staticmethod
    def backward(ctx, *grads):
        carried = AttentionState(*grads)._asdict()
        message = [carried[name] for name in CARRIED if carried[name] is not None]
        ctx.relay._send(message, ctx.relay.rank - 1)
        return None, None, *(None for _ in grads)


class _Send(torch.autograd.Function):
    """`out`, once the state is on its way to the rank behind; its gradient comes from there."""

    @staticmethod
    def forward(ctx, relay, anchor, out, *state):
        ctx.relay = relay
        ctx.state = AttentionState(*(None if x is None else x.detach() for x in state))
        relay._send([x for x in state if x is not None], relay.rank + 1)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        state = ctx.state._asdict()
        names = [name for name in CARRIED if state[name] is not None]
        received = ctx.relay._receive([state[name] for name in names], ctx.relay.rank + 1)
        carried = dict(zip(names, received, strict=True))
        return None, None, grad, *(carried.get(name) for name in state)
