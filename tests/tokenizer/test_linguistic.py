from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenizer.audio import read_audio
from tokenizer.errors import CheckpointError, RequestError
from tokenizer.linguistic import ASR_DIR, CENTROIDS_FILE, LinguisticState, LinguisticTokenizer


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in the release's layout."""
    source, root = golden / "linguistic_tokenizer", tmp_path_factory.mktemp("tokenizer")
    (root / ASR_DIR).mkdir(parents=True)
    torch.save(load_file(source / "model.safetensors"), root / ASR_DIR / "model.pt")
    for name in ("am.mvn", "config.yaml"):
        shutil.copy(source / name, root / ASR_DIR / name)
    shutil.copy(source / CENTROIDS_FILE, root / CENTROIDS_FILE)
    return root


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> LinguisticTokenizer:
    return LinguisticTokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def clip(golden: Path) -> np.ndarray:
    return read_audio(golden / "wavs" / "clip1_16k.wav").samples


def test_any_cut_gives_the_codes_of_the_whole(tokenizer: LinguisticTokenizer, clip: np.ndarray) -> None:
    random_state = random.Random(0)
    for trial in range(200):
        begin = random_state.randrange(len(clip) - 30_000)
        part = clip[begin : begin + random_state.randrange(200, 30_000)]
        cuts = sorted(random_state.randrange(len(part) + 1) for _ in range(random_state.randrange(12)))
        dither = trial % 2
        whole = tokenizer.encode([part], dither, [trial])[0]
        stream = tokenizer.stream(dither, trial)
        codes = [stream.push(piece) for piece in np.split(part, cuts)]
        assert np.concatenate([*codes, stream.close()]).tolist() == whole.tolist(), (trial, begin, len(part), cuts)


@pytest.mark.parametrize("block_chunks", [1, 5, 64])
def test_a_batch_is_one_by_one(tokenizer: LinguisticTokenizer, clip: np.ndarray, block_chunks: int) -> None:
    engine = LinguisticTokenizer(tokenizer.front_end, tokenizer.encoder, tokenizer.centroids, block_chunks)
    lengths = [16_000, 0, 67_200, 500, 3840, 9_999, 30_000, 3839, 880]
    clips = [clip[:length] for length in lengths]
    seeds = list(range(len(clips)))
    batch = engine.encode(clips, seeds=seeds)
    for codes, one, seed in zip(batch, clips, seeds):
        assert codes.dtype == np.int64
        assert codes.tolist() == tokenizer.encode([one], seeds=[seed])[0].tolist()
    assert engine.encode([]) == []


def test_dither_is_drawn_from_the_seed(tokenizer: LinguisticTokenizer, clip: np.ndarray) -> None:
    first, second, again, default = (
        tokenizer.encode([clip], 1.0, seeds)[0].tolist() for seeds in ([0], [1], [1], None)
    )
    assert first != second and second == again and default == first
    assert np.mean(np.array(first) == np.array(second)) > 0.7  # the release against itself: 0.86 with this model
    quiet = tokenizer.encode([clip], 0.0, [0])[0].tolist()
    assert quiet == tokenizer.encode([clip], 0.0, [1])[0].tolist() != first


def test_the_global_generator_is_left_alone(tokenizer: LinguisticTokenizer, clip: np.ndarray) -> None:
    before = torch.get_rng_state()
    tokenizer.encode([clip[:8000]])
    assert torch.equal(before, torch.get_rng_state())


def test_a_stream_rolls_back(tokenizer: LinguisticTokenizer, clip: np.ndarray) -> None:
    whole = tokenizer.encode([clip], seeds=[4])[0].tolist()
    stream, snapshots = tokenizer.stream(seed=4), []
    codes: list[int] = []
    for begin in range(0, len(clip), 7000):
        snapshots.append((begin, len(codes), stream.state))
        codes += stream.push(clip[begin : begin + 7000]).tolist()
    assert codes + stream.close().tolist() == whole
    for begin, count, state in reversed(snapshots):
        assert isinstance(state, LinguisticState)
        stream.state = state
        stream.push(np.ones(5000, np.float32))  # a detour that is given up
        stream.state = state
        rest = [*stream.push(clip[begin:]).tolist(), *stream.close().tolist()]
        assert whole[:count] + rest == whole


