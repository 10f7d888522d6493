"""The energy landscape of a model's self-attention: a table, verdicts on SEG's claims, figures and a page.

    python experiments/analyze.py model=mini
    python experiments/analyze.py where=mid measured_steps=[0,12] seeds=0-3 'prompts=["", "a red ring"]' keep=true
    python experiments/analyze.py model=sdxl model.path=/path/to/sdxl where=mid 'prompts=["a photo of a fox"]'

Settings live in conf/analyze.yaml and the groups beside it; `--help` lists them. A finished run is not made twice.
"""

from typing import Any

from segresearch.cli import command


@command("analyze")
def main(config: Any) -> None:
    """Checks the settings, then measures what is not measured yet."""
    from segresearch.config import AnalyzeConfig, settings

    run = settings(config, AnalyzeConfig)  # a slip shows before anything heavy is imported

    from segresearch.analysis.analyze import analyze

    print(analyze(run))


if __name__ == "__main__":
    main()
