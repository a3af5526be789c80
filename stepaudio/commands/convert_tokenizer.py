"""`stepaudio convert-tokenizer`: a tokenizer.json for AutoTokenizer, vLLM and training libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio.lm.hf_tokenizer import compare, write_tokenizer_json
from stepaudio.lm.vocab import MODEL_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    parser.add_argument("folder", type=Path, help="a chat or speech model's folder, or a tokenizer.model")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the same one)")


def run_command(args: argparse.Namespace) -> int:
    """Writes the files and says whether AutoTokenizer agrees now, where it can be asked."""
    folder = args.folder if args.folder.is_dir() else args.folder.parent
    out = folder if args.out is None else args.out
    print(write_tokenizer_json(args.folder, out))
    if (out / MODEL_FILE).is_file():
        print(compare(out))
    return 0
