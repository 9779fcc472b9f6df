"""The configuration of a training run: nested frozen dataclasses, YAML and dotted command-line overrides.

    config = load_config("toybox", ["--optimizer.lr", "1e-3", "--max_train_steps=10"])
    config = parse_args(["--config", "configs/triplane_turbo_sd21.yaml", "--seed", "1"])
    save_config(config, "runs/a/config.yaml")          # loading it again gives an equal config

A value on the command line is read as YAML (`--cameras.elevation "[0, 30]"`, `--ema_decay null`). A `Schedule` is a
number, or [start, end]: linear from the first training step to step `schedule_steps`, constant after it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

Schedule = float | tuple[float, float]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=2)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Radius = Annotated[float, Field(gt=0, lt=1)]
Elevation = Annotated[float, Field(gt=-90, lt=90)]
Timestep = Annotated[float, Field(ge=1, le=999)]

_CHECKS = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


SWITCHES = ("start_afresh", "allow_config_change")  # need no value on the command line


class ConfigError(ValueError):
    """A configuration that cannot be used: an unknown key, a value of the wrong type or outside its range."""


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class ModelConfig:
    """The student: a frozen Stable Diffusion with PETA adapters and the three heads."""

    base: str = "toybox"  # Hub id or folder of a Stable Diffusion; "toybox" is the one shipped in the package
    revision: str | None = None  # branch, tag or commit of a Hub id
    rank: Count = 16  # rank of every LoRA pair
    plane_wise: bool = True  # one LoRA pair per plane in the self-attention; False: one pair for all six
    self_attention_rank: Count | None = None  # there alone; 6 * rank with plane_wise=False: as many parameters
    self_attention: bool = True  # whether it is adapted, as the next four
    cross_attention: bool = True
    convolutions: bool = True  # of the U-Net
    decoder_attention: bool = True
    decoder_convolutions: bool = True
    full: bool = False  # full fine-tuning: the whole U-Net and decoder instead of adapters
    plane_channels: Count = 16  # channels of each plane; the decoder's last convolution puts out twice as many
    head_width: Count = 32  # hidden width of the sdf, deformation and colour MLPs
    latent_size: Count = 32  # height and width of each plane's latents
    sdf_init_scale: Positive = 1.0  # of the sdf head's last layer at the start; below 1 training starts near the sphere
    sphere_radius: Radius = 0.5  # the sdf head's output is added to |p| - sphere_radius, scene units
    gradient_checkpointing: bool = False  # recompute the U-Net's and the decoder's activations in the backward pass


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class PromptsConfig:
    """What is asked of the student."""

    source: str = "toybox"  # "toybox", "pig64", "animal2400", a .txt .json .jsonl .csv .parquet file, or a Hub dataset
    column: str = "prompt"  # of a .jsonl, .csv or .parquet file or a Hub dataset
    split: str = "train"  # of a .json file of splits, a Hub dataset, "pig64" or "animal2400"
    revision: str | None = None  # branch, tag or commit of a Hub dataset
    embeddings: str | None = None  # folder `prd embed` wrote; null: prompts are encoded in the batch
    held_out: tuple[str, ...] = ()  # prompts never trained on; exactly these texts
    stack_fraction: Fraction = 0.0  # toy box: probability of drawing "a .. on a .." instead of a single object


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class CamerasConfig:
    """Orbit cameras around the object; azimuths are spaced evenly from a random start."""

    views: Count = 4  # views a prompt, evenly spaced in azimuth
    elevation: tuple[Elevation, Elevation] = (0.0, 30.0)  # range, degrees above the horizon
    relative_distance: tuple[Positive, Positive] = (0.8, 1.0)  # range of distance * tan(fovy / 2)
    fovy: Annotated[float, Field(gt=0, lt=180)] = 60.0  # vertical field of view, degrees

    @model_validator(mode="after")
    def _check(self) -> CamerasConfig:
        for name in ("elevation", "relative_distance"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}=[{low}, {high}]: must be [low, high]")
        return self


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class VolumeConfig:
    """The NeuS volume renderer."""

    height: Count = 128  # image height, pixels
    width: Count = 128  # image width, pixels
    num_samples: Size = 64  # uniform samples a ray; the proposal's fine samples if there is importance sampling
    num_importance_samples: Annotated[int, Field(ge=0)] = 128  # proposal samples a ray; 0: none
    inv_std: Positive | tuple[Positive, Positive] = 100.0  # s of the logistic density, 1 / scene units
    grid_resolution: Size | None = None  # evaluate the field once on a grid of this resolution; null: at every sample
    max_rays: Count | None = None  # rays of a prompt at a time, made again in the backward pass; null: all at once
    rgb_gradient_scale: Schedule = 1.0  # scale of the images' gradient to the colours
    rgb_weight_gradient_scale: Schedule = 1.0  # scale of the RGB images' gradient to the compositing weights (geometry)


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class SurfaceConfig:
    """The mesh renderer: isosurface and rasteriser."""

    height: Count = 512  # image height, pixels
    width: Count = 512  # image width, pixels
    grid_resolution: Size = 128  # cells of the isosurface grid along each axis
    sdf_gradient_scale: Schedule = 0.001  # scale of the images' gradient to the sdf
    deformation_gradient_scale: Schedule = 0.001  # scale of the images' gradient to the deformation


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class TeacherConfig:
    """One teacher and its guidance."""

    enabled: bool = True  # False: not loaded
    path: str = "toybox"  # Hub id or folder in diffusers' layout; "toybox" is the one shipped in the package
    weight: NonNegative = 1.0  # of this teacher's loss
    guidance_scale: Schedule = 7.5  # classifier-free guidance
    eta: Fraction = 0.0  # largest timestep shift over t - T_min (ASD); 0: no third pass
    negative_prompt: str = ""  # of the classifier-free guidance


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class StableDiffusionConfig(TeacherConfig):
    """Stable Diffusion, which sees one view of a prompt and may be told which."""

    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"
    controlnet: str | None = None  # Hub id or folder of a depth ControlNet made for it; null: none
    controlnet_scale: Positive = 1.0  # of what the ControlNet adds


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class DeepFloydConfig(TeacherConfig):
    """DeepFloyd IF's first stage, the prior of AToM and ATT3D-IF; not one of the paper's teachers."""

    enabled: bool = False  # True: loaded
    path: str = "DeepFloyd/IF-I-XL-v1.0"  # Hub id or folder in diffusers' layout
    guidance_scale: Schedule = 20.0  # classifier-free guidance
    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class RichDreamerConfig(TeacherConfig):
    """RichDreamer, whose normal and disparity images have two conventions."""

    # in [-1, 1] bilinear, or as published in [0, 1] averaged, these two alone; null: as teacher_config.json says
    input_convention: Literal["richdreamer", "triplane_turbo"] | None = None


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class TeachersConfig:
    """The three teachers of the paper, section 3.4, and how all are kept."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of their weights; null: as mixed_precision says
    checkpoint_vae: bool = False  # recompute the VAE encoders in the backward pass: memory for time, the same numbers
    offload: bool = False  # keep idle teachers in main memory
    stable_diffusion: StableDiffusionConfig = field(default_factory=StableDiffusionConfig)  # one random view a prompt
    mvdream: TeacherConfig = field(default_factory=TeacherConfig)  # all views jointly, RGB
    richdreamer: RichDreamerConfig = field(default_factory=RichDreamerConfig)  # all views jointly, normal + disparity
    deepfloyd: DeepFloydConfig = field(default_factory=DeepFloydConfig)  # one random view a prompt, in pixels

    @property
    def enabled(self) -> list[TeacherConfig]:
        """Those that are enabled."""
        every = (self.stable_diffusion, self.mvdream, self.richdreamer, self.deepfloyd)
        return [teacher for teacher in every if teacher.enabled]

    @model_validator(mode="after")
    def _check(self) -> TeachersConfig:
        if not self.enabled:
            raise ValueError("no teacher is enabled; enable at least one, as teachers.mvdream.enabled: true")
        return self


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class DistillationConfig:
    """Asynchronous score distillation, paper Eq. 1-2."""

    t_min: Timestep | tuple[Timestep, Timestep] = (500.0, 20.0)  # smallest teacher timestep, of 1000
    t_max: Annotated[int, Field(ge=1, le=999)] = 980  # end of the teacher timesteps drawn, excluded
    weighting: Literal["dmd", "uniform", "sds", "sqrt"] = "dmd"  # w(t); "dmd" is Eq. 2
    delta: Positive = 0.1  # added to the denominator of Eq. 2
    reference: Literal["shifted", "noise"] = "shifted"  # ASD (without a shift CSD), or SDS
    x0_from: Literal["noisy", "clean"] = "noisy"  # latent of the x0 estimates: the paper's, or the published code's
    average_over: Literal["prompt", "image"] = "prompt"  # the mean of Eq. 2: the paper's, or the published code's
    grad_clip: Positive | None = None  # bound on each element of a teacher's gradient at its input; null: none

    @model_validator(mode="after")
    def _check(self) -> DistillationConfig:
        for t_min in self.t_min if isinstance(self.t_min, tuple) else (self.t_min,):
            if t_min >= self.t_max:
                raise ValueError(f"t_min={t_min}: must be below t_max={self.t_max}, which is excluded")
        return self


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class RegularizersConfig:
    """Weights of the geometric regularisers on the volume render."""

    eikonal: Schedule = (1.0, 0.0)  # weight of mean (|grad sdf| - 1)^2
    sparsity: Schedule = (1.0, 0.0)  # weight of the mean opacity


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class OptimizerConfig:
    """The optimiser of adapters and heads."""

    name: Literal["adan", "adamw"] = "adamw"  # Adan takes three betas, AdamW two
    lr: Positive = 1e-3  # peak learning rate
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.9, 0.99)  # moment decays
    eps: Positive = 1e-12  # added to the denominator
    weight_decay: NonNegative = 0.0  # decoupled
    warmup_steps: Annotated[int, Field(ge=0)] = 20  # linear warm-up of lr
    decay_fraction: Fraction = 0.4  # last part of the run over which lr falls linearly; 0: constant
    final_lr_fraction: Fraction = 0.05  # of the peak, at the end of that decay
    max_grad_norm: Positive | None = None  # clip the gradient's global norm; null: not

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        expected = {"adan": 3, "adamw": 2}[self.name]
        if len(self.betas) != expected:
            raise ValueError(f"betas={list(self.betas)}: {self.name} takes {expected} values")
        return self


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class ValidationConfig:
    """What is generated, drawn and measured before, during and after training."""

    prompts: tuple[str, ...] = ()  # drawn on the contact sheet and exported as .glb
    every_steps: Count | None = None  # measure every so many steps; null: before and after only
    spread_steps: Count | None = 100  # check that shapes of different prompts differ every so many steps; null: never
    gallery_steps: Count | None = None  # draw, measure and export the prompts every so many steps; null: never
    num_inference_steps: Count = 4  # denoising steps of the student
    views: Count = 4  # views a prompt on the contact sheet
    stacks: Count = 24  # toy box: stacks measured at the end, of each of the seen and held-out ones
    resolution: Count = 128  # image height and width on the contact sheet, pixels
    isosurface_resolution: Size = 64  # grid of the exported meshes


