"""Judging a finished checkpoint by what its engines say and understand."""
