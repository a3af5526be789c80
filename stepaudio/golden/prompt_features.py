"""Voice prompt features: 22.05 kHz log-mel, speaker filter banks and the speaker embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice.config import MelConfig, read_config
from cosyvoice.mel import mel_spectrogram
from cosyvoice.speaker import SpeakerEncoder, speaker_features
from stepaudio.golden.base import Row, close, exact, read_json
from tokenizer.audio import TOKENIZER_RATE, read_audio, resample
from tokenizer.fbank import kaldi_fbank

_RAW = "rand8000"  # a mel of given samples, without a clip


def replay(root: Path) -> Iterator[Row]:
    """Rows of the `prompt_features` folder."""
    folder = root / "prompt_features"
    info = read_json(folder / "golden.json")
    golden, mel_config = load_file(folder / "golden.safetensors"), read_config(root / "flow").mel
    encoder = SpeakerEncoder.from_file(folder / info["campplus"]["file"])
    tolerance = info["tolerance"]
    for clip in info["clips"]:
        yield from _clip(root / "wavs" / clip["clip"], clip, golden, mel_config, encoder, tolerance)
    if f"{_RAW}.wav" in golden:
        mel = mel_spectrogram(golden[f"{_RAW}.wav"], mel_config)
        yield close(f"{_RAW}.mel", mel.T, golden[f"{_RAW}.mel"], tolerance["mel22"])


def _clip(
    path: Path,
    clip: dict[str, Any],
    golden: dict[str, Tensor],
    mel_config: MelConfig,
    encoder: SpeakerEncoder,
    tolerance: dict[str, float],
) -> Iterator[Row]:
    name, audio = path.stem, read_audio(path)
    prompt = torch.from_numpy(resample(audio, mel_config.sampling_rate).samples)
    samples = torch.from_numpy(resample(audio, TOKENIZER_RATE).samples)
    mel = mel_spectrogram(prompt, mel_config)
    fbank, centred = kaldi_fbank(samples, window="povey"), speaker_features(samples)
    yield exact(
        f"{name}.lengths",
        [len(samples), len(prompt), len(mel), len(fbank)],
        [clip[key] for key in ("samples_16k", "samples_22k", "mel22_frames", "fbank_frames")],
    )
    for key, actual, bound in (
        ("mel22_first120", mel[:120], "mel22"),
        ("mel22_last8", mel[-8:], "mel22"),
        ("fbank80_first100", fbank[:100], "fbank"),
        ("fbank80_centered_first100", centred[:100], "fbank"),
        ("embedding", encoder.embed(audio), "embedding"),
    ):
        yield close(f"{name}.{key}", actual, golden[f"{name}.{key}"], tolerance[bound])
