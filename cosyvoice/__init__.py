"""Dual codes to sound: the flow-matching model, the HiFT vocoder and voice prompts of Step-Audio."""
