"""The published code's checkpoints: the logits of its formula, written out here from the math.

A layer's attention, heads of d dimensions: phi(x) = softmax(x P), o_t = sum_{s<=t} w_ts v_s with
w_ts = D1_t D2_s phi(q_t).phi(k_s); d groups' norm over a token's outputs; times silu(h W_G).
"""

import json
import math

import dijiang
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from dijiang import DiJiangConfig, KernelizedAttention
from dijiang.modules import AttentionKernel
from dijiang.position_decay import PositionDecay
from dijiang.reference_checkpoint import export_reference_checkpoint, import_reference_checkpoint
from tiny import tiny_model
from transformers import GPTNeoXConfig

VOCAB, HIDDEN, HEADS, INNER, LAYERS, POSITIONS = 96, 48, 3, 80, 2, 64
HEADDIM = HIDDEN // HEADS
IDS = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
A = "gpt_neox.layers.1.attention."


def powers(sign, positions=POSITIONS):
    """The tables before training: (1 - 1/32 .. 1 - 1/512) to the power of +-t."""
    forget = torch.linspace(math.log(1 / 32), math.log(1 / 512), HEADS).exp()
    t = torch.arange(positions)
    return ((1 - forget)[:, None] ** t)[None, :, :, None] ** sign


def checkpoint(kind="fresh", dtype=torch.float32, positions=POSITIONS):
    """A random one. "trained": no table, projection, gain or bias is what it starts as."""
    rng = torch.Generator().manual_seed(1)

    def normal(*shape, std=1.0):
        return std * torch.randn(shape, generator=rng)

    def linear(name, outputs, inputs):
        bias = {name + ".bias": normal(outputs, std=0.1)}
        return {name + ".weight": normal(outputs, inputs, std=inputs**-0.5)} | bias

    def gain(name):
        return {
            name + ".weight": 1 + normal(HIDDEN, std=0.1),
            name + ".bias": normal(HIDDEN, std=0.1),
        }

    i = torch.arange(HEADDIM, dtype=torch.float64)
    dct = torch.cos(math.pi / HEADDIM * (i[None] + 0.5) * i[:, None]) * (2 / HEADDIM) ** 0.5
    dct[0] /= 2**0.5
    tensors = {"gpt_neox.embed_in.weight": normal(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"gpt_neox.layers.{layer}."
        tensors |= gain(at + "input_layernorm") | gain(at + "post_attention_layernorm")
        tensors |= linear(at + "mlp.dense_h_to_4h", INNER, HIDDEN)
        tensors |= linear(at + "mlp.dense_4h_to_h", HIDDEN, INNER)
        at += "attention."
        tensors |= linear(at + "query_key_value", 3 * HIDDEN, HIDDEN)
        tensors |= linear(at + "dense", HIDDEN, HIDDEN) | gain(at + "group_norm")
        tensors[at + "proj_matrix"] = dct.float() * normal(HEADDIM)
        tensors[at + "W_G"] = normal(HIDDEN, HIDDEN, std=HIDDEN**-0.5)
        tensors[at + "D1"], tensors[at + "D2"] = powers(1, positions), powers(-1, positions)
        if kind == "trained":
            tensors[at + "proj_matrix"] += normal(HEADDIM, HEADDIM, std=0.3)
            for table in ("D1", "D2"):
                tensors[at + table] *= normal(1, HEADS, positions, 1)  # of either sign
    tensors |= gain("gpt_neox.final_layer_norm")
    tensors["embed_out.weight"] = normal(VOCAB, HIDDEN, std=HIDDEN**-0.5)
    return {name: x.to(dtype) for name, x in tensors.items()}


def formula(tensors, ids, *, parallel=True, rotary=0.25, base=10000, first_row=False):
    """Logits in float64. ``first_row``: row 0 of D1 and of the mask is the last token's."""
    tensors = {name: x.double() for name, x in tensors.items()}
    T = ids.shape[1]
    tables = tensors[A + "D1"].shape[2]
    assert tables >= T
    x = tensors["gpt_neox.embed_in.weight"][ids]
    turned = int(HEADDIM * rotary)
    angle = torch.outer(torch.arange(T), base ** (-torch.arange(0, turned, 2) / turned)).double()
    rotation = torch.polar(torch.ones_like(angle), angle)  # pairs (j, j + turned / 2)

    def norm(name, x):
        return F.layer_norm(
            x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"], 1e-5
        )

    def linear(name, x):
        return x @ tensors[name + ".weight"].T + tensors[name + ".bias"]

    def rotate(x):
        pairs = torch.complex(x[..., : turned // 2], x[..., turned // 2 : turned]) * rotation
        return torch.cat([pairs.real, pairs.imag, x[..., turned:]], -1)

    def attention(at, h):
        q, k, v = (
            linear(at + "query_key_value", h)
            .unflatten(-1, (HEADS, -1))
            .transpose(1, 2)
            .chunk(3, -1)
        )
        phi_q, phi_k = ((rotate(x) @ tensors[at + "proj_matrix"]).softmax(-1) for x in (q, k))
        query, key = (tensors[at + table][:, :, :T] for table in ("D1", "D2"))
        seen = torch.ones(T, T, dtype=torch.float64).tril()
        if first_row:
            query, seen = query.clone(), seen.clone()
            query[:, :, -1], seen[-1] = query[:, :, 0], seen[0]
        weights = phi_q @ phi_k.mT * query * key.mT * seen
        groups = (weights @ v).transpose(1, 2).flatten(2).unflatten(-1, (HEADDIM, -1))
        deviation = (groups - groups.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        groups = (groups - groups.mean(-1, keepdim=True)) / (deviation + 1e-5).sqrt()
        out = (
            groups.flatten(-2) * tensors[at + "group_norm.weight"] + tensors[at + "group_norm.bias"]
        )
        gate = h @ tensors[at + "W_G"]
        return linear(at + "dense", out * gate * gate.sigmoid())

    for layer in range(LAYERS):
        at = f"gpt_neox.layers.{layer}."
        attended = x + attention(at + "attention.", norm(at + "input_layernorm", x))
        inner = linear(
            at + "mlp.dense_h_to_4h",
            norm(at + "post_attention_layernorm", x if parallel else attended),
        )
        gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = attended + linear(at + "mlp.dense_4h_to_h", gelu)
    return norm("gpt_neox.final_layer_norm", x) @ tensors["embed_out.weight"].T


@torch.no_grad()
def logits(model, ids=IDS, **settings):
    return model(input_ids=ids, use_cache=False, **settings).logits


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_logits_are_the_formulas(kind):
    tensors = checkpoint(kind)
    close(logits(import_reference_checkpoint(tensors)), formula(tensors, IDS))


def test_what_shapes_do_not_tell_comes_from_the_config():
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, max_position_embeddings=POSITIONS, use_parallel_residual=False,
        rotary_pct=0.5, rotary_emb_base=500, tie_word_embeddings=True,
    )  # fmt: skip
    tensors, before = checkpoint("trained"), config.to_dict()
    model = import_reference_checkpoint(tensors, config)
    close(logits(model), formula(tensors, IDS, parallel=False, rotary=0.5, base=500))
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["fresh", "trained"])
@torch.no_grad()
def test_a_step_is_the_forward_s_row_and_not_row_0(kind):
    """The published code decodes by row 0 of D1 and of its mask, whatever the position."""
    tensors = checkpoint(kind)
    model = import_reference_checkpoint(tensors)
    cache, steps = None, []
    for part in IDS.split([17, 6, *[1] * 17], 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    whole = formula(tensors, IDS)
    close(torch.cat(steps, 1), whole)
    row_0 = formula(tensors, IDS, first_row=True)
    torch.testing.assert_close(row_0[:, :-1], whole[:, :-1])
    assert (row_0[:, -1] - whole[:, -1]).abs().max() > 0.1
    new = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(new[:, IDS.shape[1] :], formula(tensors, new).argmax(-1)[:, -9:-1])


def test_padded_and_packed_sequences_begin_at_position_0():
    model = import_reference_checkpoint(checkpoint("trained"))
    short, long = IDS[:1, :11], IDS[1:, :29]
    alone = logits(model, short), logits(model, long)
    pad = torch.zeros(1, 18, dtype=torch.int64)
    for row, real in (([pad, short], slice(18, None)), ([short, pad], slice(0, 11))):
        mask = torch.ones(2, 29, dtype=torch.int64)
        mask[0] = 0
        mask[0, real] = 1
        padded = torch.cat([torch.cat(row, 1), long])
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate gives them
        out = logits(model, padded, attention_mask=mask, position_ids=positions)
        close(out[:1, real], alone[0])
        close(out[1:], alone[1])
    positions = torch.cat([torch.arange(11), torch.arange(29)])[None]
    packed = logits(model, torch.cat([short, long], 1), position_ids=positions)
    close(packed, torch.cat(alone, 1))


@torch.no_grad()
def test_attention_maps_have_the_tables_in_them():
    model = import_reference_checkpoint(checkpoint("trained"))
    kernel, seen = model.gpt_neox.layers[0].attention.dijiang, []
    hook = kernel.register_forward_pre_hook(lambda kernel, args: seen.extend(args))
    logits(model, IDS[:1])
    hook.remove()
    phi_q, phi_k = (kernel.features_k(x, scale=kernel.scale) for x in seen[:2])
    tables = kernel.decay_position
    weights = phi_q @ phi_k.mT * tables.key[None, :, None, : IDS.shape[1]]
    weights = weights.tril() / weights.tril().sum(-1, keepdim=True)
    for one in dijiang.evaluate.attention_maps(model, IDS[0], [(0, 0), (0, 2)]):
        torch.testing.assert_close(one.student, weights[0, one.head], rtol=1e-4, atol=1e-5)


def test_beyond_the_tables_their_decay_goes_on():
    short, long = (import_reference_checkpoint(checkpoint(positions=n)) for n in (16, POSITIONS))
    close(logits(short), logits(long))


def test_tables_get_the_formulas_gradient():
    torch.manual_seed(0)
    decay = PositionDecay(2, torch.tensor([0.1, 0.01]), 9).double()
    with torch.no_grad():
        for table in decay.parameters():
            table.mul_(torch.randn_like(table))
    kernel = AttentionKernel(
        DiJiangConfig.published(
            decay="position", num_positions=9, group_norm=False, output_gate=False
        ),
        heads=2, kv_heads=2, headdim=4,
    ).double()  # fmt: skip
    kernel.decay_position = decay
    q, k, v, grad = torch.randn(4, 1, 2, 9, 4, dtype=torch.float64)
    (kernel(q, k, v) * grad).sum().backward()
    ours = [table.grad for table in decay.parameters()]
    phi = kernel.features_k
    scores = phi(q, scale=kernel.scale) @ phi(k, scale=kernel.scale).mT
    weights = decay.query[None, :, :, None] * decay.key[None, :, None] * scores
    theirs = torch.autograd.grad((weights.tril() @ v * grad).sum(), list(decay.parameters()))
    torch.testing.assert_close(ours, list(theirs))


def test_a_layer_of_one_s_own():
    """Two query heads a kv head, token by token; all that is learned has a gradient."""
    torch.manual_seed(0)
    config = DiJiangConfig.published(
        feature_map="learned_softmax", decay="position", num_positions=12
    )
    layer, x = KernelizedAttention(32, 4, num_kv_heads=2, config=config), torch.randn(2, 15, 32)
    whole = layer(x)
    whole.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        out, state = layer(x[:, :7], return_state=True)
        parts = [out]
        for t in range(7, 15):
            out, state = layer(x[:, t : t + 1], state=state, return_state=True)
            parts.append(out)
        close(torch.cat(parts, 1), whole)
        weight = layer.kernel._kept[1][-1][0]
        layer.kernel.decay_position.query.mul_(2)
        layer(x[:, :1], state=state, return_state=True)
        assert torch.equal(layer.kernel._kept[1][-1][0], 2 * weight)  # kept, but not when changed


def test_what_the_config_refuses():
    for settings, says in (
        ({"decay": "position"}, "num_positions go together"),
        ({"num_positions": 8}, "num_positions go together"),
        ({"decay": "position", "num_positions": 0}, "num_positions must be at least 1"),
        ({"decay": "position", "num_positions": 8}, "needs window=0, sinks=0 and normalize=False"),
    ):
        with pytest.raises(ValueError, match=says):
            DiJiangConfig(**settings)


def written(tensors, folder, name):
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


#: As the published models' config.json has it.
PUBLISHED_CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling.GPTNeoXForCausalLM"},
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "layer_norm_eps": 1e-05, "max_position_embeddings": POSITIONS,
    "model_type": "gpt_neox", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "rotary_emb_base": 500, "rotary_pct": 0.5, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_parallel_residual": True, "vocab_size": VOCAB,
    "rope_scaling": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "other.pt"])
def test_files_and_folders(name, tmp_path):
    tensors = checkpoint("trained")
    file = written(tensors, tmp_path, name)
    close(logits(import_reference_checkpoint(file)), formula(tensors, IDS))
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    written({"step": torch.zeros(3)}, tmp_path, "training_args.bin")  # what a Trainer leaves there
    for source in [file] if name == "other.pt" else [file, str(tmp_path)]:
        model = import_reference_checkpoint(source)
        close(logits(model), formula(tensors, IDS, rotary=0.5, base=500))
        assert model.dtype == torch.float32 and not model.training


def test_sharded_folders(tmp_path):
    tensors = checkpoint()
    names = list(tensors)
    for i, part in enumerate((names[:20], names[20:])):
        written({x: tensors[x] for x in part}, tmp_path, f"pytorch_model-0000{i + 1}-of-00002.bin")
    close(logits(import_reference_checkpoint(tmp_path)), formula(tensors, IDS))
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"embed_in\.weight of 2 dimensions"):
        import_reference_checkpoint(tmp_path)


def test_export_gives_the_checkpoint_back_bit_for_bit(tmp_path):
    tensors = checkpoint("trained")
    model = import_reference_checkpoint(tensors)
    exported = export_reference_checkpoint(model)
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
    again = import_reference_checkpoint(
        written(exported, tmp_path, "model.safetensors"), model.config
    )
    assert again.config.dijiang == model.config.dijiang
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)  # copies, all


