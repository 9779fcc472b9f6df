"""The toy box's CLIP: its words, the sides of cameras, its training."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prd.cameras import orbit_cameras
from prd.evaluation.inputs import Item
from prd.evaluation.protocols import VIEW_WORDS
from prd.evaluation.run import EvaluationConfig, captions_outside, evaluate
from prd.evaluation.scorers import load_scorer
from prd.toybox.clip import TEXT_LENGTH, TEXTS, WORDS, make_clip, make_clip_tokenizer, view_words
from prd.toybox.data import ViewPool
from prd.toybox.world import COLORS, SHAPES, all_captions

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_toyclip.py"


def test_every_word_of_the_protocols_is_one_token_and_no_text_is_cut() -> None:
    tokenizer = make_clip_tokenizer()
    for word in (*WORDS, *COLORS, *SHAPES):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    longest = max(text.format(caption=c.text, view=VIEW_WORDS[1]) for c in all_captions() for text in TEXTS)
    assert len(tokenizer(longest).input_ids) <= TEXT_LENGTH


def test_sides_are_those_of_the_protocols() -> None:
    azimuth = torch.tensor([[10.0, 80.0, 170.0, 280.0], [-10.0, 130.0, 230.0, 320.0]])
    words = view_words(orbit_cameras(torch.full_like(azimuth, 15.0), azimuth, 2.4, 50.0))
    assert tuple(words[0]) == VIEW_WORDS == ("front", "left side", "back", "right side")
    assert words[1] == ["front", "left side", "right side", "front"]


def test_it_is_small() -> None:
    assert sum(p.numel() for p in make_clip(make_clip_tokenizer()).parameters()) < 1_000_000


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_captions_that_some_object_answers_both_of_agree(example: dict[str, Any]) -> None:
    captions, agree = example["agreement"]()

    def both(one: str, other: str) -> bool:
        return bool(agree[captions.index(one), captions.index(other)])

    assert both("a cube", "a red cube") and both("a red toy", "a cube") and both("a red cube", "a red cube")
    assert not both("a cube", "a red sphere") and not both("a red cube", "a red cone")
    assert not both("a red cube", "a red cube on a blue cube")
    closed = len(all_captions())
    torch.testing.assert_close(agree[:closed, :closed], torch.eye(closed).bool())


@pytest.mark.parametrize("asked", [0, 3])
def test_a_picture_is_told_from_other_captions_and_other_sides(example: dict[str, Any], asked: int) -> None:
    """`asked`: the wording, without and with the words of a view."""
    own, sides = ["a red cube", "a cube", "a red cube"], ["back", "front", "front"]
    candidates = example["Candidates"](10_000, TEXTS[asked : asked + 1])  # all captions
    texts, place, maybe = candidates.draw(own, sides, torch.Generator().manual_seed(0))
    assert len(texts) == len(set(texts)) == len(candidates.captions) * (4 if asked else 1)
    wanted = [TEXTS[asked].format(caption=caption, view=side) for caption, side in zip(own, sides, strict=True)]
    assert [texts[k] for k in place.tolist()] == wanted
    of_first = {texts[k] for k in maybe[0].nonzero()[:, 0].tolist()}
    assert wanted[0] in of_first and TEXTS[asked].format(caption="a cube", view="back") in of_first
    assert not any("front" in text or "sphere" in text for text in of_first)


def test_the_loss_counts_neither_what_may_be_right_nor_a_second_picture_of_a_text(example: dict[str, Any]) -> None:
    """Three pictures of two texts; the first text may be right of the third picture, too."""
    axes = torch.eye(3)
    images, words = axes[[0, 0, 1]], axes
    place, maybe = torch.tensor([0, 0, 1]), torch.eye(3).bool()[[0, 0, 1]]
    loss = example["contrastive_loss"]
    shared = math.log(2) / 4  # half of the loss is of texts, half of these have two pictures, which share it
    torch.testing.assert_close(loss(images, words, torch.tensor(5.0), place, maybe), torch.tensor(shared))
    near = images.clone()
    near[2] = torch.tensor([1.0, 1.0, 0.0]) / math.sqrt(2)
    allowed = maybe.clone()
    allowed[2, 0] = True
    wrong, right = (loss(near, words, torch.tensor(5.0), place, m) for m in (maybe, allowed))
    assert right < wrong


def test_it_trains_and_judges_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example for two steps; what it saves is a CLIP that `prd evaluate --clip FOLDER` reads."""
    words = ["train_toyclip.py", "--assets", str(tmp_path), "--steps", "2", "--sets", "1"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr("prd.toybox.data.ViewPool.__init__", few_shapes(ViewPool.__init__))
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (tmp_path / "log_clip.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1 and rows[0]["step"] == 2 and math.isfinite(rows[0]["loss"])
    assert 0 <= rows[0]["r_at_1"] <= 1 and 0 <= rows[0]["side"] <= 1
    scorer = load_scorer(str(tmp_path / "clip"))
    assert scorer.size == 32 and scorer.mean == (0.5, 0.5, 0.5)
    scores = scorer.score([np.full((40, 30, 3), 128, np.uint8)] * 2, ["a red cube", "front view of a red cube", "x"])
    assert scores.shape == (2, 3) and (np.abs(scores) <= 1.001).all()


def test_the_shipped_one_finds_the_captions_of_exact_pictures() -> None:
    """Measured in training: .80 of views from anywhere, before any grey, among all captions."""
    generator = torch.Generator().manual_seed(7)
    forms: list[tuple] = [
        ("cube", 0),
        ("sphere", 0),
        ("wedge", 0),
        ("mug", 0),
        ("sphere", "cube"),
        ("cone", "cylinder"),
    ]
    batch = ViewPool(2, generator, forms).draw(24, generator, open_words=0.0)
    pictures = (batch.rgb.flatten(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    captions = [caption.text for caption in all_captions()]
    best = load_scorer("toybox").score(list(pictures), captions).argmax(axis=1)
    right = [captions[k] == batch.captions[n // 4] for n, k in enumerate(best)]
    assert np.mean(right) > 0.6


def test_captions_outside_of_its_world_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captions = ["a red cube", "a cube", "a shiny dragon", "a red cube on a blue cylinder"]
    assert captions_outside("toybox", captions) == ["a shiny dragon"]
    assert captions_outside(str(tmp_path), captions) == captions_outside(None, captions) == []
    picture = tmp_path / "dragon.png"
    Image.new("RGB", (512, 512), "white").save(picture)
    items = [Item("dragon.png", "a shiny dragon", pictures=(picture,) * 4)]
    report = evaluate(items, EvaluationConfig(protocol="prd-paper", output=tmp_path / "out", clip="toybox"))
    assert "1 given are none, as 'a shiny dragon'" in caplog.text
    assert report["summary"]["model"] == "the CLIP of toybox"


def few_shapes(make: Callable[..., None]) -> Callable[..., None]:
    """A pool of a shape and a stack: rendering all takes minutes."""

    def made(self: ViewPool, sets: int, generator: torch.Generator) -> None:
        make(self, sets, generator, [("cube", 0), ("mug", 0), ("mug", "cube")])

    return made