@dataclass(frozen=True, kw_only=True, config=_CHECKS)
class TrainConfig:
    """A whole training run of Progressive Rendering Distillation."""

    seed: int = 0  # of every random draw
    output_dir: str = "runs/prd"  # the run folder
    max_train_steps: Count = 15000  # optimiser steps
    schedule_steps: Count | None = None  # where every [start, end] schedule reaches its end; null: max_train_steps
    max_train_minutes: Positive | None = None  # wall-clock limit of the run; null: none
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # of the teachers' weights and the student's autocast
    train_batch_size: Count = 2  # prompts a process and step
    gradient_accumulation_steps: Count = 1  # batches an optimiser step
    num_denoising_steps: Count = 4  # K of Algorithm 1
    estimates_at_once: Count = 1  # of these K, decoded and judged in one batch: for small models; memory of as many
    renderers: Literal["both", "alternate", "volume", "surface"] = "both"  # at each of the K steps; alternate: in turn
    background: Fraction = 0.5  # grey level behind the object
    text_background: bool = False  # train over an environment made from the text instead, trained along; shown: grey
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # moving average of the trained weights; null: none
    checkpointing_steps: Count = 500  # save a checkpoint every so many steps
    checkpoints_total_limit: Count | None = 3  # older checkpoints are removed; null: keep all
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or "latest"
    start_afresh: bool = False  # where "latest" finds nothing to resume from
    allow_config_change: bool = False  # resume from a checkpoint that was trained with another config
    report_to: str | None = "tensorboard"  # an Accelerate tracker besides metrics.jsonl, as "wandb"; null: none
    num_threads: Count | None = None  # torch's CPU threads; null: OMP_NUM_THREADS, or cores / processes of the machine
    model: ModelConfig = field(default_factory=ModelConfig)  # the student
    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # the corpus
    cameras: CamerasConfig = field(default_factory=CamerasConfig)  # where it is seen from
    volume: VolumeConfig = field(default_factory=VolumeConfig)  # the first renderer
    surface: SurfaceConfig = field(default_factory=SurfaceConfig)  # the second renderer
    teachers: TeachersConfig = field(default_factory=TeachersConfig)  # who judges
    distillation: DistillationConfig = field(default_factory=DistillationConfig)  # the loss
    regularizers: RegularizersConfig = field(default_factory=RegularizersConfig)  # of the geometry
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # of adapters and heads
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # what is measured

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
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
    for key in _leaves(values):
        _check_key(key)
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML or JSON."""
    return _ADAPTER.dump_python(config, mode="json")


def load_config(config: str | Path = "toybox", overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, or a recipe shipped with the package by its bare name, and apply dotted overrides.

    overrides  command-line words: ["--optimizer.lr", "1e-3", "--seed=1"]

    Raises `ConfigError` for a file that does not exist or is no mapping, an unknown key (naming the nearest known
    one), a value of the wrong type or outside its range.
    """
    values = _read_yaml(_find(config))
    for key, value in _parse_overrides(overrides):
        _check_key(key)
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
    Path(path).write_text(dump_config(config), encoding="utf-8")


