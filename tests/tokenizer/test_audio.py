import errno
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from tokenizer.audio import (
    MAX_RATE,
    MIN_RATE,
    Audio,
    normalize_peak,
    read_audio,
    resample,
    trim_silence,
    write_audio,
)
from tokenizer.errors import RequestError, describe

GOLDEN = Path(__file__).parents[1] / "golden"
RATES = [8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_099, 44_100, 47_999, 48_000, 88_200, 96_000, 192_000]


def noise(length, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def tone(frequency, rate, seconds=1.0, level=0.5):
    time = np.arange(int(rate * seconds)) / rate
    return Audio((level * np.sin(2 * np.pi * frequency * time)).astype(np.float32), rate)


def level_at(audio, frequency):
    """Amplitude of one frequency in the middle of the clip, where the filter's edges do not reach."""
    samples = audio.samples[len(audio) // 8 : -len(audio) // 8].astype(np.float64)
    window = np.hanning(len(samples))
    wave = np.exp(-2j * np.pi * frequency * np.arange(len(samples)) / audio.sample_rate)
    return 2 * abs((samples * window) @ wave) / window.sum()


# ---- Audio


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 0.5, -1.0], [0.0, 0.5, -1.0]),
        (np.array([0, 16384, -32768], np.int16), [0.0, 0.5, -1.0]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0.0, 0.5, -1.0]),
        (np.array([0, 64, -128], np.int8), [0.0, 0.5, -1.0]),
        (np.array([128, 192, 0], np.uint8), [0.0, 0.5, -1.0]),
        (np.array([0.25, 2.0], np.float64), [0.25, 2.0]),
        (np.array([0.25, 2.0], np.float16), [0.25, 2.0]),
        (np.array([[0.25, 0.5]], np.float32), [0.25, 0.5]),
        (np.array([[0.0, 1.0], [1.0, 0.5]], np.float32), [0.5, 0.75]),
        (np.array([[16384, 0], [0, 0]], np.int16), [0.25, 0.0]),
        (np.tile(np.float32([0.25, 0.5]), (6, 1)), [0.25, 0.5]),
        (np.zeros((2, 0), np.float32), []),
        ([], []),
    ],
)
def test_samples_become_mono_float32(samples, expected):
    audio = Audio(samples, 16_000)
    assert audio.samples.dtype == np.float32 and audio.samples.flags.c_contiguous
    assert audio.samples.tolist() == expected
    assert len(audio) == len(expected) and audio.seconds == len(expected) / 16_000


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        ([0.0, np.nan, np.inf], 16_000, "holds 2 NaN or infinite samples"),
        (np.array([1e300]), 16_000, "holds 1 NaN or infinite"),
        (np.zeros((16_000, 2)), 16_000, r"16000 channels: give \[channels, samples\]"),
        (np.zeros((0, 5)), 16_000, "must have the shape"),
        (np.zeros((2, 3, 4)), 16_000, "must have the shape"),
        (np.float32(0), 16_000, "must have the shape"),
        (np.zeros(4, complex), 16_000, "floats or integers, not complex128"),
        (np.zeros(4, bool), 16_000, "floats or integers, not bool"),
        (["a", "b"], 16_000, "floats or integers"),
        ([0.0], MIN_RATE - 1, "sample rate 7999 Hz is outside 8000 to 192000 Hz"),
        ([0.0], MAX_RATE + 1, "sample rate 192001 Hz"),
        ([0.0], 16_000.5, "sample rate 16000.5 Hz"),
        ([0.0], 0, "sample rate 0 Hz"),
        ([0.0], -16_000, "sample rate -16000 Hz"),
    ],
)
def test_bad_audio_is_refused(samples, rate, message):
    with pytest.raises(RequestError, match=message):
        Audio(samples, rate)


# ---- reading


