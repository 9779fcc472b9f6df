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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from prd.evaluation.protocols import VIEW_WORDS
from prd.toybox.clip import TEXT_LENGTH, TEXTS, make_clip, make_clip_tokenizer, view_words
from prd.toybox.data import BACKGROUND, ViewPool, ViewSets
from prd.toybox.world import all_captions, open_captions

HELD_OUT_SEED = 1000  # of the cameras that are measured with
BATCH, CANDIDATES = 96, 512  # pictures of a step, and about how many texts they are told apart by


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


def agreement() -> tuple[list[str], Tensor]:
    """Return all captions, closed and open, and which of them [C, C] some object answers both of."""
    captions = [*all_captions(), *open_captions()]
    columns = {caption.text: i for i, caption in enumerate(all_captions())}
    answers = torch.zeros(len(captions), len(columns), dtype=torch.float32, device="cpu")
    for row, caption in enumerate(captions):
        answers[row, [columns[member.text] for member, _ in caption.members]] = 1
    return [caption.text for caption in captions], answers @ answers.T > 0


class Candidates:
    """The texts that the pictures of a step are told apart by: of many captions, in one wording."""

    def __init__(self, count: int, wordings: Sequence[str] = TEXTS) -> None:
        self.count, self.wordings = count, wordings
        self.captions, self.agree = agreement()
        self.rows = {caption: i for i, caption in enumerate(self.captions)}

    def draw(self, own: list[str], sides: list[str], generator: torch.Generator) -> tuple[list[str], Tensor, Tensor]:
        """Return n texts, the text [B] of each picture, and which texts [B, n] are right or may be.

        own    caption of each picture
        sides  words of the side that each of them shows

        With the words of a view in them there are four texts of each caption, else one. A picture of "a cube" may show
        a red one: "a red cube" is neither right nor wrong.
        """
        template = self.wordings[int(torch.randint(len(self.wordings), (), generator=generator))]
        views = VIEW_WORDS if "{view}" in template else ("",)
        side = torch.tensor([views.index(word) if len(views) > 1 else 0 for word in sides], device="cpu")
        asked = torch.tensor([self.rows[caption] for caption in own], device="cpu")
        others = torch.randperm(len(self.captions), generator=generator)[: self.count // len(views)]
        rows = torch.cat([asked, others]).unique()
        texts = [template.format(caption=self.captions[i], view=view) for i in rows.tolist() for view in views]
        place = torch.searchsorted(rows, asked) * len(views) + side
        maybe = self.agree[asked][:, rows, None] & F.one_hot(side, len(views)).bool()[:, None]
        return texts, place, maybe.flatten(1)


def pictures_of(batch: ViewSets, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Return one view [B, 3, H, W] of each object, before a background of its own, and the words of its side."""
    count = len(batch.captions)
    chosen = torch.randint(4, (count,), generator=generator)
    rows = torch.arange(count, device="cpu")
    pictures = augmented(batch.rgb[rows, chosen], batch.disparity[rows, chosen], generator)
    return pictures, [row[view] for row, view in zip(view_words(batch.cameras), chosen.tolist(), strict=True)]


def features(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit features [n, D] of pictures in [0, 1] and of texts."""
    ids = tokenizer(texts, padding="longest", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    out: Any = model(pixel_values=(pictures - 0.5) / 0.5, **ids)
    return out.image_embeds, out.text_embeds


def contrastive_loss(images: Tensor, words: Tensor, scale: Tensor, place: Tensor, maybe: Tensor) -> Tensor:
    """CLIP's loss of pictures [m, D] and texts [n, D]: a picture finds its text, a text the pictures that it is of."""
    logits = scale.exp() * images @ words.T
    right = F.one_hot(place, len(words)).bool()
    logits = logits.masked_fill(maybe & ~right, -torch.inf)
    asked = right.any(0)
    shares = right[:, asked] / right[:, asked].sum(0)
    found = logits[:, asked].log_softmax(0).masked_fill(shares == 0, 0)
    return (F.cross_entropy(logits, place) - (shares * found).sum(0).mean()) / 2


@torch.no_grad()
def measure(model: CLIPModel, tokenizer: CLIPTokenizer, pool: ViewPool, seed: int) -> dict[str, float]:
    """R@1 among all closed captions, and how often a view of its own caption's four view texts is the right one."""
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
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", type=int, default=48, help="four-view sets rendered of every shape and stack")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: must be at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pool, tokenizer = ViewPool(args.sets, generator), make_clip_tokenizer()
    held_out = ViewPool(4, torch.Generator().manual_seed(args.seed + HELD_OUT_SEED))
    model, candidates = make_clip(tokenizer), Candidates(CANDIDATES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps, pct_start=0.1)
    args.assets.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with (args.assets / "log_clip.jsonl").open("w", encoding="utf-8") as log:
        for step in tqdm(range(args.steps), mininterval=5):
            batch = pool.draw(BATCH, generator, open_words=0.1)
            pictures, sides = pictures_of(batch, generator)
            texts, place, maybe = candidates.draw(batch.captions, sides, generator)
            found = features(model, tokenizer, pictures, texts)
            loss = contrastive_loss(*found, model.logit_scale, place, maybe)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 99 or step + 1 == args.steps:
                row = {"seconds": round(time.time() - begun, 1), "step": step + 1, "loss": round(loss.item(), 4)}
                if step % 500 == 499 or step + 1 == args.steps:
                    row |= measure(model, tokenizer, held_out, args.seed)
                print(json.dumps(row), file=log, flush=True)
    print(row)
    model.half().save_pretrained(args.assets / "clip")
    tokenizer.save_pretrained(args.assets / "clip")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": model.config.vision_config.image_size}
    (args.assets / "clip" / "preprocessor_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
