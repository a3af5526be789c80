"""The device's draws against `Sampler`: rules, seeds, ties, rows of different kinds in one batch, state that grows."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from stepaudio.lm.base import SamplingParams
from stepaudio.lm.device_sampling import DEAD, DeviceSampler, Mode, draw_rows, mode_of, uniforms_of
from stepaudio.lm.sampling import Sampler, draw_at

V = 600


def compare(params, prompts, steps, device="cpu", seed=0, tied=False):
    """Feeds both the same logits; returns how many draws differed and how many there were."""
    generator = torch.Generator().manual_seed(seed)
    sampler = DeviceSampler(8, V, device)
    slots = random.Random(seed).sample(range(8), len(params))
    sampler.join(slots, prompts, params)
    oracles = [Sampler(one, prompt, V, device) for one, prompt in zip(params, prompts)]
    running, mode = set(range(len(params))), mode_of(params, V)
    wrong = total = 0
    for _ in range(steps):
        logits = torch.randn(8, V, generator=generator) * 3
        logits = (logits.bfloat16() if tied else logits).to(device)
        sampler.draw(logits, slice(0, 8), mode)
        drawn = sampler.out.tolist()
        for row in sorted(running):
            expected = int(oracles[row].draw(logits[slots[row]]))
            total += 1
            wrong += drawn[slots[row]] != expected
            if oracles[row].accept(drawn[slots[row]])[1] is not None:
                running.discard(row)
        assert all(drawn[slot] == DEAD for slot in range(8) if slot not in slots)
        assert sampler.state["active"][slots].tolist() == [row in running for row in range(len(slots))]
    return wrong, total


KINDS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(temperature=1.0, top_k=0, seed=3),
    "top_k": SamplingParams(temperature=0.7, top_k=50, seed=4),
    "top_p": SamplingParams(temperature=1.3, top_k=0, top_p=0.9, seed=5),
    "both": SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=6),
    "repetition": SamplingParams(top_k=3, seed=7, repetition_window=10, repetition_share=0.1),
    "cycle": SamplingParams(seed=8, cycle=((10, 14),) * 2 + ((100, 400),) * 3, repetition_window=4),
    "allowed": SamplingParams(temperature=0, allowed=((5, 9), (30, 40)), repetition_window=3, repetition_share=0.34),
}
KINDS = {name: replace(one, stop_ids=(), max_new_tokens=1000) for name, one in KINDS.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_equals_the_sampler(name, tied):
    wrong, total = compare([KINDS[name]], [[1, 2, 3, 3]], 300, tied=tied)
    print(f"{name}: {wrong} of {total} draws differ")
    assert total == 300 and wrong == 0


def test_all_kinds_in_one_batch():
    prompts = [[1] * (row + 1) for row in range(len(KINDS))]
    assert compare(list(KINDS.values()), prompts, 150, tied=True) == (0, 150 * len(KINDS))


def test_stop_ids_and_length_end_a_row():
    params = [replace(KINDS["plain"], stop_ids=tuple(range(0, V, 12)), max_new_tokens=40, seed=row) for row in range(6)]
    wrong, total = compare(params, [[1]] * 6, 41)
    assert wrong == 0 and 20 < total < 6 * 40


def test_recorded_repetition_rule(golden):
    recorded = json.loads((golden / "step1_lm" / "repetition_processor.json").read_text())
    for case in recorded["cases"]:
        histories = case.get("batch") or [case["input_ids"]]
        expected = case["banned"] if "batch" in case else [case["banned"]]
        size = 1 + max(max(ids, default=0) for ids in histories)
        params = SamplingParams(
            temperature=0, repetition_window=recorded["window"], repetition_share=recorded["threshold"], stop_ids=()
        )
        for ids, banned in zip(histories, expected):
            sampler = DeviceSampler(1, size + 1, "cpu")
            sampler.join([0], [ids], [params])
            logits = torch.zeros(1, size + 1)
            logits[0, ids[-1]] = 1.0
            sampler.draw(logits, slice(0, 1), mode_of([params], size + 1))
            assert (int(sampler.out[0]) != ids[-1]) == bool(banned)


def test_draws_stand_where_the_oracle_puts_them():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 7060, generator=generator) * 4
    logits[:, ::3] = -math.inf
    uniform = torch.rand(64, generator=generator)
    uniform[0], uniform[1] = 0.0, 1 - 2**-24
    expected = [int(draw_at(row, float(u))) for row, u in zip(logits, uniform)]
    assert draw_rows(logits, uniform).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_logits_that_are_not_finite(temperature, value):
    sampler = DeviceSampler(2, V, "cpu")
    params = SamplingParams(temperature=temperature, seed=0, top_p=0.9)
    sampler.join([0, 1], [[1], [1]], [params] * 2)
    logits = torch.zeros(2, V)
    logits[1] = value
    sampler.draw(logits, slice(0, 2), mode_of([params], V))
    assert sampler.out[0] < V and sampler.out[1] == V
    assert sampler.state["active"].tolist() == [True, False] and sampler.state["ids"][1] < V


def test_uniforms_are_those_of_the_sampler():
    generator = torch.Generator().manual_seed(9)
    expected = [torch.rand((), generator=generator).item() for _ in range(50)]
    params = [SamplingParams(seed=9, max_new_tokens=50), SamplingParams(temperature=0, max_new_tokens=20)]
    found = uniforms_of(params)
    assert found[0].tolist() == expected and not found[1].any()
    fresh = [uniforms_of([SamplingParams(max_new_tokens=5)]) for _ in range(2)]
    assert not torch.equal(*fresh)


def test_mode_says_what_a_batch_needs():
    assert mode_of([KINDS["greedy"]], V) == Mode()
    assert mode_of([KINDS["plain"]], V) == Mode(draws=True)
    assert mode_of([KINDS["both"], KINDS["greedy"]], V) == Mode(True, 64, True)
    assert mode_of([KINDS["top_p"]], V).width == V
    assert mode_of([replace(KINDS["top_k"], top_k=200)], V).width == 256
    assert mode_of([replace(KINDS["top_k"], top_k=V)], V).width == 0


def test_state_grows_and_says_so():
    sampler = DeviceSampler(4, V, "cpu")
    assert not sampler.join([0], [[7, 8]], [KINDS["cycle"]])
    before = {name: tensor[0].clone() for name, tensor in sampler.state.items()}
    long = SamplingParams(seed=1, stop_ids=tuple(range(30)), repetition_window=40, max_new_tokens=5000)
    assert sampler.join([1], [[1] * 50], [long])
    for name, old in before.items():
        assert torch.equal(sampler.state[name][0].flatten()[: old.numel()], old.flatten()), name
    assert sampler.state["recent"].shape == (4, 64) and sampler.state["uniforms"].shape == (4, 8192)
    assert not sampler.join([2], [[1] * 50], [long])


def test_sets_of_rows_that_left_are_used_again():
    sampler = DeviceSampler(2, V, "cpu")
    for start in range(60):
        wanted = replace(KINDS["allowed"], allowed=((start, start + 2),), repetition_window=0)
        assert not sampler.join([start % 2], [[1]], [wanted])
        sampler.draw(torch.zeros(2, V), slice(0, 2), mode_of([wanted], V))
        assert sampler.out[start % 2] == start
    many = replace(KINDS["allowed"], allowed=(), cycle=tuple((n, n + 2) for n in range(40)))
    assert sampler.join([0], [[1]], [many])


def test_a_row_moves():
    sampler = DeviceSampler(4, V, "cpu")
    sampler.join([3], [[1]], [KINDS["both"]])
    sampler.move(3, 1)
    oracle = Sampler(KINDS["both"], [1], V)
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    sampler.draw(logits, slice(0, 4), mode_of([KINDS["both"]], V))
    assert sampler.out.tolist() == [DEAD, int(oracle.draw(logits[1])), DEAD, DEAD]


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_equals_the_sampler_on_cuda(name):
    wrong, total = compare([KINDS[name]], [[1, 2, 3, 3]], 200, device="cuda", tied=True)
    assert wrong == 0, f"{wrong} of {total} draws differ"
