"""The local engine on the recorded models: greedy tokens, batches, seeds, cancelling, offloading, bad input."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from stepaudio.lm.base import Completion, SamplingParams, StopReason, Token
from stepaudio.lm.local import LocalLM, pad_left
from tests.lm.fake import FakeLM
from tokenizer.errors import CheckpointError, RequestError


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "step1_lm" / "A"


@pytest.fixture(scope="module")
def lm(folder):
    return LocalLM.from_dir(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(folder):
    return load_file(folder / "golden.safetensors")["input_ids"].flatten().tolist()


@pytest.fixture(scope="module")
def requests(prompt):
    """Eight prompts of different length with params, seeds and lengths of their own; some end by a stop id."""
    prompts = [prompt[:length] for length in (1, 3, 7, 12, 20, 5, 9, len(prompt))]
    params = [
        SamplingParams(
            seed=row,
            max_new_tokens=12 + 3 * row,
            repetition_window=10 * (row % 2),
            top_p=0.9 if row % 3 else 1.0,
            stop_ids=tuple(range(30)),
        )
        for row in range(8)
    ]
    return prompts, params


def collect(tokens):
    *ids, last = tokens
    assert last.id is None
    return Completion(tuple(token.id for token in ids), last.stop)


@pytest.mark.parametrize("name", ["A", "C"])
def test_recorded_greedy_tokens(golden, name):
    folder = golden / "step1_lm" / name
    recorded = json.loads((folder / "golden.json").read_text())
    prompt = load_file(folder / "golden.safetensors")["input_ids"].flatten().tolist()
    lm = LocalLM.from_dir(folder, dtype=torch.float32)
    params = SamplingParams(temperature=0, max_new_tokens=recorded["n_greedy"], stop_ids=())
    done = lm.generate([prompt, prompt[5:]], [params, params])
    assert list(done[0].ids) == recorded["greedy"] and done[0].stop == StopReason.LENGTH


def test_batch_of_eight_equals_eight_runs(lm, requests):
    prompts, params = requests
    batch = lm.generate(prompts, params)
    assert batch == [lm.generate([one], [wanted])[0] for one, wanted in zip(prompts, params)]
    assert batch == [collect(lm.stream(one, wanted)) for one, wanted in zip(prompts, params)]
    assert batch == lm.generate(prompts, params)
    assert {done.stop for done in batch} == {StopReason.STOP, StopReason.LENGTH}
    assert len({len(done.ids) for done in batch}) > 3


def test_other_neighbours_change_nothing(lm, requests):
    prompts, params = requests
    batch = lm.generate(prompts, params)
    order = [5, 2, 7]
    part = lm.generate([prompts[row] for row in order], [params[row] for row in order])
    assert part == [batch[row] for row in order]


def test_spread_over_host_and_disk_equals_whole(folder, lm, requests, tmp_path):
    layers = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places = {**layers, "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = LocalLM.from_dir(folder, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path))
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    assert spread.generate(*requests) == lm.generate(*requests)


def test_cycle_and_allowed_ids(lm, prompt):
    cycle = ((100, 200),) * 2 + ((200, 600),) * 3
    done = lm.generate([prompt] * 2, [SamplingParams(seed=1, cycle=cycle, max_new_tokens=20, stop_ids=(3,))] * 2)
    assert done[0] == done[1]
    assert all(cycle[at % 5][0] <= index < cycle[at % 5][1] for at, index in enumerate(done[0].ids))


def test_stream_is_cancelled_between_tokens(lm, prompt):
    params = SamplingParams(seed=0, max_new_tokens=30, stop_ids=())
    tokens = []
    for token in lm.stream(prompt, params, cancelled=lambda: len(tokens) == 3):
        tokens.append(token)
    assert len(tokens) == 4 and tokens[-1] == Token(None, StopReason.CANCELLED)


def test_stream_computes_no_further_than_it_is_read(lm, prompt, monkeypatch):
    calls = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda **inputs: calls.append(1) or forward(**inputs))
    stream = lm.stream(prompt, SamplingParams(seed=0, stop_ids=()))
    assert not calls
    next(stream), next(stream)
    stream.close()
    assert len(calls) == 2


def test_loop_is_told(lm, prompt):
    params = SamplingParams(temperature=0, allowed=((50, 51),), loop_guard=4, stop_ids=())
    assert lm.generate([prompt], [params]) == [Completion((50,) * 4, StopReason.LOOP)]


def test_empty_batch(lm):
    assert lm.generate([], []) == []


def test_bad_requests(lm, prompt):
    params = SamplingParams(max_new_tokens=lm.max_context)
    with pytest.raises(RequestError, match=f"{len(prompt)} over the context of {lm.max_context}"):
        lm.stream(prompt, params)  # before anything is drawn
    with pytest.raises(RequestError, match="prompt is empty"):
        lm.generate([prompt, []], [replace(params, max_new_tokens=3)] * 2)
    with pytest.raises(RequestError, match=r"prompt id 5000 must lie in 0..1023"):
        lm.stream([5000], replace(params, max_new_tokens=3))
    with pytest.raises(RequestError, match="2 prompts need as many"):
        lm.generate([prompt, prompt], [params])
    with pytest.raises(RequestError, match="top_p"):
        lm.stream(prompt, replace(params, max_new_tokens=3, top_p=2))


def test_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        LocalLM.from_dir(tmp_path)


def test_damaged_weights_are_named(lm, prompt, monkeypatch):
    forward = lm.model.forward

    def broken(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * float("nan")
        return output

    monkeypatch.setattr(lm.model, "forward", broken)
    with pytest.raises(CheckpointError, match="not finite"):
        lm.generate([prompt], [SamplingParams()])


def test_pad_left():
    ids, mask = pad_left([[1, 2, 3], [9]], "cpu")
    assert ids.tolist() == [[1, 2, 3], [0, 0, 9]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_fake_follows_the_same_contract():
    fake = FakeLM({(4,): [7, 8, 9], (): [5]})
    params = SamplingParams(max_new_tokens=3)
    assert collect(fake.stream([1, 4], params)) == Completion((7, 8, 9), StopReason.LENGTH)
    done = fake.generate([[1], [4]], [params, replace(params, max_new_tokens=2)])
    assert done == [Completion((5,), StopReason.STOP), Completion((7, 8), StopReason.LENGTH)]
    assert collect(fake.stream([4], params, lambda: True)) == Completion((7,), StopReason.CANCELLED)
    assert [prompt for prompt, _ in fake.calls] == [(1, 4), (1,), (4,), (4,)]
