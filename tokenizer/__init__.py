"""Sound to dual codes: the linguistic (16.7 Hz) and semantic (25 Hz) tokenizers of Step-Audio."""
