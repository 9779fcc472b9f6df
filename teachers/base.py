"""The interface of a teacher, its settings, and the common part of all diffusers U-Net teachers.

A teacher turns renderings into its own input space (`encode`), makes its conditions (`condition`) and predicts noise
(`predict_noise`). Everything that differs between diffusion models (resolution, channels, text encoder, camera input,
epsilon or v prediction) stays behind these three calls, so a new teacher is one file: derive from `UNetTeacher`, write
`encode`, and `camera_input` if the model takes cameras.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prd.cameras import Cameras
from prd.loading.strict import load_strict, load_tokenizer
from prd.rendering.views import Views
from prd.teachers.loading import CONVERT, FLOW, PREDICTIONS, load_schedule
from prd.text.encoders import PromptEncoder, check_prompts, view_prompts
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS, Fraction, NonNegative, Place, Schedule, Text
from prd.utils.dtypes import accepts_torch_dtype

Resize = Literal["bilinear", "area"]
Dtype = Literal["float32", "bfloat16", "float16"]


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class TeacherConfig:
    """Settings of one teacher in a training run; a teacher's own settings are a subclass beside it."""

    enabled: bool = True  # False: not loaded
    path: Place = "toybox"  # Hub id or folder in diffusers' layout; "toybox" is the one shipped in the package
    weight: NonNegative = 1.0  # of this teacher's loss
    guidance_scale: Schedule = 7.5  # classifier-free guidance
    eta: Fraction = 0.0  # largest timestep shift over t - T_min (ASD); 0: no third pass
    negative_prompt: Text = ""  # of the classifier-free guidance
    dtype: Dtype | None = None  # of its weights; null: teacher_options.dtype


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class TeacherOptions:
    """Settings that all teachers of a training run share."""

    dtype: Dtype | None = None  # of their weights; null: mixed_precision's, on CUDA float16 for bfloat16
    checkpoint_vae: bool = False  # recompute the VAE encoders in the backward pass: memory for time, the same numbers
    offload: bool = False  # keep idle teachers in main memory, and their text encoders but for new texts


@dataclass(frozen=True)
class Condition:
    """Condition of n images; the rows are those of the teacher's x, prompt by prompt, view by view.

    prompt_embeds           [n, L, Ct]  the text to follow
    negative_prompt_embeds  [n, L, Ct]  the text guidance moves away from
    camera                  [n, D]      or None for a teacher without camera input
    control                 [n, 3, H, W] in [0, 1], the input image of a ControlNet, or None
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    camera: Tensor | None = None
    control: Tensor | None = None

    def negative(self) -> Condition:
        """Return the same with the negative prompt as the text to follow: the unconditional pass of guidance."""
        return replace(self, prompt_embeds=self.negative_prompt_embeds)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Concatenate conditions of one teacher, so that one U-Net call serves all passes."""
        cameras = [c.camera for c in conditions if c.camera is not None]
        controls = [c.control for c in conditions if c.control is not None]
        return Condition(
            torch.cat([c.prompt_embeds for c in conditions]),
            torch.cat([c.negative_prompt_embeds for c in conditions]),
            torch.cat(cameras) if cameras else None,
            torch.cat(controls) if controls else None,
        )


