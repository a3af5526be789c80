"""Spectrograms side by side as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def draw_mels(picture: Path, rows: Sequence[dict[str, Tensor]]) -> None:
    """One row of log-mels [80, T] per clip, each under its name, all on one colour scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(5 * columns, 2.2 * len(rows)), squeeze=False)
    for line, row in zip(axes, rows):
        for axis, (name, mel) in zip(line, row.items()):
            axis.imshow(mel.float().cpu().numpy(), origin="lower", aspect="auto", vmin=-11.5, vmax=2)
            axis.set_title(name, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=70)
    plt.close(figure)
