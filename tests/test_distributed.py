"""Sequence parallelism: ranks with a slice each are one process with the whole rows."""

import itertools
import json
import os
import subprocess
import sys
import types

import dijiang
import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
from attention_cases import (
    FEATURES,
    HEADDIM,
    HEADDIM_V,
    KV_HEADS,
    assert_close,
    error,
    make_case,
    true_state,
)
from dijiang import DiJiangConfig, KernelizedAttention, ops, reference
from dijiang.distributed import sequence_parallel, shard
from dijiang.modules import kernels_of
from dijiang.ops._slice import attend_slice
from dijiang.ops._slice_grads import CARRIED
from dijiang.tensor_parallel import HeadParallel
from tiny import tiny_model
from torch.distributed.tensor import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

# ---- one process: a slice goes on from the state before, and gradients through it ----------------


def in_slices(case, cuts):
    options = dict(window=0, sinks=0, cache_size=0, normalize=True) | case.options
    sizes = {name: options[name] for name in ("window", "sinks", "cache_size")}
    state = ops.empty_attention_state(
        case.q.shape[0], KV_HEADS, 0 if case.fk is None else FEATURES, HEADDIM, HEADDIM_V,
        dtype=case.q.dtype, device="cpu", decay=case.log_decay is not None, **sizes,
    )  # fmt: skip
    outs = []
    for begin, end in itertools.pairwise([0, *cuts, case.q.shape[2]]):
        one = case.slice(begin, end)
        out, state = attend_slice(
            one.q, one.k, one.v, one.fq, one.fk, state, start=begin, scale=HEADDIM**-0.5,
            log_decay=one.log_decay, **options,
        )  # fmt: skip
        outs.append(out)
    return torch.cat(outs, 2), state


def weighed(out, state):
    """A number that depends on every output and on the far state."""
    generator = torch.Generator().manual_seed(0)
    parts = (out, *true_state(state))
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in parts)


@pytest.mark.parametrize("cuts", [[11, 24], [1, 2, 16]], ids=str)
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize(
    "near",
    [(4, 0, 0), (4, 2, 0), (4, 2, 3), (4, 6, 5), (4, 1, (5, 0)), (8, 1, 8), (0, 3, 0)],
    ids=str,
)
def test_slices_are_the_whole(near, decay, cuts):
    """Gradients too, in float64, against autograd through the token-by-token form."""
    options = dict(zip(("window", "sinks", "cache_size"), near, strict=True))
    check_slices(make_case("exp", decay, seqlen=45, **options), cuts)


@pytest.mark.parametrize("kind", [None, "softmax", "elu", "dct", "shared"])
def test_every_kind_of_features(kind):
    check_slices(make_case(kind, seqlen=45, window=4, sinks=2, cache_size=3), [11, 24])


def test_without_the_denominator():
    check_slices(make_case("exp", seqlen=45, window=4, sinks=2, normalize=False), [11, 24])


def test_queries_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr("dijiang.ops._slice_grads._CHUNK", 7)
    case = make_case("exp", "token", seqlen=45, window=4, sinks=2, cache_size=3)
    check_slices(case, [11, 24])


@pytest.mark.parametrize("near", [(8, 3, 5), (8, 0, 0)], ids=str)
def test_features_far_apart(near):
    """Features of up to 2^900: a key outweighs all far ones by itself once it is far."""
    options = dict(zip(("window", "sinks", "cache_size"), near, strict=True))
    case = make_case("exp", "token", seqlen=120, size=6, **options)
    inputs = list((case := case.to(torch.float64).require_grad()).inputs().values())
    out, whole = in_slices(case, [31, 70])[0], case.run()
    assert_close(out, whole.detach(), torch.float64)
    grads, truths = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, whole))
    for name, grad, truth in zip(case.inputs(), grads, truths, strict=True):
        assert error(grad, truth) < 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_the_operator_in_low_precision(dtype):
    """Gradients of q, k and v are sums of two tensors rounded to dtype."""
    case = make_case("exp", "token", seqlen=120, window=8, sinks=3, cache_size=5)
    inputs = list((case := case.to(dtype).require_grad()).inputs().values())
    out, whole = in_slices(case, [31, 70])[0], case.run()
    rounding = 2 * torch.finfo(dtype).eps
    assert error(out, whole) <= max(rounding, 1e-6)
    grads, truths = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, whole))
    for name, grad, truth in zip(case.inputs(), grads, truths, strict=True):
        assert error(grad, truth) <= max(rounding if name in "qkv" else 0, 1e-5), name