def test_streams_do_not_mix(tokenizer: LinguisticTokenizer, clip: np.ndarray) -> None:
    parts = [clip[:20_000], clip[20_000:40_000], clip[40_000:60_000]]
    streams = [tokenizer.stream(seed=i) for i in range(3)]
    codes: list[list[int]] = [[], [], []]
    for begin in range(0, 20_000, 3000):
        for found, stream, part in zip(codes, streams, parts):
            found += stream.push(part[begin : begin + 3000]).tolist()
    for i, (found, stream) in enumerate(zip(codes, streams)):
        assert found + stream.close().tolist() == tokenizer.encode([parts[i]], seeds=[i])[0].tolist()


def test_a_closed_stream_says_so(tokenizer: LinguisticTokenizer) -> None:
    stream = tokenizer.stream()
    assert stream.close().tolist() == [] and stream.state is None
    for call in (stream.close, lambda: stream.push(np.zeros(10, np.float32))):
        with pytest.raises(RequestError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (np.zeros((2, 4000), np.float32), "(2, 4000)"),
        (np.zeros(4000, np.int16), "int16"),
        (np.full(4000, np.nan, np.float32), "NaN"),
    ],
)
def test_bad_sound_is_refused_and_the_stream_lives_on(
    tokenizer: LinguisticTokenizer, samples: np.ndarray, told: str
) -> None:
    stream = tokenizer.stream()
    for call in (lambda: tokenizer.encode([samples]), lambda: stream.push(samples)):
        with pytest.raises(RequestError) as error:
            call()
        assert told in str(error.value)
    assert len(stream.push(np.zeros(3840, np.float32))) == 4


def test_config_is_optional(folder: Path, tokenizer: LinguisticTokenizer, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / ASR_DIR / "config.yaml").unlink()
    assert LinguisticTokenizer.from_dir(tmp_path / "copy").encoder.config == tokenizer.encoder.config


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_weights(path: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = torch.load(path, weights_only=True)
    tensors = {key: t.clone() for key, t in tensors.items() if key != name or value is not None}
    if value is not None:
        tensors[name] = value
    torch.save(tensors, path)


MODEL, CONFIG, CMVN = f"{ASR_DIR}/model.pt", f"{ASR_DIR}/config.yaml", f"{ASR_DIR}/am.mvn"


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        (MODEL, lambda p: p.unlink(), "missing"),
        (MODEL, lambda p: edit_weights(p, "encoder.encoders.1.norm2.bias", None), "'encoders.1.norm2.bias'"),
        (MODEL, lambda p: edit_weights(p, "encoder.encoders0.0.norm1.weight", None), "no SANM encoder"),
        (MODEL, lambda p: edit_weights(p, "encoder.after_norm.bias", torch.zeros(3)), "(3,)"),
        (MODEL, lambda p: edit_weights(p, "encoder.extra.bias", torch.zeros(3)), "1 unknown"),
        (MODEL, lambda p: edit_weights(p, "encoder.encoders0.0.norm1.weight", torch.ones(480)), "input 480"),
        (CMVN, lambda p: edit_text(p, "<Rescale>", "<Scale>"), "<Rescale>"),
        (CMVN, lambda p: p.unlink(), "missing"),
        (CONFIG, lambda p: edit_text(p, "num_blocks: 3", "num_blocks: 4"), "num_blocks is 4, the weights have 3"),
        (CONFIG, lambda p: edit_text(p, "lfr_n: 6", "lfr_n: 5"), "frontend_conf.lfr_n is 5, implemented is 6"),
        (CONFIG, lambda p: edit_text(p, "attention_heads: 4", "attention_heads: 5"), "not 5"),
        (CONFIG, lambda p: edit_text(p, "attention_heads: 4", "attention_heads: many"), "not 'many'"),
        (CONFIG, lambda p: p.write_text("a: [1"), "no valid YAML"),
        (CONFIG, lambda p: p.write_text("- 1"), "encoder_conf and frontend_conf"),
        (CONFIG, lambda p: p.write_text("a: !!python/object/apply:os.getcwd []"), "no valid YAML"),
        (CENTROIDS_FILE, lambda p: np.save(p, np.zeros((1024, 32), np.float32)), "(1024, 32)"),
        (CENTROIDS_FILE, lambda p: np.save(p, np.zeros((1024, 64), np.int64)), "finite floats"),
        (CENTROIDS_FILE, lambda p: p.write_bytes(p.read_bytes()[:5000]), "damaged"),
        (CENTROIDS_FILE, lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "damaged"),
    ],
)
def test_a_bad_checkpoint_is_told(folder: Path, tmp_path: Path, file: str, damage, told: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy" / file)
    with pytest.raises(CheckpointError) as error:
        LinguisticTokenizer.from_dir(tmp_path / "copy")
    message = str(error.value)
    assert told in message and Path(file).name in message and message.count("\n") <= 1
