"""Bad input to the operators: each error says what was expected, what was given, and the cure."""

import subprocess
import sys

import pytest
import torch
from dijiang import _library, ops
from dijiang.ops import FeatureParams, LinearAttentionState, empty_attention_state
from torch._subclasses.fake_tensor import FakeTensorMode

B, H, HKV, T, D, M, DV = 2, 4, 2, 10, 8, 5, 6


def qkv(dtype=torch.float32, seqlen=T):
    q = torch.rand(B, H, seqlen, D, dtype=dtype)
    k = torch.rand(B, HKV, seqlen, D, dtype=dtype)
    return q, k, torch.rand(B, HKV, seqlen, DV, dtype=dtype)


def params(heads, features=M, **fields):
    return FeatureParams(torch.randn(heads, features, D), **fields)


def linear_state(dtype=torch.float32, batch=B):
    z = torch.zeros(batch, HKV, D, dtype=dtype)
    return LinearAttentionState(z[..., None].repeat(1, 1, 1, DV), z, z - 1e30)


def attention_state(window=4, sinks=1, **options):
    return empty_attention_state(
        B, HKV, M, D, DV, window=window, sinks=sinks, dtype=torch.float32, device="cpu", **options
    )


linear, kernelized = ops.causal_linear_attention, ops.kernelized_attention
linear_update, update = ops.causal_linear_attention_update, ops.kernelized_attention_update


def refuses(error, message, f, *args, **kwargs):
    with pytest.raises(error) as raised:
        f(*args, **kwargs)
    assert message in str(raised.value), str(raised.value)


@pytest.mark.parametrize("op,f", [("causal_linear_attention", linear),
                                  ("kernelized_attention", kernelized)])  # fmt: skip
def test_shapes_and_dtypes_of_qkv(op, f):
    q, k, v = qkv()
    dim = "features" if f is linear else "headdim"
    legend = f"(batch, kv heads, seqlen, {dim})"
    refuses(
        ValueError,
        f"{op}: q must have 4 dimensions (batch, heads, seqlen, {dim}), got shape (4, 10, 8)",
        f,
        q[0],
        k,
        v,
    )
    refuses(
        ValueError,
        f"{op}: k must have shape (2, Hkv, 10, 8) {legend}, got (2, 2, 9, 8)",
        f,
        q,
        k[:, :, 1:],
        v,
    )
    refuses(
        ValueError,
        f"{op}: k must have shape (2, Hkv, 10, 8) {legend}, got (2, 2, 10, 7)",
        f,
        q,
        k[..., 1:],
        v,
    )
    refuses(
        ValueError,
        f"{op}: k must have shape (2, Hkv, 10, 8) {legend}, got (1, 2, 10, 8)",
        f,
        q,
        k[:1],
        v,
    )
    refuses(
        ValueError,
        f"{op}: v must have shape (2, 2, 10, dv) (batch, kv heads, seqlen, "
        "headdim_v), got (2, 1, 10, 6)",
        f,
        q,
        k,
        v[:, :1],
    )
    refuses(
        ValueError,
        f"{op}: the heads of k and v must divide those of q, got 2 and 3",
        f,
        q[:, :3],
        k,
        v,
    )
    refuses(
        ValueError,
        f"{op}: the heads of k and v must divide those of q, got 0 and 4",
        f,
        q,
        k[:, :0],
        v[:, :0],
    )
    refuses(
        TypeError,
        f"{op}: k must be torch.float32, got torch.bfloat16: convert it with .to()",
        f,
        q,
        k.bfloat16(),
        v,
    )
    refuses(
        TypeError,
        f"{op}: q must be float32, float64, bfloat16 or float16, got torch.int64",
        f,
        q.long(),
        k,
        v,
    )
    refuses(TypeError, f"{op}: q must be a tensor, got list", f, q.tolist(), k, v)
    refuses(TypeError, f"{op}: v must be a tensor, got NoneType", f, q, k, None)
    refuses(ValueError, f"{op}: eps must not be negative, got -1.0", f, q, k, v, eps=-1.0)


