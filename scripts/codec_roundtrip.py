"""A sound through the codec and back: dual tokenizer, flow model, vocoder.

The clip's first ten seconds are the voice prompt, so the result keeps the speaker. A .json input holds codes
(as --codes writes them); they are only decoded, with --prompt as the voice if one is given.

Example: python scripts/codec_roundtrip.py --input clip.wav --output again.wav --codes codes.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio.checkpoints import find_root
from stepaudio.device import resolve_device, resolve_dtype
from stepaudio.roundtrip import roundtrip
from tokenizer.errors import run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-path", type=Path, help="folder with the checkpoints (default: the bundled one)")
    parser.add_argument(
        "--input", type=Path, required=True, help="sound of 8 to 192 kHz, any channels; or codes, .json"
    )
    parser.add_argument("--output", type=Path, required=True, help="sound to write: 22,050 Hz, .wav or .flac")
    parser.add_argument("--codes", type=Path, help="write the codes here, as JSON")
    parser.add_argument("--prompt", type=Path, help="sound of another voice to decode with")
    parser.add_argument("--seed", type=int, default=0, help="of the dither and of the decoder's noise")
    parser.add_argument("--steps", type=int, default=10, help="steps of the flow model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="of the flow model: auto, float32 or bfloat16")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = resolve_device(args.device)
    result = roundtrip(
        find_root(args.model_path),
        args.input,
        args.output,
        codes_path=args.codes,
        prompt_path=args.prompt,
        seed=args.seed,
        num_steps=args.steps,
        device=device,
        dtype=resolve_dtype(args.dtype, device),
    )
    print(result)


if __name__ == "__main__":
    run(main)
