"""Mutated model files: each must load or end in one line of the package's own errors.

    python benchmarks/fuzz.py 1000000 --kinds headers configs      # the readers alone: about a millisecond a case
    python benchmarks/fuzz.py 10000                                # whole models too: about 0.1 s a case

A case is one mutation of a tiny random model, drawn from its number alone, so a run goes on from any `--seed`. Kinds:
headers (of a safetensors file, opened and divided into parts), configs (of every network, scheduler and index,
checked as far as the networks' sizes). The others load the whole model and encode two prompts: header (bytes and
fields of a header), keys (names and shapes of tensors), json (a value in a config), index (the list of shards),
tokenizer (bytes and values of its files), part (model.vae, model.unet, model.text_encoder), controlnet. A failure is
any other exception, a message of several lines, a case of more than 10 s, or of more memory than MEMORY. Printed are
counts, the first failures, the slowest case, and the memory.
"""
import argparse
import collections
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mutants import (
    CONFIGS,
    INDEX,
    NET,
    NET_CONFIG,
    SCHEDULER,
    TOKENIZER,
    UNET,
    broken_header,
    mutated_json,
    packed,
    parsed,
    renamed_keys,
    write_model,
)  # fmt: skip

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.folder import building, naming_path, refuse_other_folder
from segresearch.checkpoints.json_files import read_json
from segresearch.checkpoints.parts import NONE
from segresearch.checkpoints.single_file import find_parts
from segresearch.checkpoints.tensors import open_file
from segresearch.errors import InputError
from segresearch.models import load_model
from segresearch.models.denoiser import alphas_cumprod
from segresearch.models.network_configs import ControlNetConfig, UNetConfig
from segresearch.models.scheduler import folder_scheduler, own_schedule, prediction_of
from segresearch.models.vae import VAEConfig

