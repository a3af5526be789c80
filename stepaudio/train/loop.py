"""The one training loop: resumes, logs a JSON line per step, draws the loss curve, stops on bad gradients.

A stage brings its models, its batches and one update; the loop brings optimisers, the learning-rate
schedule, checkpoints and the clock. Knows nothing of sound or text.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenizer.errors import RequestError
from tokenizer.files import atomic_write, make_folder

LOG_BLOCK = 50  # steps between looks at what the device says


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train."""

    steps: int
    rate: float = 1e-3  # peak learning rate, after the warm-up; a cosine takes it to `rate * floor`
    warmup: float = 0.06  # share of the steps
    floor: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    autocast: bool = True  # bfloat16 arithmetic on a CUDA device
    save_seconds: float = 60.0  # a checkpoint so often
    seed: int = 0


class Stage(ABC):
    """What is trained: models, data and one update."""

    @abstractmethod
    def models(self) -> dict[str, nn.Module]:
        """Everything that has weights; saved and moved together."""

    @abstractmethod
    def optimised(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each optimiser, by its name."""

    @abstractmethod
    def batches(self, start: int) -> Iterator[Any]:
        """Endless batches, the same ones for the same step after a resume."""

    @abstractmethod
    def update(self, batch: Any, step: int, optimise: Optimise) -> dict[str, float | Tensor]:
        """One step: computes losses, hands each to `optimise(name, loss)`, returns what to log.

        `optimise.share` says how much of the training is over.
        """

    @abstractmethod
    def finish(self, out: Path) -> None:
        """Called once after the last step, with the models in eval mode: scores, samples, files."""


class Optimise:
    """`optimise(name, loss)`: backward, check, clip, step. `share` is how much of the training is over, 0 to 1.

    Nothing in a call waits for the device, so that a stage may capture its whole step as one graph.
    """

    def __init__(self, stage: Stage, config: LoopConfig, device: torch.device) -> None:
        self.config = config
        self.parameters = stage.optimised()
        self.optimisers = {
            name: torch.optim.AdamW(
                parameters,
                lr=torch.tensor(config.rate, device=device),
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=True,
                capturable=device.type == "cuda",
            )
            for name, parameters in self.parameters.items()
        }
        self.share = 0.0
        self._bad = torch.zeros((), device=device)  # non-finite gradients in a row

    def __call__(self, name: str, loss: Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters[name], self.config.clip)
        broken = (~torch.isfinite(norm)).float()
        self._bad.copy_((self._bad + 1) * broken)
        optimiser.found_inf = broken  # the fused step leaves weights and moments as they are if it is 1
        optimiser.step()

    def check(self) -> None:
        """Raises RequestError when training has gone wrong; waits for the device."""
        if self._bad.item() > 5:
            raise RequestError("the gradient is not finite 6 times in a row: lower the learning rate")

    def set_rate(self, rate: float) -> None:
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"].fill_(rate)


def rate_at(share: float, config: LoopConfig) -> float:
    """Learning rate when `share` (0 to 1) of the training is over: linear warm-up, then half a cosine."""
    if share < config.warmup:
        return config.rate * max(share / config.warmup, 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (share - config.warmup) / max(1e-9, 1 - config.warmup)))
    return config.rate * (config.floor + (1 - config.floor) * cosine)


class Progress:
    """How far a training is: by its steps or by its minutes, whichever is further."""

    def __init__(self, step: int, seconds: float, steps: int, minutes: float | None) -> None:
        self.step, self.steps, self.minutes = step, steps, minutes
        self._begin = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """Time spent training, that of earlier calls included."""
        return time.monotonic() - self._begin

    @property
    def share(self) -> float:
        """0 to 1."""
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, by_time))


def fit(stage: Stage, config: LoopConfig, out: Path, device: torch.device, minutes: float | None = None) -> int:
    """Trains for `config.steps`, or for `minutes` if they are over earlier, and finishes the stage.

    The schedule of the learning rate, and a stage's own, run to their end in that time. A call with the same
    `out` goes on from the last checkpoint there. Returns the number of steps done.
    """
    make_folder(out)
    torch.manual_seed(config.seed)
    for model in stage.models().values():
        model.to(device).train()
    optimise = Optimise(stage, config, device)
    step, seconds = _resume(stage, optimise, out / "state.pt", device)
    progress = Progress(step, seconds, config.steps, minutes)
    _train(stage, optimise, progress, out, device)
    _save(stage, optimise, progress, out / "state.pt")
    draw_curve(out / "log.jsonl", out / "curve.png")
    for model in stage.models().values():
        model.eval()
    stage.finish(out)
    return progress.step


def _train(stage: Stage, optimise: Optimise, progress: Progress, out: Path, device: torch.device) -> None:
    config = optimise.config
    saved, first, began = time.monotonic(), progress.step, time.monotonic()
    with (
        Log(out / "log.jsonl") as log,
        tqdm(total=config.steps, initial=progress.step, mininterval=2.0) as bar,
    ):
        for batch in stage.batches(progress.step):
            optimise.share = progress.share
            if optimise.share >= 1:
                break
            rate = rate_at(optimise.share, config)
            optimise.set_rate(rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast and device.type == "cuda"):
                metrics = stage.update(batch, progress.step, optimise)
            progress.step += 1
            bar.update()
            log.add(progress.step, progress.seconds, rate, metrics)
            if progress.step % LOG_BLOCK == 0 or progress.step == config.steps:
                log.write()
                optimise.check()
            if time.monotonic() - saved > config.save_seconds:
                _save(stage, optimise, progress, out / "state.pt")
                saved = time.monotonic()
    if progress.step > first:
        print(f"{progress.step - first} steps, {(progress.step - first) / (time.monotonic() - began):.1f} a second")


class Log:
    """A JSON line per step, written in blocks, since to read a number from a device is to wait for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[dict[str, float], dict[str, float | Tensor]]] = []

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def add(self, step: int, seconds: float, rate: float, metrics: dict[str, float | Tensor]) -> None:
        """`metrics` may lie on a device; they must not change afterwards."""
        self._rows.append(({"step": step, "seconds": round(seconds, 2), "rate": rate}, metrics))

    def write(self) -> None:
        """A number that is not finite, which a batch has nothing to say about, is left out."""
        values = [value for _, metrics in self._rows for value in metrics.values() if isinstance(value, Tensor)]
        read = iter(torch.stack([value.float() for value in values]).tolist() if values else ())
        with open(self._path, "a", encoding="utf-8") as file:
            for head, metrics in self._rows:
                numbers = {name: next(read) if isinstance(value, Tensor) else value for name, value in metrics.items()}
                kept = {name: round(value, 5) for name, value in numbers.items() if math.isfinite(value)}
                file.write(json.dumps(head | kept) + "\n")
        self._rows.clear()


def _save(stage: Stage, optimise: Optimise, progress: Progress, path: Path) -> None:
    state = {
        "step": progress.step,
        "seconds": progress.seconds,
        "models": {name: model.state_dict() for name, model in stage.models().items()},
        "optimisers": {name: optimiser.state_dict() for name, optimiser in optimise.optimisers.items()},
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def _resume(stage: Stage, optimise: Optimise, path: Path, device: torch.device) -> tuple[int, float]:
    """Loads a checkpoint, if there is one; steps and seconds that it has trained."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    for name, model in stage.models().items():
        model.load_state_dict(state["models"][name])
    for name, content in state["optimisers"].items():
        optimise.optimisers[name].load_state_dict(content)
    return state["step"], state["seconds"]


def draw_curve(log: Path, picture: Path) -> None:
    """Every logged number over the steps, one small plot each."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("step", "seconds")]
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points), linewidth=0.7)
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)
