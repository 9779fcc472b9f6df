"""TriplaneTurbo's model: a frozen Stable Diffusion that denoises and decodes six planes (TriplaneTurbo, section 3.3).

noise [B, 6, c, h, w] --network + PETA, K steps--> latents --VAE decoder + LoRA--> planes [B, 6, C, H, W] --> Field

The kind of network and its noise levels are its `Backbone`'s; latents have c = 4 channels, of Stable Diffusion 3 16,
and a text has L = 77 tokens, of other bases more, and in a last row what their networks read beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKL
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from prd.adapters.backbone import Backbone
from prd.adapters.diffusion_transformers import backbone_class, backbone_of
from prd.adapters.peta import GROUPS, PetaConfig, attach_peta, fuse_peta
from prd.adapters.planes import set_attention
from prd.adapters.precision import keep_in_half
from prd.distillation.draws import draw_normal
from prd.distillation.progressive import rollout
from prd.fields.protocol import Field
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.generators import adapter_files, sampling
from prd.generators.adapter_files import SavedConfig as SavedConfig
from prd.hub.find import find_model
from prd.loading.stable_diffusion import Base, load_base
from prd.rendering.alpha import AlphaModel, LearnedInvStd, NeusAlpha
from prd.text.encoders import PromptEncoder
from prd.utils.arguments import expanded_path
from prd.utils.checked_types import CHECKS, Count, Place, Positive, Radius
from prd.utils.construction import float32_weights, undrawn_weights
from prd.utils.dtypes import HALF_PRECISIONS


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class TriplaneTurboConfig:
    """Settings to train TriplaneTurbo: a frozen Stable Diffusion with PETA adapters and the three heads."""

    base: Place = "toybox"  # Hub id or folder of a Stable Diffusion or PixArt-Sigma; "toybox" ships in the package
    revision: str | None = None  # branch, tag or commit of a Hub id
    prediction_type: Literal["epsilon", "v_prediction"] | None = None  # of a base in one file that does not say it
    rank: Count = 16  # rank of every LoRA pair
    plane_wise: bool = True  # one LoRA pair per plane in the self-attention; False: one pair for all six
    self_attention_rank: Count | None = None  # there alone; 6 * rank with plane_wise=False: as many parameters
    self_attention: bool = True  # whether it is adapted, as the next four
    cross_attention: bool = True
    convolutions: bool = True  # of the U-Net; a transformer's patch embeddings and feed-forward layers
    decoder_attention: bool = True
    decoder_convolutions: bool = True
    full: bool = False  # full fine-tuning: the whole network and decoder instead of adapters
    plane_channels: Count = 16  # channels of each plane; the decoder's last convolution puts out twice as many
    head_width: Count = 32  # hidden width of the sdf, deformation and colour MLPs
    latent_size: Count = 32  # height and width of each plane's latents
    sdf_init_scale: Positive = 1.0  # of the sdf head's last layer at the start; below 1 training starts near the sphere
    sphere_radius: Radius = 0.5  # the sdf head's output is added to |p| - sphere_radius, scene units
    inv_std: Positive | None = None  # s of NeuS at the start, learnt on with the heads; null: the renderer's
    splat_heads: bool = False  # a fourth MLP, of what Gaussians on the surface are (`prd.splats`); False: there is none
    base_dtype: Literal["bfloat16", "float16"] | None = None  # of the frozen base under mixed_precision; null: float32
    gradient_checkpointing: bool = False  # recompute in the backward pass: the network by blocks, decoder by planes


class TriplaneTurboModel(nn.Module):
    """Frozen base, trainable PETA, conv_out and heads.

    unet, vae: the base, a U-Net or a transformer and its VAE; its modules stay unadapted, its weights are shared
    (moving or casting either moves or casts both), frozen and never trained.
    scheduler: of diffusers; its noise levels and `prediction_type` are read (`prd.adapters.noise_levels`).
    base_hash: `Base.hashes`, of the weights as they were stored; None: of the weights as they are here.
    """

    config_class = TriplaneTurboConfig
    folder_name = "adapter"  # in a run folder
    takes_shapes = shares_text_encoder = False

    @float32_weights()
    def __init__(
        self,
        unet: nn.Module,
        vae: AutoencoderKL,
        scheduler: Any,
        peta: PetaConfig | None = None,
        config: SavedConfig | None = None,
        *,
        gradient_checkpointing: bool = False,
        base_hash: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.peta, self.config = peta or PetaConfig(), config or SavedConfig()
        if self.peta.num_planes != 6:
            raise ValueError(f"num_planes={self.peta.num_planes}: a triplane field has 6 planes")
        backbone = backbone_of(unet, vae, self.peta, scheduler)
        self.prediction_type: str = backbone.levels.prediction_type
        backbone.check_size(self.config.latent_size, self.config.latent_size)
        backbone.__dict__["name_or_path"] = self.config.base  # where peft looks for the name it records
        self.peft = attach_peta(backbone, self.peta)
        own = self.config
        self.heads = TriplaneHeads(self.peta.plane_channels, own.head_width, own.sdf_init_scale, splats=own.splat_heads)
        if self.config.inv_std is not None:
            self.heads.add_module("inv_std", LearnedInvStd.of(self.config.inv_std))  # saved and kept exact as they are
        self.heads.to(self.device)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.backbone.network.enable_gradient_checkpointing()
        self._base_hash = dict(base_hash) if base_hash else None
        self.loaded_state: Mapping[str, Tensor] = {}  # of the adapter, as it was on disk
        self._unfused_state: dict[str, Tensor] | None = None  # of the adapter, once it is fused
        self.eval()

    @property
    def backbone(self) -> Backbone:
        """The adapted network and decoder, with the noise levels."""
        adapted: Any = self.peft
        return adapted.base_model.model

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base's weights; latents and planes are computed in it, the field in float32."""
        return self.backbone.dtype

    @property
    def alphas_cumprod(self) -> Tensor:
        """Noise levels [T] of a diffusion, float32; a flow has none, but `backbone.levels.sigmas`."""
        return self.backbone.levels.alphas_cumprod

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (6, c, h, w) of a sample's latents."""
        size = self.config.latent_size
        return 6, self.backbone.latent_channels, size, size

    @property
    def num_estimates(self) -> int:
        """K of the training rollout."""
        return self.config.num_inference_steps

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters: there is one part, the adapter with its heads."""
        return {"adapter": self.trainable_parameters()}

    def begin_stage(self, trainable: Sequence[str] | None) -> None:
        """Do nothing: the one part is trained in every stage."""

    def alpha(self) -> AlphaModel | None:
        """Return NeuS's density of the learned s; None without one: as the volume renderer's own config says."""
        return NeusAlpha(self.heads.get_submodule("inv_std")()) if self.config.inv_std is not None else None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return LoRA factors, the new conv_out and the heads. ValueError for a fused model, which has none."""
        self._check_not_fused("train")
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _apply(self, fn: Any, recurse: bool = True) -> TriplaneTurboModel:
        """The heads follow to every device, but stay in float32 when the base goes to half precision."""
        exact = [parameter.data for parameter in self.heads.parameters()]
        super()._apply(fn, recurse)
        for moved, values in zip(self.heads.parameters(), exact, strict=True):
            if moved.dtype in HALF_PRECISIONS:
                moved.data = values.to(moved.device)
        return self

    @property
    def is_fused(self) -> bool:
        return self._unfused_state is not None

    def fuse(self) -> TriplaneTurboModel:
        """Merge the adapter into weights of its own for inference: faster steps, the same planes.

        Ordinary LoRA goes into the weights, plane-wise LoRA into six stacked weights (0.25 billion more parameters at
        Stable Diffusion 2.1's size, rank aside). There is no way back but loading again; saving still writes the
        adapter. In half precision the merged weights are rounded again, as the base's were.
        """
        if not self.is_fused:
            self.base_hash()  # of the base, while it is there
            state = {name: tensor.detach() for name, tensor in adapter_files.adapter_state(self).items()}
            fuse_peta(self.backbone)
            self.heads.requires_grad_(False)
            self._unfused_state = state
        return self

    def set_attention(self, attention: Callable[..., Tensor] | None) -> None:
        """Set the attention of q, k, v [B, heads, L, d], as `load_xformers_attention()`; None: torch's (SD3's only)."""
        set_attention(self.backbone.network, attention)

    def predict(self, latents: Tensor, timestep: Tensor | int, prompt_embeds: Tensor) -> Tensor:
        """The network's own prediction (`prediction_type`) [B, 6, c, h, w].

        latents [B, 6, c, h, w]; timestep an integer or [B] in [0, T); prompt_embeds [B, L, Ct], or [B, 6, L, Ct]
        for a text of its own for each plane.
        """
        self._check_condition(latents, prompt_embeds)
        return self.backbone.predict(latents, timestep, prompt_embeds)

    def denoise(self, latents: Tensor, timestep: Tensor | int, prompt_embeds: Tensor) -> Tensor:
        """Denoise in one step: x0 [B, 6, c, h, w] from noisy latents of that shape. Arguments as for `predict`."""
        self._check_condition(latents, prompt_embeds)
        return self.backbone.predict_x0(latents, timestep, prompt_embeds)

    def _check_condition(self, latents: Tensor, prompt_embeds: Tensor) -> None:
        """Raise ValueError for latents or embeddings of another shape."""
        batch, shape, width = self.check_latents(latents), prompt_embeds.shape, self.backbone.text_width
        if len(shape) not in (3, 4) or shape[0] != batch or shape[-1] != width or (len(shape) == 4 and shape[1] != 6):
            raise ValueError(
                f"prompt_embeds={tuple(shape)}: expected [{batch}, L, Ct] or [{batch}, 6, L, Ct] with Ct = {width}"
            )

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """alpha_t x0 + sigma_t noise by the base's levels, all [B, 6, c, h, w]."""
        alpha, sigma = self.backbone.levels.alpha_sigma(timestep, x0)
        return alpha * x0 + sigma * noise

    def decode(self, latents: Tensor) -> TriplaneField:
        """The field of latents [B, 6, c, h, w].

        A U-Net's decoder takes them raw, not divided by the VAE's scaling factor, as the published adapter was trained;
        `latent_scale` in the config divides them. A transformer's takes them by the VAE's own scaling and shift.
        """
        return TriplaneField(self.decode_planes(latents), self.heads, self.config.bias_radius)

    def decode_planes(self, latents: Tensor) -> Tensor:
        """Planes [B, 6, C, H, W] (xy, xz, yz geometry, then texture) of latents [B, 6, c, h, w]."""
        self.check_latents(latents)
        flat = self.backbone.to_decoder(latents, self.config.latent_scale).flatten(0, 1).to(self.dtype)
        return self.backbone.decode(flat, recompute=self.gradient_checkpointing).unflatten(0, (-1, 6))

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """Return K timesteps from T - 1 down in equal strides; ValueError for a K that does not divide T."""
        return sampling.even_timesteps(num_inference_steps, len(self.backbone.levels), self.num_estimates)

    def draw_latents(self, batch: int, generator: sampling.Generators = None) -> Tensor:
        """Draw Gaussian noise [B, 6, c, h, w]; one generator for the batch, or one per sample."""
        return sampling.draw_latents(self.latent_shape, batch, self.device, generator)

    def ddim_step(self, latents: Tensor, x0: Tensor, timestep: int, previous: int) -> Tensor:
        """Step by DDIM with eta 0 (Song et al. 2021, Eq. 12), of a flow Euler's, to `previous` (below 0: the first)."""
        alpha, sigma = self.backbone.levels.alpha_sigma(timestep, latents)
        return self.add_noise(x0, (latents - alpha * x0) / sigma, max(previous, 0))

    def sample_latents(
        self,
        prompt_embeds: Tensor,
        generator: sampling.Generators = None,
        num_inference_steps: int = 4,
        latents: Tensor | None = None,
        on_step: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the last x0 [B, 6, c, h, w] of K steps from `latents`, drawn if None (`prd.generators.sampling`)."""
        timesteps = self.timesteps(num_inference_steps)
        x = self.draw_latents(len(prompt_embeds), generator) if latents is None else latents.to(self.device)
        return sampling.sample_latents(self, prompt_embeds, x, timesteps, on_step)

    def rollout(
        self,
        prompt_embeds: Tensor,
        inputs: Mapping[str, Tensor],
        draws: Sequence[torch.Generator],
        *,
        batch_size: int = 1,
        first: bool = True,
    ) -> Iterator[tuple[range, Field]]:
        """Yield the K estimates of Algorithm 1 (`prd.distillation.progressive.rollout`); arguments as in `Model`.

        draws: one generator per prompt, of the start's noise and then of each step's; `first` changes nothing here.
        """
        if inputs:
            raise ValueError(f"inputs={sorted(inputs)}: TriplaneTurbo takes text embeddings alone; leave them out")

        def noise(k: int) -> Tensor:
            return draw_normal((len(prompt_embeds), *self.latent_shape), draws).to(self.device)

        timesteps = self.timesteps(self.num_estimates)
        return rollout(self, prompt_embeds=prompt_embeds, timesteps=timesteps, noise=noise, batch_size=batch_size)

    @torch.no_grad()
    def generate(
        self,
        prompt_embeds: Tensor,
        generator: sampling.Generators = None,
        *,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
    ) -> TriplaneField:
        """Return the field of each prompt.

        prompt_embeds [B, L, Ct]; num_inference_steps K in {1, 2, 4, ...}, None: as trained; latents [B, 6, c, h, w],
        None: drawn from `generator`. Raises ValueError for a K that does not divide the schedule, for tensors of
        another shape, and for embeddings without the last row that some bases read (`prd.adapters.backbone`).
        """
        self.backbone.check_text(prompt_embeds)
        k = self.num_estimates if num_inference_steps is None else num_inference_steps
        return self.decode(self.sample_latents(prompt_embeds, generator, k, latents))

    def check_latents(self, latents: Tensor) -> int:
        """Return the number of samples of latents [B, 6, c, h, w]; ValueError for another shape."""
        channels, size = self.backbone.latent_channels, self.config.latent_size
        if latents.ndim != 5 or latents.shape[1:3] != (6, channels) or 0 in latents.shape:
            raise ValueError(
                f"latents={tuple(latents.shape)}: expected [B, 6, {channels}, h, w] (trained: {size} x {size})"
            )
        self.backbone.check_size(*latents.shape[3:])
        return latents.shape[0]

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Every trained tensor by name: peft's keys of the LoRA and conv_out, and `heads.*`."""
        return adapter_files.adapter_state(self) if self._unfused_state is None else dict(self._unfused_state)

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load `trained_state_dict`; ModelMismatch if a key is missing or extra or a shape differs."""
        self._check_not_fused("load an adapter")
        adapter_files.load_adapter_state(self, state)

    def base_hash(self) -> dict[str, str]:
        """SHA-256 of the base's weights as the adapter uses them, rounded once to each half precision."""
        if self._base_hash is None:
            self._base_hash = adapter_files.base_hash(self.backbone)
        return self._base_hash

    def keep_base_hash(self, hashes: Mapping[str, str]) -> None:
        """Record these as the base's from now on."""
        self._base_hash = dict(hashes)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the adapter, the heads and their configs to `folder`; dtype: of the tensors on disk, None: as is."""
        adapter_files.save_adapter(self, expanded_path(folder, "folder"), dtype=dtype)

    def load_adapter(self, folder: str | Path, *, allow_other_base: bool = False) -> None:
        """Load what `save_adapter` wrote; FileNotFoundError or ModelMismatch before anything is changed."""
        self._check_not_fused("load an adapter")
        adapter_files.load_adapter(self, expanded_path(folder, "folder"), allow_other_base=allow_other_base)

    def _check_not_fused(self, what: str) -> None:
        if self.is_fused:
            raise ValueError(f"the model is fused: build another one from its base to {what}")

    @classmethod
    def from_config(
        cls,
        config: TriplaneTurboConfig,
        *,
        num_denoising_steps: int = 4,
        text_dtype: torch.dtype = torch.float32,
        init_from: str | Path | None = None,
    ) -> tuple[Self, PromptEncoder]:
        """Build a model to train on the base that the config names, and return it with the base's text encoder.

        num_denoising_steps: K of a rollout; text_dtype: unused, text is float32; init_from: adapter to start from.
        Raises as `load_base` does, FileNotFoundError without an adapter there, ModelMismatch for one that does not fit.
        """
        base = load_base(config.base, revision=config.revision, text=True, prediction_type=config.prediction_type)
        assert base.encoder is not None  # text=True
        model = cls.from_base(base, config, num_denoising_steps)
        if init_from is not None:
            model.load_adapter(find_model(init_from))
        if config.base_dtype is not None:
            keep_in_half(model.backbone, getattr(torch, config.base_dtype))
        return model, base.encoder

    @classmethod
    def from_base(cls, base: Base, config: TriplaneTurboConfig, num_denoising_steps: int = 4) -> Self:
        """Attach PETA and heads of the config's sizes to a base; K = num_denoising_steps."""
        attention = backbone_class(base.unet).self_attention.pattern
        ranks = {} if config.self_attention_rank is None else {attention: config.self_attention_rank}
        same: dict[str, Any] = {key: getattr(config, key) for key in (*GROUPS, "plane_wise", "plane_channels", "full")}
        peta = PetaConfig(r=config.rank, rank_pattern=ranks, **same)
        names = ("latent_size", "head_width", "sdf_init_scale", "inv_std", "splat_heads")
        sizes: dict[str, Any] = {name: getattr(config, name) for name in names}
        sizes |= {"bias_radius": config.sphere_radius, "num_inference_steps": num_denoising_steps}
        saved = SavedConfig(base=base.public_name, base_revision=base.revision, **sizes)
        parts, checkpointing = (base.unet, base.vae, base.scheduler, peta, saved), config.gradient_checkpointing
        return cls(*parts, gradient_checkpointing=checkpointing, base_hash=base.hashes)

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        unet: nn.Module,
        vae: AutoencoderKL,
        scheduler: Any,
        *,
        allow_other_base: bool = False,
        base_hash: Mapping[str, str] | None = None,
    ) -> Self:
        """Build a model as the configs in `folder` say, on this base, and load the saved adapter."""
        peta, config = adapter_files.read_settings(expanded_path(folder, "folder"))
        with undrawn_weights():
            model = cls(unet, vae, scheduler, peta, config, base_hash=base_hash)
        model.load_adapter(folder, allow_other_base=allow_other_base)
        return model
