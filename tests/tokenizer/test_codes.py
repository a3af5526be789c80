import numpy as np
import pytest

from tokenizer.codes import LAYOUT, AudioCodes, CodeLayout
from tokenizer.errors import RequestError


def test_layout():
    assert (LAYOUT.size, LAYOUT.group, LAYOUT.id_base) == (5120, 5, 65536)
    assert LAYOUT.rate == pytest.approx(41.667, abs=1e-3)
    assert LAYOUT.pattern == ((0, 1024), (0, 1024), (1024, 5120), (1024, 5120), (1024, 5120))
    assert CodeLayout() == LAYOUT


@pytest.mark.parametrize(
    ("linguistic", "semantic", "expected"),
    [
        ([], [], []),
        ([0], [1, 2, 3], []),
        ([0, 1], [1, 2], []),
        ([0, 1], [0, 1, 2], [0, 1, 1024, 1025, 1026]),
        ([0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 1024, 1025, 1026]),
        ([1023] * 4, [4095] * 7, [1023, 1023, 5119, 5119, 5119] * 2),
    ],
)
def test_merge(linguistic, semantic, expected):
    codes = AudioCodes.merge(linguistic, semantic)
    assert codes.interleaved.tolist() == expected
    assert codes.interleaved.dtype == np.int64


def test_views_undo_the_merge():
    rng = np.random.default_rng(0)
    linguistic, semantic = rng.integers(0, 1024, 167), rng.integers(0, 4096, 250)
    codes = AudioCodes.merge(linguistic, semantic)
    assert len(codes) == 415  # ten seconds
    assert np.array_equal(codes.linguistic, linguistic[:166])
    assert np.array_equal(codes.semantic, semantic[:249])
    assert codes.seconds == pytest.approx(9.96)
    assert codes.first_break() is None


@pytest.mark.parametrize(
    ("linguistic", "semantic", "message"),
    [
        ([0, 1024], [0, 1, 2], r"linguistic codes must lie in 0\.\.1023, found 0\.\.1024"),
        ([-1, 0], [0, 1, 2], "linguistic codes"),
        ([0, 1], [0, 4096, 2], r"semantic codes must lie in 0\.\.4095"),
    ],
)
def test_merge_refuses_other_codebooks(linguistic, semantic, message):
    with pytest.raises(RequestError, match=message):
        AudioCodes.merge(linguistic, semantic)


def test_ids_and_text_round_trip():
    codes = AudioCodes([0, 1023, 1024, 1025, 5119])
    assert codes.to_ids() == [65536, 66559, 66560, 66561, 70655]
    assert codes.to_text() == "<audio_0><audio_1023><audio_1024><audio_1025><audio_5119>"
    assert AudioCodes.from_ids(codes.to_ids()) == codes
    assert AudioCodes.from_text(codes.to_text()) == codes
    assert AudioCodes.from_ids(codes.to_ids(base=300), base=300) == codes
    assert len(AudioCodes.from_text("")) == len(AudioCodes.from_ids([])) == 0
    assert AudioCodes.from_text(" <audio_7>\n<audio_8>\n").interleaved.tolist() == [7, 8]


@pytest.mark.parametrize("text", ["hello", "<audio_1>x<audio_2>", "<audio_>", "<audio_-1>", "<audio_1", "<audio_1.5>"])
def test_other_text_is_refused(text):
    with pytest.raises(RequestError, match="<audio_N> pieces only"):
        AudioCodes.from_text(text)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, 5120], r"audio code 5120 at position 1 is outside 0\.\.5119"),
        ([-1], "audio code -1 at position 0"),
        ([65536], "from_ids"),
        ([[0, 1]], "flat list of whole numbers"),
        ([0.5], "flat list of whole numbers"),
        (["a"], "flat list of whole numbers"),
        ([[0], [1, 2]], "several lengths"),
        (5, "flat list of whole numbers"),
    ],
)
def test_bad_codes_are_refused(codes, message):
    with pytest.raises(RequestError, match=message):
        AudioCodes(codes)


@pytest.mark.parametrize("text", ["<audio_5120>", "<audio_99999999999999999999999>"])
def test_numbers_out_of_range_in_text(text):
    with pytest.raises(RequestError):
        AudioCodes.from_text(text)


@pytest.mark.parametrize("ids", [[65535], [70656], [0], [2**70], [-(2**70)], [1.5], ["x"], [None]])
def test_bad_ids_are_refused(ids):
    with pytest.raises(RequestError):
        AudioCodes.from_ids(ids)


@pytest.mark.parametrize(
    ("codes", "place"),
    [
        ([], None),
        ([1], None),
        ([1, 2, 1024], None),
        ([1, 2, 1024, 1025, 1026, 3, 4], None),
        ([1024], 0),
        ([1, 1024], 1),
        ([1, 2, 3], 2),
        ([1, 2, 1024, 1025, 1026, 1027], 5),
    ],
)
def test_first_break(codes, place):
    assert AudioCodes(codes).first_break() == place


def test_is_a_value():
    source = np.array([1, 2, 1024, 1025, 1026])
    codes = AudioCodes(source)
    source[0] = 9
    assert codes.interleaved[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        codes.interleaved[0] = 3
    same = AudioCodes((1, 2, 1024, 1025, 1026))
    assert codes == same and hash(codes) == hash(same)
    assert codes != AudioCodes([1, 2, 1024, 1025, 1027]) and codes != [1, 2, 1024, 1025, 1026]
    assert (codes + same).interleaved.tolist() == [1, 2, 1024, 1025, 1026] * 2
