"""Replays the sound helpers around the models: reading, resampling, level, trimming, audio text to ids.

Rows of the recording without a counterpart here, and why:
`resample_from_lower_rate`: the release refuses rates below 16 kHz, `resample` serves them.
`trim_custom`: how much silence stays is fixed in `trim_silence`, as every caller of the release has it.
`norm_audio`, `encode_wav`: the release's own int16 scaling and float wav of its demo server; `write_audio`
writes what it is given, unscaled, as 16 bit.
`get_audio_tokens` of nothing or with blanks between pieces: an error there, codes here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from stepaudio.golden.base import Row, close, exact, read_json
from tokenizer.audio import normalize_peak, read_audio, resample, trim_silence
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

_SUM_TOLERANCE = 1e-3  # of sums over a whole clip; single samples are held to the recorded tolerance


def replay(root: Path) -> Iterator[Row]:
    """Rows of the component under `root/postprocessing`; the clips lie in `root/wavs`."""
    folder = root / "postprocessing"
    golden = read_json(folder / "golden.json")
    expected = load_file(folder / "golden.safetensors")
    yield from _load(root, golden["load_audio"])
    for case in golden["resample"]:
        yield from _resample(root, case, expected, golden["tolerance"]["resample"])
    for case in golden["energy_norm"]:
        name = f"energy.{case['name']}"
        ours = normalize_peak(expected[f"{name}.in"][0])
        yield close(name, ours, expected[f"{name}.out"][0], golden["tolerance"]["energy"])
    for case in golden["trim"]:
        yield from _trim(root, case, expected)
    yield from _audio_text(golden["get_audio_tokens"])


def _load(root: Path, case: dict[str, Any]) -> Iterator[Row]:
    audio = read_audio(root / "wavs" / case["clip"])
    yield exact("load_audio.shape", [1, len(audio), audio.sample_rate], [*case["shape"], case["sr"]])
    samples = audio.samples.astype(np.float64)
    yield close("load_audio.mean", samples.mean(), case["mean"], 1e-7)
    yield close("load_audio.l2", np.linalg.norm(samples), case["l2"], 1e-5)


def _resample(root: Path, case: dict[str, Any], expected: dict[str, np.ndarray], tolerance: float) -> Iterator[Row]:
    samples = resample(read_audio(root / "wavs" / case["clip"]), case["to"]).samples
    group = f"resample.{Path(case['clip']).stem}_to{case['to'] // 1000}k"
    first = expected[f"{group}_first4000"]
    yield exact(f"{group}.length", [len(samples)], [case["n_out"]])
    yield close(group, samples[: len(first)], first, tolerance)
    sums = [samples.sum(dtype=np.float64), np.linalg.norm(samples.astype(np.float64))]
    yield close(f"{group}.sums", sums, [case["sum"], case["l2"]], _SUM_TOLERANCE)


def _trim(root: Path, case: dict[str, Any], expected: dict[str, np.ndarray]) -> Iterator[Row]:
    """Made-up cases come with their samples, clips are prepared from their files."""
    group = f"trim.{case['name']}"
    if f"{group}.in" in expected:
        trimmed = trim_silence(expected[f"{group}.in"])
        yield close(group, trimmed, expected[f"{group}.out"], 0.0)
    else:
        audio = read_audio(root / "wavs" / f"{case['name'].removeprefix('clip_')}.wav")
        trimmed = trim_silence(normalize_peak(resample(audio, 16_000).samples))
    yield exact(f"{group}.length", [len(trimmed)], [case["n_out"]])
    sums = [trimmed.sum(dtype=np.float64), np.linalg.norm(trimmed.astype(np.float64))]
    yield close(f"{group}.sums", sums, [case["sum"], case["l2"]], _SUM_TOLERANCE)


def _audio_text(cases: list[list[Any]]) -> Iterator[Row]:
    good = [(text, ids) for text, ids in cases if isinstance(ids, list)]
    yield exact("get_audio_tokens", [AudioCodes.from_text(text).to_ids() for text, _ in good], [ids for _, ids in good])
    foreign = [text for text, ids in cases if not isinstance(ids, list) and re.sub(r"<audio_\d+>|\s", "", text)]
    yield exact("get_audio_tokens.refused", [_refused(text) for text in foreign], [True] * len(foreign))


def _refused(text: str) -> bool:
    try:
        AudioCodes.from_text(text)
    except RequestError:
        return True
    return False
