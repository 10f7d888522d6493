"""Metrics of images and of sets of images, with the networks that they need (docs/metrics.md)."""
