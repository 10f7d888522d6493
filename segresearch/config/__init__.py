"""The settings of a run: `schema` has their types, `compose` reads them from YAML, `validate` checks plain data.

`expand` makes them the list of images, `build` the objects that run. Light: no torch.
"""

from segresearch.config.compose import conf_dir, settings
from segresearch.config.method import GuidanceConfig
from segresearch.config.schema import AnalyzeConfig, ControlConfig, EvaluateConfig, GenerateConfig
from segresearch.config.validate import typed

__all__ = [
    "AnalyzeConfig", "ControlConfig", "EvaluateConfig", "GenerateConfig", "GuidanceConfig",
    "conf_dir", "settings", "typed",
]  # fmt: skip
