"""LoRA adapters on the projections, and what convert added trained whole, with PEFT.

    python examples/lora.py --model HuggingFaceTB/SmolLM2-135M --data book.txt --out adapter

The adapter is saved without the base model's weights. To use it again, convert that model the same
way, by the config that lies beside the adapter:

    config = dijiang.DiJiangConfig.from_dict(AutoConfig.from_pretrained("adapter").dijiang)
    model = dijiang.convert(AutoModelForCausalLM.from_pretrained(name), config)
    model = PeftModel.from_pretrained(model, "adapter")     # .merge_and_unload() makes it plain
"""

import argparse

import dijiang
import torch
from dijiang import data
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder, hub id or GGUF file; none: SmolLM2-135M")
    parser.add_argument("--data", help="text file, folder or dataset id; none: Python's own help")
    parser.add_argument("--out", default="adapter")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()

    model, tokenizer = dijiang.load_base(options.model)
    rows = data.pack(data.load_text(options.data).train, tokenizer, options.length)
    dijiang.convert(model, calibration=rows[:1])  # a closed gate would not learn
    model = get_peft_model(
        model,
        LoraConfig(
            r=options.rank, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj"],
            modules_to_save=["dijiang"],  # the modules that convert added
        ),
    )  # fmt: skip
    model.print_trainable_parameters()
    Trainer(
        model,
        TrainingArguments(
            options.out, max_steps=options.steps, learning_rate=1e-3, save_strategy="no",
            per_device_train_batch_size=1, logging_steps=1, report_to="none",
            use_cpu=not torch.cuda.is_available(), seed=0,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    ).train()  # fmt: skip
    model.save_pretrained(options.out)
    model.config.save_pretrained(options.out)  # what it was converted to: calibration chose
    return model


if __name__ == "__main__":
    main()
