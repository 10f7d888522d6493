"""`segresearch fid A B`, and kid, prdc, clip, lpips, is, score: metrics of folders of images, with N and errors.

Thin: the numbers are those of segresearch.metrics, so they agree with an evaluation's. Imports torch late.
"""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segresearch.cli import Arguments, one_line_errors
from segresearch.errors import ConfigError, InputError
from segresearch.rounding import rounded

if TYPE_CHECKING:
    from segresearch.evaluation.reference_images import Reference

ABOUT = {
    "fid": "The Fréchet distance of the images of A to those of B, and its bootstrap error.",
    "kid": "The kernel distance of the images of A to those of B (arXiv 1801.01401), not scaled.",
    "prdc": "Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of A against B.",
    "clip": "The mean cosine of the images of A and their prompts, by CLIP.",
    "lpips": "The mean perceptual distance of the images of A and B that have one name.",
    "is": "The inception score of the images of A (arXiv 1606.03498), in ten parts.",
    "score": "The mean of a network fitted to people's preferences over the images of A and their prompts.",
}
RESIZING = {  # what the network is shown
    "inception": "resized by torch-fidelity to 299×299 as TensorFlow 1 did it (bilinear, not antialiased)",
    "dinov2": "resized as Pillow does it to 224×224 (bicubic, antialiased), squeezed",
    "clip": "the middle square, resized as Pillow does it to 336×336 (bicubic, antialiased)",
    "mini": "not resized",
    "vgg": "not resized", "alex": "not resized",
    **dict.fromkeys(("aesthetic", "pickscore", "imagereward"),
                    "the shorter side to 224 by Pillow (bicubic), its middle"),
    **dict.fromkeys(("hpsv2", "hpsv21"), "the longer side to 224 (bicubic, antialiased), black beside the shorter"),
}  # fmt: skip


@one_line_errors()
def main(name: str) -> None:
    """The command `name`, a key of ABOUT."""
    parser = Arguments(description=ABOUT[name])
    parser.add_argument("a", metavar="A", help='a folder of images, or scenes of mini such as "scene:0-999"')
    if name in ("clip", "score"):
        text = "a .txt file, a line an image in the order of names; default: the prompts in the images' records"
        parser.add_argument("b", metavar="PROMPTS", nargs="?", help=text)
    elif name != "is":
        parser.add_argument("b", metavar="B", help="the same; of fid, kid and prdc the reference")
    if name in ("fid", "kid", "prdc"):
        usual = ["inception", "dinov2", "clip", "mini"]
        parser.add_argument("--features", choices=usual, default="inception", help="of which network (inception)")
    elif name == "lpips":
        parser.add_argument("--net", choices=["vgg", "alex", "mini"], default="vgg", help="whose distance (vgg)")
    if name == "score":
        scorers = ["aesthetic", "pickscore", "hpsv2", "hpsv21", "imagereward"]
        parser.add_argument("--by", choices=scorers, default="hpsv21", help="the network (hpsv21)")
        parser.add_argument("--beside", metavar="FOLDER", help="aesthetic: its CLIP; others: a tokenizer's folder")
    parser.add_argument("--weights", help="the network; default: where its publisher's tools put it")
    parser.add_argument("--sha256", help="of these weights, where they are not the published ones")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    if name == "fid":
        parser.add_argument("--bootstrap", type=whole(0, 100_000), default=100, help="resamples of the error (100)")
        parser.add_argument("--force", action="store_true", help="allow fewer images than features: biased upwards")
    elif name == "kid":
        parser.add_argument("--subsets", type=whole(1, 100_000), default=100, help="subsets (100)")
        parser.add_argument("--size", type=whole(2), default=1000, help="images a subset (1000, at most half)")
    elif name == "prdc":
        text = "k of the k-th nearest neighbour (of precision and recall 3, of density and coverage 5)"
        parser.add_argument("--neighbour", type=whole(1), help=text)
    args = parser.parse_args()
    print(CALLS[name](args))


def whole(lowest: int, highest: int = 10**9) -> Callable[[str], int]:
    """The type of an option: whole numbers from `lowest` to `highest`."""

    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {lowest} to {highest}")
        return int(text)

    return number


