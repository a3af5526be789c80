"""What the model gets to see of a long conversation."""

import pytest

from stepaudio.chat.history import compact, fit
from stepaudio.chat.messages import AudioPart, Message, TextPart
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

CODES = AudioCodes([1, 2, 1024, 1025, 1026])


def turns(*items):
    return [Message.of(role, content) for role, content in items]


def count(messages):
    """One id per character and two per message."""
    return [0] * sum(2 + len(message.text) for message in messages)


def test_only_the_last_human_turn_stays_sound():
    known, unknown = AudioPart(CODES, "said"), AudioPart(CODES)
    messages = [
        Message.of("system", "s"),
        Message.of("user", "see: ", known),
        Message.of("assistant", known),
        Message.of("user", unknown),
        Message.of("assistant", "a"),
        Message.of("user", known),
        Message.of("assistant", known),
    ]
    seen = compact(messages)
    assert seen[1].parts == (TextPart("see: "), TextPart("said"))
    assert seen[2].parts == (TextPart("said"),)
    assert [seen[0], *seen[3:]] == [messages[0], *messages[3:]]
    assert compact(compact(messages)) == seen
    assert compact([]) == []


def test_what_fits_stays():
    messages = turns(("system", "s"), ("user", "hello"))
    assert fit(count, messages, 10, trim=False) == ([0] * 10, 0)


@pytest.mark.parametrize("trim", [False, True])
def test_overflow_says_by_how_much(trim):
    with pytest.raises(RequestError, match=r"1,002 tokens, 2 over the 1,000"):
        fit(count, turns(("user", "x" * 1000)), 1000, trim)


def test_trimming_takes_whole_exchanges_and_spares_the_system_turn():
    messages = turns(
        ("system", "s"),
        ("user", "one"),
        ("assistant", "1"),
        ("tool", "t"),
        ("user", "two"),
        ("assistant", "2"),
        ("user", "three"),
    )
    seen = []

    def encode(kept):
        seen.append([message.text for message in kept])
        return count(kept)

    ids, dropped = fit(encode, messages, 18, trim=True)
    assert (len(ids), dropped) == (18, 3)
    assert seen[-1] == ["s", "two", "2", "three"]
    assert fit(count, messages, 10, trim=True)[1] == 5
    with pytest.raises(RequestError, match="1 over"):
        fit(count, messages, 9, trim=True)