@pytest.mark.parametrize("f", [linear, kernelized])
def test_log_decay(f):
    q, k, v = qkv()
    for shape in ((3,), (B, HKV, T + 1), (B, H, T), (HKV, T)):
        refuses(ValueError, "log_decay must have shape", f, q, k, v, log_decay=-torch.rand(shape))
    refuses(
        TypeError,
        "log_decay must be a floating-point tensor, got float",
        f,
        q,
        k,
        v,
        log_decay=-0.1,
    )


@pytest.mark.parametrize("f", [linear, kernelized])
def test_cu_seqlens(f):
    q, k, v = (x[:1] for x in qkv())

    def packed(*ends, dtype=torch.int32):
        return {"cu_seqlens": torch.tensor(ends, dtype=dtype)}

    rises = "cu_seqlens must rise from 0 to the seqlen 10 of q, got "
    refuses(ValueError, rises + "[0, 6, 4, 10]", f, q, k, v, **packed(0, 6, 4, 10))
    refuses(ValueError, rises + "[0, 4, 9]", f, q, k, v, **packed(0, 4, 9))
    refuses(ValueError, rises + "[0, 4, 11]", f, q, k, v, **packed(0, 4, 11))
    refuses(ValueError, rises + "[1, 4, 10]", f, q, k, v, **packed(1, 4, 10))
    refuses(
        TypeError,
        "cu_seqlens must be torch.int32, got torch.int64",
        f,
        q,
        k,
        v,
        **packed(0, 10, dtype=torch.int64),
    )
    refuses(ValueError, "cu_seqlens must hold at least one number", f, q, k, v, **packed())
    refuses(
        ValueError, "packed into one batch row, got batch 2: flatten", f, *qkv(), **packed(0, 4, 10)
    )
    refuses(
        ValueError,
        "cu_seqlens must have shape (N + 1,)",
        f,
        q,
        k,
        v,
        cu_seqlens=torch.zeros(2, 2, dtype=torch.int32),
    )
    refuses(
        ValueError,
        "not both",
        f,
        q,
        k,
        v,
        **packed(0, 10),
        seq_bounds=torch.tensor([[0, 10]], dtype=torch.int32),
    )
    state = linear_state() if f is linear else attention_state(0, 0)
    extra = () if f is linear else (params(H), params(HKV))
    refuses(
        ValueError,
        "initial_state.kv must have shape (3, 2,",
        f,
        q,
        k,
        v,
        *extra,
        **packed(0, 4, 6, 10),
        initial_state=state,
    )


@pytest.mark.parametrize("f", [linear, kernelized])
def test_seq_bounds(f):
    def bounds(*rows, dtype=torch.int32):
        return {"seq_bounds": torch.tensor(rows, dtype=dtype)}

    for rows in ([[0, 11], [0, 10]], [[-1, 5], [0, 10]], [[6, 5], [0, 10]]):
        refuses(
            ValueError,
            f"0 <= begin <= end <= 10 (the seqlen of q) in each row, got {rows}",
            f,
            *qkv(),
            **bounds(*rows),
        )
    refuses(ValueError, "seq_bounds must have shape (2, 2)", f, *qkv(), **bounds([0, 10]))
    refuses(
        TypeError,
        "seq_bounds must be torch.int32",
        f,
        *qkv(),
        **bounds([0, 10], [0, 10], dtype=torch.int64),
    )


