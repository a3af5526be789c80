"""Triton kernels of the language model, each beside its plain torch form; where none can run, the plain form runs."""
