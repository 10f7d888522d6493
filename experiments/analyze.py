"""The energy landscape of a model's self-attention: a table, verdicts on SEG's claims, figures and a page.

    python experiments/analyze.py model=mini
    python experiments/analyze.py where=mid measured_steps=[0,12] seeds=0-3 'prompts=["", "a red ring"]' keep=true
    python experiments/analyze.py model=sdxl model.path=/path/to/sdxl where=mid 'prompts=["a photo of a fox"]'

Settings live in conf/analyze.yaml and the groups beside it; `--help` lists them. A finished run is not made twice.
"""

from segresearch.commands import analyze as main

if __name__ == "__main__":
    main()