def test_direct_calls_stay_inside_their_memory():
    """torch.ops.dijiang.* checks what could read or write out of bounds, by itself."""
    q, k, v = qkv()

    def forward(q, k, v, segments=None, state=(None, None, None)):
        return torch.ops.dijiang.linear_attention_fwd(q, k, v, None, segments, *state, True, 0.0,
                                                      False)  # fmt: skip

    def segments(*rows):
        return torch.tensor(rows, dtype=torch.int32)

    refuses(RuntimeError, "k must have shape", forward, q, k[..., :3], v)
    refuses(RuntimeError, "must divide", forward, q[:, :3], k, v)
    refuses(RuntimeError, "wrong dtype", forward, q, k.double(), v)
    refuses(RuntimeError, "four dimensions", forward, q[0], k[0], v[0])
    refuses(
        RuntimeError,
        "which must lie inside 2 rows of 10 tokens",
        forward,
        q,
        k,
        v,
        segments([0, 0, 11]),
    )
    refuses(RuntimeError, "which must lie inside", forward, q, k, v, segments([2, 0, 5]))
    refuses(
        RuntimeError,
        "before the sequence ahead of it ends",
        forward,
        q,
        k,
        v,
        segments([0, 0, 6], [0, 5, 10]),
    )
    state = linear_state()
    refuses(
        RuntimeError,
        "z must have shape",
        forward,
        q,
        k,
        v,
        None,
        (state.kv, state.z[:, :1], state.log_scale),
    )
    refuses(
        RuntimeError,
        "kv must be contiguous",
        forward,
        q,
        k,
        v,
        None,
        (state.kv.mT.contiguous().mT, state.z, state.log_scale),
    )
    refuses(RuntimeError, "type must be 2 or 3", torch.ops.dijiang.dct, q, 4)


def test_messages_name_no_path():
    with pytest.raises(RuntimeError) as raised:
        torch.ops.dijiang.dct(torch.rand(4), 4)
    assert str(raised.value) == "dijiang: type must be 2 or 3, got 4"


def test_feature_params():
    q, k, v = qkv()
    fq, fk = params(H), params(HKV)
    refuses(ValueError, "fq and fk must be given together, fk is None", kernelized, q, k, v, fq)
    refuses(TypeError, "fq must be FeatureParams, got Tensor", kernelized, q, k, v, fq.omega, fk)
    refuses(
        ValueError,
        "fk.omega must have shape (2, m, 8) (heads, features, headdim), got (4, 5, 8)",
        kernelized,
        q,
        k,
        v,
        fq,
        fq,
    )
    refuses(
        ValueError,
        "fq.kind must be 'exp', 'softmax', 'elu', got 'relu'",
        kernelized,
        q,
        k,
        v,
        fq._replace(kind="relu"),
        fk,
    )
    refuses(
        ValueError,
        "of one kind and have as many features",
        kernelized,
        q,
        k,
        v,
        fq,
        fk._replace(kind="elu"),
    )
    refuses(
        ValueError,
        "of one kind and have as many features",
        kernelized,
        q,
        k,
        v,
        fq,
        params(HKV, M + 1),
    )
    refuses(
        ValueError,
        "fq.log_weight must have shape (4, 5) (heads, features), got (5,)",
        kernelized,
        q,
        k,
        v,
        fq._replace(log_weight=torch.zeros(M)),
        fk,
    )
    refuses(
        ValueError,
        "fq.beta must have shape (4,) (heads), got (1,)",
        kernelized,
        q,
        k,
        v,
        fq._replace(beta=torch.zeros(1)),
        fk,
    )
    refuses(
        ValueError,
        "beta belongs to kind 'exp', got kind 'elu'",
        kernelized,
        q,
        k,
        v,
        params(H, kind="elu", beta=torch.zeros(H)),
        params(HKV, kind="elu"),
    )


def test_numbers():
    q, k, v = qkv()
    refuses(ValueError, "window must not be negative, got -1", kernelized, q, k, v, window=-1)
    refuses(ValueError, "sinks must not be negative, got -2", kernelized, q, k, v, sinks=-2)
    refuses(ValueError, "scale must be positive, got 0", kernelized, q, k, v, scale=0)
    refuses(ValueError, "scale must be positive, got -1", ops.feature_map, q, params(H), scale=-1)
    refuses(ValueError, "type must be 2 or 3, got 1", ops.dct, q, type=1)
    refuses(ValueError, "at least one dimension", ops.dct, torch.tensor(1.0))
    refuses(
        TypeError,
        "dct: x must be float32, float64, bfloat16 or float16, got torch.int64",
        ops.dct,
        torch.arange(4),
    )
    refuses(ValueError, "feature_map: x must have 4 dimensions", ops.feature_map, q[0], params(H))
    refuses(ValueError, "params.omega must have shape (4, m, 8)", ops.feature_map, q, params(H + 1))


