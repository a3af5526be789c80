"""The tokenizers' way through a GPU: the same functions on the CPU, less the graphs, against the plain path."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenizer.audio import read_audio, resample
from tokenizer.errors import RequestError
from tokenizer.fbank import row_count
from tokenizer.linguistic import ASR_DIR, LinguisticTokenizer
from tokenizer.linguistic_batch import MAX_CHUNKS, Dither, LinguisticBatch, bucket, groups
from tokenizer.semantic import SemanticTokenizer
from tokenizer.split import MIN_ROWS, SplitLinear, split_linear, split_weight

SIZES = (0, 500, 879, 880, 1500, 3840, 4000, 7680, 16_001, 40_000)


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = golden / "linguistic_tokenizer", tmp_path_factory.mktemp("linguistic")
    (target / ASR_DIR).mkdir(parents=True)
    torch.save(load_file(source / "model.safetensors"), target / ASR_DIR / "model.pt")
    for name in ("am.mvn", "config.yaml"):
        shutil.copy(source / name, target / ASR_DIR)
    shutil.copy(source / "linguistic_tokenizer.npy", target)
    return target


@pytest.fixture(scope="module")
def clips(golden: Path) -> list[np.ndarray]:
    return [resample(read_audio(path), 16_000).samples for path in sorted((golden / "wavs").glob("*.wav"))]


@pytest.fixture(scope="module")
def plain(folder: Path) -> LinguisticTokenizer:
    return LinguisticTokenizer.from_dir(folder, engine="plain")


def batch_of(tokenizer: LinguisticTokenizer) -> LinguisticBatch:
    return LinguisticBatch(tokenizer.front_end.cmvn, tokenizer.encoder, tokenizer.centroids)


def test_rows_are_those_of_the_front_end(plain: LinguisticTokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    sounds = [torch.rand(size, generator=generator) - 0.5 for size in SIZES if row_count(size)]
    counts = [row_count(len(sound)) for sound in sounds]
    rows = batch_of(plain).rows(sounds, counts, 1.0, list(range(len(sounds))))
    for seed, (sound, count) in enumerate(zip(sounds, counts)):
        wanted = plain.front_end.rows(sound, 1.0, seed)
        assert len(wanted) == count
        apart = (rows[seed, :count] - wanted).abs().max()
        print(f"{len(sound)} samples: largest difference {apart:.2g}")
        assert apart < 1e-4


def test_row_counts() -> None:
    assert [row_count(size) for size in (0, 399, 879, 880, 3840, 7680, 16_000, 48_000, 160_000, 480_000)] == [
        *(0, 0, 0, 1, 4, 8, 16, 50, 167, 500)
    ]


def test_codes_are_those_of_the_plain_path(plain: LinguisticTokenizer, clips: list[np.ndarray]) -> None:
    sounds = [clips[0][:size] for size in SIZES] + clips
    seeds = list(range(len(sounds)))
    wanted = plain.encode(sounds, seeds=seeds)
    found = batch_of(plain).encode([torch.from_numpy(np.array(sound)) for sound in sounds], 1.0, seeds)
    for a, b in zip(found, wanted):
        assert np.array_equal(a, b)


def test_dither_is_kept_and_bounded() -> None:
    dither = Dither(torch.device("cpu"))
    for seed in range(9):
        expected = torch.randn(1200, 400, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(dither(seed, 7), expected[:7])
        assert torch.equal(dither(seed, 1200), expected)
        assert dither(seed, 1200).data_ptr() == dither(seed, 1200).data_ptr()
    assert len(dither._kept) == 4


def test_groups_and_buckets() -> None:
    found = groups([5, 0, MAX_CHUNKS, 3, MAX_CHUNKS // 2, MAX_CHUNKS // 2])
    assert found == [[2], [4, 5], [0, 3]]
    assert [bucket(chunks) for chunks in (1, 4, 5, 32, 33, 48)] == [4, 4, 8, 32, 48, 48]


def test_sound_to_semantic_codes(golden: Path, clips: list[np.ndarray]) -> None:
    tokenizer = SemanticTokenizer.from_file(golden / "semantic_tokenizer" / "speech_tokenizer_v1.onnx")
    pieces = [clips[0][:480], clips[0][:16_001], clips[1]]
    padded = torch.zeros(len(pieces), max(map(len, pieces)))
    for row, piece in zip(padded, pieces):
        row[: len(piece)] = torch.from_numpy(np.array(piece))
    with torch.inference_mode():
        found = tokenizer.backend.encode(padded, [len(piece) for piece in pieces])
    for a, b in zip(found, tokenizer.encode(pieces)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("size", [(3, 560, 24), (7, 64, 8)])
def test_a_split_product_is_nearly_float32(size: tuple[int, int, int]) -> None:
    rows, inputs, outputs = size
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs)
    x = torch.randn(rows, inputs, generator=generator) * 10
    with torch.inference_mode():
        wanted = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        found = split_linear(x, split_weight(linear.weight), linear.bias)
        apart = float((found - wanted).abs().max() / wanted.abs().max())
        print(f"relative difference {apart:.2g}")
        assert apart < 3e-5
        both = SplitLinear(copy.deepcopy(linear))
        assert torch.equal(both(x), linear(x)) and both._split is None
        many = torch.randn(2, MIN_ROWS, inputs, generator=generator)
        assert (both(many) - linear(many)).abs().max() < 1e-3 and both(many).shape == (2, MIN_ROWS, outputs)


def test_an_unknown_engine_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="'turbo' is unknown: use auto or plain"):
        LinguisticTokenizer.from_dir(folder, engine="turbo")


@pytest.mark.gpu
def test_codes_on_a_gpu(folder: Path, golden: Path, clips: list[np.ndarray]) -> None:
    """Graphs and split products against the plain path on the same device; again with shapes seen before."""
    model = golden / "semantic_tokenizer" / "speech_tokenizer_v1.onnx"
    pairs = [
        [LinguisticTokenizer.from_dir(folder, "cuda", engine) for engine in ("plain", "auto")],
        [SemanticTokenizer.from_file(model, "cuda", engine=engine) for engine in ("plain", "auto")],
    ]
    for slow, fast in pairs:
        for sounds in ([clips[0]], clips, [clips[0][:900], clips[1]], clips * 11, [clips[0]]):
            wanted, found = slow.encode(sounds), fast.encode(sounds)
            assert [len(row) for row in found] == [len(row) for row in wanted]
            share = np.mean(np.concatenate(found) == np.concatenate(wanted))
            print(f"{type(fast).__name__}, {len(sounds)} clips: {share:.4f} of the codes equal")
            assert share >= 0.995
