"""Data: procedural captioned scenes with exact depth and edges (`scenes`), prompt lists (`prompts`)."""
