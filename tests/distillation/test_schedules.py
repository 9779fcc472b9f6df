from __future__ import annotations

import pytest

from prd.distillation.schedules import LinearSchedule


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
