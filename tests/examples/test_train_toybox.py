"""Training the toy box's models: stopped and resumed it ends like an uninterrupted run, to the bit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples import train_toybox
from prd.loading.stable_diffusion import load_base
from prd.toybox.data import ViewPool
from prd.toybox.splits import held_out_rules

SMALL = ["--sets", "1", "--steps_scale", "0.001"]  # four steps of the autoencoder and of the Stable Diffusion


@pytest.fixture(scope="module")
def pool() -> ViewPool:
    return ViewPool(1, torch.Generator().manual_seed(0), [("cube", 0), ("mug", 0), ("cone", "cube")])


@pytest.fixture(autouse=True)
def finished(pool: ViewPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Tensor]]]:
    """The weights of each stage that came to its end; three shapes and no samples make a stage short."""
    found: dict[str, list[Tensor]] = {}
    finish = train_toybox.Run.finish

    def remembered(run: train_toybox.Run) -> None:
        finish(run)
        found[run.name] = [p.detach().clone() for p in run.parameters]

    monkeypatch.setattr(train_toybox.Run, "finish", remembered)
    monkeypatch.setattr(train_toybox, "ViewPool", lambda sets, generator: pool)
    monkeypatch.setattr(train_toybox, "sample", lambda *networks, size, seed: torch.zeros(8, 4, size, size))
    yield found


@pytest.fixture
def tiny_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage "vae" that costs nothing."""

    def train(args: argparse.Namespace) -> None:
        layer = nn.Linear(2, 2)
        run = train_toybox.Run("vae", [layer], args, lr=1e-3)
        for step in run.each_step():
            run.draw(1)
            run.update(step, layer(torch.rand(1, 2, generator=run.generator)).square().mean())
        run.finish()

    monkeypatch.setitem(train_toybox.TRAINERS, "vae", train)


def train(assets: Path, *words: str, stop: int | None = None) -> None:
    """Train from the command line; stop after so many steps of this call."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            left, update = [stop], train_toybox.Run.update

            def interrupted(run: train_toybox.Run, step: int, loss: Tensor) -> None:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                update(run, step, loss)

            patch.setattr(train_toybox.Run, "update", interrupted)
        train_toybox.main(["--assets", str(assets), *SMALL, *words])


def log(assets: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's log without the seconds."""
    lines = (assets / f"log_{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path: Path, finished: dict[str, list[Tensor]]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stages = ["--stages", "vae", "stable_diffusion", "--save_minutes", "0"]
    train(whole, *stages)
    expected = dict(finished)
    finished.clear()
    for words, stop in (([], 2), (["--resume"], 3), (["--resume"], 1)):  # in the middle of each of the stages
        with pytest.raises(KeyboardInterrupt):
            train(parts, *stages, *words, stop=stop)
        torch.manual_seed(99)  # what lies in between
    train(parts, *stages, "--resume")
    for stage, weights in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, finished[stage], strict=True)), stage
        assert log(whole, stage) == log(parts, stage) and log(whole, stage)[-1] == {"done": True}
    for path in whole.rglob("*.safetensors"):
        assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()
    assert not list(tmp_path.rglob("unfinished*"))


@pytest.mark.usefixtures("tiny_stage")
def test_what_is_done_is_left_out_and_what_was_stopped_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--stages", "vae", "--save_minutes", "0"]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *words, stop=2)
    assert [path.name for path in (tmp_path / "unfinished_vae").iterdir()] == ["checkpoint-2"]
    with pytest.raises(SystemExit, match="vae was stopped in the middle; give --resume to go on, or remove the folder"):
        train(tmp_path, *words)
    for other in (["--held_out", "fifth"], ["--seed", "1"], ["--batch_scale", "2"], ["--steps_scale", "0.002"]):
        with pytest.raises(SystemExit, match="vae was begun with .*; give the same"):
            train(tmp_path, *words, "--resume", *other)
    train(tmp_path, *words, "--resume")
    before = (tmp_path / "log_vae.jsonl").read_bytes()
    train(tmp_path, *words, "--resume")
    assert "vae: is done" in capsys.readouterr().out and (tmp_path / "log_vae.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match="vae was begun with"):
        train(tmp_path, *words, "--resume", "--seed", "1")
    train(tmp_path, *words, "--seed", "1")  # anew
    assert log(tmp_path, "vae")[0]["seed"] == 1


@pytest.mark.usefixtures("tiny_stage")
def test_nothing_is_saved_before_its_time(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--stages", "vae", stop=3)
    assert not (tmp_path / "unfinished_vae").exists()
    train(tmp_path, "--stages", "vae", "--resume")  # from the start
    assert [row.get("step") for row in log(tmp_path, "vae")] == [0, 4, None]


@pytest.mark.usefixtures("tiny_stage")
def test_a_rule_holds_its_captions_out_and_the_log_says_so(
    tmp_path: Path, pool: ViewPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[frozenset[str]] = []
    draw = pool.draw

    def watched(*words: Any, exclude: frozenset[str] = frozenset(), **options: Any) -> Any:
        asked.append(exclude)
        return draw(*words, exclude=exclude, **options)

    monkeypatch.setattr(pool, "draw", watched)
    train(tmp_path, "--stages", "vae", "--held_out", "fifth")
    assert set(asked) == {frozenset(held_out_rules()["fifth"])}
    first = log(tmp_path, "vae")[0]
    assert first == {"step": 0, "held_out": "fifth", "seed": 0, "sets": 1, "batch_scale": 1, "steps_scale": 0.001}
    asked.clear()
    train(tmp_path, "--stages", "vae")
    assert set(asked) == {frozenset()} and log(tmp_path, "vae")[0]["held_out"] is None


@pytest.mark.slow
def test_other_bases_are_trained_into_folders_that_open_as_bases(tmp_path: Path) -> None:
    """Two steps each; Stable Diffusion 3 has its own autoencoder, the others the Stable Diffusion's."""
    train(tmp_path, "--stages", "vae", "sdxl", "pixart", "vae16", "sd3")
    for name, channels in (("sdxl", 4), ("pixart", 4), ("sd3", 16)):
        base = load_base(tmp_path / name)
        assert base.vae.config["latent_channels"] == channels and base.encoder is not None
        assert base.encoder(["a red cube"]).isfinite().all() and (tmp_path / f"{name}.png").is_file()
        assert log(tmp_path, name)[-1] == {"done": True}
