"""A pretrained text-to-image model as the base of a student: what the K-step rollout and PETA need to know of it."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from prd.adapters.noise_levels import DiffusionLevels, NoiseLevels, as_timestep
from prd.adapters.planes import PlaneAttention, PlaneConvOut, decode_one_by_one
from prd.adapters.precision import under_own_autocast

if TYPE_CHECKING:
    from prd.adapters.peta import PetaConfig

LARGE_LATENT = 32 * 32  # latent pixels per plane from which planes are decoded one by one
GUIDANCE = 7.5  # that a latent consistency model is told, in the middle of what it was distilled for
PICTURE = (1024, 1024, 0, 0, 1024, 1024)  # Stable Diffusion XL is told: a picture as trained for, whole
GROUPS = ("self_attention", "cross_attention", "convolutions", "decoder_attention", "decoder_convolutions")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
SELF_ATTENTION = re.compile(r"(.*\.)?attn1\.to_(q|k|v|out\.0)")


class Backbone(nn.Module):
    """The network and the VAE decoder of a base, as the one module that PETA adapts.

    A kind of base is a subclass: it says how its network predicts from six planes (`denoise`), by which noise levels
    (`levels_class`) and which layers PETA adapts (`network_layers`). Everything else, `predict_x0` and the K steps of a
    rollout among it, is the same for all.

    The modules are new, the weights are the base's own tensors (frozen here): a teacher may use the same base, and it
    stays unadapted. The decoder's last convolution is replaced by a fresh `PlaneConvOut`.

    scheduler  of diffusers, whose noise levels the base was trained with; None: for the layers alone, nothing is noised
    """

    network_class: ClassVar[type[nn.Module]]
    network_name: ClassVar[str]  # of its attribute here, before the names of its layers
    levels_class: ClassVar[type[NoiseLevels]] = DiffusionLevels
    self_attention: ClassVar[re.Pattern[str]] = SELF_ATTENTION  # names of the layers in that group

    def __init__(self, network: nn.Module, vae: AutoencoderKL, config: PetaConfig, scheduler: Any = None) -> None:
        super().__init__()
        if not isinstance(network, self.network_class) or not isinstance(vae, AutoencoderKL):
            raise TypeError(
                f"base is {type(network).__name__} + {type(vae).__name__}: expected {self.network_class.__name__} + "
                "AutoencoderKL"
            )
        parts: Any = vae
        setattr(self, self.network_name, shared_copy(network))
        self.decoder: Any = shared_copy(parts.decoder)
        self.post_quant_conv = nn.Identity() if parts.post_quant_conv is None else shared_copy(parts.post_quant_conv)
        self.requires_grad_(False)
        self.num_planes = config.num_planes
        self.kept_in: torch.dtype | None = None  # half precision of the frozen weights; None: as loaded
        old = self.decoder.conv_out
        conv_out = PlaneConvOut(old.in_channels, config.plane_channels, config.num_planes)
        self.decoder.conv_out = conv_out.to(device=old.weight.device, dtype=old.weight.dtype)
        self.vae_scaling: dict[str, float] | None = None  # "factor" and "shift", where latents are decoded by the VAE's
        self.levels: Any = None if scheduler is None else self.levels_class.of(scheduler).to(self.device)

    @property
    def network(self) -> Any:
        """The U-Net or transformer, adapted or not."""
        return getattr(self, self.network_name)

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def latent_channels(self) -> int:
        """Channels C of a plane's latents."""
        return self.network.config["in_channels"]

    @property
    def text_width(self) -> int:
        """Channels Ct of a prompt's embedding."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for latents of a size that the network cannot take."""

    def check_text(self, prompt_embeds: Tensor) -> None:
        """Raise ValueError for embeddings [..., L, Ct] whose last row is not what this base reads in it."""

    def denoise(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The network's prediction [B * P, C, h, w] for latents of that shape; text [B, L, Ct] or [B * P, L, Ct].

        timestep  what the network is told (`NoiseLevels.told`): one for all, or [B * P]
        """
        raise NotImplementedError

    def predict(self, latents: Tensor, timestep: Tensor | int, condition: Tensor) -> Tensor:
        """The network's prediction [B, P, C, h, w] for latents of that shape.

        timestep  an integer or [B] in [0, T); condition [B, L, Ct], or [B, P, L, Ct] for a text of each plane
        """
        t = as_timestep(timestep, latents.device)
        text = condition.flatten(0, 1) if condition.ndim == 4 else condition
        rows = self.levels.told(t.repeat_interleave(self.num_planes) if t.ndim else t)
        prediction = self.denoise(latents.flatten(0, 1).to(self.dtype), rows, text.to(self.dtype))
        return prediction.view(latents.shape).to(latents.dtype)

    def predict_x0(self, latents: Tensor, timestep: Tensor | int, condition: Tensor) -> Tensor:
        """x0 [B, P, C, h, w] of noisy latents in one step; arguments as for `predict`."""
        return self.levels.x0(latents, self.predict(latents, timestep, condition), timestep)

    def to_decoder(self, latents: Tensor, scale: float | None = None) -> Tensor:
        """Latents as the decoder takes them: raw, as the published adapter was trained; with a scale divided by it."""
        return latents if scale is None else latents / scale

    @under_own_autocast
    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Planes [B * P, C, H, W] from latents [B * P, C, h, w], taken as they are (`to_decoder` comes before).

        recompute  keep the latents alone for the backward pass, which decodes every plane again before its own

        Without gradients large planes are decoded one by one, with `recompute` all are: the activations of six planes
        of 256^2 take 2 GB in float32 (8 GB with those of the backward pass), and are slower for it.
        """
        z = self.post_quant_conv(latents)
        if recompute if torch.is_grad_enabled() else z.shape[-2] * z.shape[-1] >= LARGE_LATENT:
            return decode_one_by_one(self.decoder, z, self.num_planes)
        return self.decoder(z)

    def network_layers(self) -> dict[str, list[str]]:
        """Names of the network's layers that PETA adapts, by group, found by type; ValueError for an unknown form."""
        raise NotImplementedError

    def plane_wise_layers(self) -> set[str]:
        """Names of the layers that get a pair of factors per plane."""
        return set(self.network_layers()["self_attention"])

    def layers(self) -> dict[str, list[str]]:
        """Names of all layers that PETA adapts in this base, by group, found by type.

        Raises ValueError if a group that every base has is empty, or a block is not of a known form.
        """
        groups = {**{group: [] for group in GROUPS}, **self.network_layers()}
        for name, module in self.decoder.named_modules(prefix="decoder"):
            groups["decoder_convolutions"] += convolutions(name, module)
            if isinstance(module, Attention):
                groups["decoder_attention"] += [f"{name}.{linear}" for linear in PROJECTIONS]
        if empty := [group for group, names in groups.items() if not names]:
            raise ValueError(f"base without {', '.join(empty)}: PETA expects the blocks of a known base")
        return groups


class SixPlaneBackbone(Backbone):
    """The U-Net and the VAE decoder of a Stable Diffusion 1.x, 2.x or XL, or of one distilled to few steps.

    Turbo and Lightning models differ in their weights alone. A latent consistency model is also told a guidance scale
    (`time_cond_proj_dim`; Luo et al. 2023, section 4.3).
    """

    network_class = UNet2DConditionModel
    network_name = "unet"
    unet: Any

    def __init__(self, unet: nn.Module, vae: AutoencoderKL, config: PetaConfig, scheduler: Any = None) -> None:
        super().__init__(unet, vae, config, scheduler)
        self.pooled = 0  # channels of a pooled embedding that the U-Net takes beside the tokens
        if self.unet.config.get("addition_embed_type") == "text_time":
            times = len(PICTURE) * self.unet.config["addition_time_embed_dim"]
            self.pooled = self.unet.add_embedding.linear_1.in_features - times
        processor: Any = PlaneAttention(config.num_planes)
        for module in self.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.attn1.set_processor(processor)
                module.attn2.set_processor(processor)

    @property
    def text_width(self) -> int:
        return self.unet.config["cross_attention_dim"]

    def check_text(self, prompt_embeds: Tensor) -> None:
        if self.pooled:
            check_last_row(prompt_embeds, self.pooled, "the pooled embedding")

    @under_own_autocast
    def denoise(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The U-Net's prediction [B * P, 4, h, w] for latents of that shape; text [B, 77, Ct] or [B * P, 77, Ct].

        Stable Diffusion XL's text has one more row: the pooled embedding, filled up with zeros.
        """
        added = None
        if self.pooled:
            text, pooled = text[:, :-1], text[:, -1, : self.pooled]
            if len(pooled) != len(latents):
                pooled = pooled.repeat_interleave(self.num_planes, dim=0)
            sizes = torch.tensor(PICTURE, dtype=pooled.dtype, device=pooled.device).expand(len(pooled), -1)
            added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(
            latents,
            timestep,
            encoder_hidden_states=text,
            timestep_cond=self._guidance(latents),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _guidance(self, like: Tensor) -> Tensor | None:
        """The guidance scale [B * P, D] that a latent consistency model is told; None for other U-Nets."""
        width = self.unet.config.get("time_cond_proj_dim")
        if width is None:
            return None
        scale = torch.full((len(like),), 1000 * (GUIDANCE - 1), dtype=torch.float32, device=like.device)
        return get_timestep_embedding(scale, width, downscale_freq_shift=1).to(like.dtype)

    def network_layers(self) -> dict[str, list[str]]:
        """Attention of the transformer blocks, and the convolutions of ResNet, down- and upsampling blocks."""
        groups: dict[str, list[str]] = {group: [] for group in ("self_attention", "cross_attention", "convolutions")}
        for name, module in self.unet.named_modules(prefix="unet"):
            groups["convolutions"] += convolutions(name, module)
            if isinstance(module, BasicTransformerBlock):
                if module.attn1 is None or module.attn2 is None or module.only_cross_attention:
                    raise ValueError(f"{name}: PETA needs one self- and one cross-attention in each transformer block")
                groups["self_attention"] += [f"{name}.attn1.{linear}" for linear in PROJECTIONS]
                groups["cross_attention"] += [f"{name}.attn2.{linear}" for linear in PROJECTIONS]
        return groups


def check_last_row(prompt_embeds: Tensor, count: int, what: str, *, mask: bool = False) -> None:
    """ValueError unless the last row of [..., L, Ct] is `count` numbers, not all 0, then zeros; mask: of 0 and 1."""
    is_right = prompt_embeds.ndim > 1 and prompt_embeds.shape[-2] > 1
    if is_right:
        row = prompt_embeds[..., -1, :]
        is_right = bool(row[..., :count].any(-1).all() and not row[..., count:].any())
        is_right = is_right and not (mask and bool(((row != 0) & (row != 1)).any()))
    if not is_right:
        raise ValueError(
            f"prompt_embeds={tuple(prompt_embeds.shape)}: the last row must be {what}, {count} numbers filled up with "
            "zeros; take embeddings from this base's own text encoder (`pipe.encoder`)"
        )


def shared_copy(module: Any) -> Any:
    """A copy of the module tree that shares every parameter and buffer with the original."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared)


def convolutions(name: str, module: nn.Module) -> list[str]:
    """Names of the convolutions in one block that PETA adapts; `name` is the block's."""
    children: tuple[str, ...] = ()
    if isinstance(module, ResnetBlock2D):
        children = ("conv1", "conv2", "conv_shortcut")
    elif isinstance(module, Downsample2D | Upsample2D):
        children = ("conv",)
    elif isinstance(module, Transformer2DModel):
        children = ("proj_in", "proj_out")
    return [f"{name}.{child}" for child in children if isinstance(plain_layer(module, child), nn.Conv2d)]


def plain_layer(parent: nn.Module, name: str) -> Any:
    """The layer `name` of `parent` without its adapter; None if there is none."""
    layer: Any = getattr(parent, name, None)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
