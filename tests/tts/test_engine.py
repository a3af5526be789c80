from dataclasses import replace

import numpy as np
import pytest

from stepaudio.lm.base import Completion, StopReason
from stepaudio.tts.speech import TTS_SAMPLING, Speech, TTSRequest
from tests.tts.fakes import FakeLM, make_engine
from tokenizer.codes import LAYOUT
from tokenizer.errors import RequestError

TEXT = "今天天气很好，我们去公园散步吧。"


@pytest.fixture
def engine(golden, tmp_path):
    return make_engine(golden, tmp_path)


@pytest.fixture
def base(engine):
    return engine.vocab.audio_base


def asked(engine):
    return [call for batch in engine.lm.batches for call in batch]


def has(prompt, ids):
    return any(prompt[i : i + len(ids)] == ids for i in range(len(prompt)))


def spoken(engine, text):
    return engine.vocab.encode(text, bos=False, prefix=False)


def test_one_sentence(engine, base):
    speech = engine.synthesize("（高兴1）" + TEXT, "Ann", seed=5)
    [(prompt, params)] = asked(engine)
    assert has(prompt, spoken(engine, "（高兴1）" + TEXT))
    assert has(prompt, spoken(engine, "[Ann]的声音"))
    assert (params.temperature, params.top_k, params.repetition_window, params.seed) == (0.7, 50, 10, 5)
    assert params.stop_ids == (engine.vocab.eot,)
    assert params.cycle == tuple((base + first, base + end) for first, end in LAYOUT.pattern)
    assert params.max_new_tokens % 5 == 0
    assert (len(speech.pieces), speech.problems, speech.pieces[0].attempts) == (1, [], 1)
    assert speech.seconds == pytest.approx(3.0, abs=0.01)
    assert len(speech.codes) == 125


def test_rap_goes_to_the_music_flow_with_the_music_voice(engine):
    engine.synthesize("（RAP）" + TEXT, "Ann")
    [(prompt, _)] = asked(engine)
    assert has(prompt, spoken(engine, "（RAP）哟")) and not has(prompt, spoken(engine, "[Ann]的声音"))
    assert (len(engine.decoder.decoded), len(engine.music_decoder().decoded)) == (0, 1)


@pytest.mark.parametrize(("text", "music"), [(TEXT, 0), ("（哼唱）" + TEXT, 1)])
def test_clone(engine, golden, text, music):
    clone = {"speaker": "me", "prompt_text": "我自己", "wav_path": str(golden / "wavs" / "clip2_48k_stereo.wav")}
    engine.synthesize(text, clone=clone)
    [(prompt, _)] = asked(engine)
    assert has(prompt, spoken(engine, "我自己")) and not has(prompt, spoken(engine, "me"))
    assert len(engine.music_decoder().decoded) == music


def test_long_text_is_split_with_the_same_voice_and_tags(golden, tmp_path):
    engine = make_engine(golden, tmp_path, max_piece_seconds=5.0)
    speech = engine.synthesize("（四川话）（快速1）" + TEXT * 4, "Ann", seed=3)
    assert [piece.text for piece in speech.pieces] == [TEXT] * 4
    assert sorted(piece.seed for piece in speech.pieces) == [3, 1003, 2003, 3003]
    assert all(has(prompt, spoken(engine, "（四川话）（快速1）" + TEXT)) for prompt, _ in asked(engine))
    assert speech.seconds == pytest.approx(4 * 3.0 + 3 * 0.12, abs=0.02)
    assert len({id(voice) for _, voice, _ in engine.decoder.decoded}) == 1


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_alone_and_in_a_batch(golden, tmp_path, size):
    engine = make_engine(golden, tmp_path, batch_size=size, decode_batch_size=size, max_piece_seconds=5.0)
    requests = [TTSRequest(TEXT * times, "Ann", seed=times) for times in (3, 1, 2)]
    together = engine.synthesize_batch(requests)
    for request, speech in zip(requests, together):
        alone = engine.synthesize(request.text, request.speaker, seed=request.seed)
        assert np.array_equal(alone.audio.samples, speech.audio.samples)


def test_errors_stay_with_their_request(engine):
    good, bad, unknown = engine.synthesize_batch([TTSRequest(TEXT), TTSRequest("！"), TTSRequest(TEXT, "Zoe")])
    assert isinstance(good, Speech)
    assert "nothing to say" in str(bad) and "unknown speaker 'Zoe'" in str(unknown)