class Teacher(Protocol):
    """A frozen diffusion model that scores renderings. B prompts, n = B * num_views images.

    An instance joins a training run among its parts; a class that a recipe names is a `ConfigurableTeacher`.
    """

    name: str
    num_views: int  # views of a prompt that it sees together: 1 for Stable Diffusion, 4 for MVDream and RichDreamer
    alphas_cumprod: Tensor  # its noise schedule [T], float32: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one image of x."""
        ...

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        """Renderings as the model's input x [n, C, h, w], float32, differentiable in the views.

        A stochastic encoder (a VAE's posterior) draws with `noise`, standard normal [n, C, h, w]; without it, it
        returns the mean. A deterministic encoder ignores it.
        """
        ...

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        """Condition of the images of these prompts, seen from these cameras [B, num_views]."""
        ...

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Epsilon [n, C, h, w], float32, for x_t [n, C, h, w] at timesteps t [n], without gradient."""
        ...


class ConfigurableTeacher(Teacher, Protocol):
    """A teacher that a recipe can name by its import path: `teachers: {mine: {class: my_module.MyTeacher}}`.

    config_class  a dataclass of its settings, `TeacherConfig` or a subclass
    """

    config_class: ClassVar[type[TeacherConfig]]

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> Teacher:
        """Load the teacher as a training run does, on the CPU.

        config   an instance of `config_class`; `config.path` is a folder or Hub id
        options  of all teachers of the run; placing and offloading the teacher is left to the caller
        dtype    of the weights
        """
        ...


@runtime_checkable
class ViewConditioned(Protocol):
    """A teacher that is also conditioned on the renderings themselves, as one with a depth ControlNet is."""

    def condition_on(self, condition: Condition, views: Views) -> Condition:
        """Return `condition` with the model's input from these renderings, without gradient."""
        ...


