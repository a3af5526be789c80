"""Text to token ids and back: sentencepiece text, control pieces and audio ids of one tokenizer.model.

Knows nothing about prompts, roles or sound. Ids are looked up by their piece; none is assumed.
Two rules of the text side come from `tokenizer_config.json` beside the model: whether a text starts
with `<s>`, and whether only its first segment or every one after a special piece gets the word mark.
Without that file the release's values hold. Source: formats.md sections 4.1 to 4.3.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from stepaudio.lm.base import IdRange
from tokenizer.codes import LAYOUT
from tokenizer.errors import CheckpointError, RequestError
from tokenizer.files import require_file

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
WORD_MARK = "▁"

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_NOT_TEXT = (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.USER_DEFINED, _Piece.UNUSED)
_AUDIO = re.compile(r"<audio_(\d+)>")
_ANY_AUDIO = r"<audio_(?:0|[1-9][0-9]*)>"


class Vocab:
    """The vocabulary of a Step-1 model.

    Attributes: `size`; the ids `bos`, `eot`, `bot`, `pad`, `call_start`, `call_end`; `audio_base`, the id of
    `<audio_0>`, and `audio_range`, half open; `specials`, every control, user-defined and unknown piece with its
    id, audio included; `add_bos` and `mark_every_segment`, the two rules of the text side.
    """

    def __init__(
        self, model: sentencepiece_model_pb2.ModelProto, add_bos: bool = True, mark_every_segment: bool = False
    ) -> None:
        """`model` is the parsed tokenizer.model. Raises CheckpointError if a needed piece is missing."""
        self.model = model
        self.add_bos = add_bos
        self.mark_every_segment = mark_every_segment
        self.size = len(model.pieces)
        self._ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
        self.specials = {
            piece.piece: index
            for index, piece in enumerate(model.pieces)
            if piece.type in (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.USER_DEFINED)
        }
        self.bos, self.eot, self.bot = self.id_of("<s>"), self.id_of("<|EOT|>"), self.id_of("<|BOT|>")
        self.call_start, self.call_end = self.id_of("<|CALL_START|>"), self.id_of("<|CALL_END|>")
        self.pad = self.id_of("<unk>")
        self.audio_range = _audio_range(self.specials)
        self.audio_base = self.audio_range[0]
        self._bytes = _piece_bytes(model)
        self._text_only = _text_processor(model)
        self._special_pattern = _special_pattern(self.specials)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Vocab:
        """Reads a tokenizer.model, or the one in a folder, with the tokenizer_config.json beside it, if any.

        Raises CheckpointError for a file that is missing or is not a Step-1 tokenizer.
        """
        path = Path(path)
        file = require_file(path / MODEL_FILE if path.is_dir() else path, "text tokenizer")
        config = _read_config(file.parent / CONFIG_FILE)
        return cls(
            read_model(file),
            add_bos=bool(config.get("add_bos_token", True)),
            mark_every_segment=bool(config.get("legacy", True)) if config else False,
        )

    def id_of(self, piece: str) -> int:
        """The id of a piece by its text. Raises CheckpointError if the tokenizer has none."""
        if piece not in self._ids:
            raise CheckpointError(f"text tokenizer: no piece {piece!r}, so it is not the one of a Step-1 model")
        return self._ids[piece]

    def encode(self, text: str, allow_special: bool = False, bos: bool | None = None, prefix: bool = True) -> list[int]:
        """Ids of a text.

        allow_special  True: special pieces in it become their ids, as templates need and as the release's own
                       tokenizer does; False: they are ordinary text, and only text ids come out.
        bos            put `<s>` in front; None does what the tokenizer's config says.
        prefix         the text starts a sequence, so its first word gets the word mark. Pass False for what
                       follows a special id (True again where `mark_every_segment` holds).
        Raises RequestError for lone surrogates, which no encoding has.
        """
        _check_encodable(text)
        ids = [self.bos] if (self.add_bos if bos is None else bos) else []
        for segment in self.split(text) if allow_special else [text]:
            if isinstance(segment, int):
                ids.append(segment)
                prefix = self.mark_every_segment
            elif segment:
                ids += self._encode_segment(segment, prefix)
                prefix = self.mark_every_segment
        return ids

    def join(self, parts: Iterable[str | int | Sequence[int]], bos: bool | None = None) -> list[int]:
        """Ids of a template given as parts: special ids, runs of ids, and texts that are never taken for specials.

        Equals `encode(..., allow_special=True)` of the parts written out, unless a text holds a special piece.
        Neighbouring texts are one text: a word may not end at their seam.
        """
        ids = [self.bos] if (self.add_bos if bos is None else bos) else []
        text, prefix = "", True
        for part in [*parts, ()]:
            if isinstance(part, str):
                text += part
                continue
            run = [part] if isinstance(part, int) else list(part)
            if text:
                ids += self.encode(text, bos=False, prefix=prefix)
            if text or run:
                prefix = self.mark_every_segment
            ids += run
            text = ""
        return ids

    def split(self, text: str) -> list[str | int]:
        """Cuts a text at its special pieces, the longest first: texts and special ids in order."""
        parts: list[str | int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            index = self.specials.get(match.group())
            if index is not None:
                parts += [text[start : match.start()], index]
                start = match.end()
        return [*parts, text[start:]]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids, without its leading space; bytes that are no UTF-8 become U+FFFD.

        skip_special drops everything that is not text: control, user-defined, unknown and audio pieces.
        Raises CheckpointError for an id beyond the vocabulary.
        """
        stream = TextStream(self, skip_special)
        return "".join([*map(stream.push, ids), stream.close()])

    def is_text(self, index: int) -> bool:
        """Whether an id stands for text: neither special nor audio."""
        return self.model.pieces[index].type not in _NOT_TEXT

    def bytes_of(self, index: int) -> bytes:
        """The UTF-8 bytes an id stands for, a part of a character for a byte piece."""
        if not 0 <= index < self.size:
            raise CheckpointError(
                f"token id {index} is not one of the {self.size} pieces of the text tokenizer: "
                "language model and tokenizer.model do not belong together"
            )
        return self._bytes[index]

    def _encode_segment(self, segment: str, prefix: bool) -> list[int]:
        segment = segment.replace(" ", WORD_MARK)
        if prefix and (self.mark_every_segment or not segment.startswith(WORD_MARK)):
            segment = WORD_MARK + segment
        return self._text_only.encode(segment)


