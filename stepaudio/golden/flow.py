"""Golden replay of the flow model: each stage and the whole call, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice.cfm import time_grid
from cosyvoice.config import read_config
from cosyvoice.flow import FlowRequest, TokenToMel, collate
from stepaudio.golden.base import Row, close, read_json

FP32_TOLERANCE = 5e-5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.inference_mode()
def replay(root: Path) -> Iterator[Row]:
    """Rows for every tensor of every case.

    fp32 is bounded by the largest difference, bf16 by the mean difference: it may not lie farther from the recorded
    bf16 run than that run lies from fp32.
    """
    folder = root / "flow"
    golden = read_json(folder / "golden.json")
    config = read_config(folder / golden["config"]).flow
    inputs = load_file(folder / "inputs.safetensors")
    for kind, dtype in _DTYPES.items():
        model = TokenToMel.from_file(folder / "flow.safetensors", config, dtype=dtype)
        expected = load_file(folder / f"golden_{kind}.safetensors")
        yield close(f"flow {kind} time grid", *_grids(golden, kind, dtype), 0.0 if kind == "bf16" else 1e-6)
        for case in golden["cases"]:
            name = case["name"]
            for tensor, actual in stages(model, request(inputs, name), golden["n_timesteps"]).items():
                wanted = expected.get(f"{name}.{tensor}")
                if wanted is not None:
                    bound = None if kind == "fp32" else case["observed"][tensor]["bf16_vs_fp32_mean"]
                    yield _row(f"flow {kind} {name}.{tensor}", actual, wanted, bound)


def request(inputs: dict[str, Tensor], name: str) -> FlowRequest:
    """The recorded inputs of one case."""
    return FlowRequest(
        codes=inputs[f"{name}.token"],
        prompt_codes=inputs[f"{name}.prompt_token"],
        prompt_mel=inputs[f"{name}.prompt_feat"],
        embedding=inputs[f"{name}.embedding"],
        noise=inputs[f"{name}.z"],
    )


def stages(model: TokenToMel, asked: FlowRequest, num_steps: int) -> dict[str, Tensor]:
    """What each stage gives for one request, under the names of the recording."""
    weight = model.encoder_proj.weight
    batch = collate([asked], model.config, weight.device, weight.dtype)
    embedded = model.input_embedding(batch.codes.clamp(min=0))
    encoded = model.encoder(embedded)
    mu = model.encode(
        batch.codes, batch.noise.shape[-1], prompt_codes=batch.prompt_codes, prompt_frames=batch.prompt_frames
    )
    spk = model.speaker(batch.embedding)
    pairs = [torch.cat([value, torch.zeros_like(value)]) for value in (mu, spk, batch.prompt_mel)]
    first = time_grid(num_steps, weight.dtype)[0][:1].to(weight.device).expand(2)
    return {
        "token_embedded": embedded[0],
        "encoder_out": encoded[0],
        "encoder_proj": model.encoder_proj(encoded)[0],
        "regulator_out": mu[0].T,
        "spk": spk[0],
        "estimator_step1_out": model.decoder.estimator(
            torch.cat([batch.noise] * 2), None, pairs[0], first, pairs[1], pairs[2]
        ),
        "mel": model.generate([asked], num_steps)[0],
    }


def _grids(golden: dict, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    times, _ = time_grid(golden["n_timesteps"], dtype)
    return times, torch.tensor(golden["cases"][0][f"t_of_each_step_{kind}"])


def _row(group: str, actual: Tensor, wanted: Tensor, mean_bound: float | None) -> Row:
    largest = close(group, actual, wanted, FP32_TOLERANCE)
    if mean_bound is None or actual.shape != wanted.shape:
        return largest
    mean = float((actual.float() - wanted.float()).abs().mean())
    return Row(group, mean, mean_bound, f"mean; largest {largest.difference:.2g}")
