"""The configuration of a training run: YAML and dotted command-line overrides of nested frozen dataclasses.

    config = load_config("toybox", ["--optimizer.lr", "1e-3", "--max_train_steps=10"])
    config = parse_args(["--config", "configs/triplane_turbo_sd21.yaml", "--seed", "1"])
    save_config(config, "runs/a/config.yaml")          # loading it again gives an equal config

A value on the command line is read as YAML (`--cameras.elevation "[0, 30]"`, `--ema_decay null`). The sections are in
`prd.training.sections`. A run may have stages, each the recipe with some of its values replaced:

    extends: toybox                                            # another recipe, of which this one changes values
    stages:
      - {name: volume, until: 0.6, renderers: volume}          # a share of schedule_steps
      - {name: mesh, until: 1, renderers: surface, optimizer: {lr: 2.0e-4}}
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from prd.settings import CHECKS, Count, Fraction, Positive
from prd.training.budget import Fit
from prd.training.files import write_whole
from prd.training.sections import (
    CamerasConfig,
    DistillationConfig,
    Generators,
    InterpolationConfig,
    LibraryConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RegularizersConfig,
    ShadingConfig,
    SurfaceConfig,
    TeachersConfig,
    ValidationConfig,
    VolumeConfig,
)

logger = logging.getLogger(__name__)

SWITCHES = ("start_afresh", "allow_config_change")  # need no value on the command line
STAGED = (  # what a stage may change: keys and sections
    *("renderers", "background", "cameras", "volume", "surface", "shading", "teachers", "distillation"),
    *("regularizers", "optimizer", "trained", "library", "interpolation"),
)
ONCE = ("library.source", "teachers.dtype", "teachers.checkpoint_vae", "teachers.offload")  # of a run, not of a stage
GENERATORS = {section.__dataclass_fields__["generator"].default: section for section in get_args(Generators)}


class ConfigError(ValueError):
    """A configuration that cannot be used: an unknown key, a value of the wrong type or outside its range."""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class TrainConfig:
    """A whole training run: Progressive Rendering Distillation, or a generator that answers in one pass."""

    seed: int = 0  # of every random draw
    output_dir: str = "runs/prd"  # the run folder
    max_train_steps: Count = 15000  # optimiser steps at most
    schedule_steps: Count | None = None  # where every [start, end] schedule reaches its end; null: max_train_steps
    max_train_minutes: Positive | None = None  # steps and schedules are fitted to these, in each process; null: none
    fits: tuple[
        Fit, ...
    ] = ()  # numbers of steps fitted to the minutes: written by the run, followed by what repeats it
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # of the teachers' weights and the student's autocast
    train_batch_size: Count = 2  # prompts a process and step
    gradient_accumulation_steps: Count = 1  # batches an optimiser step
    num_denoising_steps: Count = 4  # K of Algorithm 1; a generator of one pass has no such steps
    estimates_at_once: Count = 1  # of these K, decoded and judged in one batch: for small models; memory of as many
    renderers: Literal["both", "alternate", "volume", "surface"] = "both"  # at each of the K steps; alternate: in turn
    stages: tuple[dict[str, Any], ...] = ()  # parts of the run that change some values, each with its `until`
    trained: tuple[str, ...] | None = None  # parts of the generator that are trained; null: all
    init_from: str | None = None  # a saved generator to start from, "toybox-atom" or a run folder; null: from scratch
    background: Fraction = 0.5  # grey level behind the object
    text_background: bool = False  # train over an environment made from the text instead, trained along; shown: grey
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # moving average of the trained weights; null: none
    checkpointing_steps: Count = 500  # save a checkpoint every so many steps
    checkpoints_total_limit: Count | None = 3  # older checkpoints are removed; null: keep all
    resume_from_checkpoint: str | None = None  # "latest", the name of one of this run, or a folder
    start_afresh: bool = False  # where "latest" finds nothing to resume from
    allow_config_change: bool = False  # resume from a checkpoint that was trained with another config
    report_to: str | None = "tensorboard"  # an Accelerate tracker besides metrics.jsonl, as "wandb"; null: none
    num_threads: Count | None = None  # torch's CPU threads; null: OMP_NUM_THREADS, or cores / processes of the machine
    model: Annotated[Generators, Field(discriminator="generator")] = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # the corpus
    interpolation: InterpolationConfig = field(default_factory=InterpolationConfig)  # between two prompts
    library: LibraryConfig = field(default_factory=LibraryConfig)  # of 3D shapes
    cameras: CamerasConfig = field(default_factory=CamerasConfig)  # where it is seen from
    volume: VolumeConfig = field(default_factory=VolumeConfig)  # the first renderer
    surface: SurfaceConfig = field(default_factory=SurfaceConfig)  # the second renderer
    shading: ShadingConfig = field(default_factory=ShadingConfig)  # of what both draw
    teachers: TeachersConfig = field(default_factory=TeachersConfig)  # who judges
    distillation: DistillationConfig = field(default_factory=DistillationConfig)  # the loss
    regularizers: RegularizersConfig = field(default_factory=RegularizersConfig)  # of the geometry
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # of adapters and heads
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # what is measured

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if not self.teachers.enabled and self.library.reconstruction == 0:
            raise ValueError("no teacher is enabled; enable at least one, as teachers.mvdream.enabled: true")
        for name in ("alpha", "reconstruction"):
            given = getattr(self.library, name)
            if self.library.source is None and given not in (0, (0, 0)):
                raise ValueError(f"library.{name}={given}: needs shapes; give library.source, or leave it at 0")
        if self.distillation.reference == "noise" and any(t.eta > 0 for t in self.teachers.enabled):
            raise ValueError("teachers.*.eta: must be 0 with distillation.reference=noise, which shifts nothing")
        if self.validation.gallery_steps and not self.validation.prompts:
            raise ValueError("validation.gallery_steps: a gallery draws validation.prompts, of which there are none")
        if self.cameras.views != 4 and (self.teachers.mvdream.enabled or self.teachers.richdreamer.enabled):
            raise ValueError(f"cameras.views={self.cameras.views}: must be 4, which MVDream and RichDreamer see")
        for name, k in (
            ("num_denoising_steps", self.num_denoising_steps),
            ("validation.num_inference_steps", self.validation.num_inference_steps),
        ):
            if 1000 % k:
                raise ValueError(f"{name}={k}: must divide the 1000 timesteps of the base; try 1, 2 or 4")
        return self


_ADAPTER = TypeAdapter(TrainConfig)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Check nested plain values and build the config; `ConfigError` names the key, its value and what is allowed."""
    values = dict(values)
    if isinstance(model := values.get("model", {}), Mapping):
        values["model"] = {"generator": ModelConfig.generator, **model}
    known = list(_keys(TrainConfig, model=_generator_section(values)))
    for key in _leaves(values):
        _check_key(key, known)
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, known)) from None
    if config.stages:
        stages_of(config)
    return config


