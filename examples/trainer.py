"""Trains a converted model on text with transformers' Trainer.

    python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M --data book.txt --out student
    torchrun --nproc-per-node 8 examples/trainer.py ...     # DistributedDataParallel

Killed and started again with --resume it goes on from the last checkpoint in --out.
"""

import argparse

import dijiang
import torch
from dijiang import data
from transformers import Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: SmolLM2-135M")
    parser.add_argument("--data", help="text file, folder or dataset id; none: Python's own help")
    parser.add_argument("--out", default="student")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    model, tokenizer = dijiang.load_base(options.model)
    rows = data.pack(data.load_text(options.data).train, tokenizer, options.length)
    dijiang.convert(model, calibration=rows[:1])  # the one line that a softmax model lacks
    trainer = Trainer(
        model,
        TrainingArguments(
            options.out, max_steps=options.steps, learning_rate=options.learning_rate,
            per_device_train_batch_size=1, save_steps=options.save_steps, logging_steps=1,
            report_to="none", use_cpu=not torch.cuda.is_available(), seed=0,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