@pytest.mark.parametrize(("name", "rate"), [("clip0_22k", 22_050), ("clip1_16k", 16_000), ("clip2_48k_stereo", 48_000)])
def test_reads_the_clips(name, rate):
    path = GOLDEN / "wavs" / f"{name}.wav"
    stored, stored_rate = soundfile.read(path, dtype="float32", always_2d=True)
    audio = read_audio(path)
    assert audio.sample_rate == rate == stored_rate
    assert np.array_equal(audio.samples, stored.mean(axis=1, dtype=np.float32))


@pytest.mark.parametrize(
    ("suffix", "kind", "subtype", "tolerance"),
    [
        ("wav", "WAV", "PCM_16", 4e-5),
        ("wav", "WAV", "PCM_24", 2e-7),
        ("wav", "WAV", "PCM_U8", 1e-2),
        ("wav", "WAV", "FLOAT", 0.0),
        ("wav", "WAV", "DOUBLE", 0.0),
        ("wav", "WAV", "ULAW", 2e-2),
        ("wav", "WAVEX", "PCM_16", 4e-5),
        ("wav", "RF64", "PCM_16", 4e-5),
        ("flac", "FLAC", "PCM_16", 4e-5),
        ("aiff", "AIFF", "PCM_16", 4e-5),
        ("ogg", "OGG", "VORBIS", 0.2),
        ("mp3", "MP3", "MPEG_LAYER_III", 0.3),
    ],
)
def test_reads_many_formats(tmp_path, suffix, kind, subtype, tolerance):
    samples = np.clip(noise(4800), -0.9, 0.9)
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, samples, 16_000, subtype=subtype, format=kind)
    audio = read_audio(path)
    assert audio.sample_rate == 16_000 and len(audio) == len(samples)
    assert np.abs(audio.samples - samples).max() <= tolerance


def test_surround_is_mixed_down(tmp_path):
    channels = noise(6 * 800).reshape(800, 6)
    soundfile.write(tmp_path / "six.wav", channels, 48_000, subtype="FLOAT", format="WAVEX")
    assert np.allclose(read_audio(tmp_path / "six.wav").samples, channels.mean(axis=1), atol=1e-7)


def wav(data_size=None, riff_size=None, before=b"", data=None):
    """A 16 bit mono wav by hand, so that its header can lie."""
    data = np.arange(-500, 500, dtype="<i2").tobytes() if data is None else data
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    size = len(data) if data_size is None else data_size
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + before + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff_size is None else riff_size) + body


