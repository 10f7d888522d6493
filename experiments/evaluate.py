"""Guidance methods measured on the same images: a table beside the paper's numbers, figures, and a page.

    python experiments/evaluate.py experiment=table1
    torchrun --nproc-per-node=2 experiments/evaluate.py experiment=table2 images=1000
    torchrun --nproc-per-node=8 experiments/evaluate.py experiment=table1 model=sdxl metrics=paper images=30000 \
        reference=/path/to/val2014 keep=64

Settings live in conf/evaluate.yaml and the groups beside it; `--help` lists them. The same command resumes a run.
Exit codes: 0 done, 2 a wrong setting, 3 weights that are missing or wrong, 4 not all there, 5 no memory or no room.
"""

from segresearch.commands import evaluate as main

if __name__ == "__main__":
    main()
