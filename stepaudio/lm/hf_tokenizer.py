"""tokenizer.json for AutoTokenizer, vLLM and training libraries, with the ids of `Vocab`.

transformers 5 rebuilds a LlamaTokenizer as BPE whatever tokenizer.model holds, so it cuts the release's
unigram text differently and forgets `<s>`. The files written here name the generic class instead, which
takes tokenizer.json as it is. One text differs by design of that library: a typed `<0x0A>` becomes the byte.
Source: formats.md sections 4.1 to 4.3 and 13.7.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from stepaudio.lm.vocab import CONFIG_FILE, WORD_MARK, Vocab
from tokenizer.errors import CheckpointError
from tokenizer.files import atomic_write, make_folder

TOKENIZER_FILE = "tokenizer.json"

_TrainerSpec = sentencepiece_model_pb2.TrainerSpec
_CONTROL = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
_RELEASE_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 65536,
    "padding_side": "left",
}
_PROBES = (
    "\n",
    "assistant\n",
    "system\n你好",
    "<|BOT|>human\n你好，世界。 Hello  world<|EOT|><|BOT|>assistant\n",
    "<|BOT|> human\n <audio_0><audio_1024> mixed 文本 1234",
    " leading and trailing ",
    "今天天气怎么样？ I'd say 25°C, naïve café 👼🏽",
)


def write_tokenizer_json(model: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes tokenizer.json and a tokenizer_config.json that makes every library use it; returns the former.

    `model` is a tokenizer.model or its folder, `out` a folder, which may be the same one.
    Raises CheckpointError for a model this form cannot express.
    """
    vocab = Vocab.from_file(model)
    folder = make_folder(out)
    with atomic_write(folder / TOKENIZER_FILE) as temporary:
        build(vocab).save(str(temporary))
    with atomic_write(folder / CONFIG_FILE) as temporary:
        text = json.dumps(_config(Path(model), vocab), ensure_ascii=False, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
    return folder / TOKENIZER_FILE


def build(vocab: Vocab) -> Tokenizer:
    """The same tokenizer in the form of the `tokenizers` library."""
    normalizer = vocab.model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise CheckpointError("text tokenizer: it changes its text before cutting it, which tokenizer.json would not")
    tokenizer = Tokenizer(_model(vocab))
    if vocab.mark_every_segment:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(WORD_MARK), normalizers.Replace(" ", WORD_MARK)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(WORD_MARK, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    types = [piece.type for piece in vocab.model.pieces]
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=types[index] == _CONTROL or index == vocab.pad)
            for piece, index in sorted(vocab.specials.items(), key=lambda item: item[1])
        ]
    )
    if vocab.add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab.bos)]
        )
    return tokenizer


def compare(folder: str | os.PathLike[str]) -> str:
    """One line: whether AutoTokenizer on this folder gives the ids of `Vocab`, and what to do if not."""
    vocab = Vocab.from_file(folder)
    version = "tokenizer.json" if (Path(folder) / TOKENIZER_FILE).is_file() else "tokenizer.model alone"
    try:
        auto = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        return f"AutoTokenizer cannot read {folder} ({version}): {error}"
    for text in _PROBES:
        expected, found = vocab.encode(text, allow_special=True), auto.encode(text)
        if found != expected:
            return (
                f"AutoTokenizer builds other ids from {version}: {text!r} gives {found[:6]}, should be {expected[:6]}; "
                f"run `stepaudio convert-tokenizer {folder}` before using the folder outside this package"
            )
    return f"AutoTokenizer gives the right ids ({version})"


def _model(vocab: Vocab) -> models.Model:
    kind = vocab.model.trainer_spec.model_type
    pieces = vocab.model.pieces
    if kind == _TrainerSpec.UNIGRAM:
        return models.Unigram([(piece.piece, piece.score) for piece in pieces], unk_id=vocab.pad, byte_fallback=True)
    if kind == _TrainerSpec.BPE:
        ids = {piece.piece: index for index, piece in enumerate(pieces)}
        return models.BPE(ids, _merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    raise CheckpointError(f"text tokenizer: model type {kind} is neither unigram nor BPE")


def _merges(vocab: Vocab) -> list[tuple[str, str]]:
    """Every pair of text pieces that makes a text piece, best score of the result first."""
    scores = {
        piece.piece: piece.score
        for index, piece in enumerate(vocab.model.pieces)
        if vocab.is_text(index) and piece.type != piece.BYTE
    }
    pairs = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: -pair[0])]


def _config(model: Path, vocab: Vocab) -> dict[str, Any]:
    """The tokenizer_config.json beside the model, or the release's, with the generic class."""
    file = (model if model.is_dir() else model.parent) / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else dict(_RELEASE_CONFIG)
    return {
        **config,
        "add_bos_token": vocab.add_bos,
        "legacy": vocab.mark_every_segment,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
