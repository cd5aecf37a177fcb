"""A training loop of one's own under torchrun: weights sharded over the ranks by FSDP2.

    torchrun --nproc-per-node 8 examples/fsdp.py --model HuggingFaceTB/SmolLM2-135M --out student

Each rank reads its own rows. Without a GPU the ranks are processes, and gloo joins them.
"""

import argparse

import dijiang
import torch
import torch.distributed as dist
from dijiang import data
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: SmolLM2-135M")
    parser.add_argument("--data", help="text file, folder or dataset id; none: Python's own help")
    parser.add_argument("--out", default="student")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dist.init_process_group("cpu:gloo" if device.type == "cpu" else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())

    model, tokenizer = dijiang.load_base(options.model)
    rows = data.pack(data.load_text(options.data).train, tokenizer, options.length)
    dijiang.convert(model.to(device)).train()
    mesh = torch.distributed.init_device_mesh(device.type, (ranks,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for step in range(options.steps):
        ids = rows[(step * ranks + rank) % len(rows)][None].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1} loss {mean.item() / ranks:.4f}", flush=True)

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    if rank == 0:
        model.save_pretrained(options.out, state_dict=weights)
        tokenizer.save_pretrained(options.out)
    dist.barrier()  # torchrun ends all ranks when one ends badly
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
