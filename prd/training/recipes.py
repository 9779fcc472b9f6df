"""Recipes: YAML files of a `TrainConfig`, which may extend one another, and the stages of a run.

    config = load_config("toybox", ["--optimizer.lr", "1e-3", "--max_train_steps=10"])
    save_config(config, "runs/a/config.yaml")          # loading it again gives an equal config

A run may have stages, each the recipe with some of its values replaced:

    extends: toybox                                            # another recipe, of which this one changes values
    stages:
      - {name: volume, until: 0.6, renderer_schedule: [volume]}    # a share of schedule_steps
      - {name: mesh, until: 1, renderer_schedule: [surface], optimizer: {lr: 2.0e-4}}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from prd.data.text_files import lines_of
from prd.errors import ConfigError
from prd.training.classes import SECTIONS, Entry, class_name_of, entries, settings_by_key
from prd.training.command_line import parse_overrides, split_config
from prd.training.config import Stage, TrainConfig
from prd.training.keys import check_keys, explain, kinds_of, known_keys, leaves
from prd.training.renamed import renamed, with_todays_keys
from prd.training.run.launcher import read_launch, with_launcher
from prd.utils.arguments import expanded_path
from prd.utils.files import write_atomic
from prd.utils.plain_yaml import parse_yaml

logger = logging.getLogger(__name__)

STAGED = (  # what a stage may change: keys and sections
    *("renderer_schedule", "background", "cameras", "renderers", "shading", "teachers", "distillation"),
    *("regularizers", "optimizer", "trainable", "library", "interpolation"),
)
ONCE = ("library.source",)  # of a run, not of a stage; as the class of a part is
_ADAPTER = TypeAdapter(TrainConfig)


# -- a config and its plain values -----------------------------------------------------------------------------------


def from_dict(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Check nested plain values and build the config; `ConfigError` names the key, its value and what is allowed.

    where  what the values were read from, for a warning about names of before
    """
    values = renamed(values, where)
    parts = list(entries(values))
    known = known_keys(parts)
    check_keys({key: value for key, value in values.items() if key not in SECTIONS}, known)
    settings = {part.key: _settings_of(part, known) for part in parts}
    for name, section in SECTIONS.items():
        if name in values:
            own = {part.key.partition(".")[2]: settings[part.key] for part in parts if part.section is section}
            values[name] = own[""] if section.default is not None else own
    values["classes"] = {part.key: part.class_name for part in parts if part.named}
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConfigError(explain(error, known)) from None
    _check_schedule(config)
    if config.stages:
        stages_of(config)
    return config


def _check_schedule(config: TrainConfig) -> None:
    """ConfigError if there is no renderer, or one is scheduled that there is not."""
    if not config.renderers:
        raise ConfigError("renderers: none is given; give at least one, as renderers: {volume: {}}")
    chosen = config.renderer_schedule
    unknown = [name for name in chosen if name not in config.renderers] if isinstance(chosen, tuple) else []
    if unknown:
        raise ConfigError(
            f"renderer_schedule={unknown[0]!r}: must be 'all', 'alternate' or a list of {', '.join(config.renderers)}"
        )


def _settings_of(part: Entry, known: Sequence[str]) -> Any:
    """The settings of a part, checked by its own class."""
    check_keys({part.key: part.values} if "." not in part.key else _nested(part.key, part.values), known)
    try:
        return TypeAdapter(part.config_class).validate_python(part.values)
    except ValidationError as error:
        raise ConfigError(explain(error, known, part.key)) from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML or JSON.

    Raises ConfigError for a part whose settings are of a class that the config does not name: they could not be read
    again.
    """
    values = _ADAPTER.dump_python(config, mode="json")
    values.pop("classes")
    for key in settings_by_key(config):
        name, _, part = key.partition(".")
        place, own_key = (values[name], part) if part else (values, name)
        place[own_key] = _plain_part(config, key, place[own_key])
    return values


def _plain_part(config: TrainConfig, key: str, own: dict[str, Any]) -> Any:
    name, _, part = key.partition(".")
    section, class_name = SECTIONS[name], class_name_of(config, key)
    if key in config.classes or key == "model" or class_name != (section.default or part):
        return {"class": class_name, **own}
    return own[section.shorthand] if section.shorthand is not None and list(own) == [section.shorthand] else own


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write every value as YAML; `load_config(path)` gives an equal config."""
    write_atomic(expanded_path(path), dump_config(config))


def dump_config(config: TrainConfig) -> str:
    """Every value as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


# -- files and command lines -----------------------------------------------------------------------------------------


def load_config(config: str | Path = "toybox", overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, or a recipe shipped with the package by its bare name, and apply dotted overrides.

    overrides  command-line words: ["--optimizer.lr", "1e-3", "--seed=1"]

    `max_train_steps` among the overrides without `max_train_minutes` is a fixed number of steps: the minutes of the
    recipe do not apply. `mixed_precision` and `gradient_accumulation_steps` that neither sets are those that the
    launcher of this process was told (`prd.training.run.launcher`).

    Raises `ConfigError` for a file that does not exist or is no mapping, an unknown key (naming the nearest known
    one), a value of the wrong type or outside its range.
    """
    values = _read_recipe(config)
    rough, _ = with_todays_keys(parse_overrides(overrides), whole=False)
    for name, section in SECTIONS.items():
        if section.default is None and name in rough and name not in values:
            values[name] = to_dict(TrainConfig())[name]  # of which an override changes a part
    kinds = kinds_of(list(entries(merged(values, rough))))  # which depend on the classes of the parts
    changes = renamed(parse_overrides(overrides, kinds), "the command line", whole=False)
    minutes = values.get("max_train_minutes")
    if "max_train_steps" in changes and "max_train_minutes" not in changes and minutes is not None:
        logger.warning(
            "max_train_steps=%s: a fixed number of steps; the %s minutes of the recipe do not apply (give "
            "--max_train_minutes as well to have both)",
            *(changes["max_train_steps"], minutes),
        )
        changes["max_train_minutes"] = None
    if values.get("fits") and {"max_train_steps", "max_train_minutes"} & changes.keys():
        logger.warning("%s: the steps that its run was fitted to do not apply to other steps or minutes", config)
        values["fits"] = []
    return from_dict(with_launcher(merged(values, changes), read_launch()), str(config))


