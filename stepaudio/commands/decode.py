"""`stepaudio decode`: audio codes as sound. Loads the flow model and the vocoder, and the tokenizer for a voice."""

from __future__ import annotations

import argparse
from pathlib import Path

from cosyvoice.decoder import SpeechDecoder
from cosyvoice.prompt import VoicePrompt
from stepaudio.checkpoints import FLOW_DIR, MUSIC_DIR, find_root, require_checkpoint
from stepaudio.commands.options import add_model
from stepaudio.device import resolve_device, resolve_dtype
from stepaudio.roundtrip import decode, first_seconds, read_codes, read_sound
from tokenizer.audio import WRITTEN, write_audio
from tokenizer.codes import AudioCodes
from tokenizer.dual import DualTokenizer
from tokenizer.errors import RequestError
from tokenizer.files import check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    parser.add_argument(
        "codes", help="a .json file as `tokenize --json` prints it, a file of <audio_N> text, or that text"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="sound file to write")
    parser.add_argument("--voice", type=Path, help="who speaks: a recording, or a saved voice prompt (.safetensors)")
    parser.add_argument("--music", action="store_true", help="through the flow model for rap and humming")
    parser.add_argument("--seed", type=int, default=0, help="of the decoder's noise")
    parser.add_argument("--steps", type=int, default=10, help="flow steps (default: 10)")
    add_model(parser)


def run_command(args: argparse.Namespace) -> int:
    """Writes the sound and says how long it is."""
    check_target(args.output, WRITTEN)
    codes = _codes(args.codes)
    root = find_root(args.model_path)
    device = resolve_device(args.device)
    folder = require_checkpoint(root, "tts") / (MUSIC_DIR if args.music else FLOW_DIR)
    decoder = SpeechDecoder.from_dir(folder, device, resolve_dtype(args.dtype, device))
    voice: VoicePrompt | None = None
    if args.voice is not None and args.voice.suffix == ".safetensors":
        voice = VoicePrompt.load(args.voice)
    elif args.voice is not None:
        clip = first_seconds(read_sound(args.voice))
        tokenizer = DualTokenizer.from_dir(require_checkpoint(root, "tokenizer"), device)
        voice = decoder.voice_prompt(clip, tokenizer, seed=args.seed)
    sound = decode(decoder, codes, voice, args.seed, args.steps)
    write_audio(args.output, sound)
    print(f"{args.output}: {sound.seconds:.2f} s from {len(codes)} codes")
    return 0


def _codes(given: str) -> AudioCodes:
    """Codes from a file or from the text itself; RequestError for anything else."""
    if given.lstrip().startswith("<audio_"):
        return AudioCodes.from_text(given)
    path = Path(given)
    if path.suffix == ".json":
        return read_codes(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {given[:80]}: {getattr(error, 'strerror', None) or 'no text file'}") from None
    codes = AudioCodes.from_text(text)
    if not len(codes):
        raise RequestError(f"{path} holds no codes")
    return codes
