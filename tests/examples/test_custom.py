"""Parts of one's own in `examples/`: each trains as a script does and by its import path, is checked and compared."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prd.cli import main
from prd.distillation.asd import AsdResult
from prd.errors import ConfigError
from prd.toybox.world import COLORS
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.compare import ROUNDING, relative_difference

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = [
    *("--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "1", "--optimizer.warmup_steps", "1"),
    *("--max_train_steps", "2", "--checkpointing_steps", "2", "--report_to", "null"),
    *("--renderers.volume.grid_resolution", "12", "--renderers.volume.num_samples", "8"),
    *("--renderers.volume.height", "16", "--renderers.volume.width", "16", "--renderer_schedule", "volume"),
    *("--teachers.stable_diffusion.enabled", "false", "--teachers.richdreamer.enabled", "false"),
    *("--validation.prompts", "[]", "--benchmark", "null"),
]
# of each example: words that name its part in a run, and the dotted key of its section
NAMED: dict[str, tuple[list[str], str]] = {
    "custom_teacher": (["--teachers.mine.class", "custom_teacher.ColourTeacher"], "teachers.mine"),
    "custom_generator": (["--model", "{class: custom_generator.FilmModel, width: 16}"], "model"),
    "custom_renderer": (
        [
            "--renderers.soft",
            "{class: custom_renderer.SilhouetteRenderer, height: 16, width: 16}",
            *("--renderer_schedule", "soft"),
        ],
        "renderers.soft",
    ),
    "custom_loss": (["--distillation", "{class: custom_loss.RegressionLoss, delta: 0.5}"], "distillation"),
    "custom_world": (["--prompts.source", "custom_world.BallsAndBoxes", "--prompts.held_out", "[]"], "prompts"),
}
# of each with settings: a wrong value and what is said of it, and another right one with what a resumed run says
SETTINGS = {
    "custom_teacher": ("spread", "-1", "teachers.mine.spread=-1: .*greater than 0", "0.7", "0.3 -> 0.7"),
    "custom_generator": ("width", "0", "model.width=0: .*greater than or equal to 1", "8", "16 -> 8"),
    "custom_renderer": ("num_samples", "1", "renderers.soft.num_samples=1: .*greater than or equal", "9", "32 -> 9"),
    "custom_loss": ("delta", "soft", "distillation.delta='soft': .*number", "2", "0.5 -> 2.0"),
}
each = pytest.mark.parametrize("name", NAMED)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `PYTHONPATH=examples` does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def stored(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def check(name: str, folder: Path) -> None:
    """The part took part in both steps of a run."""
    first, second = rows(folder)
    assert first["skipped"] == second["skipped"] == 0 and second["gradient_norm"] > 0
    if name == "custom_teacher":
        assert first["gradient_norm/colour/volume"] > 0
    if name == "custom_renderer":
        assert first["gradient_norm/mvdream/soft"] > 0 and 0 < first["opacity"] < 1
        assert not [key for key in first if key.endswith("/volume")]
    if name == "custom_generator":
        record = json.loads((folder / "generator" / "config.json").read_text(encoding="utf-8"))
        assert record["_class_name"] == "FiLM"


@each
def test_it_trains_as_a_script(name: str, toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python examples/NAME.py`: through `Trainer(config, parts)`."""
    words = [word for word in SMALL if name != "custom_renderer" or word not in ("--renderer_schedule", "volume")]
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [name, *words, "--output_dir", str(folder)])
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert names["config"].output_dir == str(folder)
    check(name, folder)