def parse_args(argv: Sequence[str]) -> TrainConfig:
    """The config of a training command line: `--config PATH_OR_NAME` (default "toybox") and dotted overrides."""
    return load_config(*split_config(argv))


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, each accepted by `--config`."""
    folder = resources.files("prd.configs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _find(config: str | Path) -> Path:
    path = expanded_path(config, "config")
    if path.is_file():
        return path
    if str(config) in shipped_recipes():
        return Path(str(resources.files("prd.configs") / f"{config}.yaml"))
    raise ConfigError(f"config={str(config)!r}: no such file; give a YAML file or one of {shipped_recipes()}")


def _read_recipe(config: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file in the place of those of the recipe that its `extends` names, if it names one."""
    path = _find(config)
    values = read_yaml(path)
    extended = values.pop("extends", None)
    values = renamed(values, str(path), whole=extended is None)
    if extended is None:
        return values
    if path in seen:
        raise ConfigError(f"{path}: extends={extended!r}: extends itself")
    beside = path.parent / expanded_path(str(extended), "extends")
    base = _read_recipe(beside if beside.is_file() else str(extended), (*seen, path))
    return merged(base, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that is a mapping, {} if it is empty; ConfigError for any other."""
    text = "".join(line for _, line in lines_of(path, ConfigError))
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a config is a mapping of keys to values")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values with those of `changes` in their place; a part of another class keeps none of its settings."""
    result = dict(values)
    for key, change in changes.items():
        place, old = f"{prefix}{key}", result.get(key)
        if isinstance(change, Mapping) and isinstance(old, Mapping) and not _changes_class(place, key, old, change):
            change = merged(old, change, f"{place}.")
        result[key] = change
    return result


def _changes_class(place: str, name: str, old: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    """Return True if values that are a part's settings name another class than those before."""
    section = SECTIONS.get(place.partition(".")[0])
    if section is None or "class" not in change or ("." in place) != (section.default is None):
        return False
    return change["class"] != old.get("class", section.default or name)


# -- stages ----------------------------------------------------------------------------------------------------------


def stages_of(config: TrainConfig) -> list[Stage]:
    """The stages of a run in their order; one of all its steps if the config names none.

    A stage's config has `schedule_steps` set to its length: its schedules and its learning rate begin anew, at the
    step `first`. The last stage has no end of its own. Raises ConfigError for a stage that is not as it must be.
    """
    total = config.total_steps
    if not config.stages:
        return [Stage("", 0, max(total, config.max_train_steps), replace(config, schedule_steps=total))]
    stages: list[Stage] = []
    before = 0.0
    for index, written in enumerate(config.stages):
        values, where = dict(written), f"stages[{index}]"
        until, name = values.pop("until", None), values.pop("name", str(index + 1))
        first = stages[-1].last if stages else 0
        if isinstance(until, bool) or not isinstance(until, int | float) or not before < until <= 1:
            raise ConfigError(f"{where}.until={until!r}: must be a share of the run up to 1, ascending")
        before, last = until, max(first + 1, round(until * total))
        own = replace(_staged(config, values, where), schedule_steps=last - first)
        stages.append(Stage(str(name), first, last, own))
    if config.stages[-1]["until"] != 1:
        raise ConfigError(f"stages[{len(stages) - 1}].until={config.stages[-1]['until']}: the last must be 1")
    return [*stages[:-1], replace(stages[-1], last=max(stages[-1].last, config.max_train_steps))]


def _staged(config: TrainConfig, values: Mapping[str, Any], where: str) -> TrainConfig:
    """The config with the values of a stage in their place."""
    if unknown := sorted(values.keys() - set(STAGED)):
        raise ConfigError(f"{where}: {unknown[0]!r} is no value of a stage; allowed: {', '.join(STAGED)}")
    before = to_dict(config)
    fixed = [key for key in leaves(values) if key in ONCE or _renames_class(config, key, values)]
    if fixed:
        raise ConfigError(f"{where}.{fixed[0]}: holds for the whole run; give it outside of the stages")
    try:
        return from_dict(merged({**before, "stages": []}, values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _renames_class(config: TrainConfig, key: str, values: Mapping[str, Any]) -> bool:
    """Return True if a stage gives a part of the run another class."""
    part, _, name = key.rpartition(".")
    if name != "class":
        return False
    target: Any = values
    for step in key.split("."):
        target = target[step]
    section, _, own = part.partition(".")
    present = not own or own in getattr(config, section)
    return present and class_name_of(config, part) != target


def configured_parts(stages: Sequence[Stage]) -> set[str]:
    """The dotted keys of the parts that any stage's config names: "teachers.mvdream"."""
    mappings = [name for name, section in SECTIONS.items() if section.default is None]
    return {f"{name}.{part}" for stage in stages for name in mappings for part in getattr(stage.config, name)}