@plain_dataclass(frozen=True)
class Stage:
    """A part of a run: optimiser steps `first` to `last` - 1, with a config whose schedules span it."""

    name: str
    first: int
    last: int
    config: TrainConfig


def stages_of(config: TrainConfig) -> list[Stage]:
    """The stages of a run in their order; one of all its steps if the config names none.

    A stage's config has `schedule_steps` set to its length: its schedules and its learning rate begin anew, at the
    step `first`. The last stage has no end of its own. Raises ConfigError for a stage that is not as it must be.
    """
    total = config.schedule_steps or config.max_train_steps
    if not config.stages:
        return [Stage("", 0, max(total, config.max_train_steps), replace(config, schedule_steps=total))]
    stages: list[Stage] = []
    before = 0.0
    for index, written in enumerate(config.stages):
        values, where = dict(written), f"stages[{index}]"
        until, name = values.pop("until", None), values.pop("name", str(index + 1))
        first = stages[-1].last if stages else 0
        if type(until) not in (int, float) or not before < until <= 1:
            raise ConfigError(f"{where}.until={until!r}: must be a share of the run up to 1, ascending")
        if unknown := sorted(values.keys() - set(STAGED)):
            raise ConfigError(f"{where}: {unknown[0]!r} is no value of a stage; allowed: {', '.join(STAGED)}")
        if fixed := [key for key in _leaves(values) if key in ONCE]:
            raise ConfigError(f"{where}.{fixed[0]}: holds for the whole run; give it outside of the stages")
        before, last = until, max(first + 1, round(until * total))
        try:
            own = from_dict(_merged({**to_dict(config), "stages": []}, values))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        stages.append(Stage(str(name), first, last, replace(own, schedule_steps=last - first)))
    if config.stages[-1]["until"] != 1:
        raise ConfigError(f"stages[{len(stages) - 1}].until={config.stages[-1]['until']}: the last must be 1")
    return [*stages[:-1], replace(stages[-1], last=max(stages[-1].last, config.max_train_steps))]


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of `changes` in their place."""
    merged = dict(values)
    for key, change in changes.items():
        inside = isinstance(change, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], change) if inside else change
    return merged


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML or JSON."""
    return _ADAPTER.dump_python(config, mode="json")


