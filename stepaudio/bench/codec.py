"""How fast the codec is: torch beside onnxruntime, long files beside short ones, every stage of a round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from stepaudio.bench.report import Row, peak_rss_mb, row, seconds_of
from stepaudio.checkpoints import FLOW_DIR, TOKENIZER_DIR, TTS_DIR
from tokenizer.audio import TOKENIZER_RATE, Audio
from tokenizer.dual import DualTokenizer
from tokenizer.semantic import SemanticTokenizer


def noise_clip(seconds: float, seed: int) -> np.ndarray:
    """Speech-like noise with a slow loudness swing, float32 at 16 kHz."""
    count = int(seconds * TOKENIZER_RATE)
    samples = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    swing = 0.55 + 0.45 * np.sin(2 * np.pi * 3.0 * np.arange(count, dtype=np.float32) / TOKENIZER_RATE)
    return 0.1 * samples * swing.astype(np.float32)


def semantic(root: Path, seconds: float, repeats: int, seed: int) -> list[Row]:
    """The torch semantic tokenizer and onnxruntime on the same file, clip and number of threads, taken in turns."""
    path = root / TOKENIZER_DIR / "speech_tokenizer_v1.onnx"
    threads = torch.get_num_threads()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    clip = noise_clip(seconds, seed)
    ours = SemanticTokenizer.from_file(path)
    oracle = SemanticTokenizer.from_file(path, backend="onnx")
    oracle.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    equal = float(np.mean(ours.encode([clip])[0] == oracle.encode([clip])[0]))
    times: dict[str, list[float]] = {"torch": [], "onnxruntime": []}
    for _ in range(repeats):
        times["torch"] += seconds_of(lambda: ours.encode([clip]), 1, warmup=0)
        times["onnxruntime"] += seconds_of(lambda: oracle.encode([clip]), 1, warmup=0)
    rows = [row(f"semantic tokenizer, {name}", spent, seed, audio_s=seconds) for name, spent in times.items()]
    rows[0]["ratio_to_onnxruntime"] = round(rows[0]["median"] / rows[1]["median"], 3)
    rows[0]["codes_equal"] = equal
    return rows


def encode_length(root: Path, lengths: list[float], seed: int) -> list[Row]:
    """Time and peak memory of encoding clips of several lengths, each in a process of its own."""
    rows = []
    for seconds in lengths:
        command = [sys.executable, "-m", "stepaudio.bench.codec", str(root), str(seconds), str(seed)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
    for one in rows:
        one["s_per_audio_s"] = round(one["median"] / one["audio_s"], 4)
        one["peak_above_first_mb"] = round(one["peak_mb"] - rows[0]["peak_mb"])
    return rows


def _encode_once(root: Path, seconds: float, seed: int) -> Row:
    tokenizer = DualTokenizer.from_dir(root / TOKENIZER_DIR)
    clip = Audio(noise_clip(seconds, seed), TOKENIZER_RATE)
    times = seconds_of(lambda: tokenizer.encode(clip, seed=seed), 1, warmup=0)
    return row("dual tokenizer, encode", times, seed, audio_s=seconds, peak_mb=round(peak_rss_mb()))


if __name__ == "__main__":
    print(json.dumps(_encode_once(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
