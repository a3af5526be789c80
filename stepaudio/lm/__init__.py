"""The Step-1 language model: token ids in, token ids out."""
