"""The ranks of tests/test_distributed.py: python distributed_worker.py FOLDER RANKS TASK.

One process imports everything and forks the ranks, which takes a fraction of the time.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import multiprocessing
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from dijiang import DiJiangConfig, KernelizedAttention
from dijiang.distributed import sequence_parallel, shard
from dijiang.tensor_parallel import HeadParallel

NEAR = dict(window=8, sinks=3, gate=0.0)
CONFIGS = {
    "default": DiJiangConfig(cache_size=5, **NEAR),
    "window only": DiJiangConfig.window_only(8, 0),
    "sinks only": DiJiangConfig(window=0, sinks=3, cache_size=0, gate=0.0),
    "linear": DiJiangConfig(window=0, sinks=0, cache_size=0),
    "decay head": DiJiangConfig(cache_size=5, decay="head", **NEAR),
    "decay token": DiJiangConfig(cache_size=5, decay="token", **NEAR),
    "linear, decay token": DiJiangConfig(window=0, sinks=0, cache_size=0, decay="token"),
    "published": DiJiangConfig.published(),
    "layers differ": DiJiangConfig(
        cache_size=5, per_layer={1: {"window": 4, "sinks": 0, "cache_size": (3, 9)}}, **NEAR
    ),
}
SEQLEN = 70
PAIR = (1, 3)  # ranks of a group that is not all of them


def model_of(name):
    import dijiang
    from tiny import tiny_model

    model = dijiang.convert(tiny_model(), CONFIGS[name])
    torch.manual_seed(7)
    with torch.no_grad():  # maps of queries and keys that are alike would hide mistakes
        for kernel in dijiang.modules.kernels_by_layer(model).values():
            for p in kernel.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model.train()


def ids_of(seqlen=SEQLEN, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 512, (2, seqlen), generator=generator)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def summed(group, loss, model):
    results = loss.detach(), gradients(model)
    for x in (results[0], *results[1].values()):
        dist.all_reduce(x, group=group)
    return results


def train_one(group, name):
    model = model_of(name)
    with sequence_parallel(model, group) as relay:
        out = model(**shard(ids_of(), group))
        out.loss.backward()
    return out.logits.detach(), *summed(group, out.loss, model), relay.sent_bytes


def two_forwards(group):
    """Both before the backward, as accumulated gradients may come."""
    model = model_of("default")
    with sequence_parallel(model, group):
        loss = sum(model(**shard(ids_of(seed=seed), group)).loss for seed in (3, 4))
        loss.backward()
    return summed(group, loss, model)


def kernels_alone(group):
    """Rank 0's first layer has nothing else to learn."""
    model = model_of("default")
    for name, p in model.named_parameters():
        p.requires_grad_("dijiang" in name)
    with sequence_parallel(model, group):
        loss = model(**shard(ids_of(), group)).loss
        loss.backward()
    return summed(group, loss, model)


def late_backward(group):
    """What it says outside the context."""
    model = model_of("default")
    with sequence_parallel(model, group):
        loss = model(**shard(ids_of(), group)).loss
    try:
        loss.backward()
    except RuntimeError as problem:
        return str(problem)


def evaluate(group):
    """Many forwards without a backward, rows of another length, eval mode."""
    model = model_of("default").eval()
    with torch.no_grad(), sequence_parallel(model, group) as relay:
        for _ in range(3):
            logits = model(**shard(ids_of(2 * SEQLEN + 1), group)).logits
    return logits, relay.sent_bytes


def bare_attention(group, seqlen):
    torch.manual_seed(0)
    layer = KernelizedAttention(16, 2, config=DiJiangConfig(window=16, gate=0.0))
    length = seqlen // dist.get_world_size(group)
    with sequence_parallel(layer, group) as relay:
        layer(torch.randn(1, length, 16)).square().sum().backward()
    return relay.sent_bytes


def tensor_parallel(group, name):
    """Logits, gradients and a greedy continuation of a model whose heads are shared out."""
    from torch.distributed.tensor import DeviceMesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"}
    plan |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan |= {"self_attn.dijiang": HeadParallel()}
    model, ids = model_of(name), ids_of()
    mesh = DeviceMesh.from_group(group, "cpu")
    parallelize_module(model, mesh, {f"model.layers.*.{x}": style for x, style in plan.items()})
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: x.full_tensor() if hasattr(x, "full_tensor") else x
             for name, x in gradients(model).items()}  # fmt: skip
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    return out.logits.detach(), grads, model.eval().generate(ids, **options)


def example():
    path = pathlib.Path(__file__).parents[1] / "examples" / "sequence_parallel.py"
    spec = importlib.util.spec_from_file_location("sequence_parallel_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.train(model_of("default"), [ids_of(), ids_of()]))


def everything(folder, rank, size):
    for members in (PAIR, tuple(range(size))):
        group = dist.new_group(members)
        if rank not in members:
            continue
        found = {name: train_one(group, name) for name in CONFIGS}
        found["two forwards"] = two_forwards(group)
        found["kernels alone"] = kernels_alone(group)
        found["late backward"] = late_backward(group)
        found["evaluate"] = evaluate(group)
        if len(members) == 2:
            found |= {
                f"heads: {name}": tensor_parallel(group, name)
                for name, config in CONFIGS.items()
                if not config.group_norm
            }
            found["bytes"] = [bare_attention(group, seqlen) for seqlen in (1024, 65536)]
        torch.save(found, folder / f"{len(members)}.{dist.get_rank(group)}")
    torch.save(example(), folder / f"example.{rank}")
    dist.barrier()


def one_leaves(folder, rank, size, stays):
    """Rank 1 dies, or hangs, after a step: what the others say to the next, and after how long."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(KernelizedAttention(16, 2) for _ in range(2)))
    x = torch.randn(1, 20, 16)
    with sequence_parallel(layers):
        layers(x).sum().backward()
    dist.barrier()
    others = [folder / f"{other}.json" for other in range(size) if other != 1]
    if rank == 1:
        until = time.monotonic() + 60
        while stays and time.monotonic() < until and not all(path.exists() for path in others):
            time.sleep(0.1)
        os._exit(1)
    begin, said = time.monotonic(), "nothing"
    try:
        with sequence_parallel(layers, timeout=datetime.timedelta(seconds=2) if stays else None):
            layers(x).sum().backward()
    except RuntimeError as problem:
        said = str(problem)
    part = folder / f"{rank}.part"
    part.write_text(json.dumps([said, time.monotonic() - begin]))
    part.rename(folder / f"{rank}.json")
    os._exit(0)  # leaves nothing for torch.distributed to wait for


TASKS = {
    "everything": everything,
    "dies": lambda *args: one_leaves(*args, stays=False),
    "hangs": lambda *args: one_leaves(*args, stays=True),
}


def run(folder, rank, size, task):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=240),
    )  # fmt: skip
    TASKS[task](folder, rank, size)
    dist.destroy_process_group()


def main():
    folder, size, task = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if task == "everything":
        import tiny  # noqa: F401  (transformers, once for all)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(folder, rank, size, task)) for rank in range(size)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        if task == "everything" and any(process.exitcode for process in ranks):
            for process in ranks:
                process.kill()  # the others would wait for one that failed
        time.sleep(0.1)
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