KINDS = ("headers", "configs", "header", "keys", "json", "index", "tokenizer", "part", "controlnet")
SECONDS, MEMORY = 10.0, 256 << 10  # of one case; ru_maxrss counts KiB
LETTERS = 1000  # of a message
READERS: dict[str, Any] = {
    "unet/config.json": UNetConfig.from_dict, "vae/config.json": VAEConfig.from_dict, NET: ControlNetConfig.from_dict
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one case: "opened", "refused" or "failed"; what failed; seconds."""

    result: str
    failure: str
    seconds: float


class Fuzz:
    """Cases on the copy of a model in `folder`. Layers are made without first values, which files replace anyway."""

    def __init__(self, folder: Path):
        for layer in (torch.nn.Linear, torch.nn.Conv2d):
            layer.reset_parameters = lambda self: None  # type: ignore[method-assign]
        self.folder, self.file = folder / "model", folder / "model.safetensors"
        self.scratch = folder / "mutant.safetensors"
        write_model(self.folder, self.file)
        self.header, self.data = parsed(self.file)
        few = dict(list(self.header.items())[::8])  # names of all parts, without the bytes of their tensors
        empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
        self.few = {key: dict(empty) for key in few}
        self.files = {name: (self.folder / name).read_bytes() for name in (*CONFIGS, "tokenizer/vocab.json",
                      "tokenizer/merges.txt", "controlnet/net/config.json")}  # fmt: skip

    def run(self, kind: str, seed: int) -> Outcome:
        """The case of a kind and a number."""
        draw = random.Random(f"{kind} {seed}")
        start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result, failure = "opened", ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                getattr(self, f"_{kind}")(draw)
            except InputError as error:
                result = "refused"
                if not str(error) or not str(error).isprintable() or len(str(error)) > LETTERS:
                    failure = f"a message of {len(str(error))} letters, {str(error).count(chr(10)) + 1} lines: {error}"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # a panic of a Rust extension is no Exception
                failure = traceback.format_exc()
            finally:
                if kind not in KINDS[:2]:
                    self._restore()
        seconds = time.monotonic() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if not failure and (seconds > SECONDS or grown > MEMORY):
            failure = f"{seconds:.1f} s, {grown >> 10} MiB"
        what = failure if len(failure) < 2000 else f"{failure[:300]} ... {failure[-1700:]}"
        return Outcome("failed" if failure else result, what and f"{kind} {seed}: {what}", seconds)

    def _restore(self) -> None:
        for name in TOKENIZER:
            (self.folder / name).unlink(missing_ok=True)
        for name, content in self.files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        (self.folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink(missing_ok=True)
        weights = self.folder / "unet" / "diffusion_pytorch_model.safetensors"
        if (moved := weights.with_name("shard.safetensors")).is_file():
            moved.rename(weights)

    def _load(self, path: Path, **options: Any) -> None:
        load_model(path, **({} if path.is_dir() else {"tokenizer": self.folder}), **options).encode(["ab", ""])

    def _headers(self, draw: random.Random) -> None:
        header = renamed_keys(draw, self.few) if draw.random() < 0.4 else self.few
        content = packed(header, b"") if header is not self.few else broken_header(draw, header, b"")
        self.scratch.write_bytes(content)
        entries, metadata = open_file(self.scratch)
        find_parts(entries, self.scratch, NONE)
        file_scheduler(self.scratch, entries, metadata)

    def _configs(self, draw: random.Random) -> None:
        name = draw.choice([*CONFIGS, NET])
        path = self.scratch.with_suffix(".json")
        text = mutated_json(draw, CONFIGS[name] if name != NET else NET_CONFIG)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        config = read_json(path)
        with building(path), naming_path(path):
            if name in READERS:
                READERS[name](config)
            elif name == "model_index.json":
                refuse_other_folder(self.folder, config, UNET)
                folder_scheduler(config, SCHEDULER)
            elif name.startswith("scheduler"):
                checked = folder_scheduler(INDEX, config)
                own_schedule(checked), prediction_of(checked)
                alphas_cumprod(checked)

    def _header(self, draw: random.Random) -> None:
        self.scratch.write_bytes(broken_header(draw, self.header, self.data))
        self._load(self.scratch)

    def _keys(self, draw: random.Random) -> None:
        self.scratch.write_bytes(packed(renamed_keys(draw, self.header), self.data))
        self._load(self.scratch)

    def _json(self, draw: random.Random) -> None:
        name = draw.choice(list(CONFIGS))
        (self.folder / name).write_text(mutated_json(draw, CONFIGS[name]), encoding="utf-8", errors="surrogatepass")
        self._load(self.folder)

    def _index(self, draw: random.Random) -> None:
        weights = self.folder / "unet" / "diffusion_pytorch_model.safetensors"
        keys = list(parsed(weights)[0])
        weights.rename(weights.with_name("shard.safetensors"))
        index = {"metadata": {"total_size": 1}, "weight_map": {key: "shard.safetensors" for key in keys[:40]}}
        path = weights.with_name(weights.name + ".index.json")
        path.write_text(mutated_json(draw, index), encoding="utf-8", errors="surrogatepass")
        self._load(self.folder)

    def _tokenizer(self, draw: random.Random) -> None:
        if draw.random() < 0.3:
            self._bytes(draw, draw.choice(["tokenizer/vocab.json", "tokenizer/merges.txt"]))
        else:
            name = draw.choice(list(TOKENIZER))
            text = mutated_json(draw, TOKENIZER[name])
            (self.folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        self._load(self.folder)

    def _bytes(self, draw: random.Random, name: str) -> None:
        content = bytearray(self.files[name])
        for _ in range(draw.choice([1, 1, 3, 30])):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 1, 5, 50])] = draw.choice(
                [b"", b"\xff\xfe", b"{", b"]", b'"', b"\n", b"0" * 99]
            )
            content = content or bytearray(b" ")
        (self.folder / name).write_bytes(content)

    def _part(self, draw: random.Random) -> None:
        change = draw.choice([broken_header, lambda draw, header, data: packed(renamed_keys(draw, header), data)])
        self.scratch.write_bytes(change(draw, self.header, self.data))
        self._load(self.folder, **{draw.choice(["vae", "unet", "text_encoder"]): self.scratch})

    def _controlnet(self, draw: random.Random) -> None:
        if draw.random() < 0.5:
            path = self.folder / "controlnet" / "net" / "config.json"
            path.write_text(mutated_json(draw, json.loads(path.read_text())), encoding="utf-8", errors="surrogatepass")
            self._load(self.folder, controlnet="net")
        else:
            self.scratch.write_bytes(packed(renamed_keys(draw, self.header), self.data))
            self._load(self.folder, controlnet=str(self.scratch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest, start = ("", 0.0), time.monotonic()
    try:
        fuzz = Fuzz(folder)
        for i in range(arguments.cases):
            kind, seed = arguments.kinds[i % len(arguments.kinds)], arguments.seed + i // len(arguments.kinds)
            outcome = fuzz.run(kind, seed)
            counts[kind, outcome.result] += 1
            if outcome.seconds > slowest[1]:
                slowest = (f"{kind} {seed}", outcome.seconds)
            if outcome.failure and sum(n for (_, result), n in counts.items() if result == "failed") <= 10:
                print(outcome.failure, flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    for (kind, result), count in sorted(counts.items()):
        print(f"{kind:12} {result:8} {count}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    took = time.monotonic() - start
    print(f"{sum(counts.values())} cases in {took:.0f} s; slowest {slowest[0]}, {slowest[1]:.2f} s; peak {memory} MiB")
    raise SystemExit(any(result == "failed" for _, result in counts))


if __name__ == "__main__":
    main()
