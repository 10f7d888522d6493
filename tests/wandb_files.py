"""What an offline run of W&B left on disk, read back."""

import json
import struct
from pathlib import Path


def stored(file: Path) -> list:
    """The records of an offline run's file: W&B's header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = file.read_bytes(), 7, [], []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return found


def read(folder: Path) -> dict[str, tuple]:
    """By name: (run, last values, settings, whether it was finished) of every offline run below `folder`."""
    found = {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        records, values, ended = stored(file), {}, False
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
            elif kind == "history":
                values |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            ended |= kind == "exit"
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        found[run.display_name] = (run, values, settings, ended)
    return found
