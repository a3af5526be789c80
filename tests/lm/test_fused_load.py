"""Weights straight into the fused form: equal to the eager model's, in shares, in few bits, within little memory."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepaudio.checkpoints import CHAT_DIR
from stepaudio.lm import fused_load
from stepaudio.lm.fused import FusedStep1, decode, prefill
from stepaudio.lm.fused_load import RandomSource, load_fused, random_fused
from stepaudio.lm.fused_plan import GB, PROJECTIONS, check_fits, describe, part_precision, plan_rank
from stepaudio.lm.geometry import Geometry
from stepaudio.lm.kernels.quantise import PRECISIONS, pack
from stepaudio.lm.load import load_model
from tokenizer.errors import CheckpointError, RequestError

CHAT = Geometry(74752, 12288, 31232, 96, 8, 88, 32768)
SMALL = Geometry(51, 48, 80, 6, 2, 3, 512)  # neither the vocabulary nor a width is round


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "step1_lm" / "A"


def tensors(model: FusedStep1) -> dict[str, Tensor]:
    found = {"embed": model.embed, "norm": model.norm, "head": model.head.packed.data, "slopes": model.slopes}
    for index, layer in enumerate(model.layers):
        for name, value in vars(layer).items():
            found[f"{index}.{name}"] = value if isinstance(value, Tensor) else value.packed.data
    return found


def logits_of(model: FusedStep1, tokens: int = 20) -> tuple[Tensor, Tensor]:
    ids = torch.arange(tokens, device=model.device)[None] % model.geometry.vocab_size
    cache = model.new_cache(1, 64)
    slots, lengths = torch.tensor([0]).to(ids), torch.tensor([tokens], dtype=torch.int32).to(model.device)
    with torch.inference_mode():
        first = prefill(model, ids, cache, slots, lengths)
        return first, decode(model, first.argmax(-1), cache, 64)


@pytest.mark.parametrize("source", ["A", "C", "shards"])
def test_equals_the_fused_eager_model(source: str, golden: Path, tiny: Path) -> None:
    folder = tiny / CHAT_DIR if source == "shards" else golden / "step1_lm" / source
    expected = FusedStep1.from_model(load_model(folder))
    loaded = load_fused(folder, dtype=torch.float32, progress=False)
    assert (loaded.eps, loaded.alibi_dtype, loaded.geometry) == (expected.eps, expected.alibi_dtype, expected.geometry)
    theirs = tensors(expected)
    assert tensors(loaded).keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in tensors(loaded).items())
    for ours, other in zip(logits_of(loaded), logits_of(expected)):
        print(f"{source}: max difference {(ours - other).abs().max():.1e}, mean {(ours - other).abs().mean():.1e}")
        assert torch.equal(ours, other)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_quantised_as_the_whole_tensor_would_be(precision: str, folder: Path) -> None:
    dense = load_fused(folder, dtype=torch.float32, progress=False)
    loaded = load_fused(folder, dtype=torch.float32, precision=precision, progress=False)
    for name in PROJECTIONS[:-1]:
        expected = pack(getattr(dense.layers[1], name).weight, precision)
        packed = getattr(loaded.layers[1], name).packed
        assert packed.precision == precision
        assert torch.equal(packed.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(packed.scale, expected.scale)
    assert loaded.head.packed.precision == part_precision("head", precision)
    assert torch.equal(loaded.embed, dense.embed) and torch.equal(loaded.norm, dense.norm)
    assert all(one.isfinite().all() for one in logits_of(loaded))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plan_is_what_is_held(precision: str, world: int, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = plan_rank(Geometry.from_config(config), precision, 4, world)
    for rank in range(world):
        model = load_fused(folder, "cpu", torch.float32, precision, rank, world, progress=False)
        norms = sum(norm.nbytes for layer in model.layers for norm in (layer.input_norm, layer.post_norm))
        held = model.bytes_per_token + model.embed.nbytes + model.norm.nbytes + norms
        assert 0.97 * held <= plan.weight_bytes <= held  # rows are filled up to whole words
        assert model.new_cache(1, 8).nbytes == 8 * plan.cache_bytes


@pytest.mark.parametrize("make", ["files", "random"])
def test_shares_make_up_the_whole(make: str, folder: Path) -> None:
    def share(rank: int, world: int) -> FusedStep1:
        if make == "random":
            return random_fused(SMALL, dtype=torch.float32, rank=rank, world=world)
        return load_fused(folder, "cpu", torch.float32, rank=rank, world=world, progress=False)

    whole, parts = share(0, 1), [share(rank, 2) for rank in range(2)]
    inner, width = whole.geometry.intermediate_size, whole.heads * whole.geometry.head_dim
    x = torch.randn(3, inner, generator=torch.Generator().manual_seed(0))
    for index, layer in enumerate(whole.layers):
        mine = [part.layers[index] for part in parts]
        assert torch.equal(torch.cat([one.down.weight for one in mine], 1), layer.down.weight)
        assert torch.equal(torch.cat([one.out.weight for one in mine], 1), layer.out.weight)
        summed = sum(one.down(half) for one, half in zip(mine, x.chunk(2, 1)))
        assert torch.allclose(summed, layer.down(x), atol=1e-4)
        gates = [one.gate_up.weight.chunk(2) for one in mine]
        assert torch.equal(torch.cat([gate for gate, _ in gates] + [up for _, up in gates]), layer.gate_up.weight)
        half, shared = width // 2, (len(layer.qkv.weight) - width) // 4
        split = [one.qkv.weight.split([half, shared, shared]) for one in mine]
        assert torch.equal(torch.cat([one[part] for part in range(3) for one in split]), layer.qkv.weight)
    vocab = whole.geometry.vocab_size
    head = torch.cat([part.head.weight for part in parts])
    assert torch.equal(head[:vocab], whole.head.weight) and not head[vocab:].any()
    assert len(parts[0].head.weight) == len(parts[1].head.weight) == -(-vocab // 2)
    assert torch.equal(torch.cat([part.slopes for part in parts]), whole.slopes)
    assert all(torch.equal(part.embed, whole.embed) for part in parts)


class Allocated(TorchDispatchMode):
    """Most bytes of memory of our own alive at once; what maps a file is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most, self.largest, self.seen = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, tuple | list) else [result]:
            storage = one.untyped_storage() if isinstance(one, Tensor) else None
            if (
                storage is None
                or storage._cdata in inputs | self.seen
                or function.name() == "aten::set_.source_Storage"
            ):
                continue
            self.seen.add(storage._cdata)
            self.alive += storage.nbytes()
            self.most, self.largest = max(self.most, self.alive), max(self.largest, storage.nbytes())
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


