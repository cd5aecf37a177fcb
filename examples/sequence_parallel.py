"""Trains on rows longer than one process holds: each rank has a slice of every row.

    torchrun --nproc-per-node 4 examples/sequence_parallel.py --model HuggingFaceTB/SmolLM2-135M \\
        --length 65536 --out student

What the ranks send each other does not depend on the length: docs/parallel.md.
"""

import argparse

import dijiang
import torch
import torch.distributed as dist
from dijiang import data
from dijiang.distributed import sequence_parallel, shard


def train(model, rows, learning_rate=2e-4):
    """A step for each (batch, seqlen) of rows, which all ranks have; yields the loss of the whole
    and the bytes this rank sent."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for ids in rows:
        with sequence_parallel(model) as relay:
            loss = model(**shard(ids)).loss  # this rank's share
            loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        yield total.item(), relay.sent_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: SmolLM2-135M")
    parser.add_argument("--data", help="text file, folder or dataset id; none: Python's own help")
    parser.add_argument("--out", default="student")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    model, tokenizer = dijiang.load_base(options.model)
    rows = data.pack(data.load_text(options.data).train, tokenizer, options.length)
    torch.manual_seed(0)  # the ranks' models must be the same
    dijiang.convert(model).train()
    batches = (rows[step % len(rows)][None] for step in range(options.steps))
    for step, (loss, sent) in enumerate(train(model, batches)):
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {loss:.4f}, {sent} bytes sent", flush=True)
    if dist.get_rank() == 0:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
