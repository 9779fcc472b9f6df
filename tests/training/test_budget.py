"""The number of steps fitted to a run's minutes: the logic alone, with a clock that the test turns."""

from __future__ import annotations

import pytest

from prd.training.budget import MEASURED, WARM_UP, Budget, Fit, planned, with_fit
from prd.training.recipes import load_config, save_config, stages_of

FIRST = WARM_UP + MEASURED  # where an ordinary run is fitted


class Machine:
    """A machine that takes `pace(step)` seconds per step, and a run on it."""

    def __init__(self, minutes: float, steps: int, *, loading: float = 0.0, end: float = 0.0) -> None:
        self.now, self.end = loading, end
        self.budget = Budget(minutes, steps, clock=lambda: self.now)
        self.fits: dict[int, int] = {}

    def run(self, pace, stages: dict[int, float] | None = None) -> int:
        """Take all steps; pace: seconds of each; stages: {first step: share of the run}. Returns the steps taken."""
        done, start = 0, 0.0
        while done < self.budget.steps:
            if stages and done in stages:
                start = stages[done]
                self.budget.begin(done)
            self.now += pace(done)
            done += 1
            if self.budget.due(done):
                number = self.budget.fit(done, end_seconds=self.end, stage_start=start)
                if self.budget.accept(done, number):
                    self.fits[done] = number
        self.now += self.end
        return done


def test_the_first_steps_tell_the_pace_and_loading_and_end_are_left_out() -> None:
    machine = Machine(10, 265, loading=30, end=50)
    steps = machine.run(lambda step: 20.0 if step < WARM_UP else 4.0)  # the first ones compile
    assert machine.fits == {FIRST: FIRST + (600 - 30 - 50 - 2 * 20 - 8 * 4) // 4}
    assert steps == machine.budget.steps == machine.fits[FIRST]
    assert 600 - 4 < machine.now <= 600


def test_a_fast_machine_takes_the_most_steps_and_records_it() -> None:
    machine = Machine(10, 265)
    assert machine.run(lambda step: 1.0) == 265
    assert machine.fits == {FIRST: 265}  # so that what is resumed elsewhere keeps it


def test_half_the_pace_is_half_of_the_steps() -> None:
    taken = [Machine(9, 1000).run(lambda step, s=seconds: s) for seconds in (1.0, 2.0, 4.0)]
    assert taken == [540, 270, 135]


def test_a_very_slow_machine_is_fitted_before_its_minutes_are_over() -> None:
    machine = Machine(9, 265)
    steps = machine.run(lambda step: 60.0)
    assert machine.fits == {WARM_UP + 1: 9} and steps == 9 and machine.now == 540
    late = Machine(1, 265)
    assert late.run(lambda step: 90.0) == WARM_UP + 1  # nothing is left: no fewer than have been taken
    assert late.fits == {WARM_UP + 1: WARM_UP + 1}


@pytest.mark.parametrize("busy_from", [20, 80, 120])
def test_a_machine_that_becomes_busy_is_fitted_again(busy_from: int) -> None:
    machine = Machine(9, 265, end=30)
    machine.run(lambda step: 2.0 if step < busy_from else 5.0)
    assert 1 < len(machine.fits) <= 4 and machine.budget.steps < machine.fits[FIRST]
    assert machine.now <= 1.2 * 540
    assert 2.0 * busy_from + 5.0 * (machine.fits[FIRST] - busy_from) > 1.2 * 540  # had it not been fitted again


def test_a_machine_that_becomes_free_takes_more_steps() -> None:
    machine = Machine(9, 265)
    machine.run(lambda step: 20.0 if step < FIRST else 2.0)
    assert machine.fits[WARM_UP + 2] == 27  # two steps of 20 s are enough to tell
    assert machine.budget.steps > 150 and 0.85 * 540 < machine.now <= 1.1 * 540


def test_a_pace_that_stays_about_the_same_keeps_the_number() -> None:
    machine = Machine(9, 265)
    machine.run(lambda step: 3.0 + 0.2 * (step % 5 == 0))
    assert len(machine.fits) == 1


def test_a_stage_has_a_pace_of_its_own_and_none_begins_twice() -> None:
    machine = Machine(13.5, 1200)
    steps = machine.run(lambda step: 0.1 if step < 120 else 1.5, {120: 0.1})
    assert machine.fits[FIRST] == 1200  # nobody knew of the second stage
    assert machine.fits[120 + FIRST] < 700 and 0.9 * 810 < machine.now <= 1.1 * 810
    back = Machine(9, 1000)
    back.budget.steps = 100
    back.run(lambda step: 1.0, {75: 0.75})
    assert all(round(0.75 * number) <= done for done, number in back.fits.items() if done > 75)
    assert steps == machine.budget.steps


def test_every_process_asks_after_the_same_steps_whatever_its_clock() -> None:
    one, two = Budget(9, 265, clock=lambda: 0.0), Budget(9, 265, clock=iter(range(0, 10**6, 1000)).__next__)
    asked = []
    for done in range(1, 265):
        assert one.due(done) == two.due(done)
        if one.due(done):
            asked.append(done)
            number = 0 if done == WARM_UP + 1 else 100  # not known yet, then known
            assert one.accept(done, number) == two.accept(done, number) == (done == WARM_UP + 2)
    assert asked == [WARM_UP + 1, WARM_UP + 2, 25, 50, 75]


def test_fits_are_part_of_the_config_and_hold_from_their_step_on(tmp_path) -> None:
    config = load_config("atom_toybox", ["--schedule_steps", "1600"])
    fitted = with_fit(with_fit(config, 10, 600), 200, 400)
    assert fitted.fits[0] == Fit(step=10, max_train_steps=600, schedule_steps=800)  # in the recipe's proportion
    assert [planned(fitted, done).max_train_steps for done in (0, 9, 10, 199, 200, 999)] == [
        1200,
        1200,
        600,
        600,
        400,
        400,
    ]
    volume, mesh = stages_of(planned(fitted, 10))
    assert (volume.last, mesh.last) == (600, 800)
    save_config(fitted, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == fitted


def test_minutes_given_with_the_steps_apply_and_steps_alone_are_fixed(caplog) -> None:
    assert load_config("toybox").max_train_minutes == 9
    alone = load_config("toybox", ["--max_train_steps", "30"])
    assert (alone.max_train_steps, alone.max_train_minutes) == (30, None)
    assert "max_train_steps=30: a fixed number of steps; the 9.0 minutes of the recipe do not apply" in caplog.text
    both = load_config("toybox", ["--max_train_steps", "30", "--max_train_minutes", "2"])
    assert (both.max_train_steps, both.max_train_minutes) == (30, 2)
