"""Key names and shapes of the released files at full size, against our modules on the meta device.

`paraformer_other.json` lists the recogniser that shares model.pt with the linguistic encoder; nothing
here reads those tensors, so they have no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from cosyvoice.campplus import CampPlus, CampPlusConfig
from cosyvoice.config import read_config
from cosyvoice.flow import TokenToMel
from cosyvoice.hift import HiFTVocoder
from cosyvoice.weight_norm import split_weight_norm
from stepaudio.golden.base import Row, exact, read_json
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.modeling import Step1Config, Step1ForCausalLM
from tokenizer.sanm import SanmConfig, SanmEncoder
from tokenizer.semantic import SemanticConfig, SemanticEncoder

Shapes = dict[str, tuple[int, ...]]


def replay(root: Path) -> Iterator[Row]:
    """One row per manifest: how many keys or shapes differ."""
    folder = root / "manifests"
    config = read_config(folder / "cosyvoice_full.yaml")
    sizes = read_json(folder / "step1_3b.json")["_meta"]["config"]
    geometry = Geometry.from_config({"max_seq_len": 32768, **sizes})
    models: dict[str, Callable[[], Shapes]] = {
        "flow": lambda: shapes(lambda: TokenToMel(config.flow)),
        "hift": lambda: shapes(lambda: HiFTVocoder(config.hift), weight_norm=True),
        "campplus": lambda: shapes(lambda: CampPlus(CampPlusConfig())),
        "paraformer_encoder": lambda: shapes(lambda: SanmEncoder(SanmConfig()), prefix="encoder."),
        "s3tokenizer_v1_25hz": lambda: shapes(lambda: SemanticEncoder(SemanticConfig())),
        "step1_3b": lambda: shapes(lambda: Step1ForCausalLM(Step1Config(max_seq_len=geometry.max_seq_len, **sizes))),
    }
    for name, ours in models.items():
        expected = {key: tuple(shape) for key, shape in read_json(folder / f"{name}.json").items() if key != "_meta"}
        yield exact(name, sorted(ours().items()), sorted(expected.items()), note=f"{len(expected)} tensors")
    yield exact(
        "step1_3b, from config alone", sorted(geometry.weight_shapes().items()), sorted(models["step1_3b"]().items())
    )


def shapes(make: Callable[[], nn.Module], prefix: str = "", weight_norm: bool = False) -> Shapes:
    """Keys and shapes of a module's state; `weight_norm` writes them as the release's vocoder file does."""
    with torch.device("meta"):
        state = make().state_dict()
    if weight_norm:
        state = split_weight_norm(state)
    return {prefix + name: tuple(value.shape) for name, value in state.items()}