def test_save_and_load(tmp_path):
    model = import_reference_checkpoint(checkpoint("trained"))
    model.save_pretrained(tmp_path)
    loaded = dijiang.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    exported, again = map(export_reference_checkpoint, (model, loaded))
    assert all(torch.equal(exported[name], again[name]) for name in exported)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """A checkpoint's, which float32 holds exactly; and the model's."""
    tensors = checkpoint("trained", dtype)
    model = import_reference_checkpoint(tensors)
    expected = formula(tensors, IDS)
    close(logits(model), expected)
    low = logits(model.to(dtype))
    assert low.dtype == dtype
    # Three bits of bfloat16's eight: the error of a hundred rounded products and sums on the way.
    relative = (low.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert relative < 16 * torch.finfo(dtype).eps


def test_everything_wrong_is_said_at_once_and_nothing_changed():
    tensors = checkpoint()
    del tensors[A + "W_G"], tensors["embed_out.weight"]
    tensors |= {
        A + "D1": torch.ones(1, HEADS, 7, 1),
        A + "rotary_emb.inv_freq": torch.ones(2),
        A + "proj_matrix": torch.ones(16, 16, dtype=torch.int64),
        A + "dense.bias": [0.0] * HIDDEN,
        A + "D2": torch.full((1, HEADS, POSITIONS, 1), math.inf),
    }
    before = dict(tensors)
    with pytest.raises(ValueError) as error:
        import_reference_checkpoint(tensors)
    said = str(error.value).splitlines()[1:]
    expected = [
        f"{A}W_G is missing",
        "embed_out.weight is missing",
        f"{A}dense.bias must be a floating-point tensor, got list",
        f"{A}proj_matrix must be a floating-point tensor, got torch.int64",
        f"{A}D1 must have shape (1, {HEADS}, {POSITIONS}, 1), got (1, {HEADS}, 7, 1)",
        f"{A}D2 has numbers that are not finite",
        f"{A}rotary_emb.inv_freq is unknown",
    ]
    assert sorted(said) == sorted(expected)
    assert tensors.keys() == before.keys() and all(tensors[name] is before[name] for name in before)


def test_what_is_no_checkpoint(tmp_path):
    softmax = {name: x for name, x in checkpoint().items() if "D1" not in name}
    with pytest.raises(ValueError, match=r"attention\.D1 of 4 dimensions.*\n?.*dijiang\.convert"):
        import_reference_checkpoint(softmax)
    with pytest.raises(ValueError, match="48 hidden dimensions, which no model has"):
        import_reference_checkpoint(
            checkpoint() | {"gpt_neox.layers.0.attention.D1": torch.ones(1, 5, 9, 1)}
        )
    with pytest.raises(TypeError, match="a state dict or a path, got int"):
        import_reference_checkpoint(3)
    with pytest.raises(TypeError, match="GPTNeoXConfig or None, got dict"):
        import_reference_checkpoint(checkpoint(), PUBLISHED_CONFIG)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.bin"):
        import_reference_checkpoint(tmp_path / "none.bin")
    with pytest.raises(FileNotFoundError, match="neither model"):
        import_reference_checkpoint(tmp_path)
    file = written(checkpoint(), tmp_path, "model.bin")
    for text, says in (("{", "Expecting"), ('{"model_type": "llama"}', "'gpt_neox', got 'llama'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json is damaged: .*{says}"):
            import_reference_checkpoint(file)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "noise"])
