"""Hard keys: which keys stay exact beyond the window, and the table that says so."""

import random

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_close, make_case, one_thread  # noqa: F401
from dijiang import reference
from dijiang._types import cache_sizes
from dijiang.ops import empty_attention_state, kernelized_attention, kernelized_attention_update
from dijiang.ops._hard_keys import by_head, table_is_possible

NEAR = {"window": 8, "sinks": 3, "cache_size": 6}


def random_table(case, seed=0):
    """Valid hard keys that no rule chose, one sequence a row."""
    draw = random.Random(seed)
    window, sinks, size = (case.options[n] for n in ("window", "sinks", "cache_size"))
    *rows, count = reference.hard_key_rows(case.q, window)
    heads = case.k.shape[1]
    table = torch.full((heads, count, size), -1, dtype=torch.int32)
    for row in rows:
        for block in range(2, -(-case.q.shape[2] // window)):
            table[:, row + block] = table[:, row + block - 1]
            leaving = range(max((block - 2) * window, sinks), (block - 1) * window)
            number = draw.randint(0, len(leaving))  # slots of all heads fill up alike
            for head in range(heads):
                slots = table[head, row + block]
                free = [i for i in range(size) if slots[i] < 0]
                taken = draw.sample([i for i in range(size) if slots[i] >= 0], size - len(free))
                for slot, key in zip(free + taken, draw.sample(leaving, number), strict=False):
                    slots[slot] = key
    return table


@pytest.mark.parametrize("decay", [None, "token"])
def test_any_table_is_followed(decay):
    """Forwards, backwards and token by token, whoever chose."""
    case = make_case("exp", decay, **NEAR)
    case = case.with_options(hard_keys=random_table(case)).require_grad()
    truth = case.run(reference)
    out = case.run()
    assert_close(out, truth, torch.float64)
    assert_close(case.run(reference, "_recurrent"), truth, torch.float64)
    inputs = list(case.inputs().values())
    torch.manual_seed(1)
    weight = torch.randn_like(out)
    grads, expected = (torch.autograd.grad(x, inputs, weight) for x in (out, truth))
    for got, wanted in zip(grads, expected, strict=True):
        assert_close(got, wanted, torch.float64)
    chosen = case.with_options(hard_keys=None).run()
    assert not torch.allclose(out, chosen, atol=1e-6)


@pytest.mark.parametrize("size", [1, 6, 20, (1, 20), (6, 0)], ids=str)
def test_the_operator_chooses_as_the_rule_says(size):
    case = make_case("exp", **(NEAR | {"cache_size": size}))
    out, table = case.run(return_hard_keys=True)
    rule = reference.choose_hard_keys(
        case.q, case.k, case.v, scale=case.q.shape[-1] ** -0.5, **case.options
    )
    assert torch.equal(table, rule)
    again, state, given = case.run(hard_keys=table, return_state=True, return_hard_keys=True)
    assert torch.equal(again, out) and torch.equal(given, table)
    _, walked, noted = case.run(reference, "_recurrent", return_state=True, return_hard_keys=True)
    assert torch.equal(noted, rule)
    last = reference.hard_key_rows(case.q, 8)[0] + (case.q.shape[2] - 1) // 8
    positions = by_head(state.cache_position, cache_sizes(size), -1)
    assert torch.equal(positions[0], table[:, last].long())
    for got, expected in zip(state[9:], walked[9:], strict=True):
        assert (
            got is None
            if expected is None
            else torch.equal(got, expected)
            or ((got - expected).abs().max() <= 1e-12 * expected.abs().max())
        )


def test_heads_with_numbers_of_their_own_are_as_if_alone():
    """Forwards, backwards and the state, as by a call for each kv head."""
    sizes = (9, 0)
    case = make_case("exp", "token", **(NEAR | {"cache_size": sizes})).require_grad()
    out, state = case.run(return_state=True)
    grads = torch.autograd.grad(out.square().sum(), list(case.inputs().values()))
    groups, first_slot, first_vote = case.q.shape[1] // 2, 0, 0
    for head, size in enumerate(sizes):
        rows = slice(head * groups, (head + 1) * groups)
        alone = case.of_head(head).with_options(cache_size=size).require_grad()
        one, after = alone.run(return_state=True)
        assert_close(out[:, rows], one, torch.float64)
        own = torch.autograd.grad(one.square().sum(), list(alone.inputs().values()))
        for name, whole, part in zip(case.inputs(), grads, own, strict=True):
            if name in ("q", "k", "v"):
                whole = whole[:, rows] if name == "q" else whole[:, head : head + 1]
                assert_close(whole, part, torch.float64)
        if size:
            slots = slice(first_slot, first_slot + size)
            for name in ("cache_k", "cache_v", "cache_position", "cache_decay"):
                own = getattr(after, name)[:, 0].double()
                assert_close(getattr(state, name)[:, slots].double(), own, torch.float64)
            votes = slice(first_vote, first_vote + size + NEAR["window"])
            assert_close(state.cache_votes[:, votes], after.cache_votes[:, 0], torch.float64)
        first_slot += size
        first_vote += size + NEAR["window"]
    assert state.cache_k.shape[1] == 9 and state.cache_votes.shape[1] == 9 + 2 * 8


def test_a_cache_for_all_keys_is_softmax_attention():
    case = make_case("exp", **(NEAR | {"cache_size": 200}))
    exact = F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True, enable_gqa=True)
    assert_close(case.run(), exact, torch.float64)


def test_keeps_the_novel_and_the_looked_at():
    """A value unlike all others, and a key that the newest queries ask for."""
    torch.manual_seed(0)
    T, d, odd, asked = 64, 8, 5, 9
    q, k, v = torch.randn(3, 1, 1, T, d).double().mul(0.1).unbind(0)
    k[..., 0] += 1
    v[0, 0, odd] += 20
    k[0, 0, asked, 1] += 3
    q[..., 1] += 30
    _, table = kernelized_attention(
        q, k, v, window=8, cache_size=2, return_hard_keys=True
    )  # fmt: skip
    for block in range(3, T // 8):
        assert set(table[0, block].tolist()) == {odd, asked}


def test_a_table_in_pieces_is_the_whole_one():
    case = make_case("exp", "token", batch=1, **NEAR)
    _, whole = case.run(return_hard_keys=True)
    for cut in (1, 16, 61, 64, 100):
        _, state, first = case.slice(0, cut).run(return_state=True, return_hard_keys=True)
        _, rest = case.slice(cut, 150).run(initial_state=state, return_hard_keys=True)
        blocks = -(-cut // 8)
        assert torch.equal(first[:, :blocks], whole[:, :blocks])
        blocks = 150 // 8 + 1 - cut // 8
        assert torch.equal(rest[:, :blocks], whole[:, cut // 8 : cut // 8 + blocks])


def test_each_row_of_decoding_turns_over_in_its_own_time():
    case = make_case("exp", "head", **NEAR)
    state = empty_attention_state(
        2, 2, 7, 6, 5, **NEAR, dtype=torch.float64, device="cpu", decay=True
    )
    outs = []
    with torch.no_grad():
        for t in range(90):
            one = case.slice(t, t + 1)
            outs.append(
                kernelized_attention_update(
                    one.q, one.k, one.v, state, one.fq, one.fk, log_decay=one.log_decay, **NEAR
                )
            )
    truth = case.slice(0, 90).run(reference)
    assert_close(torch.cat(outs, 2), truth, torch.float64)


@pytest.mark.parametrize(
    "change,says",
    [
        ((slice(None), 9, 0, 149), "slot 0 must hold position"),  # not there yet
        ((slice(None), 9, 0, 7), "slot 0 must hold position"),  # left long ago
        ((slice(None), 4, 0, 1), "slot 0 must hold position"),  # a sink
        ((slice(None), 1, 0, 0), "slot 0 must hold position -1"),  # nothing has left
        ((slice(None), 10, 5, -1), "slot 5 must hold position"),  # a slot that empties
    ],
)
def test_refuses_tables_that_no_choice_makes(change, says):
    case = make_case("exp", batch=1, **NEAR).to(torch.float32)
    _, table = case.run(return_hard_keys=True)
    assert table_is_possible(table, case.q, None, None, 8, 3, (6,))
    *where, key = change
    table[tuple(where)] = key
    with pytest.raises(RuntimeError, match=says):
        case.run(hard_keys=table)
    assert not table_is_possible(table, case.q, None, None, 8, 3, (6,))


def test_refuses_a_key_twice_and_a_gap():
    case = make_case("exp", batch=1, **(NEAR | {"cache_size": 30})).to(torch.float32)
    _, table = case.run(return_hard_keys=True)
    table[:, 3, 5] = 12  # block 1 leaves: 8 to 15
    table[:, 3, 6] = 12
    with pytest.raises(RuntimeError, match="slot 6 must hold position -1"):
        case.run(hard_keys=table)
    assert not table_is_possible(table, case.q, None, None, 8, 3, (30,))
    table[:, 3, 5:7] = torch.tensor([-1, 12])
    with pytest.raises(RuntimeError, match="no empty slot before it"):
        case.run(hard_keys=table)
    assert not table_is_possible(table, case.q, None, None, 8, 3, (30,))


def test_tables_of_packed_and_resumed_sequences_are_possible():
    """The check that runs where the kernel's own does not: on another device."""
    case = make_case("exp", batch=1, **NEAR)
    ends = torch.tensor([0, 1, 40, 40, 103, 150], dtype=torch.int32)
    _, states, packed = case.run(cu_seqlens=ends, return_state=True, return_hard_keys=True)
    begin, end = ends[:-1], ends[1:]
    segments = torch.stack([torch.zeros_like(begin), begin, end], 1)
    assert table_is_possible(packed, case.q, segments, None, 8, 3, (6,))
    _, resumed = case.run(cu_seqlens=ends, initial_state=states, return_hard_keys=True)
    assert table_is_possible(resumed, case.q, segments, states, 8, 3, (6,))
    assert not table_is_possible(resumed, case.q, segments, None, 8, 3, (6,))
    assert not table_is_possible(packed, case.q, segments, states, 8, 3, (6,))
    case = make_case("exp", **NEAR)
    _, table = case.run(return_hard_keys=True)
    assert table_is_possible(table, case.q, None, None, 8, 3, (6,))


def test_refuses_by_name():
    case = make_case("exp", **NEAR).to(torch.float32)
    table = torch.zeros(2, 5, 6, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"hard_keys must have shape \(2, 41, 6\)"):
        case.run(hard_keys=table)
    with pytest.raises(ValueError, match="hard_keys belong to cache_size > 0"):
        case.run(hard_keys=table, cache_size=0)
    with pytest.raises(ValueError, match="cache_size=6 is of keys that leave a window"):
        case.run(window=0)
    with pytest.raises(ValueError, match="cache_size must not be negative, got -1"):
        case.run(cache_size=-1)
    with pytest.raises(ValueError, match="or one for each of the 2 kv heads, got 3 of them"):
        case.run(cache_size=(6, 0, 2))
    with pytest.raises(ValueError, match=r"cache_size=\[6, 1\] is of keys that leave a window"):
        case.run(cache_size=(6, 1), window=0)
    _, state = case.run(return_state=True)
    with pytest.raises(ValueError, match=r"must have 4 slots for hard keys, .* got 6"):
        case.run(initial_state=state, cache_size=4)
    with pytest.raises(ValueError, match=r"must have 7 slots .* got 2: .*cache_size=\[4, 3\]"):
        case.run(initial_state=state, cache_size=(4, 3))
    with pytest.raises(ValueError, match=r"initial_state\.cache_votes must be a tensor, got None"):
        case.run(initial_state=state._replace(cache_votes=None))


def test_sequences_must_lie_in_order():
    case = make_case("exp", **NEAR).to(torch.float32)
    rows = torch.tensor([[1, 0, 150], [0, 0, 150]], dtype=torch.int32)
    params = (*case.fq[:3], *case.fk[:3])
    with pytest.raises(RuntimeError, match="hard keys want sequences in order"):
        torch.ops.dijiang.kernelized_attention_fwd(
            case.q, case.k, case.v, *params, None, rows, *(None,) * 16, 1, 0.4, 8, 3, [6], True,
            0.0, False,
        )  # fmt: skip
