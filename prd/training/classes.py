"""The classes that a config may name for its parts: the library's by short names, the user's own by import paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from inspect import isfunction
from typing import Any

from prd.distillation.distill import AsdLoss
from prd.distillation.protocol import DistillationLoss
from prd.distillation.regularizers import REGULARIZERS, RegularizerConfig
from prd.errors import ConfigError
from prd.generators.atom import AtomModel
from prd.generators.att3d import Att3dModel
from prd.generators.latte3d import Latte3dModel
from prd.generators.protocol import Model
from prd.generators.triplane_turbo import TriplaneTurboModel
from prd.rendering.patch import PatchRenderer
from prd.rendering.protocol import Renderer
from prd.rendering.surface import SurfaceRenderer
from prd.rendering.volume import VolumeRenderer
from prd.splats.renderer import SplatRenderer
from prd.teachers.base import ConfigurableTeacher, TeacherConfig
from prd.teachers.deepfloyd import DeepFloydTeacher
from prd.teachers.mv_adapter import MVAdapterTeacher, MVAdapterXLTeacher
from prd.teachers.mvdream import MVDreamTeacher
from prd.teachers.pixart import PixArtTeacher
from prd.teachers.richdreamer import RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.teachers.stable_diffusion_3 import StableDiffusion3Teacher
from prd.teachers.stable_diffusion_xl import StableDiffusionXLTeacher
from prd.utils.imports import import_path, load_class


@dataclass(frozen=True)
class Section:
    """A section of the config whose settings are a part's own.

    built_in    the library's classes by the names that `class` may give
    protocol    what a class of the user's own must be; None: any function or class
    config      base class of its settings; None: any dataclass
    default     of a section that is one part, the name that it has without a `class`; None: a mapping by name, in
                which a part's name tells its class
    shorthand   the setting that a bare value stands for, as `eikonal: [1, 0]` for {weight: [1, 0]}
    """

    built_in: Mapping[str, Any]
    protocol: type | None = None
    config: type | None = None
    default: str | None = None
    shorthand: str | None = None


SECTIONS: dict[str, Section] = {
    "model": Section(
        {
            "triplane_turbo": TriplaneTurboModel,
            "atom": AtomModel,
            "att3d": Att3dModel,
            "latte3d": Latte3dModel,
        },
        Model,
        default="triplane_turbo",
    ),
    "teachers": Section(
        {
            "stable_diffusion": StableDiffusionTeacher,
            "mvdream": MVDreamTeacher,
            "richdreamer": RichDreamerTeacher,
            "deepfloyd": DeepFloydTeacher,
            "stable_diffusion_xl": StableDiffusionXLTeacher,
            "stable_diffusion_3": StableDiffusion3Teacher,
            "pixart": PixArtTeacher,
            "mv_adapter": MVAdapterTeacher,
            "mv_adapter_xl": MVAdapterXLTeacher,
        },
        ConfigurableTeacher,
        config=TeacherConfig,
    ),
    "renderers": Section(
        {"volume": VolumeRenderer, "surface": SurfaceRenderer, "patch": PatchRenderer, "splats": SplatRenderer},
        Renderer,
    ),
    "regularizers": Section(REGULARIZERS, config=RegularizerConfig, shorthand="weight"),
    "distillation": Section({"asd": AsdLoss}, DistillationLoss, default="asd"),
}


@dataclass(frozen=True)
class Entry:
    """A part as a config writes it: where, its values, and the class that they are settings of."""

    key: str  # dotted: "model", "teachers.mine"
    section: Section
    values: dict[str, Any]  # without `class`
    class_name: str | None  # a built-in's name or an import path; None: of a part that the trainer is given
    named: bool  # whether the config has a key `class`, rather than the part's name telling it

    @property
    def config_class(self) -> type:
        """The class of its settings; ConfigError where its class has none that the section takes."""
        if self.class_name is None and self.section.config is not None:
            return self.section.config
        return config_class_of(part_class(self.section, self.class_name, self.key), self.section, self.key)


def entries(values: Mapping[str, Any]) -> Iterator[Entry]:
    """The parts in the nested values of a config. Raises ConfigError for one that is no mapping of settings."""
    for name, section in SECTIONS.items():
        if name not in values:
            continue
        given = values[name]
        if section.default is not None:
            yield _entry(name, section, given, section.default)
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name}={given!r}: must be a mapping of names to settings")
        for part, settings in given.items():
            yield _entry(f"{name}.{part}", section, settings, str(part))


def _entry(key: str, section: Section, given: Any, default: str) -> Entry:
    if not isinstance(given, Mapping):
        if section.shorthand is None or given is None:
            raise ConfigError(f"{key}={given!r}: must be a mapping of settings")
        given = {section.shorthand: given}
    values = {str(name): value for name, value in given.items()}
    if section.config is not None and default not in section.built_in and values.get("class", "") is None:
        del values["class"]
        return Entry(key, section, values, None, True)
    named = values.pop("class", None)
    if named is not None and not isinstance(named, str):
        raise ConfigError(f"{key}.class={named!r}: must be {_choices(section)}")
    return Entry(key, section, values, named or default, named is not None)


def part_class(section: Section, name: str | None, key: str) -> Any:
    """The class (or the function) of a name or an import path.

    Raises ConfigError if there is none, or if a class of the user's own lacks a method of the section's protocol.
    """
    if name is None:
        raise ConfigError(
            f"{key}.class=null: names no class; give the part in Python, to build_parts or Trainer(config, parts), or "
            "name its class, as class: my_module.MyClass"
        )
    if name in section.built_in:
        return section.built_in[name]
    if "." not in name:
        where = f"{key}.class={name!r}" if key.rpartition(".")[2] != name else key
        raise ConfigError(f"{where}: must be {_choices(section)}")
    return load_class(name, section.protocol, key=f"{key}.class")


def config_class_of(part: Any, section: Section, key: str) -> type:
    """The class of a part's settings; ConfigError if it has none, or one that this section does not take."""
    config = getattr(part, "config_class", None)
    if config is None and section.config is not None and not isinstance(part, type):
        return section.config  # a function has no settings of its own
    name = getattr(part, "__name__", type(part).__name__)
    if not isinstance(config, type) or not is_dataclass(config):
        raise ConfigError(f"{key}: {name} has no config_class; give it a dataclass of its settings")
    if section.config is not None and not issubclass(config, section.config):
        raise ConfigError(f"{key}: {name}.config_class is {config.__name__}; derive it from {section.config.__name__}")
    return config


