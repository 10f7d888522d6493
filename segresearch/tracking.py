"""A mirror of a finished run in Weights & Biases. The run folder is the record; a mirror that fails costs one line."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segresearch.runs import plain


def mirror(
    mode: str,
    project: str,
    name: str,
    folder: Path,
    settings: Any,
    metrics: Mapping[str, float],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    images: Mapping[str, Path],
) -> bool:
    """Log `metrics`, `tables` (lists of rows) and `images` (paths of pictures) as one W&B run; whether it worked.

    mode: "off", "offline" (written below `folder`, needs no account; `wandb sync` sends it later) or "online". Whatever
    goes wrong, an account that is missing included, is said in one line and never raised.
    """
    if mode == "off":
        return False
    try:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", init_timeout=30)
        run = wandb.init(project=project, name=name, dir=str(folder), mode=mode, config=plain(settings), settings=quiet)  # type: ignore[arg-type]
        content: dict[str, Any] = dict(metrics)
        for key, rows in tables.items():
            columns: list[Any] = list(rows[0])
            data = [[row[c] for c in columns] for row in rows]
            content[key] = wandb.Table(columns=columns, data=data)
        content |= {key: wandb.Image(str(path)) for key, path in images.items()}
        run.log(content)
        run.finish()
    except Exception as error:  # a mirror's trouble, of whatever kind, is not the run's
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"wandb: {reason[:200]}; the run itself is complete in {folder}", file=sys.stderr)
        return False
    return True
