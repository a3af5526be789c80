"""Text to speech: voices, style tags, long text and batches."""
