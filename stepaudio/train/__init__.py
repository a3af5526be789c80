"""Recipes that make and adapt checkpoints: data, one training loop, one module per stage."""
