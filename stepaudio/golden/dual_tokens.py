"""Replays sound to merged ids: prepared samples, both streams, ids and text, merge rules and lengths.

The recording lists no fragile positions of its own, so they are found as elsewhere: codes whose two
best codewords are nearly equally far, here by our own vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from stepaudio.golden.base import Row, close, exact, read_json
from tokenizer.audio import TOKENIZER_RATE, read_audio, resample
from tokenizer.codes import LAYOUT, AudioCodes
from tokenizer.dual import SEMANTIC_FILE, DualTokenizer, prepare
from tokenizer.linguistic import LinguisticTokenizer
from tokenizer.log_mel import log_mel
from tokenizer.semantic import SemanticEncoder, SemanticTokenizer, TorchBackend

_MARGIN = 1e-3  # difference of two distances below which rounding may choose the other codeword


def replay(root: Path) -> Iterator[Row]:
    """Rows of the component under `root/dual_tokens`; both tokenizers and the clips lie beside it."""
    golden = read_json(root / "dual_tokens" / "golden.json")
    expected = load_file(root / "dual_tokens" / "golden.safetensors")
    model = SemanticEncoder.from_file(root / "semantic_tokenizer" / SEMANTIC_FILE)
    tokenizer = DualTokenizer(_linguistic(root / "linguistic_tokenizer"), SemanticTokenizer(TorchBackend(model)))
    for case in golden["clips"]:
        name = Path(case["clip"]).stem
        audio = read_audio(root / "wavs" / case["clip"])
        trimmed, whole = prepare(audio, trim=True), prepare(audio)
        raw = resample(audio, TOKENIZER_RATE).samples
        tolerance = golden["tolerance"]["preprocessed"]
        yield close(f"{name}.preprocessed", trimmed, expected[f"{name}.preprocessed"], tolerance)
        yield exact(f"{name}.lengths", [len(trimmed), len(whole)], [case["n_preprocessed"], case["n_no_trim"]])
        for kind, samples in {"trimmed": trimmed, "not_trimmed": whole, "raw_no_norm": raw}.items():
            yield from _codes(f"{name}.{kind}", tokenizer, model, samples, case[kind])
        batch = tokenizer.encode([audio, audio], dither=0.0)
        single = tokenizer.encode(audio, dither=0.0)
        yield exact(f"{name}.encode", [codes.to_ids() for codes in batch], [single.to_ids()] * 2)
        for kind, text in (
            ("not_trimmed", case["not_trimmed"]["token_str"]),
            ("trimmed", case["merge_token_str_trimmed"]),
        ):
            ids = case[kind]["merged_ids"]
            yield exact(f"{name}.{kind}.text", [AudioCodes.from_ids(ids).to_text()], [text])
            yield exact(f"{name}.{kind}.from_text", AudioCodes.from_text(text).to_ids(), ids)
    for case in golden["merge_rules"]:
        merged = AudioCodes.merge(case["vq02"], case["vq06"])
        yield exact(f"merge.{len(case['vq02'])}+{len(case['vq06'])}", [merged.to_text()], [case["text"]])
    yield from _lengths(root, tokenizer, golden["vq06_lengths"])


def _linguistic(folder: Path) -> LinguisticTokenizer:
    files = {name: value.split()[0] for name, value in read_json(folder / "golden.json")["files"].items()}
    return LinguisticTokenizer.from_files(*(folder / files[name] for name in ("weights", "cmvn", "kmeans", "config")))


def _codes(
    group: str, tokenizer: DualTokenizer, model: SemanticEncoder, samples: np.ndarray, case: dict[str, Any]
) -> Iterator[Row]:
    """Both streams and their merge."""
    linguistic = tokenizer.linguistic.encode([samples], dither=0.0)[0]
    semantic = tokenizer.semantic.encode([samples])[0]
    fragile = _fragile(tokenizer.linguistic, model, samples)
    yield exact(f"{group}.linguistic", linguistic.tolist(), case["vq02"], set(np.flatnonzero(fragile[0]).tolist()))
    yield exact(f"{group}.semantic", semantic.tolist(), case["vq06"], set(np.flatnonzero(fragile[1]).tolist()))
    merged = AudioCodes.merge(*fragile).interleaved
    ignore = set(np.flatnonzero((merged == 1) | (merged == LAYOUT.linguistic_size + 1)).tolist())
    yield exact(f"{group}.merged", AudioCodes.merge(linguistic, semantic).to_ids(), case["merged_ids"], ignore)


@torch.inference_mode()
def _fragile(linguistic: LinguisticTokenizer, model: SemanticEncoder, samples: np.ndarray) -> tuple[np.ndarray, ...]:
    """1 for each code of either stream that rounding may change, else 0."""
    vectors = linguistic.encoder(linguistic.front_end.rows(torch.from_numpy(samples), dither=0.0)[None])[0]
    hidden, _ = model(log_mel(torch.from_numpy(samples))[None])
    return _near_ties(vectors, linguistic.centroids), _near_ties(F.normalize(hidden[0]), model.quantizer.codebook)


def _near_ties(vectors: Tensor, codebook: Tensor) -> np.ndarray:
    best = torch.cdist(vectors, codebook).topk(2, largest=False).values
    return (best[:, 1] - best[:, 0] < _MARGIN).long().numpy()


def _lengths(root: Path, tokenizer: DualTokenizer, case: dict[str, Any]) -> Iterator[Row]:
    """Clips around the lengths where windows begin and end, as one batch."""
    samples = resample(read_audio(root / "wavs" / case["source"]), TOKENIZER_RATE).samples
    table = case["table"]
    found = [codes.tolist() for codes in tokenizer.semantic.encode([np.resize(samples, row[0]) for row in table])]
    ours = [[len(codes), _digest(codes), codes[:6], codes[-6:]] for codes in found]
    for row, mine in zip(table, ours):
        yield exact(f"vq06_lengths.{row[0]}", mine, row[1:])


def _digest(codes: list[int]) -> str:
    return hashlib.sha256(json.dumps(codes).encode()).hexdigest()[:16]
