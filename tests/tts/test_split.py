import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepaudio.tts.split import split
from stepaudio.tts.text import speakable, speech_seconds


@pytest.mark.parametrize(
    ("text", "seconds", "pieces"),
    [
        ("短。", 5, ["短。"]),
        ("今天很好。明天也好！后天呢？", 1.6, ["今天很好。", "明天也好！", "后天呢？"]),
        ("他说：“你好。今天不错！”然后走了。再见。", 3.8, ["他说：“你好。今天不错！”", "然后走了。再见。"]),
        ("「はい。」と言った。今日はいいですね。", 2.0, ["「はい。」と言った。", "今日はいいですね。"]),
        (
            "Dr. Smith paid $3.14 in the U.S. yesterday. J. R. Tolkien, e.g., wrote books.",
            5.0,
            ["Dr. Smith paid $3.14 in the U.S. yesterday.", "J. R. Tolkien, e.g., wrote books."],
        ),
        ("Open https://a.b/c?d=e.f now. Then stop.", 3.0, ["Open https://a.b/c?d=e.f now.", "Then stop."]),
        ('"Really?" he asked. "Yes." She left.', 1.8, ['"Really?" he asked.', '"Yes." She left.']),
        ("1. First thing\n2. Second thing", 1.8, ["1. First thing", "2. Second thing"]),
        ("Wait... what is that? Nobody knows.", 2.0, ["Wait... what is that?", "Nobody knows."]),
        ("一二三四，五六七八，九十", 1.3, ["一二三四，", "五六七八，", "九十"]),
        ("word " * 6, 1.0, ["word word word", "word word word"]),
    ],
)
def test_cuts_where_a_reader_would_breathe(text, seconds, pieces):
    assert split(text, seconds) == pieces


TEXTS = st.text(
    st.sampled_from("好的一 。，！？…“”（）「」\n abcDr.!?,;:'\"0123456789.éか\u0301\u200d😀-"),
    min_size=1,
    max_size=200,
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.floats(0.5, 10))
def test_nothing_is_lost(text, seconds):
    pieces = split(text, seconds)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    if speakable(text):
        assert all(speakable(piece) for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("好的一。，ab. "), min_size=1, max_size=300), st.floats(2, 10))
def test_pieces_are_short_enough(text, seconds):
    marks = 4 * 0.15  # closing marks stay with their sentence
    assert all(speech_seconds(piece) <= seconds + marks for piece in split(text, seconds))


def test_a_run_without_any_break_is_cut_into_equal_pieces():
    assert [len(piece) for piece in split("好" * 100, 5.0)] == [20] * 5


def test_an_accent_stays_on_its_letter():
    pieces = split("e\u0301" * 200, 2.0)
    assert all(piece[0] == "e" and piece[-1] == "\u0301" for piece in pieces)
