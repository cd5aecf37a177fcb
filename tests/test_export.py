"""The exported step, in Python and in C++ without Python, against generate()."""

import shutil
import subprocess
from pathlib import Path

import dijiang
import pytest
import torch
from dijiang import DiJiangCache, DiJiangConfig, _library, states
from dijiang.export import decode_program, decode_state, export_decode
from tiny import tiny_model
from torch._inductor.package import load_package
from torch.utils import cpp_extension

CONFIGS = {
    "default": DiJiangConfig(window=8, sinks=2, gate=0.0),
    "far alone": DiJiangConfig(window=0, sinks=0),
    "token decay": DiJiangConfig(window=8, sinks=2, gate=0.0, decay="token"),
    "by layer": DiJiangConfig(
        window=8, sinks=2, gate=0.0,
        per_layer={0: {"cache_size": (5, 2)}, 1: {"feature_map": None, "window": 6}},
    ),
}  # fmt: skip
NEW = 40


def converted(config="default", **overrides):
    return dijiang.convert(tiny_model(initializer_range=0.3, **overrides), CONFIGS[config])


def ids_of(batch, length, seed=0):
    return torch.randint(2, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids):
    """NEW greedy tokens; not the same few over and over."""
    new = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    new = new[:, ids.shape[1] :]
    assert all(len(set(row)) > 10 for row in new.tolist())
    return new


@torch.no_grad()
def by_steps(step, state, ids):
    for token in ids.split(1, 1):
        new = [step(token, *state).argmax(-1, keepdim=True)]
    while len(new) < NEW:
        new.append(step(new[-1], *state).argmax(-1, keepdim=True))
    return torch.cat(new, 1)


@pytest.mark.parametrize("config", CONFIGS)
def test_program_is_generate(config):
    model, ids = converted(config), ids_of(3, 30)
    expected = generate(model, ids)
    step = decode_program(model).module()
    assert torch.equal(by_steps(step, decode_state(model), ids[:1]), expected[:1])
    three = [x.repeat(3, *[1] * (x.dim() - 1)) for x in decode_state(model)]
    assert torch.equal(by_steps(step, three, ids), expected)


def test_program_goes_on_from_rows_of_different_ages():
    model = converted()
    prompts = [ids_of(1, length, seed=length) for length in (30, 7)]
    cache = states.stack_states([dijiang.prefill(model, ids[:, :-1]) for ids in prompts])
    last = torch.cat([ids[:, -1:] for ids in prompts])
    step = decode_program(model).module()
    for _ in range(2):  # the cache is left as it was
        new = by_steps(step, decode_state(model, cache), last)
        assert torch.equal(new, torch.cat([generate(model, ids) for ids in prompts]))


def test_model_is_left_as_it_was():
    model, ids = converted().train(), ids_of(1, 20)
    decode_program(model)
    assert model.training
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = converted()
    with pytest.raises(ValueError, match="decode_program: this LlamaForCausalLM is not converted"):
        decode_program(tiny_model())
    mixed = dijiang.convert(tiny_model(), CONFIGS["default"].replace(layers=[1]))
    with pytest.raises(ValueError, match="export_decode: layers 0 kept softmax attention"):
        export_decode(mixed, tmp_path / "model.pt2")
    for path in (tmp_path / "model.so", tmp_path / "none" / "model.pt2"):
        with pytest.raises(ValueError, match=r"path must be a \.pt2 file in an existing folder"):
            export_decode(model, path)
    other = dijiang.prefill(converted(num_key_value_heads=1), ids_of(1, 9))
    for cache, error, says in (
        ({}, TypeError, "cache must be a DiJiangCache, got dict"),
        (DiJiangCache(model.config), ValueError, "cache is empty"),
        (other, ValueError, r"0\.kv of the cache must have shape \(1, 2, 16, 16\)"),
    ):
        with pytest.raises(error, match=f"decode_state: {says}"):
            decode_state(model, cache)
        with pytest.raises(error, match=f"export_decode: {says}"):
            export_decode(model, tmp_path / "model.pt2", cache)
    assert not list(tmp_path.iterdir())


# ---- compiled: a minute each --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["default", "far alone"])
def package(request, tmp_path_factory):
    """A compiled model; a prompt; how much of it `start` has read; what comes after it."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    model, ids = converted(request.param), ids_of(1, 30)
    read = 0 if request.param == "default" else 21
    cache = dijiang.prefill(model, ids[:, :read]) if read else None
    folder = tmp_path_factory.mktemp("package")
    path = export_decode(model, folder / "model.pt2", cache)
    assert list(folder.iterdir()) == [path]
    return path, ids[:, read:], generate(model, ids)


@pytest.mark.slow
def test_package_in_python(package):
    path, ids, expected = package
    start, step = load_package(path, "start"), torch._inductor.aoti_load_package(path)
    for _ in range(2):  # a new state each time
        assert torch.equal(by_steps(step, start(), ids), expected)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, built against LibTorch alone; called with the model and so on."""
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")
    if torch.version.cuda and cpp_extension.CUDA_HOME is None:
        pytest.skip("CMake finds a torch with CUDA only where there is a CUDA toolkit")
    source = Path(__file__).parents[1] / "examples/cpp/generate"
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", source, "-B", build, prefix], check=True)
    subprocess.run(["cmake", "--build", build], check=True)

    def run(*arguments):
        command = [build / "generate", _library._FOLDER / "dijiang_ops.so", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_package_in_cpp(package, program, tmp_path):
    path, ids, expected = package
    done = program(path, NEW, *ids[0].tolist())
    assert [int(x) for x in done.stdout.split()] == expected[0].tolist(), done.stderr
    # A token that there is not, and no such file: an error and no crash.
    assert program(path, 1, 512).returncode == program(tmp_path / "none", 1, 5).returncode == 1
