"""Settings that move with the training step are resolved to numbers, wherever they stand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field

import pytest
from pydantic.dataclasses import dataclass

from prd.distillation.asd import AsdConfig
from prd.training.recipes import load_config
from prd.utils.checked_types import CHECKS, PositiveSchedule, Schedule, number, resolved, scheduled
from tests.recordings import OFFICIAL


def test_linear_up_to_its_end_and_constant_after_it() -> None:
    assert [scheduled((20.0, 10.0), step, 200) for step in (-5, 0, 50, 150, 200, 10_000)] == [
        20,
        20,
        17.5,
        12.5,
        10,
        10,
    ]
    assert scheduled((500, 20), 5_000, 20_000) == 380
    assert scheduled(7.5, 3, 10) == 7.5
    with pytest.raises(ValueError, match="total=0"):
        scheduled((1, 0), 0, 0)


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Inner:
    scale: PositiveSchedule | None = (1.0, 3.0)
    range: tuple[float, float] = (0.0, 30.0)  # which does not move
    name: str = "inner"


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Outer:
    weight: Schedule = (1.0, 0.0)
    inner: Inner = field(default_factory=Inner)
    named: Mapping[str, Inner] = field(default_factory=lambda: {"a": Inner(scale=(2.0, 4.0)), "b": Inner(scale=5.0)})


def test_every_schedule_is_resolved_and_nothing_else() -> None:
    now = resolved(Outer(), 5, 10)
    assert now.weight == 0.5 and now.inner == Inner(scale=2.0)
    assert now.named == {"a": Inner(scale=3.0), "b": Inner(scale=5.0)}
    assert Outer().weight == (1.0, 0.0) and isinstance(now, Outer)


def test_a_number_is_no_schedule() -> None:
    assert number(3.0) == 3.0
    with pytest.raises(TypeError, match=r"schedule=\[1.0, 0.0\]: still spans steps; take resolved"):
        number((1.0, 0.0))


def test_the_smallest_timestep_of_the_loss_moves() -> None:
    assert resolved(AsdConfig(), 5_000, 20_000) == AsdConfig(t_min=380.0)


def test_the_released_recipe_comes_to_the_recorded_values() -> None:
    config = load_config("triplane_turbo_sd21")
    recorded = json.loads((OFFICIAL / "guidance" / "meta.json").read_text(encoding="utf-8"))["schedules"]
    assert {"0", "1", "20000"} <= recorded.keys()
    for step, values in recorded.items():
        now = resolved(config, int(step), config.total_steps)
        loss = now.distillation
        for name in ("mv", "rd", "sd"):
            assert int(number(loss.t_min)) == values[f"{name}_min_step"] and loss.t_max == values[f"{name}_max_step"]
        assert now.teachers["mvdream"].guidance_scale == pytest.approx(values["mv_guidance_scale"], rel=1e-9)