@pytest.mark.parametrize(
    "content",
    [
        wav(),
        wav(before=b"LIST" + struct.pack("<I", 5) + b"abcde\0"),  # an odd chunk and its pad byte
        wav(data_size=0xFFFFFFFF, riff_size=0xFFFFFFFF),  # written to a pipe
        wav(data_size=0x7FFFF000, riff_size=0x7FFFF024),
        wav(data_size=0x80000000, riff_size=0x80000024),
        wav() + b"LIST" + struct.pack("<I", 4) + b"late",
    ],
)
def test_odd_but_whole_wavs_are_read(tmp_path, content):
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    assert np.array_equal(read_audio(path).samples[:1000] * 32768, np.arange(-500, 500))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.wav", wav()[:-1], "is truncated: its header promises 2000 bytes of sound, 1999 are there"),
        ("cut.wav", wav()[:100], "truncated"),
        ("cut.wav", wav()[:44], "promises 2000 bytes of sound, 0 are there"),
        ("odd_cut.wav", wav(before=b"LIST" + struct.pack("<I", 5) + b"abcde\0")[:-7], "truncated"),
        ("head.wav", wav()[:30], "no sound file this can read"),
        ("head.wav", b"RIFF", "no sound file this can read"),
        ("silent.wav", wav(data=b""), "holds 0 samples"),
        ("text.wav", b"this is no sound\n" * 20, "no sound file this can read"),
        ("empty.wav", b"", r"is empty \(0 bytes\)"),
        ("video.mkv", b"\x1aE\xdf\xa3" + bytes(1000), "no sound file this can read"),
        ("codec.wav", wav().replace(b"fmt \x10\0\0\0\x01", b"fmt \x10\0\0\0\x99"), "no sound file this can read"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        read_audio(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_cut_extensible_wav(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, noise(1000).reshape(500, 2), 48_000, subtype="PCM_24", format="WAVEX")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RequestError, match="promises 3000 bytes of sound, 2990 are there"):
        read_audio(path)


def test_cut_flac(tmp_path):
    path = tmp_path / "cut.flac"
    soundfile.write(path, noise(16_000), 16_000)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(RequestError, match=r"cut\.flac"):
        read_audio(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(RequestError, match="is a folder"):
        read_audio(tmp_path)


@pytest.mark.parametrize(("value", "rate", "message"), [(np.nan, 16_000, "1 NaN"), (0.0, 4_000, "4000 Hz is outside")])
def test_bad_content_names_the_file(tmp_path, value, rate, message):
    samples = noise(1000)
    samples[7] = value
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(RequestError, match=rf"bad\.wav: .*{message}"):
        read_audio(tmp_path / "bad.wav")


# ---- writing


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_099, 192_000])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
def test_write_and_read_back(tmp_path, suffix, rate):
    audio = Audio(np.clip(noise(2000, level=0.5), -2, 2), rate)
    path = write_audio(tmp_path / f"clip{suffix}", audio)
    again = read_audio(path)
    assert again.sample_rate == rate
    assert np.abs(again.samples - np.clip(audio.samples, -1, 1)).max() < 1 / 32_000
    assert soundfile.info(path).subtype == "PCM_16"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".ogg", ".mp3"])
def test_lossy_formats(tmp_path, suffix):
    audio = tone(440, 22_050, seconds=8)  # longer than one block
    again = read_audio(write_audio(tmp_path / f"clip{suffix}", audio))
    assert len(again) == len(audio) and level_at(again, 440) == pytest.approx(0.5, rel=0.05)


def test_clips_instead_of_wrapping(tmp_path):
    again = read_audio(write_audio(tmp_path / "loud.wav", Audio([2.0, -2.0, 0.0], 16_000)))
    assert again.samples[0] > 0.999 and again.samples[1] == -1.0 and again.samples[2] == 0.0


def test_no_samples(tmp_path):
    path = write_audio(tmp_path / "none.wav", Audio([], 16_000))
    with pytest.raises(RequestError, match="holds 0 samples"):
        read_audio(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.xyz", r"unknown sound format '\.xyz': use \.wav, \.flac, \.ogg, \.mp3"),
        ("clip", "unknown sound format ''"),
        ("clip.raw", "unknown sound format"),
        ("nowhere/clip.wav", "nowhere does not exist"),
        ("folder.wav", "is a folder"),
        ("fast.mp3", "cannot be written as MP3 at 44099 Hz"),
    ],
)
def test_unwritable_names(tmp_path, name, message):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(RequestError, match=message):
        write_audio(tmp_path / name, Audio(noise(2000), 44_099))
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.wav"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("before", [None, b"older"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, failure, before):
    path = tmp_path / "clip.wav"
    if before:
        path.write_bytes(before)

    def half_written(self, content):
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(type(failure)):
        write_audio(path, Audio(noise(1000), 16_000))
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == (["clip.wav"] if before else [])
    assert before is None or path.read_bytes() == before


def test_disk_full_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as caught:
        write_audio(tmp_path / "clip.wav", Audio(noise(1000), 16_000))
    assert describe(caught.value).startswith("disk full")


def test_overwrites_whole(tmp_path):
    write_audio(tmp_path / "clip.wav", Audio(noise(5000), 16_000))
    write_audio(tmp_path / "clip.wav", Audio(noise(100), 22_050))
    assert len(read_audio(tmp_path / "clip.wav")) == 100