def check_slices(case, cuts):
    case = case.to(torch.float64).require_grad()
    inputs = list(case.inputs().values())
    out, state = in_slices(case, cuts)
    whole, final = case.run(reference, "_recurrent", return_state=True)
    assert_close(out, whole.detach(), torch.float64)
    grads = torch.autograd.grad(weighed(out, state), inputs, allow_unused=True)
    truths = torch.autograd.grad(weighed(whole, final), inputs, allow_unused=True)
    for name, grad, truth in zip(case.inputs(), grads, truths, strict=True):
        if truth is not None and truth.any():
            assert error(grad, truth) < 1e-10, name


# ---- ranks ---------------------------------------------------------------------------------------


def run_ranks(folder, ranks, task):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, worker.__file__, folder, str(ranks), task], env=env, timeout=600,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(folder, 4, "everything")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=[2, 4])
def found(request, four_ranks):
    """What each rank of a group found, in their order."""
    ranks = range(request.param)
    return [torch.load(four_ranks / f"{request.param}.{rank}") for rank in ranks]


def assert_same_gradients(found, model):
    truth = worker.gradients(model)
    largest = max(float(x.abs().max()) for x in truth.values())
    assert found.keys() == truth.keys()
    for name, grad in found.items():
        # Rounding of what is much smaller than the rest is that of the rest.
        bound = 1e-5 * max(float(truth[name].abs().max()), 1e-2 * largest)
        assert float((grad - truth[name]).abs().max()) <= bound, name


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_ranks_are_one_process(name, found):
    model, ids = worker.model_of(name), worker.ids_of()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    logits = torch.cat([one[name][0] for one in found], 1)
    torch.testing.assert_close(logits, out.logits, rtol=1e-5, atol=1e-5)
    for one in found:
        _, loss, gradients, _ = one[name]
        torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-6, atol=0)
        assert_same_gradients(gradients, model)


def test_two_forwards_before_the_backward(found):
    model = worker.model_of("default")
    batches = [worker.ids_of(seed=seed) for seed in (3, 4)]
    sum(model(input_ids=ids, labels=ids).loss for ids in batches).backward()
    for one in found:
        assert_same_gradients(one["two forwards"][1], model)


def test_frozen_base(found):
    model, ids = worker.model_of("default"), worker.ids_of()
    for name, p in model.named_parameters():
        p.requires_grad_("dijiang" in name)
    model(input_ids=ids, labels=ids).loss.backward()
    for one in found:
        assert_same_gradients(one["kernels alone"][1], model)


def test_backward_belongs_within(found):
    assert all("call backward() within the context" in one["late backward"] for one in found)


def test_evaluation(found):
    model, ids = worker.model_of("default").eval(), worker.ids_of(2 * worker.SEQLEN + 1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    logits = torch.cat([one["evaluate"][0] for one in found], 1)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


def test_bytes_sent_do_not_depend_on_seqlen(four_ranks, found):
    """A bare attention's at 1,024 and 65,536 tokens; a model's, counted by hand."""
    first, last = (torch.load(four_ranks / f"2.{rank}")["bytes"] for rank in range(2))
    assert first[0] == first[1] > last[0] == last[1] > 0
    state = [kernel.empty_state(2, torch.float32, "cpu")
             for kernel in kernels_of(worker.model_of("default"))]  # fmt: skip
    forward = sum(x.nbytes for one in state for x in one if x is not None)
    carried = [getattr(one, name) for one in state for name in CARRIED]
    backward = sum(x.nbytes for x in carried if x is not None)
    ranks = len(found)
    for rank, one in enumerate(found):
        sent = forward * (rank < ranks - 1) + backward * (rank > 0)
        assert one["default"][3] == sent
        assert one["evaluate"][1] == 3 * forward * (rank < ranks - 1)


def test_example(four_ranks):
    """Every rank tells the loss of the whole rows, and it is one process's."""
    model, ids = worker.model_of("default"), worker.ids_of()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-4), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    for rank in range(4):
        found = torch.tensor([loss for loss, _ in torch.load(four_ranks / f"example.{rank}")])
        torch.testing.assert_close(found, torch.stack(losses), rtol=1e-5, atol=0)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", [n for n, c in worker.CONFIGS.items() if not c.group_norm])
