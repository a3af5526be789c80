"""Replays `tts_e2e`: whole speech requests of the release, its language model's answer given.

The pieces of golden data are laid out as a release folder and opened by `StepAudioTTS.from_dir`, so every
loader on the way is part of the replay. The waveform is made from the recorded mel: it does not survive
the rounding of another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice.decoder import DecoderNoise, SpeechDecoder
from cosyvoice.flow import num_frames
from cosyvoice.hift import SourceDraws, hop_length
from cosyvoice.prompt import VoicePrompt
from stepaudio.checkpoints import ASR_DIR, FLOW_DIR, MUSIC_DIR, TOKENIZER_DIR, TTS_DIR
from stepaudio.golden.base import Row, close, exact, read_json
from stepaudio.lm.base import Completion, SamplingParams, StopReason
from stepaudio.tts.engine import StepAudioTTS
from stepaudio.tts.speakers import SpeakerPrompt, Speakers
from tokenizer.codes import AudioCodes

_MUSIC_SCALE = {"spk_embed_affine_layer.weight": 0.5, "conv_post.weight_g": 0.8}  # how the music flow was made
_MEL_MEAN, _WAV = 0.03, 1e-3
_BFLOAT16_STEP = 0.07  # of values up to 16; the recording holds prompts in bfloat16


class GivenLM:
    """A language model that answers with recorded ids and keeps what it was asked."""

    max_context = 32768

    def __init__(self) -> None:
        self.answer: list[int] = []
        self.asked: list[tuple[list[int], SamplingParams]] = []

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        self.asked += [(list(prompt), wanted) for prompt, wanted in zip(prompts, params)]
        return [Completion(tuple(self.answer), StopReason.STOP) for _ in prompts]

    def stream(self, prompt: Sequence[int], params: SamplingParams, cancelled: Any = None) -> Iterator[Any]:
        raise AssertionError("the speech engine does not stream here")


class RecordedDecoder(SpeechDecoder):
    """A decoder whose noise follows the recording's rule, and which keeps its inputs and mels."""

    def draw_noise(self, codes: AudioCodes, prompt: VoicePrompt | None, seed: int) -> DecoderNoise:
        frames = num_frames(len(codes), self.config.flow)
        sines = self.config.hift.nb_harmonics + 1
        phases = np.random.RandomState(seed + 77).uniform(-np.pi, np.pi, (1, sines, 1)).astype(np.float32)
        flow = _normal(seed, (1, self.config.flow.output_size, self._width(codes, prompt)))[0]
        noise = _normal(seed + 1000, (1, sines, frames * hop_length(self.config.hift)))
        return DecoderNoise(flow, SourceDraws(torch.from_numpy(phases[..., 0]), noise))

    def token_to_mel(self, codes: Any, prompts: Any, noise: Any, *args: Any) -> list[Tensor]:
        mels = super().token_to_mel(codes, prompts, noise, *args)
        self.seen = codes[0], prompts[0], noise[0], mels[0]
        return mels


def replay(root: Path) -> Iterator[Row]:
    """Voices first, then every recorded request: ids, codes, mel, sound."""
    folder = root / "tts_e2e"
    golden = read_json(folder / "golden.json")
    tensors = load_file(folder / "golden.safetensors")
    with TemporaryDirectory() as temporary:
        release = Path(temporary)
        _lay_out(root, release)
        lm = GivenLM()
        tts = StepAudioTTS.from_dir(
            release,
            dtype=torch.bfloat16,
            lm=lm,
            speakers=_speakers(golden["speakers"], root / "wavs"),
            cache_dir=release / "cache",
            dither=0.0,
            max_attempts=1,
            max_piece_seconds=1e9,
            release_sampling=True,
        )
        speech, music = (
            RecordedDecoder.from_dir(release / TTS_DIR / name, dtype=torch.bfloat16) for name in (FLOW_DIR, MUSIC_DIR)
        )
        tts.decoder, tts.music_decoder = speech, lambda: music
        for row in golden["speakers"]:
            yield from _voice(tts, row, tensors)
        for case in golden["cases"]:
            yield from _case(tts, lm, case, tensors, root / "wavs")


