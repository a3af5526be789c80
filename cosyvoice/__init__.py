"""Dual codes to sound: the flow-matching model, the HiFT vocoder and voice prompts of Step-Audio."""

import tokenizer  # noqa: F401  how threads wait is decided there, before torch is loaded
