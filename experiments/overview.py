"""All runs of an experiment in one table, after a sweep say: what differs between them, then their numbers.

    python experiments/overview.py table1
    python experiments/overview.py evaluate --out /path/to/runs

Prints the table, and writes overview.md, overview.csv and overview.html into <out>/<name>.
"""

from segresearch.commands import overview as main

if __name__ == "__main__":
    main()
