"""Types of settings that are checked when a settings dataclass is made, and schedules that move with the training step.

A part owns its settings: a frozen pydantic dataclass stands beside the class that it configures.

    @dataclass(frozen=True, kw_only=True, config=CHECKS)     # pydantic.dataclasses.dataclass
    class VolumeConfig:
        num_samples: Size = 64                                # samples per ray
        inv_std: Schedule = 100.0                             # a number, or [start, end]

    now = resolved(config, step, total)                       # the same class, every Schedule replaced by its number
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from prd.utils.arguments import MAX_SEED, expanded, integer, is_bool, place_fault, prompt_fault, text_fault


def _number(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; an error for true and false, which pydantic takes for 1 and 0."""
    if is_bool(value):
        raise PydanticCustomError("number", "must be a number, not true or false")
    found = integer(value)
    return value if found is None else found


def _seed(value: int) -> int:
    if not 0 <= value <= MAX_SEED:
        raise PydanticCustomError("seed", f"must be an integer in 0..{MAX_SEED}")
    return value


def _place(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    if fault := place_fault(os.fspath(value)):
        raise PydanticCustomError("place", "{fault}", {"fault": fault})
    return expanded(value)


def _saved_place(value: Any) -> Any:
    return value if value == "" else _place(value)


def _without_fault(text: str) -> str:
    if fault := text_fault(text):
        raise PydanticCustomError("text", "{fault}", {"fault": fault})
    return text


def _prompt(text: str) -> str:
    if fault := prompt_fault(text):
        raise PydanticCustomError("text", "{fault}", {"fault": fault})
    return text


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Int, Field(ge=1)]
Size = Annotated[Int, Field(ge=2)]
Seed = Annotated[Int, AfterValidator(_seed)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Radius = Annotated[Float, Field(gt=0, lt=1)]
Place = Annotated[str, BeforeValidator(_place)]  # a file, a folder, or a name that is neither, as a Hub id
SavedPlace = Annotated[str, BeforeValidator(_saved_place)]  # the same, or "" for what a saved model does not name
Text = Annotated[str, AfterValidator(_without_fault)]  # any text, also none
Prompt = Annotated[str, AfterValidator(_prompt)]

CHECKS = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


class MovesWithStep:
    """Marks an annotation whose [start, end] is a schedule over the training steps, not a range."""


MOVES = MovesWithStep()
Schedule = Annotated[Float | tuple[Float, Float], MOVES]
NonNegativeSchedule = Annotated[NonNegative | tuple[NonNegative, NonNegative], MOVES]
PositiveSchedule = Annotated[Positive | tuple[Positive, Positive], MOVES]

Settings = TypeVar("Settings")


def scheduled(value: float | tuple[float, float], step: int, total: int) -> float:
    """The value of a schedule at a training step (counted from 0): linear from start to end at step `total`, then end.

    scheduled((500, 20), 5_000, 20_000) == 380; a single number is constant. Raises ValueError if total < 1.
    """
    if total < 1:
        raise ValueError(f"total={total}: a schedule spans at least one step")
    start, end = value if isinstance(value, tuple | list) else (value, value)
    share = min(max(step / total, 0.0), 1.0)
    return (1 - share) * start + share * end


def resolved(settings: Settings, step: int, total: int) -> Settings:
    """A settings dataclass with the number of this step in the place of every schedule, nested dataclasses included.

    step   training step, counted from 0
    total  step at which every [start, end] reaches its end
    """
    changes: dict[str, Any] = {}
    kind: type = type(settings)
    moving = _schedules(kind)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if field.name in moving:
            changes[field.name] = scheduled(value, step, total)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = resolved(value, step, total)
        elif isinstance(value, Mapping) and any(dataclasses.is_dataclass(v) for v in value.values()):
            changes[field.name] = {
                key: resolved(v, step, total) if dataclasses.is_dataclass(v) else v for key, v in value.items()
            }
    return _replaced(settings, changes)


def number(value: float | tuple[float, float]) -> float:
    """A resolved schedule as the number that it is; TypeError for one that still is [start, end]."""
    if isinstance(value, tuple):
        raise TypeError(f"schedule={list(value)}: still spans steps; take resolved(settings, step, total) first")
    return value


def _replaced(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A copy with other values, without running the checks again: a schedule's number lies within what was checked."""
    copy = object.__new__(type(settings))
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        object.__setattr__(copy, field.name, changes.get(field.name, getattr(settings, field.name)))
    return copy


@cache
def _schedules(kind: type) -> frozenset[str]:
    """The fields of a settings dataclass that are annotated as schedules."""
    hints = get_type_hints(kind, include_extras=True)
    return frozenset(f.name for f in dataclasses.fields(kind) if _is_schedule(hints[f.name]))


def _is_schedule(hint: Any) -> bool:
    return any(isinstance(extra, MovesWithStep) for extra in getattr(hint, "__metadata__", ())) or any(
        _is_schedule(argument) for argument in getattr(hint, "__args__", ()) if hasattr(argument, "__metadata__")
    )
