"""The parts of a training run: what `Trainer` steps, built from the config or given by the user.

parts = build_parts(config, teachers={"mine": MyTeacher()})      # the rest as the config describes
Trainer(config, parts).train()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from prd.cameras import CamerasConfig
from prd.data.embeddings import Embeddings
from prd.data.prompts import Corpus, load_corpus
from prd.data.shape_library import ShapeLibrary, open_library
from prd.distillation.distill import AsdLoss
from prd.distillation.protocol import DistillationLoss
from prd.distillation.regularizers import Regularizer
from prd.errors import ConfigError
from prd.evaluation.benchmark import Benchmark, resolve_benchmark
from prd.generators.protocol import Model
from prd.hub.shipped import shipped
from prd.rendering.protocol import Renderer
from prd.teachers.base import Teacher, TeacherConfig, UNetTeacher
from prd.teachers.multiview import own_cameras
from prd.teachers.offload import set_offload
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_digest
from prd.training.classes import SECTIONS, class_name_of, given_class, part_class, settings_by_key
from prd.training.config import TrainConfig
from prd.training.precision import dtype_of, teachers_dtype
from prd.training.recipes import configured_parts, from_dict, stages_of, to_dict
from prd.utils.imports import check_members
from prd.utils.progress import loading

LOADING = ("path", "dtype")  # settings of a teacher that it is loaded by
PER_STEP = tuple(f.name for f in fields(TeacherConfig) if f.name not in LOADING)


@dataclass
class Parts:
    """Parts of a training run: the model, and all that it is trained by.

    model         the network, of which some parts are trained
    text_encoder  makes the embeddings [B, L, Ct] that the model is given
    corpus        the prompts
    renderers     by name, at least one
    teachers      by name, frozen; their weight and guidance are the config's, the defaults for those it does not name
    regularizers  by name; their weights are the config's, 1 for those it does not name
    loss          of each teacher
    library       of 3D shapes, for a model that takes point clouds; None without
    benchmark     measures what the model makes of its captions; None: nothing does
    """

    model: Model
    text_encoder: PromptEncoder
    corpus: Corpus
    renderers: dict[str, Renderer]
    teachers: dict[str, Teacher] = field(default_factory=dict)
    regularizers: dict[str, Regularizer] = field(default_factory=dict)
    loss: DistillationLoss = field(default_factory=AsdLoss)
    library: ShapeLibrary | None = None
    benchmark: Benchmark | None = None

    def to(self, device: torch.device, *, offload: bool = False, offload_texts: bool = False) -> Parts:
        """Move every part to a device; offload, offload_texts: teachers, or all text encoders, stay in main memory."""
        self.model.to(device)
        for teacher in self.teachers.values():
            if isinstance(teacher, torch.nn.Module):
                set_offload(teacher) if offload else teacher.to(device)
        self.text_encoder.model.to(device)
        if offload_texts:
            teachers = [teacher for teacher in self.teachers.values() if isinstance(teacher, UNetTeacher)]
            for encoder in (self.text_encoder, *(teacher.prompt_encoder for teacher in teachers)):
                encoder.set_offload(device)
        return self


def build_parts(
    config: TrainConfig,
    device: torch.device | str = "cpu",
    *,
    model: tuple[Model, PromptEncoder] | None = None,
    renderers: Mapping[str, Renderer] | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    regularizers: Mapping[str, Regularizer] | None = None,
    loss: DistillationLoss | None = None,
) -> Parts:
    """The parts that a config describes, on a device; those given are taken instead of the config's.

    model  the network and the encoder of its prompts, as `from_config` of the model's class returns them

    Raises ConfigError for a part that is not what its section asks for, and what loading a part raises.
    """
    if model is not None and not (isinstance(model, tuple) and len(model) == 2):
        raise ConfigError(
            f"model={type(model).__name__}: must be (model, text encoder), as the class's from_config returns it"
        )
    given: dict[str, Any] = {"renderers": renderers, "teachers": teachers, "regularizers": regularizers}
    config = with_classes(config, {"model": model and model[0], "distillation": loss, **given})
    device, stages = torch.device(device), [stage.config for stage in stages_of(config)]
    corpus = load_corpus(config.prompts, config.seed)
    embeddings = None if config.prompts.embeddings is None else Embeddings(config.prompts.embeddings)
    if embeddings is not None:
        embeddings.check_covers(corpus.prompts)
    network, encoder = build_model(config) if model is None else model
    network.to(device)
    loaded = build_teachers(config, stages) if teachers is None else dict(teachers)
    if network.shares_text_encoder and not config.teacher_options.offload:
        encoder = shared_encoder(encoder, list(loaded.values()))
    parts = Parts(
        network,
        encoder,
        corpus,
        renderers=build_renderers(config, stages) if renderers is None else dict(renderers),
        teachers=loaded,
        regularizers=build_regularizers(config, stages) if regularizers is None else dict(regularizers),
        loss=_class_of(config, "distillation").from_config(config.distillation) if loss is None else loss,
    ).to(device, **offloaded(config))
    check_parts(parts, config)
    if embeddings is not None:
        parts.text_encoder = embeddings.encoder(encoder, "student")
        for teacher in loaded.values():
            if isinstance(teacher, UNetTeacher):
                teacher.prompt_encoder = embeddings.encoder(teacher.prompt_encoder, teacher.name)
    parts.benchmark = resolve_benchmark(config.benchmark, config.prompts.source, config.prompts.texts)
    parts.library = open_library(config.library, parts.text_encoder, network)
    return parts


def offloaded(config: TrainConfig) -> dict[str, bool]:
    """Arguments of `Parts.to`: text encoders stay in main memory as asked, else where prompts are embedded."""
    asked = config.offload_text_encoders
    texts = config.prompts.embeddings is not None if asked is None else asked
    return {"offload": config.teacher_options.offload, "offload_texts": texts}


def build_model(config: TrainConfig) -> tuple[Model, PromptEncoder]:
    """The model that the config describes, and the encoder of its prompts."""
    with torch.device("cpu"):  # whatever torch's default device is: what is drawn depends on it
        return _class_of(config, "model").from_config(
            config.model,
            num_denoising_steps=config.num_denoising_steps,
            text_dtype=teachers_dtype(config),
            init_from=config.init_from,
        )


def build_renderers(config: TrainConfig, stages: Sequence[TrainConfig]) -> dict[str, Renderer]:
    """The renderers that any stage names; their schedules are resolved at every step."""
    settings = {name: own for stage in reversed(stages) for name, own in stage.renderers.items()}
    names = dict.fromkeys(name for stage in stages for name in stage.renderers)
    return {name: _class_of(config, f"renderers.{name}", stages).from_config(settings[name]) for name in names}


def build_regularizers(config: TrainConfig, stages: Sequence[TrainConfig]) -> dict[str, Regularizer]:
    """The regularisers that any stage names: the library's, the user's functions, instances of the user's classes."""
    found: dict[str, Regularizer] = {}
    for stage in stages:
        for name, settings in stage.regularizers.items():
            if name not in found:
                kind: Any = _class_of(config, f"regularizers.{name}", stages)
                if isinstance(kind, type) and not hasattr(kind, "from_config"):
                    raise ConfigError(
                        f"regularizers.{name}.class: {kind.__name__} has no from_config(config); write one, or name a "
                        "function of what was rendered"
                    )
                is_class = isinstance(kind, type)
                found[name] = kind.from_config(settings) if is_class else kind
    return found


