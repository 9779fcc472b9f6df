"""Diffusion transformers as bases: PixArt-Sigma, and Stable Diffusion 3 and 3.5, whose MM-DiT is a flow.

What a plane's tokens go through alone and where planes meet gets plane-wise LoRA: the patch embedding (with a bias per
plane, which is the plane's own embedding beside the position's), self-attention and the output projection. The
feed-forward layers, shared by the planes as the U-Net's convolutions are, and what reads the text get ordinary LoRA.
Everything else stays as it is: the embeddings of time and text, the modulation, the feed-forward layers of Stable
Diffusion 3's text.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, ClassVar

from diffusers import AutoencoderKL, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from torch import Tensor, nn

from prd.adapters.backbone import PROJECTIONS, Backbone, SixPlaneBackbone, check_last_row
from prd.adapters.noise_levels import FlowLevels, NoiseLevels
from prd.adapters.planes import PlaneAttention
from prd.adapters.precision import under_own_autocast

ENDS = ("pos_embed.proj", "proj_out")  # patches in, patches out
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


class TransformerBackbone(Backbone):
    """A diffusion transformer and its VAE decoder, which is given latents by the VAE's own scaling and shift."""

    block_class: ClassVar[type[nn.Module]]
    frozen: ClassVar[re.Pattern[str]]  # layers that stay as they are, by their names in the transformer

    def __init__(self, network: nn.Module, vae: AutoencoderKL, config: Any, scheduler: Any = None) -> None:
        super().__init__(network, vae, config, scheduler)
        own: Any = vae.config
        shift = getattr(own, "shift_factor", None) or 0.0
        self.vae_scaling: dict[str, float] = {"factor": float(own.scaling_factor), "shift": float(shift)}

    def to_decoder(self, latents: Tensor, scale: float | None = None) -> Tensor:
        """Latents as the decoder takes them: latents / scaling_factor + shift_factor; ValueError for another scale."""
        factor, shift = self.vae_scaling["factor"], self.vae_scaling["shift"]
        if scale is not None:
            raise ValueError(f"latent_scale={scale}: this base has its VAE's own, {factor}; leave it out")
        return latents / factor + shift

    def check_size(self, height: int, width: int) -> None:
        patch, most = self.network.config["patch_size"], self.network.config.get("pos_embed_max_size")
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width}: must be multiples of {patch}, the side of a patch")
        if most is not None and max(height, width) > most * patch:
            raise ValueError(f"latents of {height} x {width}: the base has positions for {most * patch} at most")

    def block_layers(self, block: Any) -> dict[str, list[str]]:
        """Names in a block of the layers that PETA adapts, by group."""
        raise NotImplementedError

    def network_layers(self) -> dict[str, list[str]]:
        groups = {"convolutions": [f"{self.network_name}.{name}" for name in ENDS]}
        for name, block in self.network.transformer_blocks.named_children():
            if type(block) is not self.block_class:
                raise ValueError(f"transformer_blocks.{name}: is a {type(block).__name__}, which PETA does not know")
            for group, layers in self.block_layers(block).items():
                place = f"{self.network_name}.transformer_blocks.{name}"
                groups.setdefault(group, []).extend(f"{place}.{layer}" for layer in layers)
        self._check_known({name for names in groups.values() for name in names})
        return groups

    def _check_known(self, adapted: set[str]) -> None:
        """ValueError for a layer with weights that is neither adapted nor known to stay as it is."""
        prefix = f"{self.network_name}."
        for name, module in self.network.named_modules(prefix=self.network_name):
            name = name.removesuffix(".base_layer")
            leaf = ".lora_" not in name and not list(module.children()) and list(module.parameters(recurse=False))
            if leaf and name not in adapted and not self.frozen.fullmatch(name.removeprefix(prefix)):
                raise ValueError(f"{name}: is a {type(module).__name__} that PETA does not know in this base")

    def plane_wise_layers(self) -> set[str]:
        return {*self.network_layers()["self_attention"], *(f"{self.network_name}.{name}" for name in ENDS)}