class TextStream:
    """Decodes ids one at a time; a character split over byte pieces comes out whole."""

    def __init__(self, vocab: Vocab, skip_special: bool = True) -> None:
        self._vocab = vocab
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, index: int) -> str:
        """The text that becomes certain with this id; may be empty."""
        raw = self._vocab.bytes_of(index)
        if self._skip_special and not self._vocab.is_text(index):
            return ""
        if self._at_start and raw:
            raw, self._at_start = raw.removeprefix(b" "), False
        return self._utf8.decode(raw)

    def close(self) -> str:
        """What is left of an unfinished character."""
        return self._utf8.decode(b"", final=True)


def read_model(file: Path) -> sentencepiece_model_pb2.ModelProto:
    """Parses a tokenizer.model. Raises CheckpointError if it is none."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError:
        raise CheckpointError(f"text tokenizer: {file} is not a sentencepiece model: download it again") from None
    return model


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(require_file(file, "text tokenizer").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"text tokenizer: {file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"text tokenizer: {file} must hold a JSON object")
    return config


def _audio_range(specials: dict[str, int]) -> IdRange:
    """The ids of `<audio_0>`, `<audio_1>`...: at least the 5120 in use, and without a gap."""
    ids = {int(match.group(1)): index for piece, index in specials.items() if (match := _AUDIO.fullmatch(piece))}
    if len(ids) < LAYOUT.size:
        raise CheckpointError(f"text tokenizer: {len(ids)} audio pieces, at least {LAYOUT.size} are needed")
    base = ids.get(0, -1)
    for code in range(len(ids)):
        if ids.get(code) != base + code:
            raise CheckpointError(
                f"text tokenizer: <audio_{code}> should have the id {base + code}, has {ids.get(code)}"
            )
    return base, base + len(ids)


def _text_processor(model: sentencepiece_model_pb2.ModelProto) -> SentencePieceProcessor:
    """A processor whose output is text pieces only: what is user-defined never matches, and no mark is added."""
    bytes_there = {piece.piece for piece in model.pieces if piece.type == _Piece.BYTE}
    missing = [piece for byte in range(256) if (piece := f"<0x{byte:02X}>") not in bytes_there]
    if missing:
        raise CheckpointError(f"text tokenizer: byte piece {missing[0]} is missing, so some text has no ids")
    text = sentencepiece_model_pb2.ModelProto()
    text.CopyFrom(model)
    text.normalizer_spec.add_dummy_prefix = False
    text.trainer_spec.byte_fallback = True
    for piece in text.pieces:
        if piece.type == _Piece.USER_DEFINED:
            piece.type = _Piece.CONTROL  # sentencepiece never finds control pieces in text
    try:
        return SentencePieceProcessor(model_proto=text.SerializeToString())
    except RuntimeError as error:
        raise CheckpointError(f"text tokenizer: sentencepiece refuses the model: {error}") from None


def _piece_bytes(model: sentencepiece_model_pb2.ModelProto) -> list[bytes]:
    return [
        bytes([int(piece.piece[1:-1], 16)])
        if piece.type == _Piece.BYTE
        else piece.piece.replace(WORD_MARK, " ").encode("utf-8")
        for piece in model.pieces
    ]


def _special_pattern(specials: dict[str, int]) -> re.Pattern[str]:
    """Matches every special piece, the longest at a place first; audio pieces as a family."""
    others = sorted((piece for piece in specials if not _AUDIO.fullmatch(piece)), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, others), _ANY_AUDIO]))


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "it is half of a character, remove it"
        ) from None
