"""Step-Audio: speech chat, speech recognition and speech synthesis in one package."""