def dump_config(config: TrainConfig) -> str:
    """Every value as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, each accepted by `--config`."""
    folder = resources.files("prd") / "configs"
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
        return Path(str(resources.files("prd") / "configs" / f"{config}.yaml"))
    raise ConfigError(f"config={str(config)!r}: no such file; give a YAML file or one of {shipped_recipes()}")


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


def _explain(error: ValidationError) -> str:
    """One sentence about the first wrong value: its dotted key, the value and what is allowed."""
    first, *others = error.errors(include_url=False)
    path = [str(part) for part in first["loc"]]
    known = _known()
    while path and ".".join(path) not in known:
        path.pop()  # pydantic ends the location of a union by its branch, of a tuple by its index
    messages = [first["msg"]] + [e["msg"] for e in others if [str(part) for part in e["loc"]][: len(path)] == path]
    text = ", or ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in messages))
    key = ".".join(path)
    if first["type"] == "value_error":
        return f"{key}: {text}" if key else text
    return f"{key}={first['input']!r}: {text}"


def _keys(section: type, prefix: str = "") -> Iterator[str]:
    """The dotted key of every value of a section."""
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(f.default_factory) and isinstance(f.default_factory, type):
            yield from _keys(f.default_factory, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _known() -> set[str]:
    """The dotted keys of all values and of all sections."""
    keys = list(_keys(TrainConfig))
    return set(keys).union(*({key[:i] for i, letter in enumerate(key) if letter == "."} for key in keys))


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_key(key: str) -> None:
    """Raise `ConfigError` with the nearest known key unless `key` is a value or a section of the config."""
    if key in _known():
        return
    known = list(_keys(TrainConfig))
    same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, same_name or known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"unknown config key {key!r}; the nearest known key is {nearest!r}")
