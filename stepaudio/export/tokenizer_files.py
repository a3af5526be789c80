"""Writes a `Step-Audio-Tokenizer` folder: codebook, ONNX file and the nested FunASR directory.

Source: formats.md sections 1.1, 5.1, 5.3, 5.6, 6.4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor

from stepaudio.export.decoder_files import write_tensors
from tokenizer.fbank import Cmvn
from tokenizer.files import atomic_write
from tokenizer.linguistic import IMPLEMENTED
from tokenizer.onnx_export import write_semantic_onnx
from tokenizer.sanm import SanmConfig

_CONFIGURATION = {
    "framework": "pytorch",
    "task": "auto-speech-recognition",
    "model": {"type": "funasr"},
    "pipeline": {"type": "funasr-pipeline"},
    "file_path_metas": {
        "init_param": "model.pt",
        "config": "config.yaml",
        "tokenizer_conf": {"token_list": "tokens.json"},
        "frontend_conf": {"cmvn_file": "am.mvn"},
    },
}
"""What FunASR's own loader looks up; ours opens the files by name."""


def write_linguistic(
    folder: Path,
    asr_dir: str,
    config: SanmConfig,
    encoder: Mapping[str, Tensor],
    cmvn: Cmvn,
    codebook: Tensor,
    others: Mapping[str, Tensor],
    symbols: Sequence[str],
) -> None:
    """`linguistic_tokenizer.npy` [1024, D] and the FunASR directory `asr_dir` below `folder`.

    `encoder` is the encoder's state dict; `others` are tensors of model.pt beside it (a decoder, say)
    under their full names; `symbols` fill tokens.json, which only recognition with that decoder reads.
    """
    asr = folder / asr_dir
    asr.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "linguistic_tokenizer.npy") as temporary:
        np.save(temporary, codebook.detach().float().cpu().numpy(), allow_pickle=False)
    write_tensors(asr / "model.pt", {**{f"encoder.{name}": t for name, t in encoder.items()}, **others})
    cmvn.save(asr / "am.mvn")
    _write_text(asr / "config.yaml", yaml.safe_dump(_settings(config), sort_keys=False))
    _write_text(asr / "configuration.json", json.dumps(_CONFIGURATION, indent=2) + "\n")
    _write_text(asr / "tokens.json", json.dumps(list(symbols), ensure_ascii=False) + "\n")


def write_semantic(folder: Path, state: Mapping[str, Tensor], num_heads: int) -> None:
    """`speech_tokenizer_v1.onnx` from a SemanticEncoder's state dict."""
    write_semantic_onnx(folder / "speech_tokenizer_v1.onnx", state, num_heads)


def _settings(config: SanmConfig) -> dict[str, object]:
    """config.yaml: the sections that describe what these files hold."""
    return {
        "model": "ParaformerStreaming",
        "encoder": "SANMEncoderChunkOpt",
        "encoder_conf": {
            "output_size": config.size,
            "attention_heads": config.heads,
            "linear_units": config.feed_forward,
            "num_blocks": config.layers,
            "dropout_rate": config.dropout,
            "positional_dropout_rate": config.dropout,
            "attention_dropout_rate": config.dropout,
            "pos_enc_class": "SinusoidalPositionEncoder",
            "kernel_size": config.kernel,
            **IMPLEMENTED["encoder_conf"],
            "chunk_size": [12, 15],
            "stride": [8, 10],
            "pad_left": [0, 0],
            "encoder_att_look_back_factor": [4, 4],
            "decoder_att_look_back_factor": [1, 1],
        },
        "frontend": "WavFrontendOnline",
        "frontend_conf": IMPLEMENTED["frontend_conf"],
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        "normalize": None,
    }


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
