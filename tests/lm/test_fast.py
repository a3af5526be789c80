"""The fast engine against the eager one, on the recorded models and nano: tokens, batches, streams, bad input."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from stepaudio.checkpoints import TTS_DIR, find_root
from stepaudio.lm.base import Completion, SamplingParams, StopReason, Token
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused import FusedStep1, decode, prefill
from stepaudio.lm.load import load_model
from stepaudio.lm.local import LocalLM
from tokenizer.errors import CheckpointError, RequestError

GREEDY = SamplingParams(temperature=0, stop_ids=(), max_new_tokens=200)


def fast_of(folder, **options):
    return FastLM(FusedStep1.from_model(load_model(folder)), **options)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "step1_lm" / "A"


@pytest.fixture(scope="module")
def eager(folder):
    return LocalLM.from_dir(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def fast(folder):
    return fast_of(folder)


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


@pytest.mark.parametrize("name", ["A", "C", "nano"])
def test_greedy_tokens_of_fast_and_eager(golden, name):
    folder = find_root(None) / TTS_DIR if name == "nano" else golden / "step1_lm" / name
    prompt = list(range(100, 160))
    if name != "nano":
        recorded = json.loads((folder / "golden.json").read_text())
        prompt = load_file(folder / "golden.safetensors")["input_ids"].flatten().tolist()
    eager, fast = LocalLM.from_dir(folder, dtype=torch.float32), fast_of(folder)
    expected = eager.generate([prompt], [GREEDY])
    assert fast.generate([prompt], [GREEDY]) == expected and len(expected[0].ids) == 200
    if name != "nano":
        assert list(expected[0].ids[: recorded["n_greedy"]]) == recorded["greedy"]


def test_logits_of_prefill_and_decode(folder, eager, prompt):
    """Whole, in two pieces, padded, and step by step; the eager model has the golden logits."""
    fused = FusedStep1.from_model(load_model(folder))
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        expected = eager.model(ids).logits[0]
        cache = fused.new_cache(3, 64)
        slots, padded = torch.tensor([2]), torch.nn.functional.pad(ids, (0, 5))
        whole = prefill(fused, padded, cache, slots, torch.tensor([len(prompt)], dtype=torch.int32))
        half = torch.tensor([17], dtype=torch.int32)
        prefill(fused, ids[:, :17], cache, torch.tensor([1]), half)
        rest = torch.tensor([len(prompt) - 17], dtype=torch.int32)
        pieces = prefill(fused, ids[:, 17:], cache, torch.tensor([1]), rest, start=17, slot=1)
        assert cache.lengths.tolist() == [0, len(prompt), len(prompt)]
        prefill(fused, ids[:, :1], cache, torch.tensor([0]), torch.ones(1, dtype=torch.int32))
        steps = [decode(fused, ids[0, at : at + 1], cache, at + 1)[0] for at in range(1, len(prompt))]
    for name, found, wanted in (
        ("whole, padded", whole[0], expected[-1]),
        ("in pieces", pieces[0], expected[-1]),
        ("step by step", torch.stack(steps), expected[1:]),
    ):
        error = (found - wanted).abs()
        print(f"{name}: max {error.max():.2e}, mean {error.mean():.2e}")
        assert error.max() < 2e-4


def test_batch_equals_single_streams_and_eager(fast, eager, requests):
    prompts, params = requests
    batch = fast.generate(prompts, params)
    assert batch == eager.generate(prompts, params)
    assert batch == [fast.generate([one], [wanted])[0] for one, wanted in zip(prompts, params)]
    assert batch == [collect(fast.stream(one, wanted)) for one, wanted in zip(prompts, params)]
    assert {done.stop for done in batch} == {StopReason.STOP, StopReason.LENGTH}


def test_streams_at_the_same_time(fast, requests):
    prompts, params = requests
    expected = fast.generate(prompts, params)
    streams = [fast.stream(one, wanted) for one, wanted in zip(prompts, params)]
    tokens = [[] for _ in streams]
    for turn in range(60):
        for row, stream in enumerate(streams):
            tokens[row] += islice(stream, 1 + (row + turn) % 3)
    assert [collect(row) for row in tokens] == expected
    assert not fast.session.live


def test_more_prompts_than_places(folder, requests):
    prompts, params = requests
    small = fast_of(folder, max_rows=3)
    assert small.generate(prompts, params) == fast_of(folder).generate(prompts, params)
    assert small.session.cache.rows <= 3
    open_streams = [small.stream(prompts[0], params[7]) for _ in range(4)]
    for stream in open_streams[:3]:
        next(stream)
    with pytest.raises(RequestError, match="0 of 3 places are free"):
        next(open_streams[3])


def test_rows_that_ended_leave_without_waste(folder, prompt):
    lm = fast_of(folder)
    lengths = [5, 40, 3, 20]
    lm.generate([prompt] * 4, [replace(GREEDY, max_new_tokens=length) for length in lengths])
    assert lm.session.steps == max(lengths) - 1  # the first token comes with the prompt
    assert not lm.session.live and not lm.session._pending


def test_the_batch_shrinks(folder, prompt, monkeypatch):
    lm, sizes = fast_of(folder), []
    from stepaudio.lm import fused

    step = fused.decode
    monkeypatch.setattr(fused, "decode", lambda model, ids, *rest: sizes.append(len(ids)) or step(model, ids, *rest))
    lm.generate([prompt] * 4, [replace(GREEDY, max_new_tokens=length) for length in (3, 9, 5, 7)])
    assert sizes == [4, 4, 3, 3, 2, 2, 1, 1]


def test_stream_computes_no_further_than_it_is_read(folder, prompt):
    lm = fast_of(folder)
    stream = lm.stream(prompt, GREEDY)
    assert lm.session.steps == 0
    next(stream), next(stream)
    stream.close()
    assert lm.session.steps == 1 and not lm.session.live


def test_stream_is_cancelled_between_tokens(fast, prompt):
    tokens = []
    before = fast.session.steps
    for token in fast.stream(prompt, GREEDY, cancelled=lambda: len(tokens) == 3):
        tokens.append(token)
    assert len(tokens) == 4 and tokens[-1] == Token(None, StopReason.CANCELLED)
    assert fast.session.steps - before <= 4 and not fast.session.live


def test_loops_are_told(fast, eager, prompt):
    params = SamplingParams(temperature=0, allowed=((50, 51),), loop_guard=4, stop_ids=())
    assert fast.generate([prompt], [params]) == [Completion((50,) * 4, StopReason.LOOP)]
    free = replace(GREEDY, loop_guard=3)
    assert fast.generate([prompt] * 2, [free, GREEDY]) == eager.generate([prompt] * 2, [free, GREEDY])


def test_cycle_and_allowed_ids(fast, eager, prompt):
    cycle = ((100, 200),) * 2 + ((200, 600),) * 3
    params = [
        SamplingParams(seed=1, cycle=cycle, max_new_tokens=20, stop_ids=(3,), repetition_window=10),
        SamplingParams(seed=1, allowed=((7, 90),), max_new_tokens=20, top_k=0, top_p=0.8),
        SamplingParams(seed=1, max_new_tokens=20),
    ]
    assert fast.generate([prompt] * 3, params) == eager.generate([prompt] * 3, params)


def test_long_prompts_go_in_pieces(fast, eager, prompt, monkeypatch):
    import stepaudio.lm.session as session

    monkeypatch.setattr(session, "_PIECE", 16)
    params = replace(GREEDY, max_new_tokens=30)
    assert fast.generate([prompt, prompt[:9]], [params] * 2) == eager.generate([prompt, prompt[:9]], [params] * 2)


def test_capacity_grows_under_a_running_stream(folder, eager, prompt):
    lm = fast_of(folder)
    stream = lm.stream(prompt, replace(GREEDY, max_new_tokens=60))
    first = list(islice(stream, 20))
    capacity = lm.session.cache.capacity
    long = replace(GREEDY, max_new_tokens=capacity)
    other = lm.stream(prompt[:4], long)
    next(other)
    assert lm.session.cache.capacity == 2 * capacity and lm.session.cache.rows == 2
    assert [collect([*first, *stream])] == eager.generate([prompt], [replace(GREEDY, max_new_tokens=60)])
    other.close()


def test_cache_is_used_again(folder, prompt):
    lm = fast_of(folder)
    sizes = set()
    for turn in range(30):
        lm.generate([prompt[: 1 + turn]] * 2, [replace(GREEDY, max_new_tokens=2 + turn % 3)] * 2)
        sizes.add((lm.session.cache.storage[0].data_ptr(), lm.memory()["cache"]))
    assert len(sizes) == 1


def test_too_little_memory_is_one_line(folder, prompt):
    lm = fast_of(folder, cache_limit=2_000_000)
    with pytest.raises(RequestError, match=r"a cache of 4 rows of 512 tokens takes 0.0\d GB, 0.00 GB are free: lower"):
        lm.generate([prompt] * 4, [GREEDY] * 4)
    assert not lm.session.live
    assert lm.generate([prompt[:1]], [replace(GREEDY, max_new_tokens=2)])[0].stop == StopReason.LENGTH


def test_bad_requests(fast, prompt):
    params = SamplingParams(max_new_tokens=fast.max_context)
    with pytest.raises(RequestError, match=f"{len(prompt)} over the context of {fast.max_context}"):
        fast.stream(prompt, params)  # before anything is drawn
    with pytest.raises(RequestError, match="prompt is empty"):
        fast.generate([prompt, []], [replace(params, max_new_tokens=3)] * 2)
    with pytest.raises(RequestError, match=r"prompt id 5000 must lie in 0..1023"):
        fast.stream([5000], replace(params, max_new_tokens=3))
    with pytest.raises(RequestError, match="2 prompts need as many"):
        fast.generate([prompt, prompt], [params])
    assert fast.generate([], []) == []


def test_damaged_weights_end_their_row_alone(folder, prompt):
    lm = fast_of(folder)
    lm.model.embed[77] = float("nan")
    good = lm.stream([p for p in prompt if p != 77], replace(GREEDY, max_new_tokens=5))
    bad = lm.stream([5, 77], GREEDY)
    next(good)
    with pytest.raises(CheckpointError, match="not finite"):
        next(bad)
    assert collect(good).stop == StopReason.LENGTH


def test_a_broken_step_ends_every_stream(folder, prompt, monkeypatch):
    from stepaudio.lm import fused

    lm = fast_of(folder)
    first, second = lm.stream(prompt, GREEDY), lm.stream(prompt, GREEDY)
    next(first), next(second)

    def broken(*inputs):
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(fused, "decode", broken)
        with pytest.raises(RuntimeError, match="no more"):
            list(first)
    with pytest.raises(RequestError, match="broke this one off"):
        list(second)
    assert len(lm.generate([prompt], [replace(GREEDY, max_new_tokens=4)])[0].ids) == 4


def test_rounded_bias_is_refused(folder):
    model = FusedStep1.from_model(load_model(folder, alibi_dtype="bfloat16"))
    with pytest.raises(RequestError, match="--engine eager"):
        FastLM(model)