def build_teachers(config: TrainConfig, stages: Sequence[TrainConfig]) -> dict[str, Teacher]:
    """The teachers that any stage enables, by name, frozen, on the CPU."""
    loaded: dict[str, Teacher] = {}
    for name in dict.fromkeys(name for stage in stages for name in stage.teachers):
        if (settings := _as_loaded(name, stages)) is not None:
            kind = _class_of(config, f"teachers.{name}", stages)
            dtype = dtype_of(config, settings)
            with loading(f"teacher {name}"):
                loaded[name] = kind.from_config(_placed(kind, settings), options=config.teacher_options, dtype=dtype)
    share_texts(list(loaded.values()))
    return loaded


def with_classes(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """The config with the class of every part whose name does not tell it, so that it can be written and read again.

    given  parts, or None, by section: of a section by names a mapping

    Raises ConfigError for settings of a class that is neither the library's nor that of a given part, or that no import
    path leads to, and for all else that could not be read again.
    """
    found = dict[str, str | None]()
    for key, settings in settings_by_key(config).items():
        section, _, name = key.partition(".")
        part = (given.get(section) or {}).get(name) if name else given.get(section)
        own = None if part is None else given_class(SECTIONS[section], settings, part)
        class_name = own or class_name_of(config, key)
        if class_name != config.classes.get(key, name or SECTIONS[section].default):
            found[key] = class_name
    if found:
        config = replace(config, classes={**config.classes, **found})
    from_dict(to_dict(config))
    return config


def check_parts(parts: Parts, config: TrainConfig) -> None:
    """ConfigError for a part that lacks a member of its protocol, and for cameras that teachers do not know."""
    check_members(parts.model, Model, f"model ({type(parts.model).__name__})")
    for name, renderer in parts.renderers.items():
        check_members(renderer, Renderer, f"renderers.{name} ({type(renderer).__name__})")
    for name, teacher in parts.teachers.items():
        check_members(teacher, Teacher, f"teachers.{name} ({type(teacher).__name__})")
    configured = configured_parts(stages := stages_of(config))
    for stage in stages:
        own = stage.config.enabled_teachers
        asked = {n: part for n, part in parts.teachers.items() if n in own or f"teachers.{n}" not in configured}
        check_views(asked, stage.config.cameras, f" in stage {stage.name}" if stage.name else "")


def check_views(teachers: Mapping[str, Teacher], cameras: CamerasConfig, where: str = "") -> None:
    """ConfigError for teachers that see another number of views, or another projection, than they are shown.

    cameras  of the run or of a stage, for the teachers without cameras of their own
    where    named after them in the error: " in stage mesh"
    """
    shown = dict[str, Teacher]()
    for name, teacher in teachers.items():
        if (own := own_cameras(teacher)) is None:
            shown[name] = teacher
        elif own.views != teacher.num_views:
            raise ConfigError(
                f"teachers.{name}: its own cameras have views={own.views}, but it sees {teacher.num_views}"
            )
    views = cameras.views
    for count in {teacher.num_views for teacher in shown.values()} - {1, views}:
        names = " and ".join(name for name, teacher in shown.items() if teacher.num_views == count)
        raise ConfigError(f"cameras.views={views}{where}: must be {count}, which {names} see")
    told = [name for name, teacher in shown.items() if getattr(teacher, "takes_cameras", False)]
    if told and cameras.projection != "perspective":
        raise ConfigError(
            f"cameras.projection={cameras.projection}{where}: must be perspective, which {' and '.join(told)} "
            "was trained with, or leave that teacher out"
        )


def shared_encoder(encoder: PromptEncoder, teachers: Sequence[Teacher]) -> PromptEncoder:
    """A teacher's text encoder in the place of `encoder` if it is the same, so that there is one."""
    digest = encoder_digest(encoder)
    own = [teacher.prompt_encoder for teacher in teachers if isinstance(teacher, UNetTeacher)]
    return next((other for other in own if encoder_digest(other) == digest), encoder)


def share_texts(teachers: Sequence[Teacher]) -> None:
    """Let teachers whose text encoders are the same, weights and tokenizer, have one, which encodes a prompt once."""
    known: dict[str, UNetTeacher] = {}
    for teacher in teachers:
        if isinstance(teacher, UNetTeacher):
            first = known.setdefault(encoder_digest(teacher.prompt_encoder), teacher)
            teacher.text_encoder, teacher.prompt_encoder = first.text_encoder, first.prompt_encoder


def _class_of(config: TrainConfig, key: str, stages: Sequence[TrainConfig] = ()) -> Any:
    """The class of a part; `stages`: whose configs may name parts that the run's own does not."""
    section, _, name = key.partition(".")
    owner = next((stage for stage in stages if name in getattr(stage, section)), config)
    return part_class(SECTIONS[section], class_name_of(owner, key), key)


def _as_loaded(name: str, stages: Sequence[TrainConfig]) -> TeacherConfig | None:
    """A teacher's settings in the stages that enable it, None if none does; ConfigError if these load it differently.

    What is read at every step (enabled, weight, guidance) may change from stage to stage; the rest loads it.
    """
    enabled = [stage.teachers[name] for stage in stages if name in stage.enabled_teachers]
    for f in fields(enabled[0]) if enabled else ():
        values = {getattr(settings, f.name) for settings in enabled}
        if len(values) > 1 and f.name not in PER_STEP:
            raise ConfigError(
                f"teachers.{name}.{f.name}: is {' and '.join(sorted(map(str, values)))} in stages; a teacher is "
                "loaded once: give the stages that enable it one value"
            )
    return enabled[0] if enabled else None


def _placed(kind: Any, settings: Any) -> Any:
    """A teacher's settings with folders in the place of the names of what ships with the package.

    A class of the user's own has the folder of the library's class that it derives from.
    """
    names = [vars(base).get("name") for base in getattr(kind, "__mro__", ())]
    folders = (shipped(settings.path, name) for name in names if isinstance(name, str))
    places = {"path": next((folder for folder in folders if folder is not None), None)}
    if getattr(settings, "controlnet", None) is not None:
        places["controlnet"] = shipped(settings.controlnet, "controlnet")
    return replace(settings, **{key: str(place) for key, place in places.items() if place is not None})
