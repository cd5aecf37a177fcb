"""FeatureMap against the formulas of the paper, and its estimate against exp(q.k)."""

import copy
import math
import pickle

import pytest
import torch
from dijiang import FeatureMap, reference
from dijiang.config import FEATURE_MAPS
from dijiang.features import dct_matrix

D = 16


def make(name, **settings):
    return FeatureMap(name, **({"heads": 3, "headdim": D} | settings))


def test_dct_matrix_is_orthonormal_and_the_operators():
    for n in (1, 2, 7, 64):
        matrix = dct_matrix(n)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
        torch.testing.assert_close(matrix, reference.dct_matrix(n))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_forward_is_the_formula(name):
    phi = make(name, random_signs=True).double()
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, scale = torch.randn(2, 3, 5, D, dtype=torch.float64), D**-0.5
    p = phi.params(dtype=torch.float64)
    xs = math.sqrt(scale) * x
    u = torch.einsum("bhtd,hmd->bhtm", xs, p.omega)
    m = phi.num_features
    if phi.kind == "exp":
        log_d = 0.0 if phi.log_weight is None else phi.log_weight[:, None]
        beta = phi.beta[:, None, None]
        expected = (u + log_d - beta * xs.square().sum(-1, keepdim=True) - math.log(m) / 2).exp()
    elif phi.kind == "softmax":
        expected = u.softmax(-1)
    else:
        expected = 1 + torch.nn.functional.elu(u)
    out = phi(x, scale=scale)
    assert out.shape == (2, 3, 5, m)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(phi(x, scale=scale, log=True), expected.log(), rtol=1e-9, atol=1e-9)


def test_wdcf_omega_is_frequencies_times_dct_times_signs():
    phi = make("wdcf", num_features=2 * D + 3, random_signs=True)
    assert phi.signs.shape == (3, 3, D) and set(phi.signs.unique().tolist()) == {-1.0, 1.0}
    matrix = dct_matrix(D).float()
    omega = phi.omega()
    for i in (0, D - 1, D, 2 * D + 2):
        row = phi.frequencies[:, i, None] * matrix[i % D] * phi.signs[:, i // D]
        torch.testing.assert_close(omega[:, i], row)


def test_wdcf_without_signs_is_the_papers():
    phi = make("wdcf")
    torch.testing.assert_close(
        phi.omega(), phi.frequencies[..., None] * dct_matrix(D).float(), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["wdcf", "wdcf_pm"])
@pytest.mark.parametrize("rows", [D - 3, D, 2 * D])
def test_plain_dct_rows_go_to_the_kernels_as_frequencies(name, rows):
    paired = name == "wdcf_pm"
    phi = make(name, num_features=2 * rows if paired else rows)
    params = phi.params(dtype=torch.float64)
    plain = not paired or rows % D == 0  # else the second half begins amid the DCT's rows
    assert params.omega.dim() == (2 if plain else 3)
    x = torch.randn(2, 3, 5, D, dtype=torch.float64)
    dense = params._replace(omega=phi.omega().double())
    want = reference.feature_map(x, dense, scale=0.4, log=True)
    torch.testing.assert_close(phi(x, scale=0.4, log=True), want, rtol=1e-6, atol=1e-6)


def test_loaded_signs_are_not_left_out():
    phi, signed = make("wdcf"), make("wdcf", random_signs=True)
    assert signed.params().omega.dim() == 3
    phi.load_state_dict(signed.state_dict())
    assert phi.params().omega.dim() == 3
    x = torch.randn(1, 3, 5, D)
    assert torch.equal(phi(x), signed(x))
    for copied in (copy.deepcopy(phi), pickle.loads(pickle.dumps(phi))):
        assert torch.equal(copied(x), phi(x))


def test_published_softmax_map():
    """softmax over features of q C diag(t), q unscaled: the published code's formula."""
    phi = make("softmax", sampling="iid").double()
    q, scale = torch.randn(1, 3, 4, D, dtype=torch.float64), D**-0.5
    t = phi.frequencies / D**0.25
    expected = ((q @ dct_matrix(D)) * t[:, None]).softmax(-1)
    torch.testing.assert_close(phi(q, scale=scale), expected)


@pytest.mark.parametrize("name", ["wdcf_pm", "learned_pm"])
def test_pairs_are_features_of_minus_x(name):
    phi = make(name).double()
    assert phi.num_features == D
    x = torch.randn(1, 3, 4, D, dtype=torch.float64)
    torch.testing.assert_close(phi(-x), torch.cat(phi(x).chunk(2, -1)[::-1], -1))


def test_stratified_frequencies_are_quantiles():
    t = make("wdcf").frequencies
    u = (torch.arange(D) + 0.5) / D
    quantiles = torch.special.ndtri(u.double()).float()
    for head in t:
        torch.testing.assert_close(head.sort().values, quantiles)
    assert not torch.equal(t[0], t[1])  # each head its own permutation


def test_chi_frequencies_are_quantiles():
    t = make("wdcf", radius="chi").frequencies.double().sort(-1).values
    u = torch.special.gammainc(torch.tensor(D / 2.0).double(), t**2 / 2)
    torch.testing.assert_close(u[0], (torch.arange(D).double() + 0.5) / D, rtol=0, atol=1e-6)


def test_sphere_and_orthogonal_directions():
    for sampling in ("stratified", "iid"):
        norms = make("pff", sampling=sampling).directions.norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    rows = make("prf").directions
    torch.testing.assert_close(rows @ rows.mT, torch.eye(D).expand(3, D, D), atol=1e-5, rtol=0)


def estimates(name, d, heads, **settings):
    """exp(q.k) of 36 pairs, and phi(q).phi(k) of each of many independent heads."""
    phi = FeatureMap(name, heads=heads, headdim=d, sampling="iid", **settings).double()
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, d, dtype=torch.float64, generator=generator) * d**-0.5
    with torch.no_grad():
        fq, fk = (
            reference.feature_map(x.expand(1, heads, 6, d), phi.params(dtype=torch.float64))[0]
            for x in (q, k)
        )
    return (q @ k.T).exp(), fq @ fk.mT  # (6, 6), (heads, 6, 6)


