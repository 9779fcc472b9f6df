"""Train a CLIP of the toy box from scratch on its exact renderings, to judge pictures of its captions by.

    python examples/train_toyclip.py --assets CLIP            # into CLIP/clip: an hour on one core
    prd evaluate FOLDER --protocol views --clip CLIP/clip -o out

It reads captions of the world, alone or in the words of the protocols ("A photo depicts a red cube", "left side view of
a green mug"), and sees objects before backgrounds from black to white, larger and smaller than the teachers see them.
Of the four views of an object each has its own text where the words of the view are in it: sides are told apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from prd.toybox.clip import TEXT_LENGTH, TEXTS, make_clip, make_clip_tokenizer, view_words
from prd.toybox.data import BACKGROUND, ViewPool, ViewSets
from prd.toybox.world import all_captions

HELD_OUT_SEED = 1000  # of the cameras that are measured with


def augmented(rgb: Tensor, disparity: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n, 3, H, W] before another grey each, larger or smaller and moved a little."""
    count = len(rgb)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=generator, dtype=torch.float32, device=generator.device)
        return low + (high - low) * drawn

    grey = uniform(0, 1, 1, 1, 1)
    grey = torch.where(uniform(0, 1, 1, 1, 1) < 0.4, torch.ones_like(grey), grey)  # the protocols draw on white
    shown = rgb + (disparity <= 0) * (grey - BACKGROUND)
    scale, shift = uniform(0.9, 1.4), uniform(-0.08, 0.08, 2)
    theta = torch.zeros(count, 2, 3, dtype=torch.float32, device=rgb.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(rgb.shape), align_corners=False)
    return F.grid_sample(shown - grey, grid, align_corners=False) + grey  # outside is the grey


def texts_of(batch: ViewSets, generator: torch.Generator) -> list[str]:
    """A text for each of the four views of each object, in words drawn for the object."""
    words = view_words(batch.cameras)
    found = []
    for caption, own in zip(batch.captions, words, strict=True):
        template = TEXTS[int(torch.randint(len(TEXTS), (), generator=generator))]
        found += [template.format(caption=caption, view=view) for view in own]
    return found


def features(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit features [n, D] of pictures in [0, 1] and of texts."""
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    out: Any = model(pixel_values=(pictures - 0.5) / 0.5, **ids)
    return out.image_embeds, out.text_embeds


def contrastive_loss(images: Tensor, words: Tensor, scale: Tensor, texts: list[str]) -> Tensor:
    """CLIP's loss of n pairs, in which equal texts are all right."""
    same = torch.tensor([[a == b for b in texts] for a in texts], device=images.device)
    target = same / same.sum(1, keepdim=True)
    logits = scale.exp() * images @ words.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def measure(model: CLIPModel, tokenizer: CLIPTokenizer, pool: ViewPool, seed: int) -> dict[str, float]:
    """R@1 among all closed captions, and how often a view of its own caption's four view texts is the right one."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    batch = pool.draw(128, generator, open_words=0.0)
    pictures = augmented(batch.rgb.flatten(0, 1), batch.disparity.flatten(0, 1), generator)
    captions = [caption.text for caption in all_captions()]
    images, words = features(model, tokenizer, pictures, captions)
    best = (images @ words.T).argmax(1).view(-1, 4)
    right = [[captions[i] == caption for i in row] for caption, row in zip(batch.captions, best.tolist(), strict=True)]
    views = view_words(batch.cameras)
    texts = [f"{view} view of {caption}" for caption, own in zip(batch.captions, views, strict=True) for view in own]
    _, asked = features(model, tokenizer, pictures, texts)
    sided = torch.einsum("nvd,nwd->nvw", images.view(-1, 4, images.shape[1]), asked.view(-1, 4, asked.shape[1]))
    side = (sided.argmax(2) == torch.arange(4)).float().mean()
    return {"r_at_1": round(torch.tensor(right).float().mean().item(), 4), "side": round(side.item(), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--assets", type=Path, default=Path("runs/toyclip"), help="folder that receives clip/ and its log"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", type=int, default=48, help="four-view sets rendered of every shape and stack")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pool, tokenizer = ViewPool(args.sets, generator), make_clip_tokenizer()
    model = make_clip(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps, pct_start=0.1)
    args.assets.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with (args.assets / "log_clip.jsonl").open("w", encoding="utf-8") as log:
        for step in tqdm(range(args.steps), mininterval=5):
            batch = pool.draw(24, generator, open_words=0.1)
            texts = texts_of(batch, generator)
            pictures = augmented(batch.rgb.flatten(0, 1), batch.disparity.flatten(0, 1), generator)
            loss = contrastive_loss(*features(model, tokenizer, pictures, texts), model.logit_scale, texts)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 99 or step + 1 == args.steps:
                row = {"seconds": round(time.time() - begun, 1), "step": step + 1, "loss": round(loss.item(), 4)}
                print(json.dumps(row), file=log, flush=True)
        held_out = ViewPool(4, torch.Generator().manual_seed(args.seed + HELD_OUT_SEED))
        measured = measure(model, tokenizer, held_out, args.seed)
        print(json.dumps(measured), file=log)
    print(measured)
    model.half().save_pretrained(args.assets / "clip")
    tokenizer.save_pretrained(args.assets / "clip")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": model.config.vision_config.image_size}
    (args.assets / "clip" / "preprocessor_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
