"""Rules on logits, the draw itself, when a generation ends, and which params are refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from stepaudio.lm.base import SamplingParams, StopReason
from stepaudio.lm.sampling import (
    LoopGuard,
    Sampler,
    Top,
    check_params,
    check_room,
    draw_at,
    forbidden_by_repetition,
)
from tokenizer.errors import CheckpointError, RequestError

V = 40
GREEDY = SamplingParams(temperature=0, top_k=0, stop_ids=(3,))


def logits_for(*best):
    """Logits [V] with the given ids in front, the first the likeliest."""
    logits = torch.zeros(V)
    for rank, index in enumerate(best):
        logits[index] = 10.0 - rank
    return logits


def drawn(params, logits, prompt=(), steps=1):
    sampler = Sampler(params, prompt, V)
    ids = []
    for _ in range(steps):
        ids.append(int(sampler.draw(logits)))
        sampler.accept(ids[-1])
    return ids


def test_recorded_repetition_rule(golden):
    recorded = json.loads((golden / "step1_lm" / "repetition_processor.json").read_text())
    for case in recorded["cases"]:
        histories = case.get("batch") or [case["input_ids"]]
        expected = case["banned"] if "batch" in case else [case["banned"]]
        for ids, banned in zip(histories, expected):
            found = forbidden_by_repetition(ids, recorded["window"], recorded["threshold"])
            assert ([] if found is None else [found]) == banned


def test_repetition_counts_the_prompt_and_picks_the_next_best():
    params = replace(GREEDY, repetition_window=10)
    prompt = [9, 1, 2, 4, 5, 6, 7, 8, 10, 9]
    assert drawn(params, logits_for(9, 11), prompt) == [11]
    assert drawn(params, logits_for(9, 11), prompt[1:]) == [9]  # fewer than ten ids
    assert drawn(replace(GREEDY), logits_for(9, 11), prompt) == [9]


def test_repetition_comes_before_top_k():
    params = SamplingParams(top_k=1, repetition_window=2, repetition_share=0.5, seed=0)
    assert drawn(params, logits_for(9, 11), [9, 9]) == [11]


def test_allowed_ids_and_stop_ids():
    params = replace(GREEDY, allowed=((10, 12), (20, 21)))
    assert drawn(params, logits_for(30, 12, 20, 11)) == [20]
    assert drawn(params, logits_for(30, 3, 20)) == [3]
    seen = set(drawn(replace(params, temperature=1.0, seed=1), torch.zeros(V), steps=200))
    assert seen == {3, 10, 11, 20}


def test_cycle_fixes_the_range_of_each_position():
    params = replace(GREEDY, cycle=((10, 12), (10, 12), (20, 30)), stop_ids=(3,), temperature=1.0, seed=0)
    ids = drawn(params, logits_for(), steps=60)
    kept = [index for index in ids if index != 3]
    assert all((20 <= index < 30) if at % 3 == 2 else (10 <= index < 12) for at, index in enumerate(kept))
    assert drawn(replace(params, temperature=0), logits_for(3, 25, 11), steps=1) == [3]  # between cycles
    sampler = Sampler(replace(params, temperature=0), (), V)
    sampler.accept(10)
    assert int(sampler.draw(logits_for(3, 25, 11))) == 11  # inside a cycle


@pytest.mark.parametrize(
    ("k", "p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (2, 1.0, {0, 1, 2}),  # 1 and 2 are equal: they stay together
        (1, 1.0, {0}),
        (0, 0.5, {0}),
        (0, 0.51, {0, 1, 2}),
        (0, 0.95, {0, 1, 2, 3}),
        (2, 0.9, {0, 1, 2}),
        (99, 1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p(k, p, kept):
    probabilities = torch.tensor([0.5, 0.175, 0.175, 0.1, 0.05])
    left = Top(k, p, 5)(probabilities.log(), [], 0)
    assert {index for index in range(5) if left[index] > -math.inf} == kept


def test_top_p_equals_transformers_without_ties():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    for k, p in ((50, 1.0), (0, 0.9), (50, 0.9), (5, 0.3)):
        logits = torch.randn(1000, generator=generator) * 3
        expected = logits[None].clone()
        if k:
            expected = TopKLogitsWarper(k)(None, expected)
        if p < 1:
            expected = TopPLogitsWarper(p)(None, expected)
        left = Top(k, p, 1000)(logits.clone(), [], 0)
        assert torch.equal(left.isfinite(), expected[0].isfinite()), (k, p)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3])
    logits = probabilities.log()
    counts = torch.bincount(torch.stack([draw_at(logits, step / 1000) for step in range(1000)]), minlength=5)
    assert counts.tolist() == pytest.approx([0, 200, 500, 0, 300], abs=1)
    assert int(draw_at(logits, 0.0)) == 1 and int(draw_at(logits, 1 - 2**-24)) == 4


def test_temperature_flattens_and_sharpens():
    logits = torch.tensor([2.0, 0.0] + [-math.inf] * (V - 2))
    for temperature, share in ((1.0, 0.881), (0.5, 0.982), (2.0, 0.731)):
        ids = drawn(SamplingParams(temperature=temperature, top_k=0, seed=3), logits, steps=3000)
        assert ids.count(0) / 3000 == pytest.approx(share, abs=0.03)


def test_same_seed_same_ids_and_other_seed_others():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    first, second, other = (drawn(SamplingParams(seed=seed), logits, steps=50) for seed in (7, 7, 8))
    assert first == second != other
    fresh = [drawn(SamplingParams(), logits, steps=50) for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_logits_are_not_changed_and_half_precision_is_lifted():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    params = SamplingParams(seed=1, repetition_window=2, repetition_share=0.0, top_p=0.9, allowed=((5, 30),))
    drawn(params, logits, [9, 9], steps=5)
    assert torch.equal(logits, before)
    assert drawn(params, logits.bfloat16(), steps=5) == drawn(params, logits.bfloat16().float(), steps=5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_logits_that_are_not_finite(temperature, value):
    sampler = Sampler(SamplingParams(temperature=temperature), (), V)
    logits = torch.zeros(V)
    logits[:] = value
    with pytest.raises(CheckpointError, match="not finite"):
        sampler.accept(int(sampler.draw(logits)))


def test_reasons_to_stop():
    sampler = Sampler(replace(GREEDY, max_new_tokens=3), (), V)
    assert [sampler.accept(index) for index in (5, 6, 7)] == [(True, None), (True, None), (True, StopReason.LENGTH)]
    assert Sampler(GREEDY, (), V).accept(3) == (False, StopReason.STOP)
    sampler = Sampler(replace(GREEDY, loop_guard=3), (), V)
    reasons = [sampler.accept(index)[1] for index in (9, 4, 5, 4, 5, 4, 5)]
    assert reasons == [None] * 6 + [StopReason.LOOP]


@pytest.mark.parametrize(
    ("ids", "times", "at"),
    [
        ([1, 1, 1], 3, 2),
        ([1, 1, 2, 1, 1, 2], 3, None),
        ([1, 2] * 4, 4, 7),
        ([9, *range(16), *range(16)], 2, 32),
        ([*range(17), *range(17)], 2, None),  # a run of 17 is no loop
        ([1, 2, 3, 1, 2, 4, 1, 2, 3], 2, None),
    ],
)
def test_loop_guard(ids, times, at):
    guard = LoopGuard(times)
    hits = [position for position, index in enumerate(ids) if guard.push(index)]
    assert (hits[0] if hits else None) == at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be a number in 0..100"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": "hot"}, "temperature 'hot'"),
        ({"top_k": -1}, "top_k -1 must be a whole number from 0 up"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_p": 0}, "top_p 0 must be above 0"),
        ({"top_p": 1.5}, "top_p 1.5 must be a number in 0..1"),
        ({"repetition_window": -1}, "repetition_window -1"),
        ({"repetition_share": 2}, "repetition_share 2"),
        ({"loop_guard": 1}, "loop_guard 1 must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be a whole number from 1 up"),
        ({"max_new_tokens": True}, "max_new_tokens True"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, f"seed {2**63}"),
        ({"stop_ids": (V,)}, f"stop id {V} must be a whole number in 0..{V - 1}"),
        ({"allowed": ((5, 5),)}, "id range 5..5"),
        ({"allowed": ((5, V + 1),)}, f"id range 5..{V + 1}"),
        ({"cycle": ((-1, 5),)}, "id range -1..5"),
        ({"cycle": ((1, 5),), "allowed": ((1, 5),)}, "either allowed or cycle"),
        ({"cycle": ((1, 5), (7, 8)), "repetition_window": 10}, "at least two ids"),
    ],
)
def test_params_out_of_range(change, message):
    with pytest.raises(RequestError) as error:
        check_params(replace(SamplingParams(), **change), V)
    assert message in str(error.value)


def test_room_in_the_context():
    params = SamplingParams(max_new_tokens=10)
    check_room(22, params, 32)
    with pytest.raises(RequestError, match="are 3 over the context of 32"):
        check_room(25, params, 32)
    with pytest.raises(RequestError, match="prompt is empty"):
        check_room(0, params, 32)


@pytest.mark.gpu
def test_a_device_draws_what_the_cpu_draws():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(seed=5, top_p=0.9, repetition_window=10, allowed=((2, 38),))
    cpu, gpu = Sampler(params, [1] * 10, V), Sampler(params, [1] * 10, V, "cuda")
    for _ in range(100):
        expected, found = int(cpu.draw(logits)), int(gpu.draw(logits.cuda()))
        assert found == expected
        cpu.accept(expected), gpu.accept(found)
