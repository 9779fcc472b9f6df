"""What distillation asks of a teacher, and what every diffusers U-Net teacher shares.

A teacher turns renderings into its own input space (`encode`), states what it is conditioned on (`condition`) and
predicts noise (`predict_noise`). Everything that differs between diffusion models (resolution, channels, text encoder,
camera input, epsilon or v prediction) stays behind these three calls, so a new teacher is one file: derive from
`UNetTeacher`, write `encode`, and `camera_input` if the model is told about cameras.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from prd.cameras import Cameras
from prd.rendering.views import Views

CONFIG_NAME = "teacher_config.json"
Resize = Literal["bilinear", "area"]
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Condition:
    """What n images are conditioned on; the rows are those of the teacher's x, prompt by prompt, view by view.

    prompt_embeds           [n, L, Ct]  the text to follow
    negative_prompt_embeds  [n, L, Ct]  the text guidance moves away from
    camera                  [n, D]      or None for a teacher without camera input
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    camera: Tensor | None = None

    def negative(self) -> Condition:
        """The same with the negative prompt as the text to follow: the unconditional pass of guidance."""
        return replace(self, prompt_embeds=self.negative_prompt_embeds)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Several conditions of one teacher one after the other, so that one U-Net call serves all passes."""
        cameras = [c.camera for c in conditions if c.camera is not None]
        return Condition(
            torch.cat([c.prompt_embeds for c in conditions]),
            torch.cat([c.negative_prompt_embeds for c in conditions]),
            torch.cat(cameras) if cameras else None,
        )


class Teacher(Protocol):
    """A frozen diffusion model that scores renderings. B prompts, n = B * num_views images."""

    name: str
    num_views: int  # views of a prompt that it sees together: 1 for Stable Diffusion, 4 for MVDream and RichDreamer
    alphas_cumprod: Tensor  # its noise schedule [T], float32: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise

    def encode(self, views: Views, *, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Renderings as the model's input x [n, C, h, w], float32, differentiable in the views.

        A stochastic encoder (a VAE's posterior) draws from `generator`, or takes the injected standard normal `noise`
        [n, C, h, w]; with neither it returns the mean.
        """
        ...

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        """What the images of these prompts, seen from these cameras [B, num_views], are conditioned on."""
        ...

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Epsilon [n, C, h, w], float32, for x_t [n, C, h, w] at timesteps t [n], without gradient."""
        ...


class PromptEncoder:
    """A CLIP text encoder that encodes each distinct prompt once (the last `cache_size` of them are remembered)."""

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel, cache_size: int = 4096) -> None:
        self.tokenizer, self.model, self.cache_size = tokenizer, model, cache_size
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> [L, Ct]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden states [B, L, Ct]; a prompt longer than L tokens is cut and keeps its end token.

        Raises TypeError if prompts is not a sequence of strings.
        """
        check_prompts(prompts)
        missing = [p for p in dict.fromkeys(prompts) if p not in self.encoded]
        if missing:
            length = self.model.config.max_position_embeddings
            tokens = self.tokenizer(
                missing, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            hidden = self.model(tokens.input_ids.to(self.model.device)).last_hidden_state
            self.encoded.update((prompt, row.clone()) for prompt, row in zip(missing, hidden, strict=True))
        rows = []
        for prompt in prompts:
            self.encoded.move_to_end(prompt)
            rows.append(self.encoded[prompt])
        while len(self.encoded) > self.cache_size:
            self.encoded.popitem(last=False)
        return torch.stack([row.to(self.model.device) for row in rows])


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises TypeError if prompts is not a sequence of strings (one string is not)."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts={prompts!r}: must be a list of strings, one for each shape")


