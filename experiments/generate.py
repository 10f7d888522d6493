"""Images of one or several guidance methods on the same seeds, and a labelled grid of them.

    python experiments/generate.py experiment=demo
    python experiments/generate.py guidance=seg guidance.terms.seg.perturbation.sigma=inf seeds=0-15 \
        prompts='["a red sphere left of a blue cube"]'
    python experiments/generate.py model=sdxl model.path=/path/to/sdxl guidance=seg_cfg prompts='["a photo of a fox"]'

Settings live in conf/generate.yaml and the groups beside it; `--help` lists them. The same command resumes a run.
"""

from segresearch.commands import generate as main

if __name__ == "__main__":
    main()
