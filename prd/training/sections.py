"""The sections of a training configuration: nested frozen dataclasses, one comment a value.

A `Schedule` is a number, or [start, end]: linear from the first training step to step `schedule_steps`, constant after
it; in a run of several stages, from the first to the last step of a stage.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from prd.distillation.asd import AsdConfig as DistillationConfig  # noqa: F401
from prd.distillation.interpolation import InterpolationConfig  # noqa: F401
from prd.generators.atom import AtomConfig
from prd.generators.att3d import Att3dConfig
from prd.generators.latte3d import Latte3dConfig
from prd.teachers.base import TeacherConfig, TeacherOptions
from prd.teachers.deepfloyd import DeepFloydTeacherConfig as DeepFloydConfig
from prd.teachers.mvdream import MVDreamTeacherConfig
from prd.teachers.richdreamer import RichDreamerTeacherConfig as RichDreamerConfig
from prd.teachers.stable_diffusion import StableDiffusionTeacherConfig as StableDiffusionConfig
from prd.cameras import CamerasConfig  # noqa: F401
from prd.distillation.regularizers import RegularizersConfig  # noqa: F401
from prd.rendering.shading import ShadingConfig  # noqa: F401
from prd.rendering.surface import SurfaceConfig  # noqa: F401
from prd.rendering.volume import VolumeConfig  # noqa: F401
from prd.utils.checked_types import CHECKS, Count, Fraction, NonNegative, Positive, Radius, Schedule, Size

@dataclass(frozen=True, kw_only=True, config=CHECKS)
class ModelConfig:
    """TriplaneTurbo's student: a frozen Stable Diffusion with PETA adapters and the three heads."""

    generator: Literal["triplane_turbo"] = "triplane_turbo"  # which generator this section describes
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


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class PromptsConfig:
    """What is asked of the student."""

    texts: tuple[str, ...] = ()  # the prompts themselves, in the place of a source and of held_out
    source: str = "toybox"  # "toybox", "pig64", "animal2400", a .txt .json .jsonl .csv .parquet file, or a Hub dataset
    column: str = "prompt"  # of a .jsonl, .csv or .parquet file or a Hub dataset
    split: str = "train"  # of a .json file of splits, a Hub dataset, "pig64" or "animal2400"
    revision: str | None = None  # branch, tag or commit of a Hub dataset
    embeddings: str | None = None  # folder `prd embed` wrote; null: prompts are encoded in the batch
    held_out: tuple[str, ...] = ()  # prompts never trained on; exactly these texts
    stack_fraction: Fraction = 0.0  # toy box: probability of drawing "a .. on a .." instead of a single object


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class LibraryConfig:
    """A library of 3D shapes, for generators that take point clouds (LATTE3D)."""

    source: str | None = None  # "toybox", or a folder of meshes with its library.jsonl; null: none
    annealing: Schedule = 1.0  # share of a cloud's points that are the dummy's, from 0 to 1
    alpha: Schedule = 0.0  # a of (1 - a) distillation + a mask loss
    mask_weight: Positive = 1.0  # of the mask loss beside the distillation, which is a sum over pixels
    reconstruction: Schedule = 0.0  # weight of the loss of opacity, normals and disparity against the shape's

    @model_validator(mode="after")
    def _check(self) -> LibraryConfig:
        for name in ("annealing", "alpha"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}={given}: must lie in 0..1")
        return self


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class CamerasConfig:
    """Orbit cameras around the object; azimuths are spaced evenly from a random start."""

    views: Count = 4  # views a prompt, evenly spaced in azimuth
    elevation: tuple[Elevation, Elevation] = (0.0, 30.0)  # range, degrees above the horizon
    relative_distance: tuple[Positive, Positive] = (0.8, 1.0)  # range of distance * tan(fovy / 2)
    fovy: Angle | tuple[Angle, Angle] = 60.0  # vertical field of view, degrees; a range is drawn from
    distance: tuple[Positive, Positive] | None = None  # range, scene units, in the place of relative_distance

    @model_validator(mode="after")
    def _check(self) -> CamerasConfig:
        for name in ("elevation", "relative_distance", "fovy", "distance"):
            if not isinstance(given := getattr(self, name), tuple):
                continue
            low, high = given
            if low > high:
                raise ValueError(f"{name}=[{low}, {high}]: must be [low, high]")
        return self


