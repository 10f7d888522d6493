"""Evaluation: Fréchet distance, feature distance, and the attributes of pictures, with the small networks they need."""

from segresearch.evaluation.attributes import Attributes, Namer, agreement, load_namer, named, of_objects, of_scenes
from segresearch.evaluation.distance import distances, feature_distance
from segresearch.evaluation.frechet import Frechet, Gaussian, Moments, frechet_distance, gaussian, resamples
from segresearch.evaluation.vision import Vision, VisionTower, features_of, load_vision

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