def test_doubtful_pieces_are_drawn_again_with_the_next_seed(golden, tmp_path, base):
    def spoil(seed):
        loop = [base, base + 1, base + 1024, base + 1025, base + 1026] * 25
        return {10: Completion((), StopReason.STOP), 11: Completion(tuple(loop), StopReason.STOP)}.get(seed)

    engine = make_engine(golden, tmp_path, FakeLM(base, spoil=spoil))
    speech = engine.synthesize(TEXT, seed=10)
    assert (speech.pieces[0].seed, speech.pieces[0].attempts, speech.problems) == (12, 3, [])
    assert len(engine.decoder.decoded) == 1  # what the codes condemn is not decoded


def test_the_least_bad_attempt_is_kept_and_reported(golden, tmp_path, base):
    def spoil(seed):
        codes = FakeLM(base, groups=3 if seed == 1 else 0)._answer(TTS_SAMPLING).ids if seed == 1 else ()
        return Completion(codes, StopReason.STOP) if seed < 3 else None

    engine = make_engine(golden, tmp_path, FakeLM(base, spoil=spoil))
    speech = engine.synthesize(TEXT)
    assert (speech.pieces[0].seed, speech.pieces[0].attempts) == (1, 3)
    assert len(speech.problems) == 1 and speech.problems[0].startswith("piece 0: short")


def test_greedy_is_not_drawn_again(golden, tmp_path, base):
    engine = make_engine(golden, tmp_path, FakeLM(base, groups=200))
    speech = engine.synthesize(TEXT, sampling=replace(TTS_SAMPLING, temperature=0.0))
    assert (speech.pieces[0].attempts, speech.pieces[0].problems[0].kind) == (1, "long")


def test_no_codes_at_all_is_an_error(golden, tmp_path, base):
    engine = make_engine(golden, tmp_path, FakeLM(base, spoil=lambda seed: Completion((), StopReason.STOP)))
    with pytest.raises(RequestError, match=r"no sound for '今天.*3 attempts"):
        engine.synthesize(TEXT)


def test_text_tokens_are_left_out_or_clamped_as_in_the_release(golden, tmp_path, base):
    def spoil(seed):
        ids = FakeLM(base)._answer(replace(TTS_SAMPLING, seed=1)).ids
        return Completion((*ids[:120], 100, *ids[120:]), StopReason.STOP)

    ours = make_engine(golden, tmp_path, FakeLM(base, spoil=spoil)).synthesize(TEXT)
    assert len(ours.codes) == 125 and "no audio codes" in ours.problems[0]
    engine = make_engine(golden, tmp_path, FakeLM(base, spoil=spoil), release_sampling=True)
    theirs = engine.synthesize(TEXT)
    assert len(theirs.codes) == 126 and theirs.codes.interleaved[120] == 0
    [(prompt, params)] = asked(engine)
    assert (params.allowed, params.cycle, params.max_new_tokens) == ((), (), 8192 - len(prompt))


def test_speed_and_volume(engine):
    plain = engine.synthesize(TEXT)
    fast = engine.synthesize(TEXT, speed=1.5, volume=2.0)
    assert fast.seconds == pytest.approx(plain.seconds / 1.5, abs=0.001)
    assert np.abs(fast.audio.samples).max() == pytest.approx(2 * np.abs(plain.audio.samples).max(), rel=0.02)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT, {"seed": -1}, "seed -1"),
        (TEXT, {"seed": 1.5}, "seed 1.5"),
        (TEXT, {"speed": 3}, "speed 3"),
        (TEXT, {"volume": 0}, "volume 0"),
        ("（RAPP）x", {}, "did you mean"),
        ("（RAP）", {}, "only style tags"),
        ("（RAP）……", {}, "nothing to say"),
        ("（哼唱）啦啦", {"speaker": "Ann"}, "Ann哼唱"),
        (TEXT, {"speaker": "Ann", "clone": {}}, "not both"),
        (TEXT, {"clone": {"wav_path": "x"}}, "prompt_text"),
        (TEXT, {"clone": {"prompt_text": "x", "wav_path": "none.wav"}}, "none.wav does not exist"),
    ],
)
def test_bad_requests(engine, text, options, message):
    with pytest.raises(RequestError, match=message):
        engine.synthesize(text, **options)


def test_a_prompt_beyond_the_context_says_by_how_much(golden, tmp_path, base):
    engine = make_engine(golden, tmp_path, FakeLM(base, max_context=100))
    with pytest.raises(RequestError, match=r"\d+ over the limit of 100"):
        engine.synthesize(TEXT)
