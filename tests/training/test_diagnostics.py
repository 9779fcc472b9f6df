"""What is said of a run that goes wrong: who spoiled a step, and that prompts no longer matter."""

from __future__ import annotations

import json

import torch

from prd.cameras import orbit_cameras
from prd.training.diagnostics import CollapseWatch, NonFiniteDiagnostics, prompt_spread, record_skipped


class Spheres:
    """A sphere for each radius."""

    def __init__(self, *radii: float) -> None:
        self.radii = torch.tensor(radii)

    def sdf(self, points):
        return points.norm(dim=-1, keepdim=True) - self.radii[:, None, None]


def test_the_spread_is_the_mean_distance_from_the_mean_shape():
    cpu = torch.device("cpu")
    assert abs(prompt_spread(Spheres(0.4, 0.6), 2, cpu) - 0.1) < 1e-6
    assert prompt_spread(Spheres(0.5, 0.5, 0.5), 3, cpu) < 1e-6


def test_a_student_that_makes_one_shape_is_told_from_one_that_begins():
    watch = CollapseWatch()
    assert watch.check(1e-5, 0.01) is None  # the start: a sphere whatever is asked
    assert watch.check(0.05, 0.1) is None
    assert watch.check(0.02, 0.2) is None
    warning = watch.check(0.004, 0.3)
    assert warning is not None and "0.004" in warning and "stopped depending on the prompt" in warning
    assert CollapseWatch().check(1e-5, 0.5) is not None  # it never grew


def test_suspects_are_the_estimates_without_a_finite_loss_or_all(tmp_path):
    cameras = orbit_cameras(torch.tensor([[20.0, 20.0]]), torch.tensor([[30.0, 120.0]]), 2.4, 50.0)
    witness = NonFiniteDiagnostics()
    for k, (prompt, loss) in enumerate((("a cube", 1.0), ("a cone", float("nan")), ("a mug", 2.0))):
        witness.ask(k, [prompt], cameras)
        witness.answer(torch.tensor(loss))
    (suspect,) = witness.suspects("why")
    assert suspect["prompts"] == ["a cone"] and suspect["k"] == 1
    said = record_skipped(tmp_path, 9, 1, [suspect])
    assert "'a cone'" in said and "elevation 20.0, azimuth 30.0, distance 2.40" in said
    row = json.loads((tmp_path / "skipped.jsonl").read_text(encoding="utf-8"))
    assert (row["step"], row["process"], row["reason"], row["loss"]) == (9, 1, "why", "nan")
    assert [camera["azimuth"] for camera in row["cameras"][0]] == [30.0, 120.0]
    witness.asked.pop(1)
    assert len(witness.suspects("the gradient alone")) == 2
    witness.ask(2, ["a torus"], cameras)  # its teacher raised: there is no loss
    assert [s["prompts"] for s in witness.suspects("raised")] == [["a torus"]]


def test_estimates_that_were_judged_together_answer_together():
    cameras = orbit_cameras(torch.tensor([[20.0, 20.0]]), torch.tensor([[30.0, 120.0]]), 2.4, 50.0)
    witness = NonFiniteDiagnostics()
    for ks, loss in (((0, 1), 1.0), ((2, 3), float("nan"))):
        for k in ks:
            witness.ask(k, ["a cube"], cameras)
        witness.answer(torch.tensor(loss))
    assert [suspect["k"] for suspect in witness.suspects("why")] == [2, 3]
