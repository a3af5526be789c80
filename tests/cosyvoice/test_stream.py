"""Codes in pushes give the sound of the codes at once: same noise, seams that are not heard, states as values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosyvoice.decoder import SpeechDecoder
from cosyvoice.hift import SourceDraws
from cosyvoice.mel import mel_spectrogram
from cosyvoice.prompt import VoicePrompt
from cosyvoice.stream import WHOLE, ChunkSchedule, DecoderStream, advance, code_grid, stream_noise
from cosyvoice.wave_stream import WaveChunk, WaveState, frame_noise, source_draws, vocode
from stepaudio.checkpoints import BUNDLED, FLOW_DIR, TOKENIZER_DIR, TTS_DIR
from tokenizer.audio import read_audio
from tokenizer.codes import AudioCodes
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError

QUICK = ChunkSchedule(first=10, growth=1.5, largest=20, ahead=5, left=15, num_steps=2, first_steps=2)


@pytest.fixture(scope="module")
def random_decoder(tiny) -> SpeechDecoder:
    return SpeechDecoder.from_dir(tiny / TTS_DIR / FLOW_DIR)


@pytest.fixture(scope="module")
def nano() -> SpeechDecoder:
    return SpeechDecoder.from_dir(BUNDLED / TTS_DIR / FLOW_DIR)


@pytest.fixture(scope="module")
def voice(nano, golden) -> VoicePrompt:
    """A recording: its codes are spoken, by its own voice."""
    clip = read_audio(golden / "wavs" / "clip0_22k.wav")
    return nano.voice_prompt(clip, DualTokenizer.from_dir(BUNDLED / TOKENIZER_DIR))


def random_codes(count: int, seed: int = 0) -> AudioCodes:
    rng = np.random.default_rng(seed)
    groups = -(-count // 5)
    merged = AudioCodes.merge(rng.integers(0, 1024, 2 * groups), rng.integers(0, 4096, 3 * groups))
    return AudioCodes(merged.interleaved[:count])


def random_prompt(codes: int = 12, frames: int = 25) -> VoicePrompt:
    generator = torch.Generator().manual_seed(1)
    mel, embedding = torch.randn(frames, 80, generator=generator), torch.randn(192, generator=generator)
    return VoicePrompt(random_codes(codes, 7), mel, embedding)


def run(stream: DecoderStream, codes: AudioCodes, sizes: list[int]) -> list[np.ndarray]:
    """Sound of each push of so many codes (the last takes the rest) and of the close."""
    edges = np.cumsum([0, *sizes, len(codes)]).clip(max=len(codes))
    sounds = [stream.push(AudioCodes(codes.interleaved[a:b])).samples for a, b in itertools.pairwise(edges)]
    return [*sounds, stream.close().samples]


@pytest.mark.parametrize("count", [1, 4, 14, 15, 16, 57, 80])
@pytest.mark.parametrize("prompted", [False, True])
def test_pushes_of_any_size_give_the_same_samples(random_decoder, count, prompted):
    codes, prompt = random_codes(count), random_prompt() if prompted else None
    one = np.concatenate(run(DecoderStream(random_decoder, prompt, 3, QUICK), codes, [count]))
    rng = np.random.default_rng(count)
    for sizes in ([1] * count, rng.integers(0, 9, 60).tolist()):
        many = np.concatenate(run(DecoderStream(random_decoder, prompt, 3, QUICK), codes, sizes))
        assert np.array_equal(one, many)
    offline = random_decoder.decode(codes, prompt, num_steps=1)
    assert abs(len(one) - len(offline)) <= random_decoder.vocoder.hop


def test_one_window_is_the_whole_decode(random_decoder):
    codes, prompt = random_codes(43), random_prompt()
    [*_, sound] = run(DecoderStream(random_decoder, prompt, 5, WHOLE), codes, [7, 7])
    noise = stream_noise(random_decoder.config, prompt, len(codes), 5)
    difference = np.abs(sound - random_decoder.decode(codes, prompt, noise=noise).samples)
    print(f"one window: max {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() < 1e-5


def test_sound_comes_as_soon_as_the_schedule_says(random_decoder):
    stream = DecoderStream(random_decoder, None, 0, QUICK)
    assert [QUICK.size(chunk) for chunk in range(4)] == [10, 15, 20, 20] and stream.missing == 15
    assert len(stream.push(random_codes(14))) == 0 and stream.missing == 1
    assert len(stream.push(random_codes(1))) == 20 * random_decoder.vocoder.hop and stream.missing == 15
    assert len(stream.push(random_codes(35))) == 73 * random_decoder.vocoder.hop  # two chunks in one push


def test_the_vocoder_in_chunks_is_the_vocoder(nano, voice):
    vocoder, config, ahead = nano.vocoder, nano.config.hift, 20
    mel = voice.mel.T[:, :120]
    frames = mel.shape[1]
    with torch.inference_mode():
        whole = vocoder(mel[None], SourceDraws.batch([source_draws(9, 0, frames, config)])).wav[0]
    state, parts = WaveState.start(len(mel)), []
    for begin, end in zip([0, 7, 25, 26, 70], [7, 25, 26, 70, frames]):
        chunk = WaveChunk(state, mel[:, begin : min(frames, end + ahead)], end - begin, 9)
        [(samples, state)] = vocode(nano.vocoding, [chunk], fade=64)
        parts.append(samples)
    difference = (torch.cat(parts) - whole).abs()
    print(f"vocoder in chunks: max {difference.max():.1e}, mean {difference.mean():.1e} of {whole.abs().max():.2f}")
    assert difference.max() < 5e-3 and difference.mean() < 1e-4


def log_mel(samples: np.ndarray, decoder: SpeechDecoder) -> torch.Tensor:
    return mel_spectrogram(torch.from_numpy(samples), decoder.config.mel)


@pytest.mark.parametrize(
    "schedule, bound",
    [
        (ChunkSchedule(first_steps=5, num_steps=5), 0.45),
        (ChunkSchedule(first=10, ahead=5, left=15, prompt_seconds=1.0, num_steps=5, first_steps=4), 0.5),
        (ChunkSchedule(first=20, growth=1.0, ahead=15, num_steps=5, first_steps=5), 0.45),
    ],
    ids=["default", "light", "even"],
)
def test_seams_are_not_heard(nano, voice, schedule, bound):
    codes = AudioCodes(voice.codes.interleaved[:100])
    sounds = run(DecoderStream(nano, voice, 0, schedule), codes, [5] * 20)
    joined = np.concatenate(sounds)
    offline = nano.decode(codes, voice, num_steps=5, noise=stream_noise(nano.config, voice, len(codes), 0)).samples
    seams = [edge for edge in np.cumsum([len(sound) for sound in sounds]) if 0 < edge < len(joined)]
    steps = np.abs(np.diff(joined))
    inside = np.delete(steps, np.array(seams) - 1)
    distance = (log_mel(joined, nano)[:200] - log_mel(offline, nano)[:200]).abs().mean()
    print(f"log-mel L1 {distance:.3f}, at seams {steps[np.array(seams) - 1].max():.4f}")
    assert abs(len(joined) - len(offline)) <= nano.vocoder.hop
    assert len(seams) >= 2 and steps[np.array(seams) - 1].max() <= np.quantile(inside, 0.999)
    assert distance < bound


def test_streams_side_by_side_and_as_a_batch(random_decoder):
    items = [(random_codes(50, seed), random_prompt(), seed) for seed in range(3)]
    alone = [np.concatenate(run(DecoderStream(random_decoder, p, s, QUICK), c, [50])) for c, p, s in items]
    streams = [DecoderStream(random_decoder, prompt, seed, QUICK) for _, prompt, seed in items]
    parts: list[list[np.ndarray]] = [[], [], []]
    for at in range(0, 50, 10):
        for row, stream in enumerate(streams):
            parts[row].append(stream.push(AudioCodes(items[row][0].interleaved[at : at + 10])).samples)
    for row, stream in enumerate(streams):
        assert np.array_equal(np.concatenate([*parts[row], stream.close().samples]), alone[row])
    streams = [DecoderStream(random_decoder, prompt, seed, QUICK) for _, prompt, seed in items]
    for (codes, _, _), stream in zip(items, streams):
        stream.feed(codes)
    batch: list[list[np.ndarray]] = [[], [], []]
    for last in (False, False, False, True):
        for row, sound in enumerate(advance(streams, last)):
            batch[row].append(sound.samples)
    worst = max(np.abs(np.concatenate(batch[row]) - alone[row]).max() for row in range(3))
    print(f"batch of streams: max {worst:.1e}")
    assert worst < 1e-4


def test_a_state_can_be_kept_and_set_back(random_decoder):
    stream, codes = DecoderStream(random_decoder, None, 2, QUICK), random_codes(60)
    first = stream.push(AudioCodes(codes.interleaved[:30]))
    kept = stream.state
    rest = [stream.push(AudioCodes(codes.interleaved[30:])), stream.close()]
    stream.state = kept
    again = [stream.push(AudioCodes(codes.interleaved[30:])), stream.close()]
    assert len(first) and all(np.array_equal(a.samples, b.samples) for a, b in zip(rest, again))


def test_a_failed_push_changes_nothing(random_decoder, monkeypatch):
    stream = DecoderStream(random_decoder, None, 2, QUICK)
    kept = stream.state
    monkeypatch.setattr("cosyvoice.stream.vocode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.push(random_codes(40))
    assert stream.state is kept


def test_what_cannot_be_is_refused(random_decoder):
    stream = DecoderStream(random_decoder, None, 0, QUICK)
    with pytest.raises(RequestError, match="before any audio code came"):
        stream.close()
    stream.push(random_codes(1))
    assert len(stream.close()) > 0
    for call in (lambda: stream.push(random_codes(5)), stream.close):
        with pytest.raises(RequestError, match="closed"):
            call()
    for wrong in ({"first": 0}, {"ahead": 7}, {"growth": 0.5}, {"num_steps": True}, {"prompt_seconds": -1.0}):
        with pytest.raises(RequestError, match=f"{next(iter(wrong))} .* must"):
            ChunkSchedule(**wrong)


def test_noise_belongs_to_places(random_decoder):
    whole = frame_noise(4, 0, 0, 100, 3)
    assert torch.equal(whole[31:70], frame_noise(4, 0, 31, 70, 3)) and not torch.equal(whole[:32], whole[32:64])
    assert abs(float(whole.mean())) < 0.2 and 0.8 < float(whole.std()) < 1.2
    assert not torch.equal(whole, frame_noise(5, 0, 0, 100, 3)) and code_grid(random_decoder.config.flow) == 15


def test_a_shortened_prompt_keeps_its_end(random_decoder):
    short = replace(QUICK, prompt_seconds=0.24)
    stream = DecoderStream(random_decoder, random_prompt(20, 40), 0, short)
    stream.push(random_codes(14))
    request = stream.window(last=True).request
    assert len(request.prompt_codes) == 10 and len(request.prompt_mel) == 20
    assert torch.equal(request.prompt_mel, random_prompt(20, 40).mel[-20:])


@pytest.mark.gpu
def test_a_stream_on_the_gpu(golden, voice, nano):
    there = SpeechDecoder.from_dir(BUNDLED / TTS_DIR / FLOW_DIR, device="cuda")
    codes = AudioCodes(voice.codes.interleaved[:60])
    schedule = ChunkSchedule(num_steps=4, first_steps=4)
    here = np.concatenate(run(DecoderStream(nano, voice, 0, schedule), codes, [5] * 12))
    found = np.concatenate(run(DecoderStream(there, voice, 0, schedule), codes, [5] * 12))
    distance = (log_mel(here, nano) - log_mel(found, nano)).abs().mean()
    print(f"cpu and cuda streams: log-mel L1 {distance:.4f}")
    assert len(here) == len(found) and distance < 0.1
