"""Procedural captioned scenes with exact depth and edges."""
