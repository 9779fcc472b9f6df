"""Stable Diffusion 3 and 3.5 as a teacher: a flow of a diffusion transformer, seen as the diffusion that it equals."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from prd.loading.strict import load_strict
from prd.teachers.base import Condition, TeacherConfig
from prd.teachers.loading import FLOW
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.text.sd3 import Sd3PromptEncoder, load_sd3_encoder
from prd.utils.checked_types import CHECKS, Count, Place, Positive, Schedule

STEPS = 1000  # the transformer is told the noise level times this


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class StableDiffusion3TeacherConfig(TeacherConfig):
    """Settings of Stable Diffusion 3 as a teacher; not one of the paper's teachers."""

    path: Place = "stabilityai/stable-diffusion-3.5-medium"  # Hub id or folder in diffusers' layout
    guidance_scale: Schedule = 4.5  # classifier-free guidance
    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"
    t5: bool = True  # read the prompt with its T5 too, 4.8 billion parameters; false: the two CLIPs alone
    shift: Positive = 1.0  # of its noise levels s -> shift s / (1 + (shift - 1) s); it samples with 3
    pixels: Count | None = None  # height and width of the images it is shown; null: as trained, 1024


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels s of a flow y = (1 - s) x + s noise, [T] in ]0, 1], as a schedule of a diffusion.

    x_t = sqrt(a) x + sqrt(1 - a) noise is y times sqrt(a) + sqrt(1 - a) where both hold as much noise of x:
    s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)), so a = (1 - s)^2 / ((1 - s)^2 + s^2).
    """

    sigmas: Tensor

    @staticmethod
    def even(shift: float = 1.0) -> FlowSchedule:
        """Levels 1 / T, ..., 1, shifted."""
        s = torch.arange(1, STEPS + 1, dtype=torch.float64, device="cpu") / STEPS
        return FlowSchedule(shift * s / (1 + (shift - 1) * s))

    @property
    def alphas_cumprod(self) -> Tensor:
        signal, noise = (1 - self.sigmas) ** 2, self.sigmas**2
        return signal / (signal + noise)

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(prediction_type=FLOW)


class StableDiffusion3Teacher(StableDiffusionTeacher):
    """Stable Diffusion 3 medium, 3.5 medium or large, or a fine-tune, in the diffusers layout.

    Its flow is converted at its edge: `alphas_cumprod` is the diffusion's schedule that it equals (`FlowSchedule`), x_t
    becomes its y, and its prediction noise (`epsilon_from`). x is the VAE latent of the rendering's colours,
    [B, 16, h, w]. `unet` is its transformer.
    """

    name = "stable_diffusion_3"
    config_class: ClassVar[Any] = StableDiffusion3TeacherConfig
    prompt_encoder_class: ClassVar[Any] = Sd3PromptEncoder
    own_settings = ("pixels", "t5", "shift")

    def __init__(
        self, unet: SD3Transformer2DModel, vae: AutoencoderKL, scheduler: FlowSchedule, *parts: Any, **options: bool
    ) -> None:
        network: Any = unet
        schedule: Any = scheduler
        super().__init__(network, vae, schedule, *parts, **options)
        self.sigmas = scheduler.sigmas.float()

    @staticmethod
    def text_widths(unet: Any, text_encoder: Any) -> tuple[int, int]:
        return text_encoder.width, unet.config.joint_attention_dim

    @classmethod
    def load_parts(
        cls, folder: str, dtype: torch.dtype, base: str | None = None, *, t5: bool = True, shift: float = 1.0
    ) -> dict[str, Any]:
        """Transformer, schedule, tokenizers and text encoders; t5 and shift as the settings of these names."""
        transformer = load_strict(SD3Transformer2DModel, folder, "transformer", dtype)
        encoder = load_sd3_encoder(base or folder, transformer.config.joint_attention_dim, dtype, t5=t5)
        return {
            "unet": transformer,
            "scheduler": FlowSchedule.even(shift),
            "tokenizer": encoder.tokenizers,
            "text_encoder": encoder.model,
        }

    @property
    def latent_step(self) -> int:
        return 2 * self.unet.config.patch_size

    def run_unet(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The flow noise - x [n, C, h, w] at x_t [n, C, h, w] of the diffusion; the text's last row is pooled."""
        text = condition.prompt_embeds.to(self.unet.dtype)
        a = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        y = (x_t.float() / (a.sqrt() + (1 - a).sqrt())).to(self.unet.dtype)
        return self.unet(
            hidden_states=y,
            timestep=self.sigmas.to(t.device)[t] * STEPS,
            encoder_hidden_states=text[:, :-1],
            pooled_projections=text[:, -1, : self.unet.config.pooled_projection_dim],
        ).sample
