"""Golden replay of the language model: logits, hidden states, cache, greedy tokens, bf16 rows, bias tables, repetition.

Root holds `step1_lm/` with one folder per model, `alibi.safetensors` and `repetition_processor.json`; every name
and size is read from there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from stepaudio.golden.base import Row, close, exact, read_json
from stepaudio.lm.attention import alibi_slopes, sqrt_alibi_bias
from stepaudio.lm.load import load_model
from stepaudio.lm.modeling import Step1ForCausalLM
from stepaudio.lm.sampling import forbidden_by_repetition

_ALIBI = re.compile(r"bias_h(?P<heads>\d+)_(?P<dtype>fp32|bf16)(?:_len(?P<length>\d+)_lastrow)?")
_BF16_TOLERANCE = 0.1  # what the recording asks for; on a CPU the rows are equal


def replay(root: Path) -> Iterator[Row]:
    """Compares every model folder, every bias table and every case of the repetition rule."""
    component = root / "step1_lm"
    for config in sorted(component.glob("*/config.json")):
        yield from replay_model(config.parent)
    yield from replay_alibi(component / "alibi.safetensors")
    yield from replay_repetition(component / "repetition_processor.json")


@torch.inference_mode()
def replay_model(folder: Path) -> Iterator[Row]:
    """One model in float32, whole, in pieces and step by step, then in bfloat16 with the rounded bias."""
    name, golden = folder.name, load_file(folder / "golden.safetensors")
    tolerance = read_json(folder / "golden.json")["tolerance"]["fp32_logits"]
    model, ids = load_model(folder), golden["input_ids"][None]
    output = model(ids, output_hidden_states=True)
    yield close(f"{name} logits", output.logits[0], golden["logits"], tolerance)
    yield close(f"{name} hidden after layer 0", output.hidden_states[1][0], golden["hidden_after_layer0"], tolerance)
    yield close(f"{name} hidden, last norm", output.hidden_states[-1][0], golden["hidden_final_norm"], tolerance)
    yield close(f"{name} chunked prefill", _in_pieces(model, ids, 17), golden["logits"], tolerance)
    yield from _decoding(name, model, output.past_key_values, golden, tolerance)
    rounded = load_model(folder, dtype=torch.bfloat16, alibi_dtype="bfloat16")
    rows = golden["bf16_logits_last8"]
    yield close(f"{name} bf16, last rows", rounded(ids).logits[0, -len(rows) :], rows, _BF16_TOLERANCE)


def _in_pieces(model: Step1ForCausalLM, ids: Tensor, size: int) -> Tensor:
    """Logits [S, V] of a prompt fed a few tokens at a time through one cache."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(piece, past_key_values=cache).logits[0] for piece in ids.split(size, dim=1)])


def _decoding(
    name: str, model: Step1ForCausalLM, cache: Cache, golden: dict[str, Tensor], tolerance: float
) -> Iterator[Row]:
    """Greedy tokens one by one after the prompt in `cache`, with the logits each came from and the cache's end."""
    logits, steps, tokens = golden["logits"][-1], [], []
    for _ in golden["greedy"]:
        steps.append(logits)
        tokens.append(int(logits.argmax()))
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
    yield exact(f"{name} greedy tokens", tokens, golden["greedy"].tolist())
    yield close(f"{name} cached steps", torch.stack(steps), golden["step_logits"], tolerance)
    for key, layer, kept in (("k_cache_layer0_last4", 0, "keys"), ("v_cache_last_layer_last4", -1, "values")):
        states = getattr(cache.layers[layer], kept)[0].transpose(0, 1).flatten(1)
        yield close(f"{name} {key}", states[-len(golden[key]) :], golden[key], tolerance)


def replay_alibi(path: Path) -> Iterator[Row]:
    """Bias tables [heads, rows, keys]; the bfloat16 ones are the float32 ones rounded."""
    for name, expected in sorted(load_file(path).items()):
        match = _ALIBI.fullmatch(name)
        if match is None:
            yield Row(f"alibi {name}", math.inf, 0.0, "this table's name is not understood")
            continue
        keys = torch.arange(expected.shape[-1])
        rows = keys[-1:] if match["length"] else keys
        bias = sqrt_alibi_bias(alibi_slopes(int(match["heads"])), rows, keys).reshape(expected.shape)
        seen = expected.isfinite()
        yield exact(f"alibi {name} hidden keys", bias.isfinite().flatten().tolist(), seen.flatten().tolist())
        tolerance = 1e-6 if expected.dtype == torch.float32 else 0.0
        yield close(f"alibi {name}", bias.to(expected.dtype)[seen], expected[seen], tolerance)


def replay_repetition(path: Path) -> Iterator[Row]:
    """Which id the repetition-aware rule forbids, for each history."""
    golden = read_json(path)
    histories, banned = [], []
    for case in golden["cases"]:
        histories += case.get("batch") or [case["input_ids"]]
        banned += case["banned"] if "batch" in case else [case["banned"]]
    found = [forbidden_by_repetition(ids, golden["window"], golden["threshold"]) for ids in histories]
    yield exact("repetition rule", [[] if token is None else [token] for token in found], banned)
