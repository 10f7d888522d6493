"""Guidance methods of the literature, one a file, each a frozen dataclass that a config file can hold."""
