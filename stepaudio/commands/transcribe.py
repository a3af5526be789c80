"""`stepaudio transcribe`: the words of sound files. `stepaudio chat --task asr` does whole folders, and resumes."""

from __future__ import annotations

import argparse
import json

from stepaudio.chat.engine import ASR_SAMPLING
from stepaudio.checkpoints import find_root
from stepaudio.commands.options import add_engine, add_model, add_spread, engine_options, spread_options
from stepaudio.compat import StepAudio


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    parser.add_argument("input", nargs="+", help="sound files")
    parser.add_argument("--batch-size", type=int, default=8, help="files that are written down together (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokenizer's dither")
    parser.add_argument("--json", action="store_true", help="print one JSON object per file")
    add_model(parser)
    add_engine(parser)
    add_spread(parser)


def run_command(args: argparse.Namespace) -> int:
    """Prints the words of each file; nothing if one of them cannot be read."""
    engine = StepAudio.from_dir(
        find_root(args.model_path),
        args.device,
        args.dtype,
        text_only=True,
        batch_size=args.batch_size,
        lm_options={**engine_options(args), **spread_options(args)},
    )
    texts = engine.transcribe(args.input, seed=args.seed, sampling=ASR_SAMPLING)
    for path, text in zip(args.input, texts):
        if args.json:
            print(json.dumps({"input": path, "text": text}, ensure_ascii=False))
        else:
            print(text if len(texts) == 1 else f"{path}: {text}")
    return 0