def test_states():
    q, k, v = qkv()
    fq, fk = params(H), params(HKV)
    refuses(
        TypeError,
        "initial_state must be LinearAttentionState, got tuple",
        linear,
        q,
        k,
        v,
        initial_state=tuple(linear_state()),
    )
    refuses(
        ValueError,
        "initial_state.kv must have shape (2, 2, 8, 6) (sequences, kv heads, "
        "features, headdim_v), got (1, 2, 8, 6)",
        linear,
        q,
        k,
        v,
        initial_state=linear_state(batch=1),
    )
    refuses(
        TypeError,
        "initial_state.kv must be torch.float32, got torch.float64",
        linear,
        q,
        k,
        v,
        initial_state=linear_state(torch.float64),
    )
    options = {"window": 4, "sinks": 1}
    refuses(
        ValueError,
        "initial_state.window_k must have shape (2, 2, 8, 8)",
        kernelized,
        q,
        k,
        v,
        fq,
        fk,
        initial_state=attention_state(window=3),
        **options,
    )
    refuses(
        ValueError,
        "initial_state.sink_k must have shape (2, 2, 1, 8)",
        kernelized,
        q,
        k,
        v,
        fq,
        fk,
        initial_state=attention_state(sinks=2),
        **options,
    )
    refuses(
        ValueError,
        "initial_state must be one with decay",
        kernelized,
        q,
        k,
        v,
        fq,
        fk,
        initial_state=attention_state(),
        log_decay=-torch.rand(HKV),
        **options,
    )
    refuses(
        ValueError,
        "initial_state must be one without decay",
        kernelized,
        q,
        k,
        v,
        fq,
        fk,
        initial_state=attention_state(decay=True),
        **options,
    )
    refuses(
        ValueError,
        "initial_state.kv must have shape (2, 2, 0, 6)",
        kernelized,
        q,
        k,
        v,
        initial_state=attention_state(),
        **options,
    )
    state = attention_state()
    state.kv.requires_grad_()
    refuses(
        ValueError,
        "carries no gradient: detach its tensors",
        kernelized,
        q,
        k,
        v,
        fq,
        fk,
        initial_state=state,
        **options,
    )


def test_updates():
    q, k, v = qkv()
    refuses(
        ValueError,
        "takes one token a sequence, got seqlen 10: causal_linear_attention with "
        "initial_state takes more",
        linear_update,
        q,
        k,
        v,
        linear_state(),
    )
    refuses(
        ValueError, "takes one token a sequence, got seqlen 10", update, q, k, v, attention_state()
    )
    q, k, v = qkv(seqlen=1)
    refuses(
        ValueError,
        "state.kv must have shape (2, 2, 8, 6)",
        linear_update,
        q,
        k,
        v,
        linear_state(batch=1),
    )
    state = linear_state()
    refuses(
        ValueError,
        "state.kv must be contiguous: it is written in place",
        linear_update,
        q,
        k,
        v,
        state._replace(kv=state.kv.mT.contiguous().mT),
    )


def test_updates_refuse_to_be_differentiated():
    q, k, v = (x.requires_grad_() for x in qkv(seqlen=1))
    outs = [
        linear_update(q, k, v, linear_state()),
        update(q, k, v, attention_state(), params(H), params(HKV), window=4, sinks=1),
    ]
    for out in outs:
        refuses(NotImplementedError, "has no gradient", out.sum().backward)


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in qkv())
    (grad,) = torch.autograd.grad(linear(q, k, v).sum(), q, create_graph=True)
    refuses(NotImplementedError, "linear_attention is differentiable once", grad.sum().backward)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_kernels(device):
    with FakeTensorMode():
        x = torch.empty(2, 4, 10, 8, device=device)
        refuses(
            RuntimeError,
            f"dct: x is on {x.device}, but there are kernels for CPU and CUDA alone",
            ops.dct,
            x,
        )