# ---- resampling


@pytest.mark.parametrize("rate", RATES)
def test_length_frequency_and_level(rate):
    source = tone(1_000, rate)
    audio = resample(source, 16_000)
    assert audio.sample_rate == 16_000 and audio.samples.dtype == np.float32
    assert len(audio) == -(-len(source) * 16_000 // rate)
    assert level_at(audio, 1_000) == pytest.approx(0.5, rel=2e-3)
    rest = audio.samples[2_000:-2_000]
    time = np.arange(2_000, 2_000 + len(rest)) / 16_000
    assert np.abs(rest - 0.5 * np.sin(2 * np.pi * 1_000 * time)).max() < 3e-3


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 24_000])
@pytest.mark.parametrize(("frequency", "decibels"), [(9_500, -25), (10_000, -44), (11_000, -48)])
def test_aliases_are_suppressed(rate, frequency, decibels):
    audio = resample(tone(frequency, rate), 16_000)
    assert level_at(audio, 16_000 - frequency) < 0.5 * 10 ** (decibels / 20)


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_000])
@pytest.mark.parametrize(("share", "decibels"), [(0.3, -54), (0.35, -44)])
def test_upsampling_adds_no_images(rate, share, decibels):
    audio = resample(tone(share * rate, rate), 16_000)
    assert level_at(audio, (1 - share) * rate) < 0.5 * 10 ** (decibels / 20)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_is_the_transform_of_the_release(rate):
    samples = noise(rate // 2)
    transform = torchaudio.transforms.Resample(rate, 16_000)
    expected = transform(torch.from_numpy(samples)[None])[0].numpy()
    assert np.array_equal(resample(Audio(samples, rate), 16_000).samples, expected)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_099])
def test_small_and_same(rate):
    same = Audio(noise(100), rate)
    assert resample(same, rate) is same
    for length in (0, 1, 2, 7):
        assert len(resample(Audio(noise(length), rate), 16_000)) == -(-length * 16_000 // rate)


@pytest.mark.parametrize("target", [22_050, 44_100, 48_000])
def test_other_targets(target):
    audio = resample(tone(440, 16_000), target)
    assert len(audio) == target and level_at(audio, 440) == pytest.approx(0.5, rel=2e-3)


# ---- level and silence


@pytest.mark.parametrize(
    ("peak", "expected"), [(0.0, 0.0), (0.001, 0.0999), (0.009, 0.8991), (0.01, 0.999), (0.8, 0.999), (3.0, 0.999)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_normalize_peak(peak, expected, sign):
    samples = np.array([0.0, sign * peak, -sign * peak / 2], np.float32)
    out = normalize_peak(samples)
    assert out.dtype == np.float32
    assert out.tolist() == pytest.approx([0.0, sign * expected, -sign * expected / 2], rel=1e-6)
    assert len(normalize_peak(samples[:0])) == 0


@pytest.mark.parametrize(
    ("lead", "sound", "trail", "begin", "length"),
    [
        (8_000, 16_000, 8_000, 7_808 - 800, 20_880),
        (0, 12_345, 0, -800, 16_800),
        (0, 200, 0, -800, 4_560),
    ],
)
def test_trim_silence(lead, sound, trail, begin, length):
    loud = np.sin(np.arange(sound) * 0.3).astype(np.float32)
    samples = np.concatenate([np.zeros(lead, np.float32), loud, np.zeros(trail, np.float32)])
    out = trim_silence(samples)
    assert out.dtype == np.float32 and len(out) == length
    expected = np.pad(samples, (800, length))[begin + 800 :][:length]
    assert np.array_equal(out, expected)


def test_trim_of_silence_and_of_nothing():
    assert len(trim_silence(np.zeros(16_000, np.float32))) == 20_400
    assert len(trim_silence(np.zeros(0, np.float32))) == 0
