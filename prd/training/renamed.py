"""Keys of a configuration that had other names until version 0.2, read for one release.

A recipe, a command line or a checkpoint's config written before is brought into today's shape, with one warning that
names the new keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "estimates_at_once": "rollout_batch_size",
    "trained": "trainable",
    "volume": "renderers.volume",
    "surface": "renderers.surface",
    "teachers.dtype": "teacher_options.dtype",
    "teachers.checkpoint_vae": "teacher_options.checkpoint_vae",
    "teachers.offload": "teacher_options.offload",
    "model.generator": "model.class",
}
SCHEDULES = {"both": "all", "alternate": "alternate", "volume": ["volume"], "surface": ["surface"]}
# parts that were there whether or not a recipe mentioned them
ALWAYS: dict[str, dict[str, Any]] = {
    "teachers": {"stable_diffusion": {}, "mvdream": {}, "richdreamer": {}},
    "renderers": {"volume": {}, "surface": {}},
    "regularizers": {"eikonal": [1.0, 0.0], "sparsity": [1.0, 0.0]},
}


def renamed(values: Mapping[str, Any], where: str, *, whole: bool = True) -> dict[str, Any]:
    """Nested values of a config with today's keys, and one warning if they had others.

    where  what they were read from, for the warning
    whole  as in `with_todays_keys`
    """
    new, found = with_todays_keys(values, whole=whole)
    if found:
        listed = ", ".join(f"{old} is {key}" for old, key in found.items())
        named, _ = with_todays_keys(values, whole=False)
        pairs = [(section, part) for section in ALWAYS for part in new.get(section, {})]
        added = [f"{section}.{part}" for section, part in pairs if part not in named.get(section, {})]
        also = f"; parts that were there without being named are added: {', '.join(added)}" if added else ""
        warnings.warn(
            f"{where}: written with names of before version 0.2, which are read for one release: {listed}{also}",
            FutureWarning,
            stacklevel=3,
        )
    return new


def with_todays_keys(values: Mapping[str, Any], *, whole: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Nested values of a config with today's keys, and the names that were replaced with those they have now.

    whole  whether the values are a whole config, to which an old one's unmentioned parts belong, or changes of one
    """
    found: dict[str, str] = {}
    new = _renamed(values, found)
    if found and whole:
        for section, parts in ALWAYS.items():
            given = new.get(section, {})
            new[section] = {**parts, **given}
    return new, found


def _renamed(values: Mapping[str, Any], found: dict[str, str]) -> dict[str, Any]:
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    if isinstance(schedule := new.get("renderers"), str) and schedule in SCHEDULES:
        del new["renderers"]
        new["renderer_schedule"] = SCHEDULES[schedule]
        found[f"renderers: {schedule}"] = f"renderer_schedule: {str(SCHEDULES[schedule]).replace(chr(39), '')}"
    for old, key in RENAMED.items():
        *sections, name = old.split(".")
        holder: Any = new
        for section in sections:
            holder = holder.get(section) if isinstance(holder, Mapping) else None
        if not isinstance(holder, dict) or name not in holder:
            continue
        _insert(new, key.split("."), holder.pop(name))
        found[old] = key
        if sections and not holder:
            del new[sections[0]]
    if isinstance(stages := new.get("stages"), list | tuple):
        new["stages"] = [_renamed(stage, found) if isinstance(stage, Mapping) else stage for stage in stages]
    return new


def _insert(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested value; an old section's values go under those that the new one already has."""
    for section in path[:-1]:
        values = values.setdefault(section, {})
    if isinstance(value, Mapping) and isinstance(values.get(path[-1]), Mapping):
        value = {**value, **values[path[-1]]}
    values[path[-1]] = value
