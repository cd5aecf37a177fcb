"""A base model in 8 or 4 bits: converted, trained by adapters, generating."""

import dijiang
import pytest
import torch
from dijiang import DiJiangConfig
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama(tmp_path), device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
    )  # fmt: skip
    assert type(model.model.layers[0].self_attn.q_proj).__name__.startswith("Linear" + str(bits))
    dijiang.convert(model, DiJiangConfig(window=8, sinks=2, gate=0.0))
    kernels = [p for name, p in model.named_parameters() if ".dijiang." in name]
    assert kernels and all(p.dtype == torch.float32 for p in kernels)
    ids = torch.randint(2, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    cached, whole = (
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=x) for x in (True, False)
    )
    assert torch.equal(cached, whole)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["dijiang"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > 4 and all(bool(p.grad.isfinite().all()) for p in trained)
