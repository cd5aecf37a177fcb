"""Tensor parallelism over heads, by torch's own plans."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle
from torch.func import functional_call

from ._types import cache_sizes
from .modules import AttentionKernel


class HeadParallel(ParallelStyle):
    """Gives each rank the heads of an AttentionKernel that ColwiseParallel gives it of q, k and v.

    For a plan of ``torch.distributed.tensor.parallel.parallelize_module``, beside ColwiseParallel
    for q_proj, k_proj and v_proj and RowwiseParallel for o_proj. Parameters become DTensors sharded
    by heads; outputs, gradients and generation are those of one process.

    Raises (from parallelize_module):
        TypeError: the module is no AttentionKernel.
        ValueError: the mesh's size does not divide its key/value heads, or it has a group norm.

    >>> plan = {"model.layers.*.self_attn.dijiang": HeadParallel()}            # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, AttentionKernel):
            raise TypeError(
                f"HeadParallel: expected an AttentionKernel, got {type(module).__name__}"
            )
        size = device_mesh.size()
        if module.kv_heads % size:
            raise ValueError(
                f"HeadParallel: the mesh's size must divide the key/value heads, got {size} ranks "
                f"and {module.kv_heads} heads"
            )
        if module.norm is not None:
            raise ValueError(
                "HeadParallel: group_norm has channels of all heads in a group, which no rank has"
            )
        own = cache_sizes(module.config.cache_size)
        if len(own) > 1:
            first = module.kv_heads // size * device_mesh.get_local_rank()
            own = own[first : first + module.kv_heads // size]
            module.config = module.config.replace(cache_size=own)
        for part in module.modules():
            for name, x in part.named_parameters(recurse=False):
                sharded = distribute_tensor(x.detach(), device_mesh, [Shard(0)])
                part.register_parameter(name, nn.Parameter(sharded, x.requires_grad))
            for name, x in part.named_buffers(recurse=False):
                setattr(part, name, distribute_tensor(x, device_mesh, [Shard(0)]))
            for count in ("heads", "kv_heads"):
                if hasattr(part, count):
                    setattr(part, count, getattr(part, count) // size)
        module.__class__, module.mesh = _ShardedKernel, device_mesh
        return module


class _ShardedKernel(AttentionKernel):
    """An AttentionKernel that computes on its own shards."""

    def forward(self, q, k, v, *, hidden=None, **arguments):
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        if not any(isinstance(x, DTensor) for x in tensors.values()):
            return super().forward(q, k, v, hidden=hidden, **arguments)
        if hidden is not None:  # whole on every rank, which finds a part of its gradient
            hidden = DTensor.from_local(hidden, self.mesh, [Replicate()], run_check=False)
            hidden = hidden.to_local(grad_placements=[Partial()])
        local = {name: x.to_local() for name, x in tensors.items()}
        return functional_call(self, local, (q, k, v), {"hidden": hidden, **arguments})