@pytest.mark.parametrize(("name", "settings"), [("prf", {}), ("pff", {"radius": "chi"})])
def test_estimates_exp_without_bias(name, settings):
    """The mean is within five standard errors of exp(q.k)."""
    truth, samples = estimates(name, 8, 4000, **settings)
    assert ((samples.mean(0) - truth).abs() <= 5 * samples.std(0) / math.sqrt(4000)).all()


def test_wdcf_estimates_exp_with_chi_radius_and_signs():
    """Fixed directions with random signs are nearly uniform ones; the paper's radius is biased."""
    truth, samples = estimates("wdcf", 64, 1000, radius="chi", random_signs=True, beta=0.5)
    assert (samples.mean(0) / truth - 1).abs().max() < 0.06
    truth, samples = estimates("wdcf", 64, 1000, radius="normal", beta=0.5)
    assert (samples.mean(0) / truth - 1).abs().mean() > 0.3


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("prf", set()), ("pff", set()), ("elu", set()), ("softmax", {"frequencies"}),
        ("wpff", {"frequencies", "log_weight", "beta"}),
        ("wdcf", {"frequencies", "log_weight", "beta"}),
        ("wdcf_pm", {"frequencies", "log_weight", "beta"}),
        ("learned", {"matrix", "log_weight", "beta"}),
        ("learned_pm", {"matrix", "log_weight", "beta"}), ("learned_softmax", {"matrix"}),
    ],
)  # fmt: skip
def test_what_is_learned_gets_gradients(name, learned):
    phi = make(name).double()
    assert {key for key, _ in phi.named_parameters()} == learned
    x = torch.randn(1, 3, 4, D, dtype=torch.float64)
    if learned:
        (phi(x) * torch.randn(1, 3, 4, phi.num_features, dtype=torch.float64)).sum().backward()
        for key, parameter in phi.named_parameters():
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_repeated_starts_equal_and_is_its_own(name):
    phi = make(name, random_signs=True, radius="chi", init="dct")
    other = phi.repeated(2)
    ours, theirs = phi.params(2), other.params()
    # One omega serves both heads that would have the same.
    assert torch.equal(ours.omega.repeat_interleave(2, 0), theirs.omega)
    for one, two in zip(ours[1:3], theirs[1:3], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    for ours, theirs in zip(phi.parameters(), other.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_seed_decides(name):
    settings = dict(random_signs=True, init="dct")
    first, again = make(name, seed=3, **settings), make(name, seed=3, **settings)
    assert torch.equal(first.omega(), again.omega())
    if name != "elu":
        assert not torch.equal(first.omega(), make(name, seed=4, **settings).omega())


@pytest.mark.parametrize("init", ["identity", "dct"])
def test_learned_rows_differ_from_each_other(init):
    matrix = make("learned", num_features=3 * D, init=init).matrix
    distance = torch.cdist(matrix, matrix) + 10 * torch.eye(3 * D)
    assert distance.min() > 1e-3


def test_refuses():
    with pytest.raises(ValueError, match="'cosine'"):
        make("cosine")
    with pytest.raises(ValueError, match="even num_features, got 5"):
        make("wdcf_pm", num_features=5)
    with pytest.raises(ValueError, match="must be 16 or None, got 32"):
        make("elu", num_features=32)


def test_half_precision_parameters_are_used_in_float32():
    phi = make("wdcf").bfloat16()
    assert phi.params().omega.dtype == torch.float32
    assert phi(torch.randn(1, 3, 4, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
