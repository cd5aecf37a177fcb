"""A training loop of one's own with Accelerate: the same script for one device, DDP or DeepSpeed.

accelerate launch examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M --out student
accelerate launch --use_deepspeed --zero_stage 2 examples/accelerate_loop.py ...
"""

import argparse

import dijiang
import torch
from accelerate import Accelerator
from dijiang import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: SmolLM2-135M")
    parser.add_argument("--data", help="text file, folder or dataset id; none: Python's own help")
    parser.add_argument("--out", default="student")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, tokenizer = dijiang.load_base(options.model)
    rows = data.pack(data.load_text(options.data).train, tokenizer, options.length)
    dijiang.convert(model).train()
    model, optimizer, batches = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=2e-4), torch.utils.data.DataLoader(rows)
    )
    step = 0
    while step < options.steps:
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean = accelerator.gather(loss.detach()).mean().item()
            accelerator.print(f"step {step} loss {mean:.4f}", flush=True)
            if step == options.steps:
                break

    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.out, state_dict=weights)
        tokenizer.save_pretrained(options.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
