"""Weight norm of a state dict: multiplied out for use, split off again for the release's file form.

Knows key names only (formats.md 7.4): `weight_g` / `weight_v` as released,
`parametrizations.weight.original0` / `original1` of newer torch, and plain `weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenizer.errors import CheckpointError

_STYLES = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
_PLAIN = ("source_downs.",)  # convolutions of the vocoder without weight norm


def fuse_weight_norm(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Replaces each pair by weight = g * v / ||v||, the norm over all dimensions but the first.

    `source` names the file in errors. Raises CheckpointError for a pair whose shapes disagree.
    """
    fused = dict(state)
    for gain, direction in _STYLES:
        for name in [name for name in state if name.endswith("." + gain)]:
            prefix = name.removesuffix(gain)
            if prefix + direction not in state:
                continue
            g, v = fused.pop(name).float(), fused.pop(prefix + direction).float()
            norm = _norm(v)
            if g.shape != norm.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {tuple(g.shape)}, its pair asks for {tuple(norm.shape)}"
                )
            fused[prefix + "weight"] = v * (g / norm)
    return fused


def split_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain vocoder weights -> the keys of the released `hift.pt`; `fuse_weight_norm` gives them back."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".weight") and value.ndim == 3 and not name.startswith(_PLAIN):
            split[name + "_g"], split[name + "_v"] = _norm(value), value
        else:
            split[name] = value
    return split


def _norm(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
