"""Replays recorded inputs of the public release through this code and compares the outputs.

One module per folder of golden data; each has `replay(root) -> Iterator[Row]`, where `root` is the
folder that holds all components.
"""
