"""What W&B shows of an experiment: a workspace or a report, built from the results that are there.

    python experiments/dashboard.py table1                          # prints it as JSON; nothing is sent
    python experiments/dashboard.py table1 --kind report --save report.json
    python experiments/dashboard.py table1 --publish --entity my-team

Needs the extra: pip install 'segresearch[dashboards]'. Publishing needs an account, and runs that `wandb sync` sent.
"""

import argparse
import json
import sys
from pathlib import Path

from segresearch.cli import exit_code, line


def main() -> None:
    parser = argparse.ArgumentParser(description="A W&B workspace or report of an experiment, as code.")
    parser.add_argument("name", help="the experiment, as the runs' folder is called")
    parser.add_argument("--kind", choices=["workspace", "report"], default="workspace")
    parser.add_argument("--out", default="runs", help="where runs lie (default: runs)")
    parser.add_argument("--project", default="segresearch", help="of W&B, as in wandb.project of the runs")
    parser.add_argument("--entity", default="", help="of W&B: a user or a team")
    parser.add_argument("--save", type=Path, metavar="JSON", help="write it to this file instead of printing it")
    parser.add_argument("--publish", action="store_true", help="save it at W&B (needs an account)")
    given = parser.parse_args()

    from segresearch import runs
    from segresearch.dashboard import build, metrics_of, publish, spec

    try:
        board = build(given.kind, given.name, metrics_of(given.name, given.out), given.project, given.entity)
        text = json.dumps(spec(board), indent=1, ensure_ascii=False) + "\n"
        if given.save is not None:
            runs.write(given.save, text)
        if given.publish:
            print(publish(board))
        elif given.save is None:
            print(text, end="")
    except (ValueError, OSError) as error:
        print(f"error: {line(error)}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None


if __name__ == "__main__":
    main()
