"""A W&B workspace or report of an experiment, built from its results.

    python experiments/dashboard.py table1                          # prints it as JSON; nothing is sent
    python experiments/dashboard.py table1 --kind report --save report.json
    python experiments/dashboard.py table1 --publish --entity my-team

Needs the extra: pip install 'segresearch[dashboards]'. Publishing needs an account, and runs that `wandb sync` sent.
"""

from segresearch.commands import dashboard as main

if __name__ == "__main__":
    main()