def test_missing_cuda_build(monkeypatch):
    """A CUDA tensor on a CPU build: the cure is named (a fake tensor needs no GPU)."""
    reason = "this is a CPU build of dijiang: where nvcc is on PATH, "
    monkeypatch.setattr(_library, "_FOLDER", _library._FOLDER / "nowhere")
    _library.why_no_cuda.cache_clear()
    try:
        with FakeTensorMode():
            q, k, v = (x.to("cuda") for x in qkv())
            for f in (linear, kernelized):
                refuses(RuntimeError, f"{f.__name__}: q is on cuda:0, but {reason}", f, q, k, v)
            refuses(RuntimeError, reason, ops.dct, q)
            refuses(RuntimeError, reason, ops.feature_map, q, params(H))
    finally:
        _library.why_no_cuda.cache_clear()


def test_float64_on_cuda(monkeypatch):
    monkeypatch.setattr(_library, "why_no_cuda", lambda: None)
    with FakeTensorMode():
        q, k, v = (x.to("cuda") for x in qkv(torch.float64))
        refuses(TypeError, "float64 is supported on the CPU alone", linear, q, k, v)


def test_tensors_on_different_devices(monkeypatch):
    monkeypatch.setattr(_library, "why_no_cuda", lambda: None)
    with FakeTensorMode():
        q, k, v = qkv()
        refuses(
            ValueError,
            "k must be on cuda:0, got cpu: move it with .to()",
            linear,
            q.to("cuda"),
            k,
            v,
        )
        refuses(
            ValueError,
            "fq.omega must be on cpu, got cuda:0",
            kernelized,
            q,
            k,
            v,
            FeatureParams(torch.empty(H, M, D, device="cuda")),
            params(HKV),
        )


def test_missing_library_names_the_cure(tmp_path):
    """In a process of its own: the package without its compiled operators."""
    source = _library._FOLDER
    package = tmp_path / "dijiang"
    (package / "ops").mkdir(parents=True)
    for file in [*source.glob("*.py"), *source.glob("ops/*.py")]:
        (package / file.relative_to(source)).write_bytes(file.read_bytes())
    program = (
        "import dijiang\ntry:\n    dijiang.ops\nexcept ImportError as error:\n    print(error)"
    )

    def imported():
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
        )
        return done.stdout

    text = imported()
    assert "operators are not built" in text and "pip install --no-build-isolation ." in text
    (package / "dijiang_ops.so").write_bytes(b"not a library")
    text = imported()
    assert "does not load with torch" in text and "pip install --no-build-isolation ." in text


def test_a_step_like_one_before_is_still_checked_where_it_differs():
    """Checks are passed over for calls of the same shapes, dtypes and settings alone."""
    from dijiang import ops

    def step(dv=8, dtype=torch.float32, **settings):
        state = ops.empty_attention_state(
            1, 2, 0, 8, 8, window=4, sinks=1, dtype=torch.float32, device="cpu"
        )
        x, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, dv).to(dtype)
        with torch.no_grad():
            return ops.kernelized_attention_update(
                x, x, v, state, **({"window": 4, "sinks": 1} | settings)
            )

    for _ in range(2):
        assert step().shape == (1, 2, 1, 8)
        with pytest.raises(ValueError, match=r"state\.kv must have shape"):
            step(dv=4)
        with pytest.raises(TypeError, match=r"v must be torch\.float32"):
            step(dtype=torch.float64)
        with pytest.raises(ValueError, match=r"state\.sink_k must have shape"):
            step(sinks=2)
        with pytest.raises(ValueError, match="scale must be positive"):
            step(scale=-1.0)
        with pytest.raises(ValueError, match="eps must not be negative"):
            step(eps=float("nan"))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_step_like_one_before_has_settings_of_its_own(kind):
    """Whatever a number comes as, it is this call's and not a remembered one."""
    from dijiang import ops

    x = torch.randn(3, 1, 2, 1, 8, generator=torch.Generator().manual_seed(0))

    def last_step(scale):
        state = ops.empty_attention_state(
            1, 2, 0, 8, 8, window=4, sinks=1, dtype=torch.float32, device="cpu"
        )
        with torch.no_grad():
            steps = [
                ops.kernelized_attention_update(q, q, q, state, scale=scale, window=4, sinks=1)
                for q in x
            ]
        return steps[-1]

    small, large = (last_step(kind(scale)) for scale in (0.125, 3.0))
    assert torch.equal(small, last_step(0.125)) and torch.equal(large, last_step(3.0))
    assert not torch.allclose(small, large)