def _voice(tts: StepAudioTTS, row: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Row]:
    """Codes, mel and embedding of a registered voice."""
    name = f"tts_e2e/voice {row['speaker']}"
    voice = tts.voices.get(tts.speakers.find(row["speaker"]).wav_path)
    yield exact(f"{name}/codes", voice.codes.to_ids(tts.vocab.audio_base), row["prompt_code"])
    expected = tensors[f"speaker.{row['speaker']}.feat_bf16_first40"]
    mel = voice.mel.bfloat16()
    yield exact(f"{name}/frames", [len(mel)], [row["feat_len"]])
    yield close(f"{name}/mel", mel[: len(expected)], expected, _BFLOAT16_STEP)
    embedding = tensors[f"speaker.{row['speaker']}.embedding_bf16"]
    yield close(f"{name}/embedding", voice.embedding.bfloat16(), embedding, _BFLOAT16_STEP)


def _case(
    tts: StepAudioTTS, lm: GivenLM, case: dict[str, Any], tensors: dict[str, Tensor], wavs: Path
) -> Iterator[Row]:
    """One request: what the language model is given, what the flow is given, mel and sound."""
    name = f"tts_e2e/{case['name']}"
    clone = case["clone"]
    if clone:
        clone = {"prompt_text": clone["prompt_text"], "wav_path": wavs / clone["wav"]}
    lm.answer = case["generated_ids"][:-1]
    speaker = None if clone else case["prompt_speaker"]
    speech = tts.synthesize(case["text"], speaker, clone, seed=case["noise_seed"], allow_any_tag=True)
    prompt, params = lm.asked[-1]
    yield exact(f"{name}/ids", prompt, case["lm_input_ids"])
    kwargs = case["generate_kwargs"]
    asked = [len(prompt) + params.max_new_tokens, params.temperature, params.top_k, params.repetition_window]
    yield exact(f"{name}/sampling", asked, [kwargs["max_length"], kwargs["temperature"], 50, 10])

    decoder = tts.music_decoder() if case["model"] == "music" else tts.decoder
    codes, voice, noise, mel = decoder.seen
    yield exact(f"{name}/flow codes", codes.interleaved.tolist(), [max(code, 0) for code in case["flow_token"]])
    yield exact(f"{name}/voice", [len(voice.codes), *voice.mel.shape], _voice_shape(case))
    expected, wav = tensors[f"{case['name']}.mel_bf16"], tensors[f"{case['name']}.wav"]
    yield _mean(f"{name}/mel", mel, expected)
    yield exact(f"{name}/samples", [len(speech.audio), speech.audio.sample_rate], [len(wav), case["sr"]])
    [sound] = decoder.mel_to_audio([expected], [noise.source])
    yield close(f"{name}/wav of the recorded mel", sound.samples, wav, _WAV)


def _mean(group: str, actual: Tensor, expected: Tensor) -> Row:
    if actual.shape != expected.shape:
        return close(group, actual, expected, _MEL_MEAN)
    difference = float((actual.float() - expected.float()).abs().mean())
    return Row(group, difference, _MEL_MEAN, "mean difference, bfloat16")


def _voice_shape(case: dict[str, Any]) -> list[int]:
    return [case["prompt_token_shape"][1], *case["prompt_feat_shape"][1:]]


def _speakers(rows: Sequence[dict[str, Any]], wavs: Path) -> Speakers:
    return Speakers(SpeakerPrompt(row["speaker"], row["prompt_text"], wavs / row["wav"]) for row in rows)


def _normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def _lay_out(root: Path, release: Path) -> None:
    """The golden components as the folders of a release, without language model weights."""
    tokenizer, tts = release / TOKENIZER_DIR, release / TTS_DIR
    linguistic = root / "linguistic_tokenizer"
    (tokenizer / ASR_DIR).mkdir(parents=True)
    shutil.copy(linguistic / "linguistic_tokenizer.npy", tokenizer)
    shutil.copy(root / "semantic_tokenizer" / "speech_tokenizer_v1.onnx", tokenizer)
    for name in ("am.mvn", "config.yaml"):
        shutil.copy(linguistic / name, tokenizer / ASR_DIR)
    torch.save(load_file(linguistic / "model.safetensors"), tokenizer / ASR_DIR / "model.pt")
    for folder, scales in ((FLOW_DIR, {}), (MUSIC_DIR, _MUSIC_SCALE)):
        (tts / folder).mkdir(parents=True)
        shutil.copy(root / "flow" / "cosyvoice.yaml", tts / folder)
        shutil.copy(root / "prompt_features" / "campplus.onnx", tts / folder)
        for weights in (root / "flow" / "flow.safetensors", root / "vocoder" / "hift.safetensors"):
            state = {key: value * scales.get(key, 1.0) for key, value in load_file(weights).items()}
            torch.save(state, tts / folder / f"{weights.stem}.pt")
    for path in (root / "prompts").glob("tokenizer*"):
        shutil.copy(path, tts)
