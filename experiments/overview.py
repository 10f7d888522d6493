"""All runs of an experiment in one table, after a sweep say: what differs between them, then their numbers.

    python experiments/overview.py table1
    python experiments/overview.py evaluate --out /path/to/runs

Prints the table, and writes overview.md, overview.csv and overview.html into <out>/<name>.
"""

import argparse
import sys

from segresearch.cli import exit_code, line
from segresearch.evaluation.compare_runs import overview, write


def main() -> None:
    parser = argparse.ArgumentParser(description="All runs of an experiment in one table.")
    parser.add_argument("name", help="the experiment, as the runs' folder is called")
    parser.add_argument("--out", default="runs", help="where runs lie (default: runs)")
    given = parser.parse_args()
    try:
        found = overview(given.name, given.out)
        paths = write(found, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {line(error)}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    print(found.markdown())
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
