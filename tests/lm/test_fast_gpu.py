"""The fast engine on a CUDA device: graphs against plain calls and the eager model, memory, shapes never seen."""

import random
import threading
from dataclasses import replace

import pytest
import torch

from stepaudio.device import resolve_device
from stepaudio.lm.base import SamplingParams, StopReason
from stepaudio.lm.fast import FastLM
from stepaudio.lm.fused import FusedStep1, decode, prefill
from stepaudio.lm.graphs import Graphs
from stepaudio.lm.load import load_model
from stepaudio.lm.local import LocalLM

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, stop_ids=(), max_new_tokens=200)
LOGIT_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # of fast against eager, logits of some units


@pytest.fixture(scope="module")
def cuda():
    return resolve_device("cuda")


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "step1_lm" / "A"


def fast_of(folder, device, dtype=torch.float32, **options):
    return FastLM(FusedStep1.from_model(load_model(folder, device=device, dtype=dtype)), **options)


def some_requests(count, seed, vocab_size=1024, longest=60):
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    params = [
        SamplingParams(
            temperature=draw.choice([0.0, 0.7, 1.0]),
            top_k=draw.choice([0, 20, 50]),
            top_p=draw.choice([0.8, 1.0]),
            repetition_window=draw.choice([0, 10]),
            stop_ids=tuple(draw.sample(range(vocab_size), 3)),
            max_new_tokens=draw.randint(1, 24),
            seed=row,
        )
        for row in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize("name", ["A", "C"])
def test_graph_plain_and_eager_tokens(golden, cuda, name):
    folder, prompt = golden / "step1_lm" / name, list(range(40, 80))
    expected = LocalLM.from_dir(folder, cuda, torch.float32).generate([prompt], [GREEDY])
    graphs, plain = fast_of(folder, cuda), fast_of(folder, cuda, graphs=False)
    assert plain.generate([prompt], [GREEDY]) == expected
    assert graphs.generate([prompt], [GREEDY]) == expected == graphs.generate([prompt], [GREEDY])
    assert graphs.memory()["graph_count"] >= 2 and plain.memory()["graph_count"] == 0


@pytest.mark.parametrize("dtype", LOGIT_BOUND)
def test_logits(folder, cuda, dtype):
    ids = torch.arange(40, 80, device=cuda)[None]
    model = load_model(folder, device=cuda, dtype=dtype)
    with torch.inference_mode():
        expected = model(ids).logits[0].float()
        fused = FusedStep1.from_model(model)
        cache = fused.new_cache(2, 512)
        length = torch.tensor([30], dtype=torch.int32, device=cuda)
        found = [prefill(fused, ids[:, :32], cache, torch.tensor([0], device=cuda), length)[0]]
        found += [decode(fused, ids[0, at : at + 1], cache, 512)[0] for at in range(30, 40)]
    error = (torch.stack(found).float() - expected[29:]).abs()
    print(f"{dtype}: max {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() < LOGIT_BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_single_and_stream(folder, cuda, dtype):
    lm = fast_of(folder, cuda, dtype)
    prompts, params = some_requests(9, 0)
    batch = lm.generate(prompts, params)
    single = [lm.generate([one], [wanted])[0] for one, wanted in zip(prompts, params)]
    assert batch == lm.generate(prompts, params)
    same = sum(a == b for a, b in zip(batch, single))
    print(f"{dtype}: {same} of {len(batch)} rows equal when run alone")
    assert dtype == torch.bfloat16 or same == len(batch)
    streamed = [tuple(t.id for t in lm.stream(one, p) if t.id is not None) for one, p in zip(prompts, params)]
    assert streamed == [done.ids for done in single]


def test_seeds_and_rules_equal_the_eager_engine(folder, cuda):
    prompts, params = some_requests(12, 5)
    eager = LocalLM.from_dir(folder, cuda, torch.float32).generate(prompts, params)
    fast = fast_of(folder, cuda).generate(prompts, params)
    assert sum(a == b for a, b in zip(eager, fast)) >= len(eager) - 1  # float32 kernels round differently


def test_memory_is_flat_over_500_requests(folder, cuda):
    lm, used = fast_of(folder, cuda, torch.bfloat16), []
    for turn in range(100):
        prompts, params = some_requests(5, turn)
        assert len(lm.generate(prompts, params)) == 5
        if turn >= 60:
            torch.cuda.synchronize()
            used.append((torch.cuda.memory_allocated(), lm.memory()["cache"]))
    print(lm.memory(), f"captured {lm.session.graphs.captured}")
    assert max(used)[0] - min(used)[0] < 2**20 and len({cache for _, cache in used}) == 1
    assert len(lm.session.graphs) <= lm.session.graphs.limit


def test_shapes_never_seen(folder, cuda):
    lm = fast_of(folder, cuda)
    prompts = [[7] * length for length in (1, 3000, 33, 1025)]
    params = [replace(GREEDY, max_new_tokens=length) for length in (3, 5, 700, 2)]
    assert lm.generate(prompts, params) == LocalLM.from_dir(folder, cuda, torch.float32).generate(prompts, params)


def test_cancelling_costs_one_step(folder, cuda):
    lm = fast_of(folder, cuda, torch.bfloat16)
    tokens = []
    for token in lm.stream([1, 2, 3], GREEDY, cancelled=lambda: len(tokens) == 5):
        tokens.append(token)
    assert tokens[-1].stop == StopReason.CANCELLED and lm.session.steps <= 6


def test_stop_inside_the_steps_under_way(folder, cuda):
    lm = fast_of(folder, cuda)
    [free] = lm.generate([[1, 2, 3]], [replace(GREEDY, max_new_tokens=30)])
    before = lm.session.steps
    [done] = lm.generate([[1, 2, 3]], [replace(GREEDY, stop_ids=(free.ids[9],))])
    at = free.ids.index(free.ids[9])
    assert done.ids == free.ids[:at] and done.stop == StopReason.STOP
    assert lm.session.steps - before <= at + 1


def test_two_threads(folder, cuda):
    lm, found = fast_of(folder, cuda), {}
    prompts, params = some_requests(2, 3)
    params = [replace(one, max_new_tokens=80, stop_ids=()) for one in params]
    expected = [lm.generate([one], [wanted])[0].ids for one, wanted in zip(prompts, params)]

    def run(row):
        found[row] = tuple(t.id for t in lm.stream(prompts[row], params[row]) if t.id is not None)

    threads = [threading.Thread(target=run, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[row] for row in range(2)] == expected


def test_a_graph_refuses_other_shapes(cuda):
    graphs, out = Graphs(cuda, True, limit=2), torch.zeros(3, device=cuda)
    with torch.cuda.stream(torch.cuda.Stream()):
        for key in range(4):
            graphs.run(key, lambda x: out.add_(x), torch.ones(3, device=cuda), state=[out])
        assert len(graphs) == 2 and graphs.captured == 4
        with pytest.raises(RuntimeError, match="--engine eager"):
            graphs.run(3, lambda x: out.add_(x), torch.ones(4, device=cuda), state=[out])
        torch.cuda.current_stream().synchronize()
    assert out.tolist() == [4.0] * 3
