"""Replays the semantic tokenizer: log-mel, hidden states, codes of both backends, and counts by length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from stepaudio.golden.base import Row, close, exact, read_json
from tokenizer.audio import TOKENIZER_RATE, read_audio, resample
from tokenizer.log_mel import log_mel
from tokenizer.semantic import SemanticEncoder, SemanticTokenizer, TorchBackend

_MODEL = "speech_tokenizer_v1.onnx"
_SIZES = {
    "n_mels": "num_mels",
    "n_audio_ctx": "num_positions",
    "n_codebook_size": "codebook_size",
    "n_audio_state": "width",
    "n_audio_head": "num_heads",
    "n_audio_layer": "num_layers",
}


def replay(root: Path) -> Iterator[Row]:
    """Rows of the component under `root/semantic_tokenizer`; the clips lie in `root/wavs`."""
    folder = root / "semantic_tokenizer"
    golden = read_json(folder / "golden.json")
    expected = load_file(folder / "golden.safetensors")
    model = SemanticEncoder.from_file(folder / _MODEL)
    yield from _weights(model, golden["dims"], folder / "weights.safetensors")
    yield from _counts(model, golden["frames_to_tokens"])
    backends = {
        "torch": SemanticTokenizer(TorchBackend(model)),
        "onnx": SemanticTokenizer.from_file(folder / _MODEL, backend="onnx"),
    }
    clips = [resample(read_audio(root / "wavs" / case["clip"]), TOKENIZER_RATE).samples for case in golden["clips"]]
    for case, samples in zip(golden["clips"], clips):
        yield from _tensors(Path(case["clip"]).stem, model, samples, case, expected, golden["tolerance"])
    for name, tokenizer in backends.items():
        batch = tokenizer.encode(clips)
        for case, samples, codes in zip(golden["clips"], clips, batch):
            fragile = set(case["fragile_positions"])
            group = f"{Path(case['clip']).stem}.tokens.{name}"
            yield exact(group, tokenizer.encode([samples])[0].tolist(), case["tokens"], fragile)
            yield exact(f"{group}.batch", codes.tolist(), case["tokens"], fragile)


def _weights(model: SemanticEncoder, dims: dict[str, int], path: Path) -> Iterator[Row]:
    """Sizes read out of the graph, and every weight where the recording keeps them under their torch names."""
    found = {name: getattr(model.config, ours) for name, ours in _SIZES.items()}
    yield exact("dims", sorted(found.items()), sorted(dims.items()))
    if path.exists():
        expected, tensors = load_file(path), model.state_dict()
        yield exact("weights.keys", sorted(tensors), sorted(expected))
        unequal = [name for name in expected if not torch.equal(tensors[name], expected[name])]
        yield exact("weights", unequal, [])


@torch.inference_mode()
def _counts(model: SemanticEncoder, table: list[list[int]]) -> Iterator[Row]:
    frames = torch.tensor([row[0] for row in table])
    _, counts = model(torch.zeros(len(table), model.config.num_mels, int(frames.max())), frames)
    yield exact("frames_to_tokens", counts.tolist(), [row[1] for row in table])


@torch.inference_mode()
def _tensors(
    name: str,
    model: SemanticEncoder,
    samples: np.ndarray,
    case: dict[str, Any],
    expected: dict[str, torch.Tensor],
    tolerance: dict[str, Any],
) -> Iterator[Row]:
    mel = log_mel(torch.from_numpy(samples))
    hidden, _ = model(mel[None])
    first = expected[f"{name}.logmel_first100"]
    yield exact(f"{name}.lengths", [len(samples), mel.shape[1]], [case["samples_16k"], case["mel_frames"]])
    yield close(f"{name}.logmel", mel[:, : first.shape[1]], first, tolerance["logmel"])
    range_ = [float(mel.min()), float(mel.max()), float(mel.mean())]
    yield close(
        f"{name}.logmel_range", range_, [case["mel_min"], case["mel_max"], case["mel_mean"]], tolerance["logmel"]
    )
    yield close(f"{name}.hidden", hidden[0], expected[f"{name}.hidden"], tolerance["hidden"])
