"""The settings of a run: `schema` has their types, `compose` reads them from YAML, `validate` checks plain data.

`expand` makes them the list of images, `build` the objects that run; `parse` reads seeds, scenes and prompts. Light: no
torch.
"""

from segresearch.config.compose import conf_dir, settings
from segresearch.config.schema import (
    AnalyzeConfig,
    CFGTerm,
    ControlConfig,
    CustomConfig,
    EvaluateConfig,
    GenerateConfig,
    GuidanceConfig,
    ModelConfig,
    PerturbedTerm,
    SamplerConfig,
    ScheduleConfig,
)  # fmt: skip
from segresearch.config.validate import typed

__all__ = [
    "AnalyzeConfig", "CFGTerm", "ControlConfig", "CustomConfig", "EvaluateConfig", "GenerateConfig", "GuidanceConfig",
    "ModelConfig", "PerturbedTerm", "SamplerConfig", "ScheduleConfig", "conf_dir", "settings", "typed",
]  # fmt: skip