class UNetTeacher(nn.Module):
    """A frozen diffusers U-Net with its noise schedule and text encoder: all of a `Teacher` but `encode`.

    unet            predicts epsilon, v or the sample, as `scheduler.config.prediction_type` says
    scheduler       any diffusers scheduler with `alphas_cumprod`
    prompt_encoder  [B] strings -> [B, L, Ct]
    """

    name = "unet"
    num_views = 1

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
    ) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        if text_encoder.config.hidden_size != width:
            raise ValueError(
                f"text_encoder: its width {text_encoder.config.hidden_size} is not the U-Net's cross_attention_dim "
                f"{width}; load both from the same folder"
            )
        self.unet, self.text_encoder = unet, text_encoder
        self.prompt_encoder = PromptEncoder(tokenizer, text_encoder)
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod.float()  # no buffer: it must stay float32 in a half teacher
        self.freeze()

    def freeze(self) -> None:
        """No parameter learns and no layer is in training mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> UNetTeacher:
        """A teacher stays in evaluation mode even when a model that holds it is put in training mode."""
        return super().train(False)

    @property
    def image_size(self) -> int:
        """Height and width of x, the U-Net's sample_size."""
        size = self.unet.config.sample_size
        return size if isinstance(size, int) else size[0]

    def camera_input(self, cameras: Cameras) -> Tensor | None:
        """The camera vectors [B*V, D] the U-Net takes as class_labels; None for a model without cameras."""
        return None

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        """Text and camera of B * num_views images.

        Raises ValueError if the number of prompts is not the cameras' batch or the views are not `num_views`.
        """
        check_prompts(prompts)
        if len(prompts) != cameras.batch:
            raise ValueError(f"prompts: {len(prompts)} given for {cameras.batch} shapes; give one for each")
        self.check_views(cameras.views)
        embeds = self.prompt_encoder([*prompts, negative_prompt])
        positive = embeds[:-1].repeat_interleave(cameras.views, dim=0)  # [B*V, L, Ct]
        return Condition(positive, embeds[-1:].expand_as(positive), self.camera_input(cameras))

    def check_views(self, views: int) -> None:
        if views != self.num_views:
            raise ValueError(
                f"views={views}: {self.name} sees {self.num_views} views of a prompt together; select those"
            )

    @torch.no_grad()
    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Epsilon [n, C, h, w], float32, from whatever the U-Net predicts; see `Teacher.predict_noise`."""
        if (
            x_t.shape[1] != self.unet.config.in_channels
            or len(t) != len(x_t)
            or len(condition.prompt_embeds) != len(x_t)
        ):
            raise ValueError(
                f"x_t={tuple(x_t.shape)}, t={tuple(t.shape)}, prompt_embeds={tuple(condition.prompt_embeds.shape)}: "
                f"expected n images of {self.unet.config.in_channels} channels, n timesteps and n texts"
            )
        dtype = self.unet.dtype
        camera = None if condition.camera is None else condition.camera.to(dtype)
        text = condition.prompt_embeds.to(dtype)
        predicted = self.unet(x_t.to(dtype), t, encoder_hidden_states=text, class_labels=camera).sample.float()
        return epsilon_from(predicted, x_t.float(), self.alphas_cumprod.to(t.device)[t], self.prediction_type)

    @staticmethod
    def load_parts(folder: str, torch_dtype: torch.dtype, base: str | None = None) -> dict[str, Any]:
        """U-Net, scheduler, tokenizer and text encoder of a folder or Hub id in the diffusers layout.

        base: the folder or Hub id whose text encoder and tokenizer the teacher shares.
        """
        text = base or folder
        return {
            "unet": UNet2DConditionModel.from_pretrained(
                folder, subfolder="unet", torch_dtype=torch_dtype, use_safetensors=True
            ),
            "scheduler": DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
            "tokenizer": CLIPTokenizer.from_pretrained(text, subfolder="tokenizer"),
            "text_encoder": CLIPTextModel.from_pretrained(
                text, subfolder="text_encoder", dtype=torch_dtype, use_safetensors=True
            ),
        }


def epsilon_from(predicted: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise in x_t [n, C, h, w] from a prediction of epsilon, v (Salimans and Ho 2022, section 4) or the sample.

    alpha_bar [n]: the schedule at each image's timestep.
    """
    if prediction_type == "epsilon":
        return predicted
    a = alpha_bar.view(-1, 1, 1, 1)
    if prediction_type == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x
        return a.sqrt() * predicted + (1 - a).sqrt() * x_t
    if prediction_type == "sample":
        return (x_t - a.sqrt() * predicted) / (1 - a).sqrt()
    raise ValueError(f"prediction_type={prediction_type!r}: must be 'epsilon', 'v_prediction' or 'sample'")


def shared_folder(folder: str, base: str | None) -> str | None:
    """Where a teacher's shared parts are: `base` beside its folder ("../stable_diffusion"), or `base` as a Hub id."""
    return str(Path(folder, base)) if base is not None and base.startswith(".") else base


def to_images(pixels: Tensor, size: int, resize: Resize = "bilinear") -> Tensor:
    """Renderings [B, V, H, W, C] as images [B*V, C, size, size].

    "bilinear" interpolates between pixel centres without anti-aliasing, "area" averages (adaptive average pooling).
    """
    images = pixels.flatten(0, 1).permute(0, 3, 1, 2)
    if images.shape[-2:] == (size, size):
        return images
    if resize == "area":
        return F.adaptive_avg_pool2d(images, size)
    if resize == "bilinear":
        return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    raise ValueError(f"resize={resize!r}: must be 'bilinear' or 'area'")


def read_config(folder: str, settings: type[Settings]) -> Settings:
    """The settings (a dataclass) in the teacher's `teacher_config.json`, beside its U-Net, of a folder or Hub id.

    Raises FileNotFoundError (or the Hub's own) if there is none, since a guess would teach the wrong cameras in
    silence, and ValueError for a key that is not a setting.
    """
    path = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        path = Path(hf_hub_download(folder, CONFIG_NAME))
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: not found; pass config=... or write the teacher's settings there")
    values = json.loads(path.read_text())
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)} is no setting of this teacher; it has {', '.join(known)}")
    return settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
