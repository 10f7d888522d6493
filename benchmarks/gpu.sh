#!/bin/sh
# The tests that need a GPU and the benchmark, in under 9 minutes, into one file: ${OUT:-runs/gpu}/results.md
#   benchmarks/gpu.sh                        whoever has a GPU for ten minutes; PYTHON=... names a Python
#   benchmarks/gpu.sh --device cpu --smoke   the same at tiny sizes, without one
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || command -v "$python" >/dev/null || python=python3
exec "$python" benchmarks/gpu.py "$@"
