"""`stepaudio tokenize`: sound files as audio codes. Loads the tokenizer alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stepaudio.checkpoints import CHAT_DIR, TTS_DIR, find_root, require_checkpoint
from stepaudio.device import resolve_device
from stepaudio.lm.vocab import MODEL_FILE, Vocab
from stepaudio.roundtrip import read_sound
from tokenizer.codes import LAYOUT
from tokenizer.dual import DualTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    parser.add_argument("input", nargs="+", type=Path, help="sound files")
    parser.add_argument("--form", choices=["text", "codes", "ids"], default="text", help="text is <audio_N> pieces")
    parser.add_argument("--json", action="store_true", help="all forms in one JSON object per file, for `decode`")
    parser.add_argument("--trim", action="store_true", help="cut silence off both ends, as for voice prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the dither")
    parser.add_argument("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run_command(args: argparse.Namespace) -> int:
    """Prints the codes of each file, one line per file."""
    root = find_root(args.model_path)
    folder = require_checkpoint(root, "tokenizer")
    sounds = [read_sound(path) for path in args.input]
    tokenizer = DualTokenizer.from_dir(folder, resolve_device(args.device))
    base = _id_base(root)
    for path, codes in zip(args.input, tokenizer.encode(sounds, trim=args.trim, seed=args.seed)):
        forms = {"codes": codes.interleaved.tolist(), "ids": codes.to_ids(base), "text": codes.to_text()}
        if args.json:
            print(json.dumps({"input": str(path), "seconds": round(codes.seconds, 3), **forms}, ensure_ascii=False))
        else:
            print(forms["text"] if args.form == "text" else " ".join(map(str, forms[args.form])))
    return 0


def _id_base(root: Path) -> int:
    """Id of `<audio_0>` in the text tokenizer that is there; the release's if there is none."""
    for folder in (root / CHAT_DIR, root / TTS_DIR):
        if (folder / MODEL_FILE).is_file():
            return Vocab.from_file(folder).audio_base
    return LAYOUT.id_base
