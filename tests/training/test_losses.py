"""The losses of docs/teachers.md through the trainer: few steps of each command line on the toy box's random models."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prd.distillation.asd import AsdResult, NonFinitePrediction
from prd.distillation.distill import AsdLoss
from prd.errors import ConfigError
from prd.training.parts import Parts, build_parts
from prd.training.recipes import load_config
from prd.training.run.checkpoints import CheckpointError
from prd.training.trainer import Trainer
from tests.conftest import use_assets
from tests.training.own_parts import Half
from tests.training.test_trainer import SMALL

ROOT = Path(__file__).parents[2]
TEACHERS = ("stable_diffusion", "mvdream", "richdreamer")
IMAGES = {"stable_diffusion": 2, "mvdream": 8, "richdreamer": 8}  # of a step: K = 2 estimates of one prompt
VSD = ("--distillation.reference", "fake", "--distillation.weighting", "sds")
# each by its name on the page: passes of the teachers and of the fake scores, per image
LOSSES = {
    "SDS": (2, 0),
    "CSD": (2, 0),
    "ASD, eta 0": (2, 0),
    "ASD, eta 0.1": (3, 0),
    "ASD, eta 0.3": (3, 0),
    "SDS-Bridge": (3, 0),
    "SDI": (2 + 2 * 10, 0),
    "VSD": (2, 1 + 3),
    "DMD": (2, 1 + 3),
}


def documented() -> dict[str, list[str]]:
    """The words of each command line of the page by the name behind it."""
    page = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    return {name: shlex.split(words) for words, name in re.findall(r"^prd train (.+?)\s+# (.+)$", page, flags=re.M)}


Make = Callable[..., Trainer]


@pytest.fixture(scope="module")
def make(random_toybox: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """A trainer of some words on one set of parts, the model as it was at first."""
    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, random_toybox)
        parts = build_parts(load_config("toybox", SMALL))
        start = {name: tensor.clone() for name, tensor in parts.model.trained_state_dict().items()}
        folder = str(tmp_path_factory.mktemp("run"))

        def made(*words: str, **changes: Any) -> Trainer:
            parts.model.load_trained_state_dict(start)
            config = load_config("toybox", [*SMALL, "--output_dir", folder, *words])
            return Trainer(config, Parts(**{**vars(parts), **changes}))

        yield made


def steps(trainer: Trainer, *which: int) -> list[dict[str, float]]:
    rows = [trainer.train_step(step) for step in which]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def fake_weights(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.fakes is not None
    return {name: tensor.detach().clone() for name, tensor in trainer.fakes.state_dict().items()}


def test_the_page_has_a_command_line_of_each_loss() -> None:
    assert documented().keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_page_trains(name: str, make: Make) -> None:
    trainer = make(*documented()[name])
    before = [p.detach().clone() for p in trainer.parameters]
    frozen = {k: v.clone() for k, v in trainer.parts.teachers["mvdream"].state_dict().items()}  # type: ignore[attr-defined]
    rows = steps(trainer, 0, 1)
    assert all(row["skipped"] == 0 and row["gradient_norm"] > 0 for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    each, fake = LOSSES[name]
    for row in rows:
        for teacher in TEACHERS:
            assert row[f"passes/{teacher}"] == each * IMAGES[teacher]
            assert row.get(f"passes/{teacher}_fake", 0) == fake * IMAGES[teacher]
            assert (f"fake_loss/{teacher}" in row) == (fake > 0)
            assert row[f"gradient_norm/{teacher}/volume"] > 0
    assert [row["teacher_passes"] for row in rows] == [(each + fake) * 18, (each + fake) * 36]
    after = trainer.parts.teachers["mvdream"].state_dict()  # type: ignore[attr-defined]
    assert frozen.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in frozen.items())
    if fake:
        assert trainer.fakes is not None
        factors = [p for name, p in fake_weights(trainer).items() if "lora_B" in name]
        assert len(factors) > 20 and all(bool(p.any()) and bool(p.isfinite().all()) for p in factors)
        assert not [score.seen for score in trainer.fakes.scores.values() if score.seen]


def test_what_is_not_asked_for_changes_nothing(make: Make) -> None:
    """Settings of fake scores and of the inversion, without a loss that has them: no network, no draw, no number."""
    idle = ["--distillation.fake.rank", "3", "--distillation.fake.lr", "0.1", "--distillation.fake.updates_per_step"]
    idle += ["2", "--distillation.fake.teachers", "[mvdream]", "--distillation.inversion_steps", "3"]
    trainers = make(), make(*idle)
    assert [trainer.fakes for trainer in trainers] == [None, None]
    assert steps(make(), 0, 1) == steps(make(*idle), 0, 1)


def test_the_draws_of_the_student_are_those_without_a_fake_score(make: Make) -> None:
    """At first a fake score is its teacher: VSD then is CSD, at the same timesteps and noises."""
    csd, vsd = (steps(make(*words), 0)[0] for words in (documented()["CSD"], VSD))
    for name in csd:
        if name.startswith(("gradient_norm/", "weight/", "distillation/")):
            assert vsd[name] == pytest.approx(csd[name], rel=1e-3), name


def test_a_resumed_run_equals_an_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    options = [*VSD, "--distillation.fake.updates_per_step", "2", "--distillation.fake.lr", "[0.01, 0.001]"]
    options += ["--schedule_steps", "3", "--distillation.fake.teachers", "[mvdream, stable_diffusion]"]
    options += ["--checkpointing_steps", "2"]
    whole = make(*options, "--output_dir", str(tmp_path / "whole"))
    expected = steps(whole, 0, 1, 2)
    student, fake = [p.detach().clone() for p in whole.parameters], fake_weights(whole)
    assert {name.partition(".")[0] for name in fake} == {"mvdream", "stable_diffusion"}

    first = make(*options, "--output_dir", str(tmp_path / "parts"))
    steps(first, 0, 1)
    saved = first.save(2)
    assert load_file(saved / "adapter.safetensors").keys() == first.model.trained_state_dict().keys()
    assert load_file(saved / "fake.safetensors").keys() == fake.keys()
    second = make(*options, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "latest")
    assert second.resume() == 2
    assert steps(second, 2) == expected[2:]
    assert all(torch.equal(a, b) for a, b in zip(student, second.parameters, strict=True))
    assert fake.keys() == fake_weights(second).keys()
    assert all(torch.equal(tensor, fake_weights(second)[name]) for name, tensor in fake.items())

    other = ["--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "latest", "--allow_config_change"]
    with pytest.raises(CheckpointError, match="fake scores are of other teachers or of another rank"):
        make(*options, *other, "--distillation.fake.rank", "3").resume()


def test_a_checkpoint_without_fake_scores_is_refused_by_a_run_with_them(make: Make, tmp_path: Path) -> None:
    make("--output_dir", str(tmp_path)).save(1)
    again = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest", "--allow_config_change"]
    with pytest.raises(CheckpointError, match="holds no fake scores"):
        make(*again, *VSD).resume()
    assert make(*again, *documented()["SDI"]).resume() == 1


def test_the_saved_adapter_is_the_students_alone(make: Make, tmp_path: Path) -> None:
    names: list[set[str]] = []
    for words in ((), VSD):
        trainer = make(*words)
        steps(trainer, 0)
        trainer.model.save_pretrained(tmp_path / str(len(names)))
        names.append(set(load_file(tmp_path / str(len(names)) / "adapter_model.safetensors")))
    assert names[0] == names[1]


def test_how_samples_are_shared_out_does_not_matter(make: Make) -> None:
    """One batch of two, two batches of one, and both estimates together train a fake score alike."""
    found = {}
    for split in ((2, 1, 1), (1, 2, 1), (2, 1, 2)):
        batch, accumulation, together = map(str, split)
        words = ["--train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        trainer = make(*VSD, *words, "--rollout_batch_size", together, "--renderer_schedule", "[volume]")
        fakes = trainer.fakes
        assert fakes is not None
        steps(trainer, 0)
        moments = [fakes.optimizer.state[p]["exp_avg"] for p in fakes.optimizer.param_groups[0]["params"]]
        found[split] = torch.cat([moment.flatten() for moment in moments])
    first, *others = found.values()
    for other in others:
        assert float((other - first).norm() / first.norm()) < 1e-3


def test_a_step_that_is_left_out_teaches_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(*VSD)
    before = fake_weights(trainer)

    def fails(*args: Any, **options: Any) -> Tensor:
        raise NonFinitePrediction("mvdream", "noise prediction", [0], [3])

    with monkeypatch.context() as patch:
        patch.setattr(trainer.parts.teachers["richdreamer"], "predict_noise", fails)
        (row,) = steps(trainer, 0)
    assert row["skipped"] == 1 and not [name for name in row if name.startswith("fake_loss")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in fake_weights(trainer).items())
    (row,) = steps(trainer, 1)
    assert row["skipped"] == 0 and row["passes/mvdream_fake"] == 4 * 8


def test_a_stage_has_a_loss_of_its_own(make: Make) -> None:
    stages = [{"until": 0.4}, {"until": 1, "distillation": {"reference": "fake", "fake": {"rank": 2}}}]
    words = ["--max_train_steps", "3", "--stages", json.dumps(stages)]
    trainer = make(*words)
    rows = steps(trainer, 0, 1, 2)
    assert ["passes/mvdream_fake" in row and row["passes/mvdream_fake"] > 0 for row in rows] == [False, True, True]
    stages.insert(1, {"until": 0.7, "distillation": {"reference": "fake", "fake": {"rank": 3}}})
    with pytest.raises(ConfigError, match="distillation.fake.rank: differs between stages"):
        make("--max_train_steps", "3", "--stages", json.dumps(stages))


def test_teachers_that_cannot_have_a_fake_score_are_named(make: Make) -> None:
    with pytest.raises(ConfigError, match="fake.teachers='mvdream': is not enabled"):
        parts = {name: teacher for name, teacher in make().parts.teachers.items() if name != "mvdream"}
        make(*VSD, "--teachers.mvdream.enabled", "false", "--distillation.fake.teachers", "[mvdream]", teachers=parts)
    own = make().parts.teachers | {"mine": make().parts.teachers["mvdream"]}
    assert make(*VSD, teachers=own).fakes is not None

    class Plain(Half):
        name, num_views, alphas_cumprod, input_shape = "plain", 1, torch.linspace(0.999, 0.001, 1000), (3, 4, 4)
        condition = predict_noise = Half.encode

    with pytest.raises(ConfigError, match="fake.teachers='mine': is a Plain without a U-Net; name those"):
        make(*VSD, teachers={**own, "mine": Plain()})


@pytest.mark.slow
def test_two_processes_train_one_fake_score(random_toybox: Path, tmp_path: Path) -> None:
    """By `accelerate launch`: the update is that of one process with both prompts."""
    found = {}
    for processes, batch in ((1, 2), (2, 1)):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
        out = tmp_path / f"{processes}.safetensors"
        words = [*SMALL, *VSD, "--output_dir", str(tmp_path / f"run{processes}")]
        result = subprocess.run(
            [*launcher, str(ROOT / "tests/training/one_step.py"), str(out), *words, "--train_batch_size", str(batch)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        tensors = load_file(out)
        assert int(tensors["processes"]) == processes
        found[processes] = torch.cat([tensor.flatten() for name, tensor in sorted(tensors.items()) if "fake." in name])
    assert bool(found[1].any())
    assert float((found[2] - found[1]).norm() / found[1].norm()) < 1e-3


class Recorded(AsdLoss):
    """The loss, and the seeds of the generators that each of its calls was given."""

    def __init__(self) -> None:
        self.seeds: list[tuple[int, ...]] = []

    def __call__(self, *words: Any, generator: Any, **named: Any) -> AsdResult:
        self.seeds.append(tuple(g.initial_seed() for g in generator))
        return super().__call__(*words, generator=generator, **named)


def test_each_renderer_has_draws_of_its_own(make: Make) -> None:
    """Their sum then varies less than with the same timesteps and noises for both."""
    loss = Recorded()
    make("--renderer_schedule", "all", loss=loss).train_step(0)
    assert len(loss.seeds) == 2 * len(TEACHERS)
    volume, surface = set(loss.seeds[:3]), set(loss.seeds[3:])  # the teachers of a renderer draw one after the other
    assert len(volume) == len(surface) == 1 and not set(*volume) & set(*surface)
