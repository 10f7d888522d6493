"""All runs of an experiment in one table, after a sweep say: what differs between them, then their numbers.

    python experiments/overview.py table1
    python experiments/overview.py evaluate --out /path/to/runs

Prints the table, and writes overview.md, overview.csv and overview.html into <out>/<name>.
"""

import argparse

from segresearch.cli import one_line_errors
from segresearch.evaluation.compare_runs import overview, write


def main() -> None:
    parser = argparse.ArgumentParser(description="All runs of an experiment in one table.")
    parser.add_argument("name", help="the experiment, as the runs' folder is called")
    parser.add_argument("--out", default="runs", help="where runs lie (default: runs)")
    args = parser.parse_args()
    with one_line_errors():
        table = overview(args.name, args.out)
        paths = write(table, args.out)
    print(table.markdown())
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