def test_damaged_files(name, damage, tmp_path):
    file = written(checkpoint(), tmp_path, name)
    whole = file.read_bytes()
    file.write_bytes({"cut short": whole[:-999], "empty": b"", "noise": b"noise" * 99}[damage])
    with pytest.raises(ValueError, match=r"is damaged or holds more"):
        import_reference_checkpoint(file)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    file = written(checkpoint() | {"trap": Trap()}, tmp_path, "pytorch_model.bin")
    with pytest.raises(ValueError, match="is damaged or holds more than a state dict"):
        import_reference_checkpoint(file)


def test_what_export_refuses():
    with pytest.raises(TypeError, match="GPTNeoXForCausalLM, got LlamaForCausalLM"):
        export_reference_checkpoint(tiny_model())
    model = import_reference_checkpoint(checkpoint())
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dijiang.features_k.matrix[2, 0, 0] += 1
    with pytest.raises(ValueError, match="heads of layer 1 were trained to projections"):
        export_reference_checkpoint(model)
    dijiang.restore(model)
    with pytest.raises(ValueError, match="not converted"):
        export_reference_checkpoint(model)
    dijiang.convert(model, DiJiangConfig.published())
    with pytest.raises(ValueError, match="no place for feature_map='softmax' and not 'learned_s"):
        export_reference_checkpoint(model)
