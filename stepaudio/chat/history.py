"""How much of a conversation the language model gets to see.

Two policies, both pure. `compact`: the last human turn stays sound, every earlier sound whose words are known
becomes those words (a second of sound is 42 tokens, a second of speech about 3). `fit`: what is over the context
is an error that says by how much, or, when asked for, the oldest turns go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stepaudio.chat.messages import HUMAN, SYSTEM, AudioPart, Message, Part, TextPart
from tokenizer.errors import RequestError


def compact(messages: Sequence[Message]) -> list[Message]:
    """Sounds before the last human turn as transcripts, where there are any."""
    last = max((i for i, message in enumerate(messages) if message.role == HUMAN), default=0)
    earlier = [message.with_parts([_as_text(part) for part in message.parts]) for message in messages[:last]]
    return [*earlier, *messages[last:]]


def fit(
    encode: Callable[[Sequence[Message]], list[int]], messages: Sequence[Message], limit: int, trim: bool
) -> tuple[list[int], int]:
    """The prompt of a conversation, and how many of its oldest messages were left out to stay within `limit` ids.

    With `trim` whole exchanges go, from one human turn up to the next; system turns and the last human turn with
    what follows it stay. Raises RequestError, with how many tokens over, if that is not asked for or not enough.
    """
    kept = list(messages)
    ids = encode(kept)
    while trim and len(ids) > limit and (shorter := _without_oldest(kept)) is not None:
        kept = shorter
        ids = encode(kept)
    if len(ids) > limit:
        hint = "shorten the last turn" if trim else "shorten it, drop its oldest turns, or lower max_new_tokens"
        raise RequestError(
            f"the conversation has {len(ids):,} tokens, {len(ids) - limit:,} over the {limit:,} that leave room "
            f"for an answer: {hint}"
        )
    return ids, len(messages) - len(kept)


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The conversation without its first exchange; None if there is only one."""
    starts = [i for i, message in enumerate(messages) if message.role == HUMAN]
    if len(starts) < 2:
        return None
    return [message for i, message in enumerate(messages) if i >= starts[1] or message.role == SYSTEM]


def _as_text(part: Part) -> Part:
    known = isinstance(part, AudioPart) and part.transcript is not None
    return TextPart(part.transcript) if known else part  # type: ignore[union-attr,arg-type]
