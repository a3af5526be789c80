from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
import torchaudio

from tokenizer.errors import CheckpointError
from tokenizer.fbank import Cmvn, FrontEnd, kaldi_fbank

PLAIN = Cmvn(torch.zeros(560), torch.ones(560))


def noise(length: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", ["hamming", "povey"])
@pytest.mark.parametrize("scale", [1.0, 32768.0])
@pytest.mark.parametrize("length", [400, 401, 559, 560, 16_000, 2048 * 160 + 1000])
def test_fbank_is_torchaudios(window: str, scale: float, length: int) -> None:
    samples = noise(length) * scale
    expected = torchaudio.compliance.kaldi.fbank(
        samples[None], num_mel_bins=80, sample_frequency=16_000, window_type=window, energy_floor=0.0, dither=0.0
    )
    torch.testing.assert_close(kaldi_fbank(samples, window=window), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("length", [0, 1, 399])
def test_less_than_a_frame_is_no_frame(length: int) -> None:
    assert kaldi_fbank(torch.zeros(length)).shape == (0, 80)


def test_digital_silence() -> None:
    """Formats.md 5.5: -15.94 without dither, 4.43 on average and -2.5 to 8.5 over the bins with it."""
    assert kaldi_fbank(torch.zeros(1600)).unique().tolist() == pytest.approx([math.log(2**-23)])
    dithered = kaldi_fbank(torch.zeros(160_000), dither=1.0, generator=torch.Generator().manual_seed(0))
    assert dithered.mean().item() == pytest.approx(4.43, abs=0.05)
    assert dithered[:, 0].mean().item() == pytest.approx(-2.5, abs=0.2)
    assert dithered[:, 79].mean().item() == pytest.approx(8.5, abs=0.2)


def test_dither_does_not_depend_on_where_the_signal_is_cut() -> None:
    samples = torch.zeros(400 + 160 * 49)
    whole = kaldi_fbank(samples, dither=1.0, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    cuts = [0, 1, 8, 30, 50]
    pieces = [
        kaldi_fbank(samples[160 * a : 160 * (b - 1) + 400], dither=1.0, generator=generator)
        for a, b in itertools.pairwise(cuts)
    ]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-4, rtol=0)


def test_cmvn_round_trip(tmp_path: Path) -> None:
    cmvn = Cmvn(noise(560, 1), noise(560, 2))
    cmvn.save(tmp_path / "am.mvn")
    again = Cmvn.from_file(tmp_path / "am.mvn")
    assert torch.equal(again.shift, cmvn.shift) and torch.equal(again.scale, cmvn.scale)


@pytest.mark.weights
def test_the_released_cmvn() -> None:
    cmvn = Cmvn.from_file(next(Path(os.environ["STEPAUDIO_RELEASED"]).rglob("am.mvn")))
    assert [cmvn.shift.min(), cmvn.shift.max()] == pytest.approx([-15.05122, -8.311879], abs=1e-5)
    assert [cmvn.scale.min(), cmvn.scale.max()] == pytest.approx([0.1435867, 0.155775], abs=1e-6)
    assert torch.equal(cmvn.shift, cmvn.shift[:80].repeat(7))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("<AddShift>", "<Shift>", "<AddShift>"),
        ("<Rescale>", "", "<Rescale>"),
        ("0 ]\n<Rescale>", "0 \n<Rescale>", "<AddShift>"),
        ("[ 0.5", "[ zero", "<Rescale>"),
        ("[ 0.5", "[ nan", "<Rescale> must hold 560 finite"),
        ("[ 0.5", "[", "found 559"),
    ],
)
def test_a_bad_cmvn_is_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "am.mvn"
    Cmvn(torch.zeros(560), torch.tensor([0.5] + [1.0] * 559)).save(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=r"am\.mvn") as error:
        Cmvn.from_file(path)
    assert told in str(error.value)


def code_count(length: int) -> int:
    """The closed form of formats.md 5.4."""
    chunks, rest = divmod(length, 3840)
    if chunks == 0:
        frames = (rest - 400) // 160 + 1 if rest >= 400 else 0
        return math.ceil(frames / 6) if frames >= 4 else 0
    frames = (rest - 80) // 160 + 1 if rest >= 80 else 0
    return 4 * chunks + (math.ceil((frames - 2) / 6) if frames >= 6 else 0)


def rows_as_recorded(samples: torch.Tensor) -> torch.Tensor:
    """The release's loop over chunks, frames and rows, step by step as formats.md 5.4 tells it."""
    rows, cache, splice = [], torch.zeros(0), None
    for begin in range(0, len(samples) + 1, 3840):
        chunk = samples[begin : begin + 3840]
        last = len(chunk) < 3840
        if last and not len(chunk):
            break
        wave = torch.cat([cache, chunk])
        count = (len(wave) - 400) // 160 + 1 if len(wave) >= 400 else 0
        cache = wave[160 * count :]
        if count == 0:
            continue
        frames = kaldi_fbank(wave * 32768)
        splice = frames[:1].repeat(3, 1) if splice is None else splice
        frames = torch.cat([splice, frames])
        if len(frames) < 7:
            splice = frames
            continue
        made = 0
        for i in range(math.ceil((len(frames) - 3) / 6)):
            row = frames[6 * i : 6 * i + 7]
            if len(row) < 7 and not last:
                break
            rows.append(torch.cat([row, row[-1:].repeat(7 - len(row), 1)]).flatten())
            made += 1
        splice = frames[min(len(frames) - 1, 6 * made) :]
    return torch.stack(rows) if rows else torch.zeros(0, 560)


LENGTHS = [0, 1, 399, 400, 879, 880, 1359, 1360, 3839, 3840, 3841, 3919, 3920, 4719, 4720, 7680, 8000, 16_000, 48_000]


@pytest.mark.parametrize("length", [*LENGTHS, 160_000])
def test_row_counts_and_rows(length: int) -> None:
    samples = noise(length)
    rows = FrontEnd(PLAIN).rows(samples, dither=0.0)
    assert len(rows) == code_count(length)
    torch.testing.assert_close(rows, rows_as_recorded(samples), atol=1e-3, rtol=0)


def test_row_counts_at_every_step_of_a_chunk() -> None:
    front_end = FrontEnd(PLAIN)
    assert [code_count(n) for n in (0, 879, 880, 3840, 7680, 160_000, 480_000)] == [0, 0, 1, 4, 8, 167, 500]
    for length in range(0, 9000, 37):
        assert len(front_end.rows(torch.zeros(length), dither=0.0)) == code_count(length), length


def test_cmvn_shifts_then_scales() -> None:
    samples, cmvn = noise(8000), Cmvn(noise(560, 1), noise(560, 2))
    plain, normal = (FrontEnd(c).rows(samples, dither=1.0, seed=3) for c in (PLAIN, cmvn))
    torch.testing.assert_close(normal, (plain + cmvn.shift) * cmvn.scale)


def test_pieces_give_the_rows_of_the_whole_and_states_are_values() -> None:
    front_end, samples = FrontEnd(PLAIN), noise(20_000)
    whole = front_end.rows(samples, seed=9)
    state, kept = front_end.start(seed=9), []
    for piece in samples.split(3000):
        kept.append(state)
        _, state = front_end.push(state, piece)
    for i, state in enumerate(kept):  # every earlier state still leads to the same rows
        rows, _ = front_end.push(state, samples[3000 * i :], final=True)
        torch.testing.assert_close(rows, whole[len(whole) - len(rows) :], atol=1e-4, rtol=0)
