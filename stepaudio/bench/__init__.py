"""Measurements with a baseline in the same run; `python -m stepaudio.bench --help` lists them."""
