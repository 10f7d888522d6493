"""A small evaluation, for the tests of whole runs."""

from pathlib import Path

from segresearch.config import EvaluateConfig, typed

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