@each
def test_it_trains_by_its_import_path(
    name: str, toybox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`PYTHONPATH=examples prd train ...`; its settings are stored, and the run goes on from them."""
    words, section = NAMED[name]
    run = [*SMALL, *words, "--output_dir", str(tmp_path / "run")]
    assert main(["train", *run]) == 0, capsys.readouterr().err
    check(name, tmp_path / "run")
    kept: Any = stored(tmp_path / "run")
    for part in section.split("."):
        kept = kept[part]
    if name == "custom_world":
        assert kept["source"] == "custom_world.BallsAndBoxes"
        return
    assert kept["class"].startswith(f"{name}.")
    setting, wrong, message, other, change = SETTINGS[name]
    assert setting in kept
    assert load_config(tmp_path / "run" / "config.yaml") == replace(load_config("toybox", run), schedule_steps=2)

    with pytest.raises(ConfigError, match=message):
        load_config("toybox", [*run, f"--{section}.{setting}", wrong])
    resumed = [*run, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    with pytest.raises(ConfigError, match=rf"{section}\.{setting}: {change}"):
        Trainer(load_config("toybox", [*resumed, f"--{section}.{setting}", other]))


def test_a_recipe_names_them_all(toybox: Path, tmp_path: Path) -> None:
    """As YAML, together."""
    path = tmp_path / "own.yaml"
    path.write_text(
        "extends: toybox\n"
        "model: {class: custom_generator.FilmModel, width: 16, depth: 2}\n"
        "teachers: {mine: {class: custom_teacher.ColourTeacher, spread: 0.2, weight: 0.5, guidance_scale: 2}}\n"
        "renderers: {soft: {class: custom_renderer.SilhouetteRenderer, height: 16, width: 16, sharpness: [10, 40]}}\n"
        "renderer_schedule: alternate\n"
        "distillation: {class: custom_loss.RegressionLoss, delta: 0.5}\n",
        encoding="utf-8",
    )
    words = [word for word in SMALL if word not in ("--renderer_schedule", "volume")]
    words += ["--renderers.surface.height", "16", "--renderers.surface.width", "16"]
    config = load_config(path, [*words, "--output_dir", str(tmp_path / "run")])
    trainer = Trainer(config)
    kinds = {name: type(part).__name__ for name, part in (trainer.parts.teachers | trainer.parts.renderers).items()}
    assert kinds["mine"] == "ColourTeacher" and kinds["soft"] == "SilhouetteRenderer"
    assert type(trainer.model).__name__ == "FilmModel" and type(trainer.parts.loss).__name__ == "RegressionLoss"
    found = trainer.objective.renderer_names
    step = found.index("soft")  # one renderer per step, in turn
    row = trainer.train_step(step)
    assert row["gradient_norm/colour/soft"] > 0 and row["gradient_norm/mvdream/soft"] > 0


def test_a_prompt_that_names_no_colour_is_refused(toybox: Path, tmp_path: Path) -> None:
    from examples.custom_teacher import ColourTeacher
    from tests.teachers.tiny import random_views

    with pytest.raises(ValueError, match="prompt='a dragon': names no colour; name one of red, "):
        ColourTeacher().condition(["a red cube", "a dragon"], random_views(2, 1).cameras)


def test_the_loss_pulls_towards_the_estimate_of_the_teacher() -> None:
    """Its gradient is the one that it reports, bounded, and smaller the nearer the picture is to what is asked for."""
    from examples.custom_loss import RegressionConfig, RegressionLoss
    from examples.custom_teacher import ColourTeacher, ColourTeacherConfig
    from tests.teachers.tiny import random_views

    teacher, loss, prompts = ColourTeacher(spread=0.05), RegressionLoss(), ["a red cube", "a blue cone"]
    given: dict[str, Any] = {
        "settings": ColourTeacherConfig(guidance_scale=1.0),
        "config": RegressionConfig(t_min=500, delta=0.4),
    }
    views = random_views(2, 4)

    def ask(rgb: torch.Tensor) -> tuple[AsdResult, torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        leaf = rgb.detach().requires_grad_()
        result = loss(teacher, replace(views, rgb=leaf), prompts, generator=generators, **given)
        result.loss.sum().backward()
        assert leaf.grad is not None
        return result, leaf.grad

    result, gradient = ask(views.rgb)
    assert result.loss.shape == (2,) and result.weight.shape == (2,) and result.gradient.shape == (2, 3, 8, 8)
    assert float(result.gradient.abs().max()) < 0.4001 and relative_difference(ask(views.rgb)[1], gradient) <= ROUNDING
    seen = gradient.abs().flatten(2).amax(2) > 0
    assert seen.sum(1).tolist() == [1, 1]  # one view of each prompt
    pooled = (
        gradient[seen].unflatten(1, (8, 2)).unflatten(3, (8, 2)).sum(dim=(2, 4))
    )  # of 2 x 2 pixels: d loss / d x * 2
    torch.testing.assert_close(pooled.permute(0, 3, 1, 2), 2 * result.gradient)
    right = torch.tensor([COLORS["red"], COLORS["blue"]])[:, None, None, None].expand_as(views.rgb)
    assert bool((ask(right)[0].loss < 0.01 * result.loss).all())
    with pytest.raises(ValueError, match="eta=0.1: must be 0"):
        given["settings"] = ColourTeacherConfig(eta=0.1)
        ask(views.rgb)


@each
def test_it_is_short_and_says_how_it_is_run(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80 and f"python examples/{name}.py" in text


@pytest.mark.slow
def test_the_command_line_of_a_docstring_runs(tmp_path: Path) -> None:
    """Once in a process of its own, on the trained toy box."""
    words = [sys.executable, str(EXAMPLES / "custom_teacher.py"), *SMALL, "--output_dir", str(tmp_path / "run")]
    subprocess.run(words, check=True, timeout=600)
    check("custom_teacher", tmp_path / "run")