def images(text: str) -> "Reference":
    """The images of a folder or of scenes. ConfigError in one line."""
    from segresearch.evaluation.reference_images import reference

    try:
        return reference(text)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("reference: ")) from error


def both_features(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The features of A and of B, and their network."""
    from segresearch.config.build import usable_device
    from segresearch.evaluation.reference_images import measured
    from segresearch.metrics.features import load_extractor
    from segresearch.progress import Bar

    sides = [images(text) for text in (args.a, args.b)]
    extractor = load_extractor(args.features, args.weights, args.sha256, usable_device(args.device))
    features = []
    with Bar(sum(map(len, sides))) as bar:
        for text, side in zip((args.a, args.b), sides, strict=True):
            bar.describe(text)
            features.append(measured(side, lambda batch, _: extractor.of(batch), bar))
    return features[0], features[1], extractor


def fid(args: argparse.Namespace) -> str:
    from segresearch.metrics.frechet import frechet_distance, gaussian

    a, b, extractor = both_features(args)
    try:
        distance = frechet_distance(a, gaussian(b, args.force), args.bootstrap, args.force)
    except InputError as error:
        raise InputError(str(error).replace("force=True", "--force")) from error
    biased = "; fewer images than features: biased far upwards" if min(len(a), len(b)) <= extractor.dim else ""
    name = {"inception": "FID", "dinov2": "FD-DINOv2"}.get(extractor.name, f"FD-{extractor.name}")
    return f"{name} {distance}{biased}\n{note(extractor.name, extractor.weights)}"


def kid(args: argparse.Namespace) -> str:
    from segresearch.metrics.nonparametric import kid as kernel_distance

    a, b, extractor = both_features(args)
    size = min(args.size, min(len(a), len(b)) // 2)  # of all images the subsets would be one, and differ in nothing
    if size < 2:
        raise ConfigError(f"{args.a}, {args.b}: {len(a)} and {len(b)} images; a kernel distance needs four of each")
    value, spread = kernel_distance(a, b, args.subsets, size)
    mean = spread / math.sqrt(args.subsets)
    text = f"KID {rounded(value, mean)} (N = {len(a)} against {len(b)}, {args.subsets} subsets of {size})"
    return f"{text}\n{note(extractor.name, extractor.weights)}"


def prdc(args: argparse.Namespace) -> str:
    from segresearch.metrics.nonparametric import density_coverage, precision_recall

    a, b, extractor = both_features(args)
    near, dense = args.neighbour or 3, args.neighbour or 5
    values = (*precision_recall(a, b, near), *density_coverage(a, b, dense))
    names = ("precision", "recall", "density", "coverage")
    lines = [f"{name} {value:.3f}" for name, value in zip(names, values, strict=True)]
    lines.append(f"N = {len(a)} against {len(b)}, k = {near} and {dense}; compared at equal N alone, no error")
    return "\n".join([*lines, note(extractor.name, extractor.weights)])


def prompts_of(side: "Reference", args: argparse.Namespace) -> list[str]:
    """A prompt for each image, of the file B or of the images' records. ConfigError in one line."""
    from segresearch.config.expand import from_text
    from segresearch.records import read_record

    if args.b is not None:
        texts = list(from_text(Path(args.b), "PROMPTS"))
    elif side.files:
        texts = [str((read_record(path) or {}).get("prompt", "")) for path in side.files]
        if missing := [path for path, text in zip(side.files, texts, strict=True) if not text]:
            raise ConfigError(f"{missing[0]}: no prompt in a record; give a .txt file of prompts")
    else:
        raise ConfigError(f"{args.a}: no prompts; give a .txt file, a line an image")
    if len(texts) != len(side):
        raise ConfigError(f"{args.b}: {len(texts)} prompts for the {len(side)} images of {args.a}")
    return texts


def with_prompts(side: "Reference", texts: list[str], measure: Callable[[Any, list[str]], Any]) -> Any:
    """A number of each image, a batch at a time."""
    from segresearch.evaluation.reference_images import measured
    from segresearch.progress import Bar

    with Bar(len(side)) as bar:
        bar.describe(side.text)
        return measured(side, lambda batch, first: measure(batch, texts[first : first + len(batch)]), bar)


def clip(args: argparse.Namespace) -> str:
    from segresearch.config.build import usable_device
    from segresearch.metrics.text_alignment import CLIP, load_clip, text_alignment

    side = images(args.a)
    texts = prompts_of(side, args)
    network = load_clip(args.weights or CLIP, args.sha256, usable_device(args.device))
    cosines = with_prompts(side, texts, lambda batch, some: text_alignment(network, batch, some))
    return f"CLIP score {average(cosines)}\nby the network's own image processor; weights {network.weights[:12]}"


def score(args: argparse.Namespace) -> str:
    from segresearch.config.build import usable_device
    from segresearch.metrics.scores import load_scorer

    side = images(args.a)
    texts = [""] * len(side) if args.by == "aesthetic" else prompts_of(side, args)
    scorer = load_scorer(args.by, args.weights, args.beside, args.sha256, usable_device(args.device))
    values = with_prompts(side, texts, scorer.of)
    return f"{args.by} {average(values)}\n{note(args.by, scorer.weights)}"


def inception(args: argparse.Namespace) -> str:
    from segresearch.config.build import usable_device
    from segresearch.evaluation.aggregate import TENTHS, inception_numbers
    from segresearch.metrics.features import load_extractor

    side = images(args.a)
    if len(side) < TENTHS:
        raise ConfigError(f"{args.a}: {len(side)} images; the inception score needs {TENTHS}, and thousands to compare")
    extractor = load_extractor("inception", args.weights, args.sha256, usable_device(args.device))
    x = with_prompts(side, [""] * len(side), lambda batch, _: extractor.of(batch))
    assert extractor.classes is not None
    numbers = inception_numbers(x.numpy(), None, extractor.classes)
    (value, error), (spread,) = numbers["is-inception"], numbers["is_spread-inception"]
    text = f"IS {rounded(value, error)} (N = {len(side)}, {TENTHS} parts, whose standard deviation is {spread:.3g})"
    return f"{text}\n{note('inception', extractor.weights)}"


def lpips(args: argparse.Namespace) -> str:
    import torch

    from segresearch.config.build import usable_device

    a, b = images(args.a), images(args.b)
    names = [[str(path.relative_to(Path(side.text).expanduser())) for path in side.files] for side in (a, b)]
    if names[0] != names[1] or len(a) != len(b):
        only = sorted(set(names[0]) ^ set(names[1]))
        raise ConfigError(f"{args.a}, {args.b}: not the same names ({', '.join(only[:3]) or 'of scenes'})")
    distances, weights = perceptual(args, usable_device(args.device))
    values = []
    for (name, first), (_, second) in zip(a.batches(), b.batches()):
        try:
            values.append(distances(first, second))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return f"LPIPS-{args.net} {average(torch.cat(values))}\n{note(args.net, weights)}"


def perceptual(args: argparse.Namespace, device: Any) -> tuple[Callable[[Any, Any], Any], str]:
    """The distance of two batches of images pair by pair, and the weights that it is of."""
    if args.net == "mini":
        from segresearch.metrics.mini_vision import load_vision, perceptual_distances
        from segresearch.pretrained import frozen

        tower = frozen(load_vision(args.weights or "mini"), device)
        return lambda x, y: perceptual_distances(tower.vision, x, y).cpu(), "of mini"
    from segresearch.metrics.lpips import load_lpips, lpips_distances

    network = load_lpips(args.net, args.weights, None, (args.sha256, None), device)
    return lambda x, y: lpips_distances(network, x, y), "of the package lpips"


def average(values: Any) -> str:
    """The mean with its standard error, and N."""
    n = len(values)
    error = values.double().std().item() / math.sqrt(n) if n > 1 else None
    return f"{rounded(values.double().mean().item(), error, 4)} (N = {n})"


def note(network: str, weights: str) -> str:
    """What the numbers depend on beside the images."""
    return f"{RESIZING[network]}; network {network}, weights {weights[:12]}"


Call = Callable[[argparse.Namespace], str]
CALLS: dict[str, Call] = {
    "fid": fid, "kid": kid, "prdc": prdc, "clip": clip, "lpips": lpips, "is": inception, "score": score,
}  # fmt: skip
