"""Replays the linguistic tokenizer: features, encoder, codes whole, in pieces, interleaved and at odd lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from stepaudio.golden.base import Row, close, exact, read_json
from tokenizer.audio import TOKENIZER_RATE, read_audio, resample
from tokenizer.fbank import CHUNK_ROWS
from tokenizer.linguistic import LinguisticTokenizer


def replay(root: Path) -> Iterator[Row]:
    """Rows of the component under `root/linguistic_tokenizer`; the clips lie in `root/wavs`."""
    folder = root / "linguistic_tokenizer"
    golden = read_json(folder / "golden.json")
    expected = load_file(folder / "golden.safetensors")
    files = {name: value.split()[0] for name, value in golden["files"].items()}
    tokenizer = LinguisticTokenizer.from_files(
        folder / files["weights"], folder / files["cmvn"], folder / files["kmeans"], folder / files["config"]
    )
    clips: dict[str, np.ndarray] = {}
    for case in golden["clips"]:
        samples = clips[case["clip"]] = _read(root / "wavs" / case["clip"])
        name = Path(case["clip"]).stem
        yield exact(f"{name}.samples_16k", [len(samples)], [case["samples_16k"]])
        yield from _tensors(name, tokenizer, samples, expected, golden["tolerance"])
        yield from _codes(name, tokenizer, samples, case)
    yield from _interleaved(tokenizer, clips, golden["interleaved_sessions"])
    yield from _lengths(tokenizer, clips, golden)


def _read(path: Path) -> np.ndarray:
    return resample(read_audio(path), TOKENIZER_RATE).samples


@torch.inference_mode()
def _tensors(
    name: str,
    tokenizer: LinguisticTokenizer,
    samples: np.ndarray,
    expected: dict[str, torch.Tensor],
    tolerance: dict[str, Any],
) -> Iterator[Row]:
    rows = tokenizer.front_end.rows(torch.from_numpy(samples), dither=0.0)
    encoder = tokenizer.encoder
    first, _ = encoder.windows(rows[None, :CHUNK_ROWS], None, encoder.start(1))
    yield close(f"{name}.feats", rows, expected[f"{name}.feats"], tolerance["feats"])
    yield close(f"{name}.enc_out", encoder(rows[None])[0], expected[f"{name}.enc_out"], tolerance["enc_out"])
    key = f"{name}.first_chunk_full_out"
    if key in expected:
        yield close(key, first[0, 0], expected[key], tolerance["enc_out"])


def _codes(name: str, tokenizer: LinguisticTokenizer, samples: np.ndarray, case: dict[str, Any]) -> Iterator[Row]:
    fragile = set(case["fragile_positions"])
    whole = tokenizer.encode([samples], dither=0.0)[0]
    yield exact(f"{name}.one_shot", whole.tolist(), case["one_shot"], fragile)
    for pattern in case["streaming"]:
        group = f"{name}.streaming.{pattern['pattern']}"
        calls = _stream(tokenizer, samples, [size for size, _ in pattern["calls"]])
        expected = [codes for _, codes in pattern["calls"]]
        yield exact(f"{group}.counts", [len(codes) for codes in calls], [len(codes) for codes in expected])
        yield exact(group, _join(calls), _join(expected), fragile)


def _stream(tokenizer: LinguisticTokenizer, samples: np.ndarray, sizes: Sequence[int]) -> list[list[int]]:
    """Codes of each call; the last piece is final, so what closing adds belongs to it."""
    stream = tokenizer.stream(dither=0.0)
    pieces = np.split(samples, np.cumsum(sizes)[:-1])
    calls = [stream.push(piece).tolist() for piece in pieces]
    calls[-1] += stream.close().tolist()
    return calls


def _join(calls: list[list[int]]) -> list[int]:
    return [code for call in calls for code in call]


def _interleaved(tokenizer: LinguisticTokenizer, clips: dict[str, np.ndarray], case: dict[str, Any]) -> Iterator[Row]:
    streams = {side: tokenizer.stream(dither=0.0) for side in "ab"}
    codes: dict[str, list[int]] = {"a": [], "b": []}
    for begin in range(0, case["piece"] * case["pieces"], case["piece"]):
        for side, stream in streams.items():
            codes[side] += stream.push(clips[case[f"clip_{side}"]][begin : begin + case["piece"]]).tolist()
    for side, stream in streams.items():
        yield exact(f"interleaved_sessions.{side}", codes[side] + stream.close().tolist(), case[side])


def _lengths(tokenizer: LinguisticTokenizer, clips: dict[str, np.ndarray], golden: dict[str, Any]) -> Iterator[Row]:
    edge, long = golden["edge_lengths"], golden["long"]
    samples = clips[edge["source"]][edge["offset"] :]
    encoded = tokenizer.encode([samples[:length] for length, _, _ in edge["table"]], dither=0.0)
    yield exact("edge_lengths", [codes.tolist() for codes in encoded], [codes for _, _, codes in edge["table"]])
    for case in golden["tails"]:
        sizes = np.diff([*range(0, case["n"], case["sizes"][0]), case["n"]])
        calls = _stream(tokenizer, samples[: case["n"]], sizes)
        group = f"tails.{case['n']}.{case['sizes'][0]}"
        yield exact(f"{group}.counts", [len(codes) for codes in calls], case["counts"])
        yield exact(group, _join(calls), case["tokens"])
    samples = np.resize(clips[long["source"]], round(long["seconds"] * TOKENIZER_RATE))
    yield exact("long", tokenizer.encode([samples], dither=0.0)[0].tolist(), long["tokens"])
