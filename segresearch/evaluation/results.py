"""The results of an evaluation, results.json: made of its shards, read again where they are of just these shards, and
the tables, plots and pages that show them, which are written again where one is damaged."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.evaluation import branches, outputs, shards
from segresearch.evaluation.aggregate import Result, aggregate
from segresearch.evaluation.frame import RESULTS, Frame
from segresearch.evaluation.reference_images import Reference
from segresearch.evaluation.sample_shards import required_arrays
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.method_looks import key_of

VERSION = 4  # of the results


def results(spec: EvaluationSpec, real: Reference, folder: Path, diagnosed: Path | None = None) -> Result:
    """The results and all files that show them; read where they are of just these shards and settings. Raises Damaged
    for a shard, OSError."""
    config, path = spec.config, folder / RESULTS
    for swept in [*spec.folders.values(), Path(config.out) / "reference", folder, folder / "figures"]:
        shards.sweep(swept)
    sums = []
    for method, rows in ((method, rows) for method in spec.methods for rows in spec.ranges):
        arrays = shards.header(spec.shard(method, rows))["arrays"]
        sums.append([arrays[name]["sha256"] for name in required_arrays(spec, method, rows)])
    names = [folder.name, config.name, config.model.name, config.n_examples]  # the folder's name is the run's identity
    numbers = branches.read(diagnosed) if diagnosed else ()
    made_of = [VERSION, runs.code_version(), names, [metric.producer for metric in spec.metrics], sums]
    made_of += [real.content(config.out)] if real.files else []
    inputs = runs.digest([*made_of, *([branches.plain_rows(numbers)] if numbers else [])])
    stored = _stored(path, inputs)
    if stored:
        result = stored_result(stored, numbers)
        damaged = [name for name, digest in stored["files"].items() if runs.file_digest(folder / name) != digest]
        if not damaged and all(any((folder / "figures").glob(f"*.{kind}")) for kind in config.vector):
            return result
        if damaged:
            print(f"{folder / damaged[0]}: changed or missing; {len(damaged)} such files are written again",
                  file=sys.stderr)  # fmt: skip
    else:
        result = dataclasses.replace(aggregate(spec, real), diagnostics=numbers)
    files = {name: runs.file_digest(folder / name) for name in outputs.write(spec, result, folder)}
    looks = {name: key_of(guidance) for name, guidance in spec.methods.items()}
    content = {"inputs": inputs, "files": files, **_numbers(result), "looks": looks}
    runs.write(path, json.dumps({**content, "sha256": runs.digest(content)}, indent=1) + "\n")
    return result


def _numbers(result: Result) -> dict[str, Any]:
    return {"metrics": result.frame.plain(), "norms": result.norms, "reference_images": result.reference_images}


def _stored(path: Path, inputs: str) -> dict[str, Any]:
    """What a whole file of results of these inputs holds; {} for any other."""
    if not path.is_file():
        return {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        whole = stored.pop("sha256", "") == runs.digest(stored)
        if stored["inputs"] != inputs:  # of other shards or settings
            return {}
        if whole:
            return dict(stored)
    print(f"{path}: changed or damaged; made again", file=sys.stderr)
    return {}


def stored_result(stored: Mapping[str, Any], numbers: Any) -> Result:
    """The result that the content of results.json holds. numbers: of the diagnostics."""
    norms = {method: tuple(steps) for method, steps in stored["norms"].items()}
    return Result(Frame.of(stored["metrics"]), norms, stored["reference_images"], numbers)


def later_shards(ranges: Sequence[range], spec: EvaluationSpec, folder: Path) -> Iterator[Path]:
    """The shards of these ranges that were written or changed after the results in `folder`; none without results. A
    time of change is of the disk: what decays without one is seen by stage=verify alone."""
    with contextlib.suppress(OSError):
        written = (folder / RESULTS).stat().st_ctime_ns
        for path in (spec.shard(method, rows) for method in spec.methods for rows in ranges):
            with contextlib.suppress(OSError):
                if path.stat().st_ctime_ns > written:
                    yield path


def drop_unless_whole(path: Path) -> None:
    """Read every byte of a shard, and drop it with a line where it is damaged."""
    try:
        shards.read(path)
    except shards.Damaged as error:
        shards.drop(error)
    except OSError:
        pass  # said where it is used


def note_look(spec: EvaluationSpec, folder: Path) -> None:
    """Note by the time of results.json that all shards were looked at, so that the next call looks at none."""
    if next(later_shards(spec.ranges, spec, folder), None) is not None:
        with contextlib.suppress(OSError):
            os.utime(folder / RESULTS)
