"""docs/extend.md quotes the examples as they are, and its recipes load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from prd.distillation.regularizers import regularize
from prd.rendering.protocol import Rendered
from prd.training.parts import build_regularizers
from prd.training.recipes import load_config
from tests.teachers.tiny import random_views

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


def test_quoted_code_is_that_of_the_examples() -> None:
    quoted = [block.split("\n", 1) for block in blocks("python") if block.startswith("# examples/")]
    assert len(quoted) == 8
    for first, code in quoted:
        source = (ROOT / first.removeprefix("# ")).read_text(encoding="utf-8")
        assert code in source, f"{first}:\n{code}"


def test_its_recipes_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (losses,) = [block for block in blocks("python") if block.startswith("# my_losses.py")]
    (tmp_path / "my_losses.py").write_text(losses, encoding="utf-8")
    recipes = blocks("yaml")
    assert len(recipes) == 3
    for i, recipe in enumerate(recipes):
        path = tmp_path / f"{i}.yaml"
        path.write_text(recipe, encoding="utf-8")
        config = load_config(path)
        if "regularizers:" in recipe:
            views = random_views(1, 4)
            own = build_regularizers(config, [config])
            chosen = {name: (own[name], 1.0) for name in ("dark", "coverage")}
            _, values = regularize(Rendered(views), chosen)
            assert set(values) == {"dark"}  # `Coverage` asks for what only volumes have
            torch.testing.assert_close(values["dark"], views.rgb.mean())
            assert own["coverage"](Rendered(views)) == pytest.approx(float(views.opacity.mean() - 0.2) ** 2)


def test_every_part_has_its_section_and_its_protocol_is_where_it_says() -> None:
    for part in ("teacher", "model", "renderer", "loss", "regulariser", "world"):
        assert f"\n## A {part}\n" in PAGE
    for path, name in re.findall(r"`(prd/[\w/]+\.py)`: `(\w+)`", PAGE):
        assert f"\nclass {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
    for path in re.findall(r"`((?:prd|examples)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
