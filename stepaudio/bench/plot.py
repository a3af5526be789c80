"""A picture of the measurements on a GPU: `python -m stepaudio.bench.plot` writes benchmarks/h200.png."""

from __future__ import annotations

from pathlib import Path

from stepaudio.bench.table import REPO, gpu_rows
from tokenizer.errors import run


def draw(source: Path, target: Path) -> None:
    """Bars of milliseconds, on a logarithmic scale, each beside its baseline of the same run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = list(gpu_rows(source))[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 1))
    places = range(len(rows))
    axes.barh([at + 0.2 for at in places], [one.before or 0 for one in rows], 0.38, color="#bbbbbb", label="baseline")
    axes.barh([at - 0.2 for at in places], [one.now for one in rows], 0.38, color="#2266aa", label="fast path")
    axes.set_yticks(list(places), [one.label for one in rows], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draws benchmarks/h200.png."""
    draw(REPO / "benchmarks/h200.json", REPO / "benchmarks/h200.png")


if __name__ == "__main__":
    run(main)
