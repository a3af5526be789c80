"""Writes `tokenizer.model` and `tokenizer_config.json`: a sentencepiece model with the release's special pieces.

Knows the places of the special, byte and audio pieces; what lies between them, the text, is the caller's.
Source: formats.md sections 4.1 and 4.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from tokenizer.codes import LAYOUT
from tokenizer.errors import RequestError
from tokenizer.files import atomic_write

WORD_MARK = "▁"
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_TrainerSpec = sentencepiece_model_pb2.TrainerSpec

# Ids 1 to 67 in order; those not listed as user-defined are control pieces.
_NAMED = (
    *("<s>", "</s>", "<|EOT|>", "<|BOT|>", "<|CALL_START|>", "<|CALL_END|>", "<|THINK_START|>", "<|THINK_END|>"),
    *("<|IMG_START|>", "<|IMG_END|>", "<|META_START|>", "<|META_END|>"),
    *("<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>", "<dream_end>"),
    *("<|MASK_1e69f|>", "<|UNMASK_1e69f|>", "<video_start>", "<video_end>", "<row_patch>", "<column_patch>"),
    *("<|SEP_1e69f|>", *(f"<user_defined_symbol_{n}>" for n in range(22, 27))),
    *("<audio_start>", "<audio_end>", "<text_start>", "<text_end>", "<|TTS|>", "<|ASR|>", "<|TQAA|>", "<|AQTA|>"),
    *(f"<user_defined_symbol_{n}>" for n in range(35, 64)),
)
_USER_DEFINED = ("<|MASK_1e69f|>", "<|UNMASK_1e69f|>", "<|SEP_1e69f|>", "<user_defined_symbol_")

FIRST_TEXT = 1 + len(_NAMED) + 256 + 1  # id of the first text piece after `▁`

_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|BOT|>system\nYou are a helpful assistant.<|EOT|>' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|BOT|>' + ('human' if message['role'] == 'user' else message['role']) + '\n' + message['content'] }}"
    "{{ '<|EOT|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|BOT|>assistant\n' }}{% endif %}"
)


def build_vocabulary(
    text: Mapping[str, float], num_audio: int = LAYOUT.size, audio_base: int | None = None
) -> sentencepiece_model_pb2.ModelProto:
    """A unigram model: special pieces, bytes, `▁`, the `text` pieces with their log-probabilities, audio pieces.

    `text` spells a space as `▁` and is kept in order. `audio_base` is the id that `<audio_0>` must get (the
    release's is 65536); None puts it right after the text. Characters without a piece fall back to bytes.
    Raises RequestError if the text does not end exactly at `audio_base`, or for an empty or special piece.
    """
    model = sentencepiece_model_pb2.ModelProto()
    add = _adder(model)
    add("<unk>", 0.0, _Piece.UNKNOWN)
    for piece in _NAMED:
        add(piece, 0.0, _Piece.USER_DEFINED if piece.startswith(_USER_DEFINED) else _Piece.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0.0, _Piece.BYTE)
    add(WORD_MARK, text.get(WORD_MARK, -8.0), _Piece.NORMAL)
    for piece, score in text.items():
        if piece != WORD_MARK:
            add(piece, score, _Piece.NORMAL)
    if audio_base is not None and len(model.pieces) != audio_base:
        raise RequestError(f"the text pieces end at id {len(model.pieces)}, audio pieces were to begin at {audio_base}")
    for code in range(num_audio):
        add(f"<audio_{code}>", 0.0, _Piece.USER_DEFINED)
    _describe(model)
    return model


def _adder(model: sentencepiece_model_pb2.ModelProto) -> Callable[[str, float, int], None]:
    seen: set[str] = set()

    def add(piece: str, score: float, kind: int) -> None:
        if not piece or piece in seen:
            raise RequestError(f"text piece {piece!r} is empty, there twice or a special piece")
        seen.add(piece)
        model.pieces.add(piece=piece, score=score, type=kind)

    return add


def _describe(model: sentencepiece_model_pb2.ModelProto) -> None:
    """The settings that decide how text is cut (formats.md 4.1)."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _TrainerSpec.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.escape_whitespaces = True
    normalizer.remove_extra_whitespaces = False


def write_vocabulary(folder: Path, model: sentencepiece_model_pb2.ModelProto, chat: bool) -> None:
    """Writes both files; `chat` adds the chat template, as the chat release has it and the speech release has not."""
    with atomic_write(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    config: dict[str, object] = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 65536,
        "pad_token": "<unk>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    if chat:
        config = {"add_bos_token": True, **config, "chat_template": _CHAT_TEMPLATE}
    with atomic_write(folder / "tokenizer_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
