# make demo    images of the embedded model: unguided, SAG, PAG and SEG side by side; prints where they are
# make test    all tests but those that need a GPU
# make test-gpu    the tests that need a GPU: images of CPU and GPU, the scripts, CUDA graphs, SDXL at full size
# make test-slurm  experiments/slurm.sbatch on a Slurm of one node; skipped, with the reason, where it is not installed
# make reproduce   tables 1, 2 and figures 6, 12 of the paper on the embedded model, 1,000 images per method; in runs/
# make docs    the site of the docs, in site/: static files
# make notebooks      executes experiments/notebooks into docs/notebooks, a minute
# make docs-numbers   measures the numbers of the docs again and compares them with the pages, minutes (docs/numbers.md)
# make check   ruff and mypy
# make clean   removes caches, builds and the environment; runs/ stays
#
# Each installs .venv with the versions of constraints.txt, and again when that file or pyproject.toml changes.
# It takes the newest Python from 3.11 on; `make demo PYTHON=/path/to/python` names one.

VENV := .venv
WORKERS := 2
# Neighbours, which share what is made for them, go to one worker.
SPREAD = -n $(WORKERS) --dist worksteal
IMAGES := 1000
READY := $(VENV)/.ready
OLDEST := 3.11
PYTHONS := python3.14 python3.13 python3.12 python3.11 python3 python
SUITS := import sys, ensurepip, venv; sys.exit(sys.version_info[:2] < tuple(map(int, "$(OLDEST)".split("."))))

.PHONY: demo test test-slow test-gpu test-slurm reproduce docs notebooks docs-numbers check clean

demo: $(READY)
	$(VENV)/bin/python experiments/generate.py experiment=demo

test: $(READY)
	$(VENV)/bin/python -m pytest $(SPREAD)

test-slow: $(READY)
	$(VENV)/bin/python -m pytest $(SPREAD) -m slow

test-gpu: $(READY)
	@$(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	    { echo "no GPU here: torch finds no CUDA device; make test runs what needs none" >&2; exit 1; }
	$(VENV)/bin/python benchmarks/gpu.py --only tests

test-slurm: $(READY)
	$(VENV)/bin/python -m pytest -m slurm -rs

reproduce: $(READY)
	set -e; for name in table1 table2 fig6 fig12; do \
	    OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node=$(WORKERS) experiments/evaluate.py experiment=$$name preset=quick images=$(IMAGES); \
	done

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "the docs: site/index.html"

notebooks: $(READY)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	$(VENV)/bin/python -m experiments.docs.notebooks

docs-numbers: $(READY)
	$(VENV)/bin/python -m experiments.docs.numbers --check

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	@if ! $(VENV)/bin/python -c '$(SUITS)' 2>/dev/null; then \
	    for python in $(or $(PYTHON),$(PYTHONS)) none; do \
	        $$python -c '$(SUITS)' 2>/dev/null && break; \
	    done; \
	    if [ $$python = none ]; then \
	        echo "Python $(OLDEST) or newer, with its venv module, was not found. Looked at:" >&2; \
	        for python in $(or $(PYTHON),$(PYTHONS)); do \
	            echo "  $$python: $$($$python --version 2>/dev/null || echo none that runs)" >&2; \
	        done; \
	        echo "Install one (on Debian with python3-venv), or name it: make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    $$python -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing into $(VENV) (several gigabytes where torch brings CUDA; takes some minutes)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