class UNetTeacher(nn.Module):
    """A frozen diffusers U-Net with its noise schedule and text encoder: all of a `Teacher` but `encode`.

    unet            predicts epsilon, v or the sample, as `scheduler.config.prediction_type` says; further output
                    channels (a learned variance) are dropped
    scheduler       any diffusers scheduler with `alphas_cumprod`
    view_dependent  append the side a view is seen from to its prompt; see `view_prompts`

    The attribute `offload` is True-like if the teacher stays in main memory between calls; see `prd.teachers.offload`.
    `passes` counts the images that the U-Net has evaluated.
    Raises ValueError for parts that do not fit each other.
    """

    name = "unet"
    num_views = 1
    offload: Any = False
    passes = 0
    config_class: ClassVar[type[TeacherConfig]] = TeacherConfig
    takes_cameras: ClassVar[bool] = False
    cameras_as_maps: ClassVar[bool] = False  # by an encoder of its own, not by the U-Net's class embedding
    tokenizer_class: ClassVar[Any] = CLIPTokenizer
    text_encoder_class: ClassVar[Any] = CLIPTextModel
    prompt_encoder_class: ClassVar[type[PromptEncoder]] = PromptEncoder

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        *,
        view_dependent: bool = False,
    ) -> None:
        super().__init__()
        given, width = self.text_widths(unet, text_encoder)
        if given != width:
            raise ValueError(
                f"text_encoder: its width {given} is not the U-Net's cross_attention_dim {width}; load both from the "
                "same folder"
            )
        embedded = getattr(unet.config, "class_embed_type", None)
        if (embedded == "projection") != (self.takes_cameras and not self.cameras_as_maps):
            raise ValueError(
                f"unet: class_embed_type={embedded!r}; {self.name} "
                f"{'takes no' if embedded == 'projection' else 'needs a'} camera projection: this is another model's "
                "U-Net"
            )
        if told := getattr(unet.config, "time_cond_proj_dim", None):
            raise ValueError(
                f"unet: time_cond_proj_dim={told}; a latent consistency model predicts no score to distill; give the "
                "model that it was made from"
            )
        self.unet, self.text_encoder, self.view_dependent = unet, text_encoder, view_dependent
        self.prompt_encoder = self.prompt_encoder_class(tokenizer, text_encoder)
        if scheduler.config.prediction_type not in (*PREDICTIONS, FLOW):
            raise ValueError(
                f"scheduler: prediction_type={scheduler.config.prediction_type!r}; must be one of "
                f"{', '.join(PREDICTIONS)}"
            )
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod.float()  # no buffer: it must stay float32 in a half teacher
        self.freeze()

    @staticmethod
    def text_widths(unet: Any, text_encoder: Any) -> tuple[int, int]:
        """Channels of the text encoder's embeddings, and those that the U-Net takes."""
        return text_encoder.config.hidden_size, unet.config.encoder_hid_dim or unet.config.cross_attention_dim

    def freeze(self) -> None:
        """Let no parameter learn and put every layer in evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> UNetTeacher:
        """Stay in evaluation mode, even when a model that holds the teacher is put in training mode."""
        return super().train(False)

    def with_unet(self, unet: nn.Module) -> UNetTeacher:
        """Return the same teacher with another U-Net in the place of its own; all else is shared."""
        other = copy.copy(self)
        other._modules = {**self._modules, "unet": unet}
        other.passes = 0
        return other

    @property
    def image_size(self) -> int:
        """Height and width of x, the U-Net's sample_size."""
        size = self.unet.config.sample_size
        return size if isinstance(size, int) else size[0]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one image of x."""
        return self.unet.config.in_channels, self.image_size, self.image_size

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        """Every teacher implements this itself; see `Teacher.encode`."""
        raise NotImplementedError(f"{type(self).__name__}.encode: a teacher says how renderings become its input")

    def camera_input(self, cameras: Cameras) -> Tensor | None:
        """Camera vectors [B*V, D] that the U-Net takes as class_labels; None for a model without cameras."""
        return None

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        """Text and camera of B * num_views images.

        Raises ValueError if the number of prompts is not the cameras' batch or the views are not `num_views`.
        """
        check_prompts(prompts)
        if len(prompts) != cameras.batch:
            raise ValueError(f"prompts: {len(prompts)} given for {cameras.batch} shapes; give one for each")
        self.check_views(cameras.views)
        texts, copies = (view_prompts(prompts, cameras), 1) if self.view_dependent else (prompts, cameras.views)
        embeds = self.prompt_encoder([*texts, negative_prompt])
        positive = embeds[:-1].repeat_interleave(copies, dim=0)  # [B*V, L, Ct]
        return Condition(positive, embeds[-1:].expand_as(positive), self.camera_input(cameras))

    def check_views(self, views: int) -> None:
        """Raise ValueError unless `views` is the number of views that the teacher sees together."""
        if views != self.num_views:
            raise ValueError(
                f"views={views}: {self.name} sees {self.num_views} views of a prompt together; select those"
            )

    @torch.no_grad()
    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Epsilon [n, C, h, w], float32, from whatever the U-Net predicts; see `Teacher.predict_noise`.

        Raises ValueError as `predict` does.
        """
        predicted = self.predict(x_t, t, condition)
        return epsilon_from(predicted, x_t.float(), self.alphas_cumprod.to(t.device)[t], self.prediction_type)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The U-Net's own prediction [n, C, h, w], float32: epsilon, v or the sample, as `prediction_type` says.

        Differentiable in weights that require a gradient. Raises ValueError for images of another size or number, and
        for timesteps outside the schedule.
        """
        channels, size, steps = self.unet.config.in_channels, self.image_size, len(self.alphas_cumprod)
        if x_t.shape[1:] != (channels, size, size) or len(t) != len(x_t) or len(condition.prompt_embeds) != len(x_t):
            raise ValueError(
                f"x_t={tuple(x_t.shape)}, t={tuple(t.shape)}, prompt_embeds={tuple(condition.prompt_embeds.shape)}: "
                f"expected n images of {channels} channels and {size} x {size}, n timesteps and n texts"
            )
        for what, rows in (
            ("negative_prompt_embeds", condition.negative_prompt_embeds),
            ("control", condition.control),
        ):
            if rows is not None and len(rows) != len(x_t):
                raise ValueError(f"{what}: {len(rows)} rows for {len(x_t)} images; one for each")
        if self.takes_cameras and (condition.camera is None or len(condition.camera) != len(x_t)):
            given = "none" if condition.camera is None else tuple(condition.camera.shape)
            raise ValueError(f"camera: {given} for {len(x_t)} images; {self.name} takes one camera vector for each")
        if t.is_floating_point() or t.dtype == torch.bool or bool(((t < 0) | (t >= steps)).any()):
            raise ValueError(f"t={t.tolist()}: must be integers in 0..{steps - 1}")
        self.passes += len(x_t)
        return self.run_unet(x_t.to(self.unet.dtype), t, condition).float()[:, :channels]

    def run_unet(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Output of the U-Net [n, C', h, w] for x_t [n, C, h, w], in its own precision."""
        dtype = self.unet.dtype
        camera = None if condition.camera is None or self.cameras_as_maps else condition.camera.to(dtype)
        text, added = condition.prompt_embeds.to(dtype), self.added_inputs(x_t, condition)
        return self.unet(x_t, t, encoder_hidden_states=text, class_labels=camera, **added).sample

    def added_inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """Further inputs of the U-Net, by its own names."""
        return {}

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> UNetTeacher:
        """Load the teacher as a training run does; see `ConfigurableTeacher.from_config`."""
        return cls.from_pretrained(config.path, dtype=dtype)

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(cls, folder: str, *, dtype: torch.dtype = torch.float32) -> UNetTeacher:
        """Load a folder or Hub id in the diffusers layout: U-Net, scheduler, tokenizer and text encoder."""
        return cls(**cls.load_parts(expanded(folder), dtype))

    @classmethod
    def load_parts(cls, folder: str, dtype: torch.dtype, base: str | None = None) -> dict[str, Any]:
        """U-Net, scheduler, tokenizer and text encoder of a folder or Hub id in the diffusers layout.

        base  folder or Hub id whose text encoder and tokenizer the teacher shares
        """
        text = base or folder
        return {
            "unet": load_strict(UNet2DConditionModel, folder, "unet", dtype, remedy=CONVERT),
            "scheduler": load_schedule(folder),
            "tokenizer": load_tokenizer(cls.tokenizer_class, text),
            "text_encoder": load_strict(cls.text_encoder_class, text, "text_encoder", dtype),
        }


