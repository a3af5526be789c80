import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokenizer.audio import Audio, read_audio, resample
from tokenizer.codes import AudioCodes
from tokenizer.dual import FILES, SEMANTIC_FILE, DualTokenizer, prepare
from tokenizer.errors import CheckpointError
from tokenizer.linguistic import ASR_DIR

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden tokenizers laid out as the release has them."""
    source, folder = GOLDEN / "linguistic_tokenizer", tmp_path_factory.mktemp("Step-Audio-Tokenizer")
    asr = folder / ASR_DIR
    asr.mkdir(parents=True)
    torch.save(load_file(source / "model.safetensors"), asr / "model.pt")
    for name in ("am.mvn", "config.yaml"):
        shutil.copy(source / name, asr / name)
    shutil.copy(source / "linguistic_tokenizer.npy", folder)
    shutil.copy(GOLDEN / "semantic_tokenizer" / SEMANTIC_FILE, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return DualTokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def clips():
    return [read_audio(path) for path in sorted((GOLDEN / "wavs").glob("*.wav"))]


def noise(seconds, rate=16_000, level=0.1, seed=0):
    samples = level * np.random.default_rng(seed).standard_normal(int(seconds * rate))
    return Audio(samples.astype(np.float32), rate)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_codes_of_the_release(folder, backend):
    tokenizer = DualTokenizer.from_dir(folder, semantic_backend=backend)
    for case in json.loads((GOLDEN / "dual_tokens" / "golden.json").read_text())["clips"]:
        audio = read_audio(GOLDEN / "wavs" / case["clip"])
        assert tokenizer.encode(audio, dither=0.0).to_ids() == case["not_trimmed"]["merged_ids"]
        assert tokenizer.encode(audio, dither=0.0).to_text() == case["not_trimmed"]["token_str"]
        assert tokenizer.encode(audio, trim=True, dither=0.0).to_ids() == case["trimmed"]["merged_ids"]


@pytest.mark.parametrize("options", [{}, {"trim": True}, {"dither": 0.0}, {"seed": 7}])
def test_batch_equals_one_by_one(tokenizer, clips, options):
    batch = [*clips, noise(0.3), Audio(clips[0].samples[:30_000], 22_050), noise(0.01), noise(2.5, 8_000), clips[1]]
    single = [tokenizer.encode(clip, **options) for clip in batch]
    assert tokenizer.encode(batch, **options) == single
    assert tokenizer.encode([]) == []
    assert all(codes.first_break() is None and len(codes) % 5 == 0 for codes in single)


def test_seeds(tokenizer, clips):
    first = tokenizer.encode(clips[1], seed=1)
    assert tokenizer.encode(clips[1], seed=1) == first
    others = [tokenizer.encode(clips[1], seed=seed) for seed in range(2, 6)]
    assert any(not np.array_equal(codes.linguistic, first.linguistic) for codes in others)
    assert all(np.array_equal(codes.semantic, first.semantic) for codes in others)
    assert tokenizer.encode(clips[1], dither=0.0, seed=1) == tokenizer.encode(clips[1], dither=0.0, seed=2)


def test_leaves_the_global_generator_alone(tokenizer, clips):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tokenizer.encode(clips[1])
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("samples", "groups"),
    [(0, 0), (1, 0), (160, 0), (479, 0), (880, 0), (1_439, 0), (1_440, 1), (3_840, 2), (16_000, 8), (160_000, 83)],
)
def test_count(tokenizer, samples, groups):
    codes = tokenizer.encode(noise(samples / 16_000))
    assert isinstance(codes, AudioCodes) and len(codes) == 5 * groups


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_099, 44_100, 48_000, 96_000, 192_000])
def test_any_rate(tokenizer, rate):
    assert len(tokenizer.encode(noise(1.0, rate))) == 40


def test_loudness_does_not_matter(tokenizer, clips):
    quiet = Audio(clips[1].samples * 0.25, 16_000)  # a power of two: the same samples once normalised
    assert tokenizer.encode(quiet) == tokenizer.encode(clips[1])


@pytest.mark.parametrize("trim", [False, True])
def test_silence(tokenizer, trim):
    codes = tokenizer.encode(Audio(np.zeros(16_000, np.float32), 16_000), trim=trim)
    assert len(codes) == (50 if trim else 40)


def test_prepare(clips):
    samples = prepare(clips[2])
    assert samples.dtype == np.float32 and len(samples) == 56_000
    assert np.abs(samples).max() == pytest.approx(0.999)
    assert np.argmax(np.abs(samples)) == np.argmax(np.abs(resample(clips[2], 16_000).samples))
    assert len(prepare(clips[2], trim=True)) == 59_760
    assert len(prepare(Audio(np.zeros(0, np.float32), 48_000), trim=True)) == 0


def test_missing_files_are_all_named(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "part")
    (tmp_path / "part" / SEMANTIC_FILE).unlink()
    (tmp_path / "part" / ASR_DIR / "am.mvn").unlink()
    for place, missing in (
        (tmp_path / "part", [SEMANTIC_FILE, f"{ASR_DIR}/am.mvn"]),
        (tmp_path, FILES),
        (tmp_path / "nowhere", FILES),
    ):
        with pytest.raises(CheckpointError, match="missing") as caught:
            DualTokenizer.from_dir(place)
        assert [name for name in FILES if name in str(caught.value)] == [name for name in FILES if name in missing]
        assert str(place) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_config_is_optional(tmp_path, folder, clips, tokenizer):
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / ASR_DIR / "config.yaml").unlink()
    assert DualTokenizer.from_dir(tmp_path / "bare").encode(clips[1]) == tokenizer.encode(clips[1])


@pytest.mark.parametrize("name", FILES)
def test_a_pointer_in_place_of_a_file(tmp_path, folder, name):
    shutil.copytree(folder, tmp_path / "pointers")
    (tmp_path / "pointers" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer") as caught:
        DualTokenizer.from_dir(tmp_path / "pointers")
    assert name.rpartition("/")[2] in str(caught.value)
