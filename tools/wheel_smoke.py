"""What an installed dijiang must do with the torch beside it; tools/wheel_check.sh runs this."""

import sys
import tempfile

import dijiang
import torch
import transformers
from dijiang import _library, ops, reference

# It is of one Python version, the operators are of all: these must not need it.
sys.modules["dijiang._core"] = None


def close(made, wanted):
    for got, expected in zip(made, wanted, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-5)


def with_gradients(function, *leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out.sin().sum(), leaves)


def kernelized(function):
    def run(q, k, v, omega):
        fq, fk = ops.FeatureParams(omega.repeat_interleave(2, 0)), ops.FeatureParams(omega)
        return function(q, k, v, fq, fk, window=8, sinks=2, cache_size=4)

    return run


def check_operators():
    """Results and gradients in float32 against the float64 oracles, and under torch.compile."""
    q, k, v = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    features = q.exp(), k.exp(), v
    cases = (
        (ops.dct, reference.dct, (torch.randn(3, 4, 5, 24),)),
        (ops.causal_linear_attention, reference.causal_linear_attention, features),
        (
            kernelized(ops.kernelized_attention),
            kernelized(reference.kernelized_attention),
            (q, k, v, torch.randn(2, 16, 8)),
        ),
    )
    for operator, oracle, given in cases:
        close(
            with_gradients(operator, *given), with_gradients(oracle, *(x.double() for x in given))
        )
    compiled = torch.compile(ops.causal_linear_attention, fullgraph=True)
    close(
        with_gradients(compiled, *features),
        with_gradients(ops.causal_linear_attention, *features),
    )


@torch.no_grad()
def check_model():
    """A tiny LLaMA: converted, generated from with and without its cache, saved, restored."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 256, (2, 40))
    softmax = model(ids).logits
    dijiang.convert(model, dijiang.DiJiangConfig(window=8, sinks=2, cache_size=4, gate=0.0))
    logits = model(ids).logits
    assert not torch.allclose(logits, softmax)
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached = model.generate(ids, **options)
    assert cached.shape == (2, 70)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(dijiang.from_pretrained(folder)(ids).logits, logits)
    assert torch.equal(dijiang.restore(model)(ids).logits, softmax)


def check_core():
    del sys.modules["dijiang._core"]
    from dijiang import _core

    x = torch.randn(4, 24, dtype=torch.float64)
    close([torch.from_numpy(_core.dct(x.numpy()))], [reference.dct(x)])


torch.manual_seed(0)
transformers.utils.logging.disable_progress_bar()
check_operators()
check_model()
check_core()
print(
    f"ok: dijiang {dijiang.__version__}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}, Python {sys.version.split()[0]}; "
    f"CUDA operators: {_library.why_no_cuda() or 'loaded'}"
)
