"""Supervised fine-tuning with TRL, short samples packed into one row without seeing each other.

    python examples/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data book.txt --out student

Packing without padding is meant for attention that can tell sequences apart; linear attention can,
by the positions that TRL passes on.
"""

import argparse

import dijiang
import torch
from datasets import Dataset
from dijiang import data
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: SmolLM2-135M")
    parser.add_argument("--data", help="text file, folder or dataset id; none: Python's own help")
    parser.add_argument("--out", default="student")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    model, tokenizer = dijiang.load_base(options.model)
    samples = [part for text in data.load_text(options.data).train for part in text.split("\n\n")]
    dijiang.convert(model)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            options.out, max_length=options.length, packing=True, max_steps=options.steps,
            per_device_train_batch_size=1, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(), bf16=False, seed=0,
        ),
        train_dataset=Dataset.from_dict({"text": samples}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
