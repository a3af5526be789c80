"""Measurements with a baseline in the same run; `stepaudio bench --help` lists them."""
