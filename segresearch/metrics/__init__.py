"""Metrics of images and of sets of images, with the networks that they need (docs/metrics.md)."""

from segresearch.metrics.attributes import Attributes, Namer, agreement, load_namer, named, of_objects, of_scenes
from segresearch.metrics.frechet import Frechet, Gaussian, Moments, frechet_distance, gaussian, resamples
from segresearch.metrics.mini_vision import Vision, VisionTower, features_of, load_vision
from segresearch.metrics.perceptual_mini import distances, feature_distance

__all__ = [
    "Attributes",
    "Frechet",
    "Gaussian",
    "Moments",
    "Namer",
    "Vision",
    "VisionTower",
    "agreement",
    "distances",
    "feature_distance",
    "features_of",
    "frechet_distance",
    "gaussian",
    "load_namer",
    "load_vision",
    "named",
    "of_objects",
    "of_scenes",
    "resamples",
]
