from __future__ import annotations

import json

import pytest

from prd.distillation.schedules import LinearSchedule
from prd.training.recipes import load_config
from prd.utils.checked_types import resolved
from tests.recordings import OFFICIAL


def test_constant_before_and_after_linear_between() -> None:
    schedule = LinearSchedule(20.0, 10.0, 100, 300)
    assert [schedule(step) for step in (0, 100, 200, 250, 300, 10_000)] == [20, 20, 15, 12.5, 10, 10]


def test_from_what_yaml_says() -> None:
    assert LinearSchedule.from_value(7.5, 10)(3) == 7.5
    assert LinearSchedule.from_value([1, 0], 10)(5) == 0.5


@pytest.mark.parametrize("value", [[1, 2, 3], "20", []])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="schedule="):
        LinearSchedule.from_value(value, 10)  # type: ignore[arg-type]


def test_an_empty_span_is_refused() -> None:
    with pytest.raises(ValueError, match="end_step=5"):
        LinearSchedule(1, 0, 5, 5)


def test_the_released_recipe_comes_to_the_recorded_values() -> None:
    config = load_config("triplane_turbo_sd21")
    recorded = json.loads((OFFICIAL / "guidance" / "meta.json").read_text())["schedules"]
    assert {"0", "1", "20000"} <= recorded.keys()
    for step, values in recorded.items():
        now = resolved(config, int(step), config.total_steps)
        for name in ("mv", "rd", "sd"):
            assert int(now.distillation.t_min) == values[f"{name}_min_step"]
            assert now.distillation.t_max == values[f"{name}_max_step"]
        mvdream = now.teachers["mvdream"]
        assert mvdream.guidance_scale == pytest.approx(values["mv_guidance_scale"], rel=1e-9)