def test_heads_over_ranks_are_one_process(name, four_ranks):
    model, ids = worker.model_of(name), worker.ids_of()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    continued = model.eval().generate(ids, **options)
    for rank in range(2):
        logits, grads, tokens = torch.load(four_ranks / f"2.{rank}")[f"heads: {name}"]
        torch.testing.assert_close(logits, out.logits, rtol=1e-5, atol=1e-5)
        assert_same_gradients(grads, model)
        assert torch.equal(tokens, continued)


@pytest.mark.parametrize("task", ["dies", "hangs"])
def test_a_rank_that_leaves_is_an_error(task, tmp_path):
    """Soon, and by name: at once where it died, after the time limit of 2 s where it hangs."""
    run_ranks(tmp_path, 3, task)
    for rank in (0, 2):
        said, seconds = json.loads((tmp_path / f"{rank}.json").read_text())
        assert f"rank {rank} could not" in said and "rank 1, which died" in said
        assert seconds < 30


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_one_rank_alone(alone):
    model, ids = worker.model_of("default"), worker.ids_of()
    with sequence_parallel(model) as relay:
        loss = model(**shard(ids)).loss
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    assert relay.sent_bytes == 0


def test_refuses(alone):
    model, ids = worker.model_of("default"), worker.ids_of()
    with pytest.raises(ValueError, match="Linear has no AttentionKernel"):
        sequence_parallel(torch.nn.Linear(2, 2)).__enter__()
    positions = torch.arange(ids.shape[1])[None]
    refused = {
        "position_ids must be given": dict(position_ids=None),
        r"position_ids must begin at 0, the number .* got 5": dict(position_ids=positions + 5),
        "without a cache": dict(use_cache=True),
        "packed sequences": dict(position_ids=positions % 10),
        "no padding": dict(attention_mask=(positions > 3).expand(2, -1).long()),
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message), sequence_parallel(model):
            model(**dict(input_ids=ids, position_ids=positions) | changes)
    again = pytest.raises(ValueError, match="within sequence_parallel already")
    with again, sequence_parallel(model), sequence_parallel(model):
        pass
    softmax = pytest.raises(ValueError, match="softmax_mode")
    with softmax, sequence_parallel(model), dijiang.softmax_mode(model):
        model(input_ids=ids, position_ids=positions)
    assert all(kernel.relay is None for kernel in dijiang.modules.kernels_by_layer(model).values())
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == ids.shape[1]


def test_refuses_layers_with_softmax(alone):
    model = dijiang.convert(tiny_model(), DiJiangConfig(layers=[1]))
    with pytest.raises(ValueError, match="1 of 2 layers keep softmax"):
        sequence_parallel(model).__enter__()


def test_refuses_gradient_checkpointing(alone):
    model = worker.model_of("default")
    model.gradient_checkpointing_enable()
    with sequence_parallel(model), pytest.raises(ValueError, match="gradient checkpointing"):
        model(**shard(worker.ids_of()))


def test_shard(alone):
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    labels = torch.tensor([[5, 6, -100], [8, 9, 1]])
    part = shard(ids, labels=labels)
    assert part["shift_labels"].tolist() == [[6, -100, -100], [9, 1, -100]]
    assert part["num_items_in_batch"] == 3 and part["position_ids"].tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="a token for each of 1 ranks"):
        shard(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the shape of ids, \(2, 3\), got \(2, 2\)"):
        shard(ids, labels=labels[:, 1:])


def test_head_parallel_refuses(alone):
    mesh = DeviceMesh("cpu", [0])
    model = worker.model_of("published")
    with pytest.raises(TypeError, match="expected an AttentionKernel, got Linear"):
        parallelize_module(model, mesh, {"lm_head": HeadParallel()})
    with pytest.raises(ValueError, match="group_norm has channels of all heads"):
        parallelize_module(model, mesh, {"model.layers.*.self_attn.dijiang": HeadParallel()})
    kernel, three = KernelizedAttention(16, 4).kernel, types.SimpleNamespace(size=lambda: 3)
    with pytest.raises(ValueError, match="got 3 ranks and 4 heads"):
        HeadParallel()._apply(kernel, three)


def test_not_initialised():
    with pytest.raises(RuntimeError, match="init_process_group"):
        sequence_parallel(KernelizedAttention(16, 2)).__enter__()