def test_no_second_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from bfloat16 into float32: blocks are converted, whole tensors never exist twice."""
    geometry = Geometry(1000, 256, 640, 4, 2, 6, 512)
    config = {"model_type": "step1", **vars(geometry)}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in geometry.weight_shapes().items()}
    save_file(weights, tmp_path / "model.safetensors")
    del weights
    block = 64 * 1024
    monkeypatch.setattr(fused_load, "BLOCK_BYTES", block)
    with Allocated() as allocated:
        model = load_fused(tmp_path, dtype=torch.float32, progress=False)
    kept = sum(one.nbytes for name, one in tensors(model).items() if name != "slopes")
    print(f"kept {kept:,} bytes, at most {allocated.most:,}, largest {allocated.largest:,}")
    assert kept <= allocated.most <= kept + 4 * block
    assert allocated.largest == geometry.intermediate_size * 2 * geometry.hidden_size * 4  # gate_up, which stays


# Folders that are not whole


def changed(folder: Path, to: Path, weights: dict[str, Tensor | None], **config: object) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("golden*"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (to / "config.json").write_text(json.dumps(values), encoding="utf-8")
    found = load_file(folder / "model.safetensors") | weights
    save_file({name: value for name, value in found.items() if value is not None}, to / "model.safetensors")
    return to


@pytest.mark.parametrize(
    "weights, config, message",
    [
        ({"model.norm.weight": None}, {}, "lack 1 tensors .* first model.norm.weight"),
        ({"model.extra.weight": torch.zeros(2)}, {}, "hold unknown 1 tensors .* first model.extra.weight"),
        (
            {"model.norm.weight": torch.zeros(3)},
            {},
            r"model.norm.weight has shape \(3,\), config.json asks for \(256,\)",
        ),
        ({"model.norm.weight": torch.zeros(256, dtype=torch.int8)}, {}, "model.norm.weight holds int8 numbers"),
        ({}, {"quantization_config": {"bits": 4}}, "packed already"),
        ({}, {"num_hidden_layers": 2}, "hold unknown"),
    ],
)
def test_strict(
    weights: dict[str, Tensor | None], config: dict[str, object], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_fused(changed(folder, tmp_path / "copy", weights, **config), dtype=torch.float32, progress=False)


def test_other_numbers_of_config_are_taken_over(folder: Path, tmp_path: Path) -> None:
    model = load_fused(
        changed(folder, tmp_path / "copy", {}, rms_norm_eps=1e-3, alibi_dtype="bfloat16"), progress=False
    )
    assert model.eps == 1e-3 and model.alibi_dtype == model.dtype == torch.bfloat16


# Random weights


def test_random_weights_are_usable(capsys: pytest.CaptureFixture[str]) -> None:
    model, other = random_fused(SMALL, dtype=torch.float32), random_fused(SMALL, dtype=torch.float32, seed=1)
    for logits in logits_of(model):
        assert logits.isfinite().all() and 0.1 < logits.std() < 10
    assert not torch.equal(model.embed, other.embed)
    assert (model.layers[0].input_norm == 1).all() and (model.norm == 1).all()
    rows = torch.cat([model.head.weight, model.embed, model.layers[0].qkv.weight, model.layers[1].qkv.weight])
    assert len(rows.unique(dim=0)) == len(rows)
    assert not capsys.readouterr().err


def test_random_blocks_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_fused(SMALL, dtype=torch.float32)
    monkeypatch.setattr(fused_load, "BLOCK_BYTES", 1000)
    assert torch.equal(random_fused(SMALL, dtype=torch.float32).layers[2].down.weight, whole.layers[2].down.weight)
    assert RandomSource(SMALL, "cpu", torch.float32, 0).read("lm_head.weight", slice(3, 9), slice(0, 48)).shape == (
        6,
        48,
    )


# The plan


def test_plan_of_the_released_chat_model() -> None:
    plan = plan_rank(CHAT, "bfloat16", world=2)
    assert plan.weight_bytes == 132_867_317_760 and plan.cache_bytes == 180_224
    assert 70e9 < plan_rank(CHAT, "int4").weight_bytes < 73e9
    assert describe(plan, "Step-Audio-Chat", 149 * GB).endswith("149.0 GB free: room for 83,965 tokens")


@pytest.mark.parametrize(
    "precision, world, free, answer",
    [
        ("bfloat16", 1, 149, r"use --precision int8 \(132.9 GB\) or --tensor-parallel 2 \(132.9 GB\)"),
        ("int8", 1, 24, r"use --tensor-parallel 8 \(.* or --precision int4 --tensor-parallel 4 \("),
        ("int4", 8, 5, "no precision or split of this model fits"),
    ],
)
def test_what_does_not_fit_is_refused(precision: str, world: int, free: int, answer: str) -> None:
    with pytest.raises(RequestError, match=answer) as caught:
        check_fits(CHAT, plan_rank(CHAT, precision, world=world), free * GB)
    assert "\n" not in str(caught.value)
    check_fits(CHAT, plan_rank(CHAT, precision, world=world), 300 * GB)


@pytest.mark.parametrize("world", [0, 3, 16, -2])
def test_bad_splits(world: int) -> None:
    with pytest.raises(RequestError, match=f"--tensor-parallel {world} does not divide .* use one of 1, 2, 4, 8"):
        plan_rank(CHAT, world=world)


def test_bad_precision(folder: Path) -> None:
    with pytest.raises(RequestError, match="'int2' is unknown"):
        load_fused(folder, precision="int2", progress=False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_layers_on_the_device(precision: str) -> None:
    geometry = Geometry(74752, 12288, 31232, 96, 8, 2, 32768)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_fused(geometry, "cuda", torch.bfloat16, precision)
    plan = plan_rank(geometry, precision)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    print(f"{precision}: planned {plan.weight_bytes / GB:.2f} GB, held {held / GB:.2f}, peak {peak / GB:.2f}")
    assert held == pytest.approx(plan.weight_bytes, rel=0.02)
    assert peak <= plan.weight_bytes + plan.working_bytes + 0.3 * GB
    assert all(one.isfinite().all() for one in logits_of(model))