@dataclass(frozen=True, kw_only=True, config=CHECKS)
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


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class SurfaceConfig:
    """The mesh renderer: isosurface and rasteriser."""

    height: Count = 512  # image height, pixels
    width: Count = 512  # image width, pixels
    grid_resolution: Size = 128  # nodes of the isosurface grid along each axis
    sdf_gradient_scale: Schedule = 0.001  # scale of the images' gradient to the sdf
    deformation_gradient_scale: Schedule = 0.001  # scale of the images' gradient to the deformation
    isosurface: Literal["cubes", "tetrahedra"] = "cubes"  # marching cubes, or DMTet's marching tetrahedra


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class ShadingConfig:
    """Shading of training renders by a random light, so that geometry is not drawn in the texture (DreamFusion, 3.1).

    The rest of the prompts, 1 - textureless - diffuse, keep their colours as they are ("shadeless").
    """

    textureless: Fraction = 0.0  # share of prompts rendered white under the light
    diffuse: Fraction = 0.0  # share of prompts whose colours are rendered under the light
    ambient: tuple[Fraction, Fraction] = (
        0.1,
        0.4,
    )  # range of the light from everywhere; the rest is diffuse
    light_distance: tuple[Positive, Positive] = (0.8, 1.5)  # range, over the camera's; the light is near the camera

    @model_validator(mode="after")
    def _check(self) -> ShadingConfig:
        if self.textureless + self.diffuse > 1:
            raise ValueError(f"textureless={self.textureless}, diffuse={self.diffuse}: are shares of one whole")
        return self


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class TeachersConfig(TeacherOptions):
class TeacherConfig:
    """One teacher and its guidance."""

    enabled: bool = True  # False: not loaded
    path: str = "toybox"  # Hub id or folder in diffusers' layout; "toybox" is the one shipped in the package
    weight: NonNegative = 1.0  # of this teacher's loss
    guidance_scale: Schedule = 7.5  # classifier-free guidance
    eta: Fraction = 0.0  # largest timestep shift over t - T_min (ASD); 0: no third pass
    negative_prompt: str = ""  # of the classifier-free guidance


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class StableDiffusionConfig(TeacherConfig):
    """Stable Diffusion, which sees one view of a prompt and may be told which."""

    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"
    controlnet: str | None = None  # Hub id or folder of a depth ControlNet made for it, or "toybox"; null: none
    controlnet_scale: Positive = 1.0  # of what the ControlNet adds


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class DeepFloydConfig(TeacherConfig):
    """DeepFloyd IF's first stage, the prior of AToM and ATT3D-IF; not one of the paper's teachers."""

    enabled: bool = False  # True: loaded
    path: str = "DeepFloyd/IF-I-XL-v1.0"  # Hub id or folder in diffusers' layout
    guidance_scale: Schedule = 20.0  # classifier-free guidance
    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class RichDreamerConfig(TeacherConfig):
    """RichDreamer, whose normal and disparity images have two conventions."""

    # in [-1, 1] bilinear, or as published in [0, 1] averaged, these two alone; null: as teacher_config.json says
    input_convention: Literal["richdreamer", "triplane_turbo"] | None = None


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class TeachersConfig:
    """The three teachers of the paper, section 3.4, and how all are kept."""

    stable_diffusion: StableDiffusionConfig = field(default_factory=StableDiffusionConfig)  # one random view a prompt
    mvdream: MVDreamTeacherConfig = field(default_factory=MVDreamTeacherConfig)  # all views jointly, RGB
    richdreamer: RichDreamerConfig = field(default_factory=RichDreamerConfig)  # all views jointly, normal + disparity
    deepfloyd: DeepFloydConfig = field(default_factory=DeepFloydConfig)  # one random view a prompt, in pixels

    @property
    def enabled(self) -> list[TeacherConfig]:
        """Those that are enabled."""
        every = (self.stable_diffusion, self.mvdream, self.richdreamer, self.deepfloyd)
        return [teacher for teacher in every if teacher.enabled]


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class RegularizersConfig:
    """Weights of the geometric regularisers on the volume render."""

    eikonal: Schedule = (1.0, 0.0)  # weight of mean (|grad sdf| - 1)^2
    sparsity: Schedule = (1.0, 0.0)  # weight of the mean opacity
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


@dataclass(frozen=True, kw_only=True, config=CHECKS)
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


@dataclass(frozen=True, kw_only=True, config=CHECKS)
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


Generators = ModelConfig | AtomConfig | Att3dConfig | Latte3dConfig  # what `model` may be, told by its `generator`
