"""Checkpoints on disk: what a path or a name is, the two layouts, and reading them into the networks."""
