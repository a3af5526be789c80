"""The measurements of speech: what a player would have heard, and a model made to speak for a set time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosyvoice.stream import ChunkSchedule
from stepaudio.bench import stream as bench
from stepaudio.bench.stream import Heard, at_once, listen
from stepaudio.bench.tts import ForcedLM, Plan
from stepaudio.checkpoints import TTS_DIR
from stepaudio.lm.base import SamplingParams, StopReason, Token
from stepaudio.tts.engine import StepAudioTTS
from stepaudio.tts.speech import TTSRequest
from tokenizer.codes import LAYOUT


def test_a_player_waits_for_late_chunks_only():
    heard = Heard((0.1, 0.3, 2.0, 2.1), (0.5, 0.5, 0.5, 0.5))
    assert heard.first == 0.1 and heard.seconds == 2.0
    assert heard.waits == pytest.approx([0.0, 0.9, 0.0]) and heard.underruns == 1
    assert Heard((0.2,), (1.0,)).underruns == 0


class OrderedLM:
    """Draws the first id that the cycle allows, as often as it may."""

    max_context = 9000

    def stream(self, prompt, params, cancelled=None):
        assert not params.stop_ids and not params.loop_guard
        for number in range(params.max_new_tokens):
            yield Token(params.cycle[number % len(params.cycle)][0])
        yield Token(None, StopReason.LENGTH)


def test_a_forced_model_speaks_for_the_time_it_is_told():
    tokens = list(ForcedLM(OrderedLM(), 100, 10).stream([1], SamplingParams(loop_guard=5)))
    assert tokens[-1] == Token(None, StopReason.STOP)
    assert [token.id for token in tokens[:-1]] == [100, 100, *[100 + LAYOUT.linguistic_size] * 3] * 2


def test_listeners_at_once_hear_what_one_alone_hears(tiny, monkeypatch):
    quick = ChunkSchedule(first=10, ahead=5, left=0, num_steps=1, first_steps=1)
    monkeypatch.setattr(bench, "stream", lambda engine, request: engine.stream(request, schedule=quick, threads=True))
    engine = StepAudioTTS.from_dir(tiny, max_attempts=1)
    requests = [TTSRequest("你好", speaker="Tingting", seed=seed) for seed in range(3)]
    alone = [listen(engine, request).seconds for request in requests]
    assert [heard.seconds for heard in at_once(engine, requests)] == alone
    row = bench._row(Plan(torch.device("cpu"), torch.float32, tiny / TTS_DIR), "x", [Heard((0.5,), (1.0,))] * 2)
    assert row["median"] == 0.5 and row["underruns"] == 0 and np.isclose(row["rtf"], 0.5)