def epsilon_from(predicted: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise in x_t [n, C, h, w] from a prediction of epsilon, v (Salimans and Ho 2022, section 4), sample or flow.

    alpha_bar [n]: the schedule at each image's timestep. A flow predicts u = noise - x for y = (1 - s) x + s noise;
    with s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) y is x_t over the same sum, and the noise y + (1 - s) u. Raises
    ValueError for another prediction type.
    """
    if prediction_type == "epsilon":
        return predicted
    a = alpha_bar.view(-1, 1, 1, 1)
    if prediction_type == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x
        return a.sqrt() * predicted + (1 - a).sqrt() * x_t
    if prediction_type == "sample":
        return (x_t - a.sqrt() * predicted) / (1 - a).sqrt()
    if prediction_type == FLOW:
        return (x_t + a.sqrt() * predicted) / (a.sqrt() + (1 - a).sqrt())
    raise ValueError(f"prediction_type={prediction_type!r}: must be one of {', '.join((*PREDICTIONS, FLOW))}")


def target_of(x: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Target of a model of a prediction type for x and noise [n, C, h, w]: epsilon, v, the sample or the flow.

    alpha_bar [n]: the schedule at each image's timestep. The inverse of `epsilon_from`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == FLOW:
        return noise - x
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * x if prediction_type == "v_prediction" else x


def to_images(pixels: Tensor, size: int, resize: Resize = "bilinear") -> Tensor:
    """Renderings [B, V, H, W, C] as images [B*V, C, size, size], float32 for half precision.

    "bilinear" interpolates between pixel centres without anti-aliasing, "area" averages (adaptive average pooling).
    Raises ValueError for renderings that are not square: every teacher's images are.
    """
    if pixels.ndim != 5 or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"views={tuple(pixels.shape)}: must be square renderings [B, V, H, H, C]")
    images = pixels.flatten(0, 1).permute(0, 3, 1, 2)
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    if resize not in ("bilinear", "area"):
        raise ValueError(f"resize={resize!r}: must be 'bilinear' or 'area'")
    if images.shape[-2:] == (size, size):
        return images
    if resize == "area":
        return F.adaptive_avg_pool2d(images, size)
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
