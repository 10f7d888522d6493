"""Train mini's two text encoders as the text towers of small CLIPs, contrastively on (scene, caption).

    python -m experiments.mini.train_clip

Both text towers share one convolutional vision trunk, each with its own projection of it: a CLIPTextModel (64 wide,
with a projection that only this training uses) and a CLIPTextModelWithProjection (96 wide). Short captions ("a red
cube") often fit several images of a batch, so accuracy below 1 is not all error. Writes <out>/clip.pt (weights of
the text towers and, for image features, of the vision tower) and the retrieval accuracy on held-out scenes.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from experiments.mini.common import Plan, arguments, batch_indices, generator, load_state, save_state, train
from experiments.mini.encode import load_shards
from experiments.mini.render import SHARD, open_images, take
from experiments.mini.tokenizer import LENGTH, load_tokenizer, second, tokenize
from experiments.mini.train_vae import HELD_OUT
from segresearch.cli import one_line_errors
from segresearch.metrics.mini_vision import Vision
from segresearch.scenes.scenes import scenes

BEGIN_ID, END_ID = 719, 720  # of the built vocabulary, checked when training starts


def text_config(which: int, vocabulary: int = END_ID + 1) -> CLIPTextConfig:
    """Sizes of text encoder 0 (64 wide, quick_gelu) and 1 (96 wide, gelu, projected to 96), after SDXL's two."""
    width, heads, act = ((64, 4, "quick_gelu"), (96, 4, "gelu"))[which]
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=4, num_attention_heads=heads,
        max_position_embeddings=LENGTH, hidden_act=act, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=(vocabulary - 1, 0)[which],
    )  # fmt: skip


class TwoCLIPs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()
        self.text_encoder = CLIPTextModel(text_config(0))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(1))
        self.text_projection = nn.Linear(64, 64, bias=False)
        self.vision_projections = nn.ModuleList([nn.Linear(256, 64, bias=False), nn.Linear(256, 96, bias=False)])
        self.log_scale = nn.Parameter(torch.full((2,), math.log(14.0)))
        with torch.no_grad():  # transformers initializes with 0.02, which is too small for towers this narrow
            for encoder in (self.text_encoder, self.text_encoder_2):
                for name, p in encoder.named_parameters():
                    if p.ndim == 2 and "embedding" not in name:
                        p.normal_(std=(0.5 if "out_proj" in name or "fc2" in name else 1.0) / math.sqrt(p.shape[1]))
                    elif "embedding" in name:
                        p.normal_(std=0.1 if "token" in name else 0.05)

    def embed(self, images: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(image, text) unit embeddings of CLIP 0 and of CLIP 1; tokens by tokenizer 1, cut to any common length."""
        features = self.vision(images)
        texts = (
            self.text_projection(self.text_encoder(tokens).pooler_output),
            self.text_encoder_2(second(tokens, END_ID)).text_embeds,
        )
        pairs = zip(self.vision_projections, texts)
        return [(F.normalize(p(features).float(), dim=-1), F.normalize(t.float(), dim=-1)) for p, t in pairs]


def trim(tokens: Tensor) -> Tensor:
    """Cut the padding that all rows share. The encoders are causal, so padding cannot change the end token."""
    return tokens[:, : int((tokens != END_ID).sum(1).max()) + 1]


@torch.no_grad()
def measure(model: TwoCLIPs, tokenizer_folder: Path, count: int) -> dict[str, Any]:
    """Retrieval in groups of 64 held-out scenes: the fraction whose own caption (image) ranks first."""
    held = scenes(range(HELD_OUT, HELD_OUT + count))
    images = held.images.float() / 127.5 - 1
    tokens = tokenize(load_tokenizer(tokenizer_folder), held.captions)
    result = {}
    embedded = [model.embed(i, trim(t)) for i, t in zip(images.split(64), tokens.split(64))]
    for which in range(2):
        hits = []
        for group in embedded:
            logits = group[which][0] @ group[which][1].T
            target = torch.arange(len(logits))
            hits.append([(logits.argmax(d) == target).float().mean() for d in (1, 0)])
        result[f"clip{which + 1}_text_of_64"], result[f"clip{which + 1}_image_of_64"] = (
            torch.tensor(hits).mean(0).tolist()
        )
    return result


def finish(out: Path, weights: Mapping[str, Tensor], tokenizer_folder: Path, count: int) -> dict[str, Any]:
    model = TwoCLIPs().eval()
    model.load_state_dict(weights)
    measured = measure(model, tokenizer_folder, count)
    packed = {"weights": dict(weights), "measured": json.dumps(measured)}
    save_state(out / "clip.pt", packed)
    return measured


def load_clips(path: Path) -> tuple[TwoCLIPs, dict[str, Any]]:
    packed = load_state(path)
    model = TwoCLIPs().eval()
    model.load_state_dict(packed["weights"])
    return model, json.loads(packed["measured"])


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="folder of scenes/, tokens/, tokenizers/")
    parser.add_argument("--out", type=Path, default=Path("runs/mini/clip"))
    parser.add_argument("--weights", type=Path, help="a clip.pt to start from, instead of random weights")
    parser.add_argument("--images", type=int, default=16 * SHARD)
    args = arguments(parser, steps=1800, batch=128, peak=1.5e-3)
    tokenizer_folder = args.runs / "tokenizers" / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_folder)
    if (tokenizer.bos_token_id, tokenizer.eos_token_id) != (BEGIN_ID, END_ID):
        raise ValueError(
            f"{tokenizer_folder}: begin and end tokens {tokenizer.bos_token_id, tokenizer.eos_token_id} are not "
            f"{BEGIN_ID, END_ID}: the scenes' vocabulary has changed, set the two constants"
        )
    shards = open_images(args.runs / "scenes", args.images)
    tokens = load_shards(args.runs / "tokens", args.images, axis=1)
    torch.manual_seed(args.seed)
    model = load_clips(args.weights)[0] if args.weights else TwoCLIPs()
    model.to(args.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = batch_indices(args.images, args.batch, step, args.seed)
        variant = torch.randint(len(tokens), (args.batch,), generator=generator(args.seed, 103, step))
        ids = trim(tokens[variant, index].long())
        images, target = take(shards, index).to(args.device), torch.arange(args.batch, device=args.device)
        loss, logged = torch.zeros((), device=args.device), {}
        with torch.autocast(images.device.type, torch.bfloat16):
            pairs = model.embed(images, ids.to(args.device))
        for which, (image, text) in enumerate(pairs):
            logits = model.log_scale[which].clamp(max=math.log(100.0)).exp() * image @ text.T
            loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            logged[f"accuracy{which + 1}"] = (logits.argmax(1) == target).float().mean()
        return loss, logged

    plan = Plan.of(args, warmup=100, hold=0.2, decay=0.995, weight_decay=0.02, save_every=250)
    weights = train(args.out, model, loss_of, plan, {k: str(v) for k, v in vars(args).items()})
    print(json.dumps(finish(args.out, weights, tokenizer_folder, min(1024, args.images)), indent=1))


if __name__ == "__main__":
    main()