def setting_names(config_class: type) -> list[str]:
    """The keys of a part's settings."""
    return [f.name for f in fields(config_class)]


def _choices(section: Section) -> str:
    return f"one of {', '.join(section.built_in)}, or the import path of a class, as class: my_module.MyClass"


def settings_by_key(config: Any) -> dict[str, Any]:
    """The settings of every part of a `TrainConfig` by dotted key: "model", "teachers.mine"."""
    found = dict[str, Any]()
    for name, section in SECTIONS.items():
        own = getattr(config, name)
        found |= {name: own} if section.default is not None else {f"{name}.{part}": own[part] for part in own}
    return found


def class_name_of(config: Any, key: str) -> str | None:
    """The name of the class of a part of a `TrainConfig`: a built-in's or an import path.

    None for settings that no class owns (`TeacherConfig`, `RegularizerConfig`), of a part that the trainer is given.
    Raises ConfigError for settings of a class that the config does not name.
    """
    name, _, part = key.partition(".")
    section, kind = SECTIONS[name], type(settings_by_key(config)[key])
    named = config.classes.get(key)
    if named is not None and config_class_of(part_class(section, named, key), section, key) is kind:
        return named
    own = section.default or part
    found = [built_in for built_in, its in section.built_in.items() if config_class_of(its, section, key) is kind]
    if own in found or (own in section.built_in and kind is section.config):
        return own
    if kind is section.config:
        return None
    if not found:
        raise ConfigError(
            f"{key}: {kind.__name__} are the settings of a class that the config does not name; give the part to "
            "Trainer(config, parts), of a class that a module or a script holds, or name the class by "
            f"replace(config, classes={{{key!r}: 'my_module.MyClass'}})"
        )
    return found[0]


def given_class(section: Section, settings: Any, part: Any) -> str | None:
    """The name of the class (or the function) of a part given in Python: a built-in's or an import path.

    None where it is no class of these settings (or, of a section of functions, no function), or no path leads to it.
    """
    kind = part if isfunction(part) else type(part)
    is_function = section.protocol is None and kind is part and type(settings) is section.config
    if not is_function and getattr(kind, "config_class", None) is not type(settings):
        return None
    return next((name for name, its in section.built_in.items() if its is kind), import_path(kind))


def split_given_parts(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config's plain values without parts that have no class, which a user gave to the trainer; and those.

    What such a part is the config does not tell; its settings are compared as they are written.
    """
    kept, given = dict(values), dict[str, Any]()
    for name, section in SECTIONS.items():
        if section.default is None and isinstance(values.get(name), Mapping):
            for part, own in values[name].items():
                named = isinstance(own, Mapping) and own.get("class") is not None
                if part not in section.built_in and not named:
                    plain = isinstance(own, Mapping)
                    given[f"{name}.{part}"] = {k: v for k, v in own.items() if k != "class"} if plain else own
            kept[name] = {part: own for part, own in values[name].items() if f"{name}.{part}" not in given}
    return kept, given
