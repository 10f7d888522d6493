"""Train the attribute classifier, which reads the objects of an image, on rendered scenes.

    python -m experiments.mini.train_attributes

Images are mirrored at every second step. Half of them are softened with a 3×3 binomial filter, because sampled images
have softer edges than rendered ones. Writes <out>/checkpoint.pt, loss.jsonl and classifier.pt ({"config", "weights",
"measured"}: accuracy on held-out scenes).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.mini.common import Plan, arguments, batch_indices, generator, save_state, train
from experiments.mini.render import SHARD, open_images, take
from experiments.mini.train_vae import HELD_OUT
from segresearch.cli import one_line_errors
from segresearch.metrics.agreement import (
    AttributeClassifier,
    Attributes,
    agreement,
    attribute_loss,
    classify,
    scene_attributes,
)
from segresearch.scenes.scenes import scenes

WIDTH = 24


def softened(images: Tensor) -> Tensor:
    """Images (b, 3, h, w) under a 3×3 binomial filter."""
    taps = torch.tensor([0.25, 0.5, 0.25], device=images.device)
    kernel = taps.outer(taps).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def measure(classifier: AttributeClassifier, count: int) -> dict[str, Any]:
    """Agreement with the objects of held-out scenes, for images as rendered and softened."""
    index = range(HELD_OUT, HELD_OUT + count)
    images, truth = scenes(index).images, scene_attributes(index)
    soft = softened(images.float()).round().to(torch.uint8)
    result: dict[str, Any] = {"scenes": count}
    for version, batch in (("rendered", images), ("softened", soft)):
        shares = agreement(classify(classifier, batch), truth)
        result[version] = {name: round(value.mean().item(), 4) for name, value in shares.items()}
    return result


def finish(out: Path, weights: Mapping[str, Tensor], width: int, count: int) -> dict[str, Any]:
    classifier = AttributeClassifier(width).eval()
    classifier.load_state_dict(weights)
    measured = {**measure(classifier, count), "parameters": sum(p.numel() for p in classifier.parameters())}
    packed = {"config": json.dumps({"width": width}), "weights": dict(weights), "measured": json.dumps(measured)}
    save_state(out / "classifier.pt", packed)
    return measured


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("runs/mini/scenes"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini/attributes"))
    parser.add_argument("--images", type=int, default=16 * SHARD)
    args = arguments(parser, steps=2500, batch=64, peak=3e-3)
    shards, truth = open_images(args.scenes, args.images), scene_attributes(range(args.images))
    torch.manual_seed(args.seed)
    classifier = AttributeClassifier(WIDTH).to(args.device)
    target = Attributes(*(part.to(args.device) for part in vars(truth).values()))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index = batch_indices(args.images, args.batch, step, args.seed)
        images = take(shards, index).to(args.device)
        half = torch.rand(len(images), generator=generator(args.seed, 105, step)).to(args.device) < 0.5
        images[half] = softened(images[half])
        if step % 2:
            images = images.flip(-1)
        with torch.autocast(images.device.type, torch.bfloat16):
            count, names = classifier(images)
        expected = target[index.to(args.device)]
        value = attribute_loss(count, names, expected)
        return value, {"count": (count.argmax(1) + 1 == expected.count).float().mean()}

    plan = Plan.of(args, warmup=100, hold=0.3, decay=0.998, save_every=250)
    weights = train(args.out, classifier, loss, plan, {k: str(v) for k, v in vars(args).items()})
    print(json.dumps(finish(args.out, weights, WIDTH, min(2048, args.images)), indent=1))


if __name__ == "__main__":
    main()