class PixArtBackbone(TransformerBackbone):
    """PixArt-Sigma: the planes are rows that self-attention joins, as in a U-Net; the learned variance is dropped.

    A text [L + 1, Ct] is a T5's tokens and, in the last row, the mask of the prompt's own (`prd.text.pixart`).
    """

    network_class = PixArtTransformer2DModel
    network_name = "transformer"
    block_class = BasicTransformerBlock
    frozen = re.compile(r"(adaln_single|caption_projection)\..*")
    transformer: Any

    def __init__(self, network: nn.Module, vae: AutoencoderKL, config: Any, scheduler: Any = None) -> None:
        super().__init__(network, vae, config, scheduler)
        if self.transformer.use_additional_conditions or self.transformer.caption_projection is None:
            raise ValueError("transformer: is told sizes, as PixArt-alpha's is; give PixArt-Sigma")
        processor: Any = PlaneAttention(config.num_planes)
        self.transformer.set_attn_processor(processor)

    @property
    def text_width(self) -> int:
        return self.transformer.config["caption_channels"]

    def check_text(self, prompt_embeds: Tensor) -> None:
        tokens = prompt_embeds.shape[-2] - 1 if prompt_embeds.ndim > 1 else 0
        check_last_row(prompt_embeds, tokens, "the mask of the prompt's tokens, 1 or 0", mask=True)

    @under_own_autocast
    def denoise(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The noise [B * P, 4, h, w] in latents of that shape; text [B, L + 1, Ct] or [B * P, L + 1, Ct]."""
        rows, once = len(latents), len(text) != len(latents)
        if rows != len(text) * (self.num_planes if once else 1):
            raise ValueError(f"text={tuple(text.shape)}: expected one per sample or one per plane of {rows} planes")
        text = text.repeat_interleave(self.num_planes, dim=0) if once else text
        return self.transformer(
            latents,
            encoder_hidden_states=text[:, :-1],
            timestep=timestep.expand(rows),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            cross_attention_kwargs={"one_text": once},
            encoder_attention_mask=text[:, -1, : text.shape[1] - 1],
            return_dict=False,
        )[0][:, : self.latent_channels]

    def block_layers(self, block: Any) -> dict[str, list[str]]:
        return {
            "self_attention": [f"attn1.{layer}" for layer in PROJECTIONS],
            "cross_attention": [f"attn2.{layer}" for layer in PROJECTIONS],
            "convolutions": list(FEED_FORWARD),
        }


class StableDiffusion3Backbone(TransformerBackbone):
    """Stable Diffusion 3 and 3.5: the planes of a sample are one sequence [B, P * N, D], which the text joins once.

    The transformer is given the planes above each other as one picture [B, C, P * h, w]: its patches come in the order
    of the planes. Each plane's patches have the positions of a picture of their own (`_apart`, `_joined`).

    A text [L + 1, Ct] is the tokens of two CLIPs and a T5 and, in the last row, the pooled embedding, filled up with
    zeros (`prd.text.sd3`). There is none of each plane: its tokens and the image's attend to each other.
    """

    network_class = SD3Transformer2DModel
    network_name = "joint_transformer"
    levels_class: ClassVar[type[NoiseLevels]] = FlowLevels
    self_attention = re.compile(r"(.*\.)?attn2?\.to_(q|k|v|out\.0)")
    block_class = JointTransformerBlock
    frozen = re.compile(
        r"time_text_embed\..*|context_embedder|norm_out\.linear|transformer_blocks\.\d+\."
        r"(norm1\.linear|norm1_context\.linear|ff_context\..*|attn2?\.norm_(added_)?[qk]|attn\.add_q_proj)"
    )
    joint_transformer: Any

    def __init__(self, network: nn.Module, vae: AutoencoderKL, config: Any, scheduler: Any = None) -> None:
        super().__init__(network, vae, config, scheduler)
        embedding = self.joint_transformer.pos_embed
        embedding.register_forward_pre_hook(partial(_apart, config.num_planes))
        embedding.register_forward_hook(partial(_joined, config.num_planes))

    @property
    def text_width(self) -> int:
        return self.joint_transformer.config["joint_attention_dim"]

    def check_text(self, prompt_embeds: Tensor) -> None:
        pooled = self.joint_transformer.config["pooled_projection_dim"]
        check_last_row(prompt_embeds, pooled, "the pooled embedding")

    @under_own_autocast
    def denoise(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The flow noise - x0 [B * P, C, h, w] at latents of that shape; text [B, L + 1, Ct]."""
        planes = self.num_planes
        if len(text) * planes != len(latents):
            raise ValueError(
                f"text={tuple(text.shape)}: Stable Diffusion 3 reads one text per sample, {len(latents) // planes} here"
            )
        picture = latents.unflatten(0, (-1, planes)).transpose(1, 2).flatten(2, 3)  # [B, C, P h, w]
        flow = self.joint_transformer(
            hidden_states=picture,
            timestep=timestep.expand(len(latents))[::planes],
            encoder_hidden_states=text[:, :-1],
            pooled_projections=text[:, -1, : self.joint_transformer.config["pooled_projection_dim"]],
            return_dict=False,
        )[0]
        return flow.unflatten(2, (planes, -1)).transpose(1, 2).flatten(0, 1)

    def block_layers(self, block: Any) -> dict[str, list[str]]:
        of_text = ["attn.add_k_proj", "attn.add_v_proj"]
        if not block.context_pre_only:  # the last block puts out no text
            of_text += ["attn.add_q_proj", "attn.to_add_out"]
        attentions = ("attn", "attn2") if block.use_dual_attention else ("attn",)
        return {
            "self_attention": [f"{attention}.{layer}" for attention in attentions for layer in PROJECTIONS],
            "cross_attention": of_text,
            "convolutions": list(FEED_FORWARD),
        }


def _apart(planes: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Planes above each other [B, C, P * h, w] as rows [B * P, C, h, w], before the patch embedding."""
    return (args[0].unflatten(2, (planes, -1)).transpose(1, 2).flatten(0, 1),)


def _joined(planes: int, module: nn.Module, args: tuple[Tensor], tokens: Tensor) -> Tensor:
    """Tokens of rows [B * P, N, D] as those of samples [B, P * N, D], after the patch embedding."""
    return tokens.unflatten(0, (-1, planes)).flatten(1, 2)


BACKBONES: tuple[type[Backbone], ...] = (SixPlaneBackbone, PixArtBackbone, StableDiffusion3Backbone)


def backbone_class(network: Any) -> type[Backbone]:
    """The kind of base that a network is of; TypeError for one that PETA is not made for."""
    for kind in BACKBONES:
        if isinstance(network, kind.network_class):
            return kind
    known = ", ".join(kind.network_class.__name__ for kind in BACKBONES)
    raise TypeError(f"base is a {type(network).__name__}: PETA adapts {known}, each with an AutoencoderKL")


def backbone_of(network: nn.Module, vae: AutoencoderKL, config: Any, scheduler: Any = None) -> Backbone:
    """The backbone of a base's network and VAE; `config` a PetaConfig, `scheduler` as for `Backbone`."""
    return backbone_class(network)(network, vae, config, scheduler)