def load_config(config: str | Path = "toybox", overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, or a recipe shipped with the package by its bare name, and apply dotted overrides.

    overrides  command-line words: ["--optimizer.lr", "1e-3", "--seed=1"]

    `max_train_steps` among the overrides without `max_train_minutes` is a fixed number of steps: the minutes of the
    recipe do not apply.

    Raises `ConfigError` for a file that does not exist or is no mapping, an unknown key (naming the nearest known
    one), a value of the wrong type or outside its range.
    """
    values = _read_recipe(config)
    given = dict(_parse_overrides(overrides))
    if "max_train_steps" in given and "max_train_minutes" not in given and values.get("max_train_minutes") is not None:
        logger.warning(
            "max_train_steps=%s: a fixed number of steps; the %s minutes of the recipe do not apply (give "
            "--max_train_minutes as well to have both)",
            *(given["max_train_steps"], values["max_train_minutes"]),
        )
        given["max_train_minutes"] = None
    for key, value in given.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{config}: {section}={target!r} is not a section; give its keys as a mapping")
        target[name] = value
    return from_dict(values)


def parse_args(argv: Sequence[str]) -> TrainConfig:
    """The command line of a training script: `--config PATH_OR_NAME` (default "toybox") and dotted overrides."""
    config, overrides = "toybox", []
    for key, value in _split_words(argv):
        if key == "config":
            config = value
        else:
            overrides.append(f"--{key}={value}")
    return load_config(config, overrides)


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write every value as YAML; `load_config(path)` gives an equal config."""
    write_whole(Path(path), dump_config(config))


def dump_config(config: TrainConfig) -> str:
    """Every value as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, each accepted by `--config`."""
    folder = resources.files("prd.configs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which `no` and dates are text, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))


def _find(config: str | Path) -> Path:
    path = Path(config)
    if path.is_file():
        return path
    if str(config) in shipped_recipes():
        return Path(str(resources.files("prd.configs") / f"{config}.yaml"))
    raise ConfigError(f"config={str(config)!r}: no such file; give a YAML file or one of {shipped_recipes()}")


def _read_recipe(config: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file in the place of those of the recipe that its `extends` names, if it names one.

    Another generator's `model` is not mixed with the recipe's.
    """
    path = _find(config)
    values = _read_yaml(path)
    extended = values.pop("extends", None)
    if extended is None:
        return values
    if path in seen:
        raise ConfigError(f"{path}: extends={extended!r}: extends itself")
    beside = path.parent / str(extended)
    base = _read_recipe(beside if beside.is_file() else str(extended), (*seen, path))
    if _generator_section(values) is not _generator_section(base) and "model" in values:
        base.pop("model", None)
    return _merged(base, values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a config is a mapping of keys to values")
    return values


def _split_words(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--key value` and `--key=value` as pairs of text; hyphens in a key are underscores."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{word!r}: expected --key value or --key=value, as --optimizer.lr 1e-3")
        if not equals and key.replace("-", "_") in SWITCHES and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = rest.pop(0)
        yield key.replace("-", "_"), value


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for key, text in _split_words(words):
        try:
            value = yaml.load(text, Loader=_Yaml)
        except yaml.YAMLError:
            value = text  # a prompt or a path with YAML's punctuation in it
        yield key, value


def _explain(error: ValidationError, known: Sequence[str]) -> str:
    """One sentence about the first wrong value: its dotted key, the value and what is allowed."""
    first, *others = error.errors(include_url=False)
    path = _place(first["loc"])
    keys = _with_sections(known)
    while path and ".".join(path) not in keys:
        path.pop()  # pydantic ends the location of a union by its branch, of a tuple by its index
    messages = [first["msg"]] + [e["msg"] for e in others if _place(e["loc"])[: len(path)] == path]
    text = ", or ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in messages))
    key = ".".join(path)
    if first["type"] == "value_error":
        return f"{key}: {text}" if key else text
    return f"{key}={first['input']!r}: {text}"


def _place(location: Sequence[int | str]) -> list[str]:
    """Where an error is, without the branch that pydantic took at `model`."""
    path = [str(part) for part in location]
    return [path[0], *path[2:]] if len(path) > 1 and path[0] == "model" and path[1] in GENERATORS else path


def _generator_section(values: Mapping[str, Any]) -> type:
    """The section that `model` is, by the generator it names."""
    model = values.get("model", {})
    name = model.get("generator", ModelConfig.generator) if isinstance(model, Mapping) else ModelConfig.generator
    if name not in GENERATORS:
        raise ConfigError(f"model.generator={name!r}: must be one of {', '.join(GENERATORS)}")
    return GENERATORS[name]


def _keys(section: type, prefix: str = "", *, model: type = ModelConfig) -> Iterator[str]:
    """The dotted key of every value of a section; `model`: which section `model` is."""
    for f in dataclasses.fields(section):
        inner: Any = model if section is TrainConfig and f.name == "model" else f.default_factory
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from _keys(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _with_sections(keys: Sequence[str]) -> set[str]:
    """The dotted keys of all values and of all sections."""
    return set(keys).union(*({key[:i] for i, letter in enumerate(key) if letter == "."} for key in keys))


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_key(key: str, known: Sequence[str]) -> None:
    """Raise `ConfigError` with the nearest known key unless `key` is a value or a section of the config."""
    if key in _with_sections(known):
        return
    same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, same_name or known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"unknown config key {key!r}; the nearest known key is {nearest!r}")
