"""A small evaluation, for the tests of whole runs."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import one_figure

from segresearch.config import EvaluateConfig, typed
from segresearch.evaluation import evaluate as run

SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
COUNT = 3


def study(folder, out):
    """A run of three images and two methods on the tiny model, in the folder `out`."""
    given = {
        "model": {"name": "tiny", "path": str(folder)},
        "sampler": {"name": "euler_ancestral"},
        "schedule": {"name": "leading"},
        "name": "study",
        "compare": [{}, {"label": "SEG", "terms": {"seg": SEG}}],
        "prompts": "scene:0-", "images": COUNT, "steps": 2, "size": [64, 64], "batch_size": 1, "shard": 1,
        "n_examples": 2,
        "reference": "scene:100000-100005", "n_bootstrap": 2, "n_subsets": 2, "force": True, "device": "cpu",
        "out": str(out),
    }  # fmt: skip
    return typed(EvaluateConfig, given)


def shard(config, rows) -> Path:
    """Of the second method."""
    (folder,) = Path(config.out, "shards").glob("seg-*")
    return folder / f"{rows}.safetensors"


@contextmanager
def empty_plots():
    """Within the block an evaluation draws an empty plot in place of the real ones, and loads its metrics once."""
    loaded = {}

    def image_metrics(spec, device):
        config = spec.config
        named = (config.features, config.distances, config.text_alignment, str(config.weights), str(config.checksums))
        key = (*named, spec.scenes, spec.folders[spec.baseline].name)
        if key not in loaded:
            loaded[key] = loading(spec, device)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        loading = run.image_metrics
        patch.setattr(run, "image_metrics", image_metrics)
        patch.setattr(run.outputs.plots, "draw", one_figure)
        yield
