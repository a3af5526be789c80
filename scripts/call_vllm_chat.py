"""Chat with a Step-Audio-Chat that a vLLM server runs: words or sound in, words out as they come, sound if wanted.

The server has the language model; the text tokenizer, the audio tokenizer and the voice stay here.
Start one (vLLM 0.20 or newer; Step-1 needs this attention backend, and its two embeddings must not be tied):
  vllm serve models/Step-Audio-Chat --served-model-name Step-Audio-Chat --trust-remote-code \\
      --tensor-parallel-size 4 --attention-backend TRITON_ATTN --hf-overrides '{"tie_word_embeddings": false}'
Examples:
  python scripts/call_vllm_chat.py --url http://localhost:8000/v1 --tokenizer models/Step-Audio-Chat --text "你好"
  python scripts/call_vllm_chat.py --model-path models --audio question.wav --output answer.wav --speaker Tingting
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

from stepaudio.chat.engine import CHAT_SAMPLING, Reply
from stepaudio.chat.messages import HUMAN, SYSTEM
from stepaudio.checkpoints import CHAT_DIR, TOKENIZER_DIR, TTS_DIR, find_root
from stepaudio.commands.options import add_model, add_sampling, sampling_options
from stepaudio.compat import StepAudio
from stepaudio.lm.remote import RemoteLM
from tokenizer.audio import WRITTEN, write_audio
from tokenizer.errors import RequestError, run
from tokenizer.files import check_target


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--url", default="http://localhost:8000/v1", help="of the server (default: http://localhost:8000/v1)")
    add("--model", help="name of the served model (default: the server's first)")
    add("--tokenizer", type=Path, help="folder with the chat model's tokenizer.model (default: in --model-path)")
    add("--text", help="what the user says, in words")
    add("--audio", help="what the user says, a sound file")
    add("--system", help="the system turn")
    add("--output", type=Path, help="speak the answer into this sound file")
    add("--speaker", help="a registered voice (default: the first)")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=120.0, help="seconds that the server may stay silent (default: 120)")
    add_sampling(parser)
    add_model(parser)
    return parser.parse_args()


def main() -> None:
    """Sends one turn and prints the answer while it is made."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = arguments()
    if (args.text is None) == (args.audio is None):
        raise RequestError("give the user's turn: either --text or --audio")
    if args.output is not None:
        check_target(args.output, WRITTEN)
    needs_root = args.audio is not None or args.output is not None or args.tokenizer is None
    root = find_root(args.model_path) if needs_root else Path()
    engine = StepAudio(
        root / TOKENIZER_DIR,
        root / TTS_DIR,
        args.tokenizer or root / CHAT_DIR,
        device=args.device,
        dtype=args.dtype,
        lm=RemoteLM.connect(args.url, args.model, args.timeout, os.environ.get("OPENAI_API_KEY")),
        text_only=args.output is None,
    )
    content = args.text if args.audio is None else {"type": "audio", "audio": args.audio}
    system = [] if args.system is None else [{"role": SYSTEM, "content": args.system}]
    for output in engine.stream(
        [*system, {"role": HUMAN, "content": content}],
        speaker=args.speaker,
        seed=args.seed,
        sampling=replace(CHAT_SAMPLING, **sampling_options(args)),
    ):
        if isinstance(output, str):
            print(output, end="", flush=True)
        elif isinstance(output, Reply):
            print()
            if output.audio is not None:
                write_audio(args.output, output.audio)


if __name__ == "__main__":
    run(main)
