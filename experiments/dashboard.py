"""A W&B workspace or report of an experiment, built from its results.

    python experiments/dashboard.py table1                          # prints it as JSON; nothing is sent
    python experiments/dashboard.py table1 --kind report --save report.json
    python experiments/dashboard.py table1 --publish --entity my-team

Needs the extra: pip install 'segresearch[dashboards]'. Publishing needs an account, and runs that `wandb sync` sent.
"""

import argparse
import json
from pathlib import Path

from segresearch.cli import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description="A W&B workspace or report of an experiment, as code.")
    parser.add_argument("name", help="the experiment, as the runs' folder is called")
    parser.add_argument("--kind", choices=["workspace", "report"], default="workspace")
    parser.add_argument("--out", default="runs", help="where runs lie (default: runs)")
    parser.add_argument("--project", default="segresearch", help="of W&B, as in wandb.project of the runs")
    parser.add_argument("--entity", default="", help="of W&B: a user or a team")
    parser.add_argument("--save", type=Path, metavar="JSON", help="write it to this file instead of printing it")
    parser.add_argument("--publish", action="store_true", help="save it at W&B (needs an account)")
    args = parser.parse_args()

    from segresearch import runs
    from segresearch.dashboard import build, metrics_of, publish, spec

    with one_line_errors():
        view = build(args.kind, args.name, metrics_of(args.name, args.out), args.project, args.entity)
        text = json.dumps(spec(view), indent=1, ensure_ascii=False) + "\n"
        if args.save is not None:
            runs.write(args.save, text)
        if args.publish:
            print(publish(view))
        elif args.save is None:
            print(text, end="")


if __name__ == "__main__":
    main()
