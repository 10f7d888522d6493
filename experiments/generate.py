"""Images of one or several guidance methods on the same seeds, and a labelled grid of them.

    python experiments/generate.py experiment=demo
    python experiments/generate.py guidance=seg guidance.terms.seg.perturbation.sigma=inf seeds=0-15 \
        prompts='["a red sphere left of a blue cube"]'
    python experiments/generate.py model=sdxl model.path=/path/to/sdxl guidance=seg_cfg prompts='["a photo of a fox"]'

Settings live in conf/generate.yaml and the groups beside it; `--help` lists them. The same command resumes a run.
"""

from typing import Any

from segresearch.cli import command


@command("generate")
def main(config: Any) -> None:
    """Checks the settings, then makes what is missing of the run."""
    from segresearch.config import settings

    run = settings(config)  # a slip shows before anything heavy is imported

    from segresearch.generate import generate

    print(generate(run))


if __name__ == "__main__":
    main()
