"""HiFT: f0, source, its STFT, the predicted spectrum and the wave.

The source is made from the recorded f0 and the wave from the recorded source, because the phase
integrates f0: a rounding difference in it moves the wave by far more than any defect would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice.config import read_config
from cosyvoice.hift import HiFTVocoder, SourceDraws
from stepaudio.golden.base import Row, close, read_json

_F0_RELATIVE, _SOURCE, _STFT, _MAGNITUDE_RELATIVE, _PHASE = 1e-3, 1e-5, 1e-4, 1e-4, 2e-4
_WAV, _WAV_CLIPPED = 2e-4, 5e-4


def replay(root: Path) -> Iterator[Row]:
    """Rows of the `vocoder` folder."""
    folder = root / "vocoder"
    cases = read_json(folder / "golden.json")["cases"]
    vocoder = HiFTVocoder.from_file(folder / "hift.safetensors", read_config(root / "flow").hift)
    inputs, golden = load_file(folder / "inputs.safetensors"), load_file(folder / "golden.safetensors")
    for case in cases:
        name = case["name"]
        recorded = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
        draws = SourceDraws(inputs[f"{name}.phase_draw"][None], inputs[f"{name}.noise_draw"][None])
        clipped = case["clipped"] + case["magnitude_over_100"] > 0
        with torch.inference_mode():
            yield from _case(vocoder, name, inputs[f"{name}.mel"][None], draws, recorded, clipped)


def _case(
    vocoder: HiFTVocoder, name: str, mel: Tensor, draws: SourceDraws, recorded: dict[str, Tensor], clipped: bool
) -> Iterator[Row]:
    f0, source = recorded["f0"][None], recorded["source"]
    yield _relative(f"{name}.f0", vocoder.f0_predictor(mel)[0], recorded["f0"], _F0_RELATIVE)
    yield close(f"{name}.source", vocoder(mel, draws, f0=f0).source, source, _SOURCE, "from the recorded f0")
    stft = vocoder.stft(source)[0]
    magnitude, phase = (part[0] for part in vocoder.spectrum(mel, source))
    bins = len(magnitude)
    yield _first400(f"{name}.s_stft_real", stft[:bins], recorded, _STFT)
    yield _first400(f"{name}.s_stft_imag", stft[bins:], recorded, _STFT)
    yield _relative(f"{name}.magnitude", magnitude, recorded["magnitude"], _MAGNITUDE_RELATIVE)
    yield _first400(f"{name}.phase", phase, recorded, _PHASE)
    wav = vocoder.synthesize(mel, source)[0]
    yield close(f"{name}.wav", wav, recorded["wav"], _WAV_CLIPPED if clipped else _WAV, "from the recorded source")


def _first400(group: str, actual: Tensor, recorded: dict[str, Tensor], tolerance: float) -> Row:
    expected = recorded[group.split(".", 1)[1] + "_first400"]
    return close(group, actual[:, :400], expected, tolerance, "first 400 frames")


def _relative(group: str, actual: Tensor, expected: Tensor, tolerance: float) -> Row:
    """Difference relative to the recorded value, absolute below 1."""
    if actual.shape != expected.shape:
        return close(group, actual, expected, tolerance)
    scale = expected.abs().clamp(min=1)
    return close(group, actual / scale, expected / scale, tolerance, "relative")
