"""The token ids a conversation is put to the language model with.

Pure: vocabulary and messages in, ids out; sound must be codes by now, and goes in as ids without a detour
over text. A turn is `<|BOT|>{role}\n{content}<|EOT|>`; role words carry no word mark, because they follow a
special id (formats.md section 10, Q2). Source: formats.md section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepaudio.chat.messages import ASSISTANT, CallPart, Message, Part, TextPart
from stepaudio.lm.vocab import Vocab
from tokenizer.codes import AudioCodes

Delimiters = tuple[int, int]  # ids around a tool call


def build_prompt(
    vocab: Vocab, messages: Sequence[Message], delimiters: Delimiters | None = None, *, allow_special: bool = False
) -> list[int]:
    """Ids up to the point where the model goes on with the assistant's turn; the arguments of `encode_messages`."""
    if not messages or messages[-1].role != ASSISTANT or not messages[-1].open:
        messages = [*messages, Message(ASSISTANT, open=True)]
    return encode_messages(vocab, messages, delimiters, allow_special=allow_special)


def encode_messages(
    vocab: Vocab, messages: Sequence[Message], delimiters: Delimiters | None = None, *, allow_special: bool = False
) -> list[int]:
    """Ids of whole turns, with `<s>` in front where the tokenizer adds one.

    delimiters     ids around a call, `<|CALL_START|>` and `<|CALL_END|>` by default
    allow_special  special pieces typed in texts become their ids, as the release lets them
    """
    delimiters = delimiters or (vocab.call_start, vocab.call_end)
    items: list[str | int | list[int]] = []
    for message in messages:
        items += [vocab.bot, f"{message.role}\n"]
        for part in message.parts:
            items += _items(vocab, part, delimiters, allow_special)
        items += [] if message.open else [vocab.eot]
    return vocab.join(items)


def _items(vocab: Vocab, part: Part, delimiters: Delimiters, allow_special: bool) -> Sequence[str | int | list[int]]:
    if isinstance(part, TextPart):
        return vocab.split(part.text) if allow_special else [part.text]
    if isinstance(part, CallPart):
        return [delimiters[0], part.body, delimiters[1]]
    assert isinstance(part.audio, AudioCodes), f"sound that is not tokenized: {part.audio!r}"
    return [part.audio.to_ids(vocab.audio_base)]
