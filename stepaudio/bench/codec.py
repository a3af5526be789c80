"""How fast the codec is: torch beside onnxruntime, long files beside short ones, every stage of a round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from cosyvoice.decoder import SpeechDecoder
from stepaudio.bench.report import Row, peak_rss_mb, row, seconds_of
from stepaudio.checkpoints import FLOW_DIR, TOKENIZER_DIR, TTS_DIR
from stepaudio.device import resolve_device, resolve_dtype
from tokenizer.audio import TOKENIZER_RATE, Audio
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError
from tokenizer.semantic import OnnxBackend, SemanticTokenizer


def noise_clip(seconds: float, seed: int) -> np.ndarray:
    """Speech-like noise with a slow loudness swing, float32 at 16 kHz."""
    count = int(seconds * TOKENIZER_RATE)
    samples = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    swing = 0.55 + 0.45 * np.sin(2 * np.pi * 3.0 * np.arange(count, dtype=np.float32) / TOKENIZER_RATE)
    return 0.1 * samples * swing.astype(np.float32)


def semantic(root: Path, seconds: float, repeats: int, seed: int, rounds: int = 8) -> list[Row]:
    """The torch semantic tokenizer and onnxruntime on the same file, clip and number of threads.

    Each runs in processes of its own, in turns, so that neither's waiting threads take the other's cores.
    """
    times: dict[str, list[float]] = {"torch": [], "onnxruntime": []}
    codes: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name in times:
            found = _child("semantic", root, seconds, seed, name, str(repeats))
            times[name] += found["times"]
            codes[name] = found["codes"]
    rows = [row(f"semantic tokenizer, {name}", spent, seed, audio_s=seconds) for name, spent in times.items()]
    rows[0]["ratio_to_onnxruntime"] = round(rows[0]["median"] / rows[1]["median"], 3)
    rows[0]["ratio_of_fastest"] = round(rows[0]["min"] / rows[1]["min"], 3)
    rows[0]["codes_equal"] = float(np.mean(np.equal(codes["torch"], codes["onnxruntime"])))
    return rows


def _semantic(root: Path, seconds: float, seed: int, name: str, repeats: str) -> Row:
    path = root / TOKENIZER_DIR / "speech_tokenizer_v1.onnx"
    tokenizer = SemanticTokenizer.from_file(path, backend="torch" if name == "torch" else "onnx")
    if isinstance(tokenizer.backend, OnnxBackend):  # as onnxruntime comes, but for the number of threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        tokenizer.backend.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    clip = noise_clip(seconds, seed)
    times = seconds_of(lambda: tokenizer.encode([clip]), int(repeats))
    return {"times": times, "codes": tokenizer.encode([clip])[0].tolist()}


def encode_length(root: Path, lengths: list[float], seed: int) -> list[Row]:
    """Time and peak memory of encoding clips of several lengths, each in a process of its own."""
    rows = [_child("encode", root, seconds, seed) for seconds in lengths]
    for one in rows:
        one["s_per_audio_s"] = round(one["median"] / one["audio_s"], 4)
        one["peak_above_first_mb"] = round(one["peak_mb"] - rows[0]["peak_mb"])
    return rows


def _encode(root: Path, seconds: float, seed: int) -> Row:
    tokenizer = DualTokenizer.from_dir(root / TOKENIZER_DIR)
    clip = Audio(noise_clip(seconds, seed), TOKENIZER_RATE)
    times = seconds_of(lambda: tokenizer.encode(clip, seed=seed), 1, warmup=0)
    return row("dual tokenizer, encode", times, seed, audio_s=seconds, peak_mb=round(peak_rss_mb()))


def stages(root: Path, seconds: float, repeats: int, seed: int, device: str = "auto") -> list[Row]:
    """Every stage of a round trip of one clip with a 5 s voice prompt, batch 1."""
    where = resolve_device(device)
    tokenizer = DualTokenizer.from_dir(root / TOKENIZER_DIR, device=where)
    decoder = SpeechDecoder.from_dir(root / TTS_DIR / FLOW_DIR, device=where, dtype=resolve_dtype("auto", where))
    clip = Audio(noise_clip(seconds, seed), TOKENIZER_RATE)
    prompt = decoder.voice_prompt(Audio(noise_clip(5.0, seed + 1), TOKENIZER_RATE), tokenizer, seed=seed)
    spent: dict[str, list[float]] = {"tokenize": [], "flow": [], "vocoder": []}
    spent["tokenize"] = seconds_of(lambda: tokenizer.encode(clip, seed=seed), repeats, device=where.type)
    codes = tokenizer.encode(clip, seed=seed)
    for index in range(repeats + 1):
        timings: dict[str, float] = {}
        sound = decoder.decode(codes, prompt, seed=seed, timings=timings)
        if index:
            spent["flow"].append(timings["flow"])
            spent["vocoder"].append(timings["vocoder"])
    length = {"audio_s": seconds, "codes": len(codes), "samples": len(sound), "device": str(where)}
    return [row(f"round trip, {name}", times, seed, **length) for name, times in spent.items()]


_CHILDREN = {"semantic": _semantic, "encode": _encode}


def _child(task: str, root: Path, seconds: float, seed: int, *more: str) -> Row:
    """Runs one of `_CHILDREN` in a new process and returns what it prints."""
    command = [sys.executable, "-m", "stepaudio.bench.codec", task, str(root), str(seconds), str(seed), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RequestError(f"{task} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    _task, _root, _seconds, _seed, *_more = sys.argv[1:]
    print(json.dumps(_CHILDREN[_task](Path(_root), float(_seconds), int(_seed), *_more)))
