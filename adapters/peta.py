"""PETA: what is added to Stable Diffusion so that it denoises and decodes six planes (TriplaneTurbo, section 3.3).

The U-Net's self-attention gets plane-wise LoRA, six A/B pairs a projection; its cross-attention and its convolutions,
and the VAE decoder's attention and convolutions, get ordinary LoRA; the decoder gets a new last convolution. Nothing
is scaled by alpha / rank. Everything is one peft adapter around one module, so peft's own files and functions apply.
"""

from __future__ import annotations

import copy
import operator
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Conv2d as LoraConv
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from prd.adapters.planes import NUM_PLANES, PlaneAttention, PlaneConvOut, PlaneLinear, decode_one_by_one
from prd.adapters.precision import HALF_PRECISIONS, added, computed_in, under_own_autocast

CONV_OUT = "decoder.conv_out"
LARGE_LATENT = 32 * 32  # latent pixels per plane from which planes are decoded one by one
OPTIONS = {  # of peft's LoraConfig that mean something here, or are peft's own records
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_type", "task_type", "auto_mapping"),
    *("peft_version", "runtime_config"),
}
PICTURE = (1024, 1024, 0, 0, 1024, 1024)  # Stable Diffusion XL is told: a picture as trained for, whole
MERGED_WIDTH = 8  # a trained convolution is merged up to this many output channels a rank (measured on one core)
GROUPS = ("self_attention", "cross_attention", "convolutions", "decoder_attention", "decoder_convolutions")
SELF_ATTENTION = re.compile(r"(.*\.)?attn1\.to_(q|k|v|out\.0)")


def only_adapter(layer: LoraLayer, x: Tensor) -> str | None:
    """The name of the layer's adapter if it is the plain case: one, active, unmerged, computed in its input's dtype."""
    active = layer.active_adapters
    if len(active) != 1 or active[0] not in layer.lora_A or layer.disable_adapters or layer.merged:
        return None
    down: Any = layer.lora_A[active[0]]
    return active[0] if computed_in(down.weight) == computed_in(x) else None


class PetaLinear(LoraLinear):
    """peft's LoRA of a linear layer, without the multiplication by a scale of 1."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = only_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        return added(self.base_layer(x), self.lora_B[name](self.lora_A[name](x)), x)

    def fused(self) -> nn.Module:
        """A plain layer with W + B A as its weight."""
        base, up, down = fusable(self)
        return with_weight(base, torch.addmm(base.weight, up, down))


class PlaneLora(PetaLinear):
    """LoRA of a linear layer with one pair of factors per plane; input [B * P, L, in]."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if not isinstance(config, PetaConfig):
            raise TypeError(
                f"adapter {adapter_name!r} has a {type(config).__name__}: give peft the adapter's own config, "
                "config=PetaConfig.from_pretrained(folder)"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        bias = config.plane_bias and kwargs["target_name"].endswith("to_out.0")
        base: Any = self.get_base_layer()
        down = PlaneLinear(config.num_planes, base.in_features, r)
        up = PlaneLinear(config.num_planes, r, base.out_features, bias=bias)
        nn.init.normal_(down.weight, std=1 / r)
        nn.init.zeros_(up.weight)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("six planes cannot be merged into one weight")

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight for each plane, [P, out, in]."""
        up: Any = self.lora_B[adapter]
        down: Any = self.lora_A[adapter]
        return up.weight @ down.weight

    def fused(self) -> nn.Module:
        """A `PlaneLinear` with W + B_p A_p and b + b_p as the weight and the bias of plane p."""
        base, up, down = fusable(self)
        planes = len(up)
        layer = PlaneLinear(0, 0, 0)
        layer.weight = frozen(torch.baddbmm(base.weight.expand(planes, -1, -1), up, down))
        own: Any = self.lora_B[self.active_adapters[0]]
        biases = [bias for bias in (base.bias, own.bias) if bias is not None]
        layer.bias = frozen(sum(biases).to(base.weight.dtype).expand(planes, -1).contiguous()) if biases else None
        return layer


class PetaConv(LoraConv):
    """LoRA of a convolution, as one convolution with W + B A wherever that is cheaper than three.

    An output position costs, in products with a k x k patch, 2 out + 3 r apart and 3 out merged when it is trained
    (the frozen W then needs its gradient too), and out + r against out when it is not; making W + B A costs r out
    once. Computed in half precision (autocast's, whatever the input's) a trained adapter stays apart: its small changes
    would be rounded away in W.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = only_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        conv: Any = self.base_layer
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        positions = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
        trained = torch.is_grad_enabled() and down.weight.requires_grad
        wide = conv.out_channels > (MERGED_WIDTH * self.r[name] if trained else positions)
        if wide or conv.groups > 1 or (trained and computed_in(x) in HALF_PRECISIONS):
            return added(conv(x), up(down(x)), x)
        weight = torch.addmm(conv.weight.flatten(1), up.weight.flatten(1), down.weight.flatten(1))
        return conv._conv_forward(x, weight.view_as(conv.weight), conv.bias)

    def fused(self) -> nn.Module:
        """A plain convolution with W + B A as its weight."""
        base, up, down = fusable(self)
        if base.groups > 1:
            merged = base.weight + self.get_delta_weight(self.active_adapters[0])
        else:
            merged = torch.addmm(base.weight.flatten(1), up.flatten(1), down.flatten(1)).view(base.weight.shape)
        last = base.weight.is_contiguous(memory_format=torch.channels_last)
        return with_weight(base, merged.contiguous(memory_format=torch.channels_last) if last else merged)


def fusable(adapted: Any) -> tuple[Any, Tensor, Tensor]:
    """The layer without its adapter, and B and A in its dtype (products of half precision are summed in float32)."""
    base, name = adapted.get_base_layer(), adapted.active_adapters[0]
    return base, *(part[name].weight.to(base.weight.dtype) for part in (adapted.lora_B, adapted.lora_A))


def with_weight(base: Any, weight: Tensor) -> nn.Module:
    """The layer with another weight; `base` is left as it is and the bias is shared."""
    layer: Any = copy.copy(base)
    layer._parameters = {**base._parameters, "weight": frozen(weight)}
    return layer


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


@dataclass
class PetaConfig(LoraConfig):
    """Settings of PETA: what is adapted and by how much; plain JSON fields, saved as peft's adapter_config.json.

    `r` is the rank everywhere, `rank_pattern` (peft's: regex -> rank) overrides it for some modules. Plane-wise LoRA
    against basic LoRA of the same parameter count is `plane_wise=False, rank_pattern={SELF_ATTENTION.pattern: 6 * r}`.
    `target_modules` and `modules_to_save` are found when the adapter is attached, whatever is given. ValueError for the
    options of peft's LoRA that PETA does not have (dropout, another alpha, DoRA, ...).
    """

    r: int = field(default=16)
    lora_alpha: int | None = field(default=None)  # type: ignore[assignment]  # always r: nothing is scaled
    num_planes: int = field(default=NUM_PLANES)
    plane_channels: int = field(default=32)  # C of the decoded planes; the new conv_out has 2C channels
    plane_wise: bool = field(default=True)  # False: one A/B pair shared by the planes in self-attention
    plane_bias: bool = field(default=False)  # a bias per plane on to_out, as the folded published weights need
    self_attention: bool = field(default=True)  # attn1 of the U-Net
    cross_attention: bool = field(default=True)  # attn2 of the U-Net
    convolutions: bool = field(default=True)  # ResNet, down- and upsampling (and conv projections) of the U-Net
    decoder_attention: bool = field(default=True)
    decoder_convolutions: bool = field(default=True)
    full: bool = field(default=False)  # full fine-tuning: the whole U-Net and decoder are trained and saved, no LoRA

    def __post_init__(self) -> None:
        for name in ("r", "num_planes", "plane_channels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name}={value!r}: must be a positive integer")
            setattr(self, name, operator.index(value))  # of numpy or torch, which JSON does not take
        if self.num_planes % 2:
            raise ValueError(f"num_planes={self.num_planes}: must be even, geometry planes and as many texture planes")
        for name in (*GROUPS, "plane_wise", "plane_bias", "full"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be true or false")
        self._refuse_other_options()
        if self.init_lora_weights is True:
            self.init_lora_weights = "gaussian"  # A ~ N(0, 1 / r) as a standard deviation, B = 0
        self.lora_alpha = self.r  # peft scales by alpha / r; here by 1
        self.alpha_pattern = dict(self.rank_pattern or {})
        self.modules_to_save = ["unet", "decoder"] if self.full else [CONV_OUT]
        super().__post_init__()
        layers: Any = {nn.Linear: self._linear, nn.Conv2d: PetaConv}
        self._register_custom_module(layers)

    def _refuse_other_options(self) -> None:
        """Raise ValueError for an option of peft's LoRA that PETA does not have: it would be ignored."""
        if self.lora_alpha not in (None, self.r):
            raise ValueError(f"lora_alpha={self.lora_alpha}: PETA scales nothing; leave it out, or give r={self.r}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r}: must be True, False or 'gaussian'")
        for option in fields(LoraConfig):
            if option.name in OPTIONS or not option.init:
                continue
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if getattr(self, option.name) not in (default, None):
                raise ValueError(f"{option.name}={getattr(self, option.name)!r}: PETA has no such option; leave it out")

    def _linear(self, target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> LoraLayer:
        name = kwargs["target_name"]
        plane_wise = self.plane_wise and name.startswith("unet.") and SELF_ATTENTION.fullmatch(name)
        return (PlaneLora if plane_wise else PetaLinear)(target, adapter_name, config=config, **kwargs)

    # The registered mapping holds a bound method: it is rebuilt, not copied, when peft copies or pickles the config.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_custom_modules"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PetaConfig:
        """peft's constructor for a config file: this class, whatever peft_type says."""
        return cls(**{name: value for name, value in kwargs.items() if name != "peft_type"})


class SixPlaneBackbone(nn.Module):
    """The U-Net and the VAE decoder of a Stable Diffusion, as the one module that PETA adapts.

    The modules are new, the weights are the base's own tensors (frozen here): a teacher may use the same base, and it
    stays unadapted. The decoder's last convolution is replaced by a fresh `PlaneConvOut`.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, config: PetaConfig) -> None:
        super().__init__()
        if not isinstance(unet, UNet2DConditionModel) or not isinstance(vae, AutoencoderKL):
            raise TypeError(
                f"base is {type(unet).__name__} + {type(vae).__name__}: PETA adapts UNet2DConditionModel + "
                "AutoencoderKL, that is Stable Diffusion 1.x, 2.x, XL and their fine-tunes"
            )
        parts: Any = vae
        self.unet: Any = shared_copy(unet)
        self.decoder: Any = shared_copy(parts.decoder)
        self.post_quant_conv = nn.Identity() if parts.post_quant_conv is None else shared_copy(parts.post_quant_conv)
        self.requires_grad_(False)
        self.num_planes = config.num_planes
        self.kept_in: torch.dtype | None = None  # half precision of the frozen weights; None: as loaded
        self.pooled = 0  # channels of a pooled embedding that the U-Net takes beside the tokens
        if self.unet.config.get("addition_embed_type") == "text_time":
            times = len(PICTURE) * self.unet.config["addition_time_embed_dim"]
            self.pooled = self.unet.add_embedding.linear_1.in_features - times
        old = self.decoder.conv_out
        conv_out = PlaneConvOut(old.in_channels, config.plane_channels, config.num_planes)
        self.decoder.conv_out = conv_out.to(device=old.weight.device, dtype=old.weight.dtype)
        processor: Any = PlaneAttention(config.num_planes)
        for module in self.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.attn1.set_processor(processor)
                module.attn2.set_processor(processor)

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
        return self.unet(latents, timestep, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    @under_own_autocast
    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Planes [B * P, C, H, W] from latents [B * P, 4, h, w], taken as they are.

        recompute  keep the latents alone for the backward pass, which decodes every plane again before its own

        Without gradients large planes are decoded one by one, with `recompute` all are: the activations of six planes
        of 256^2 take 2 GB in float32 (8 GB with those of the backward pass), and are slower for it.
        """
        z = self.post_quant_conv(latents)
        if recompute if torch.is_grad_enabled() else z.shape[-2] * z.shape[-1] >= LARGE_LATENT:
            return decode_one_by_one(self.decoder, z, self.num_planes)
        return self.decoder(z)


def shared_copy(module: Any) -> Any:
    """A copy of the module tree that shares every parameter and buffer with the original."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared)


def plain_layer(parent: nn.Module, name: str) -> Any:
    """The layer `name` of `parent` without its adapter; None if there is none."""
    layer: Any = getattr(parent, name, None)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def expected_modules(backbone: SixPlaneBackbone, config: PetaConfig) -> dict[str, list[str]]:
    """The names of the modules that PETA adapts in this base, by group, found by type.

    Raises ValueError if a group that every Stable Diffusion has is empty, or a block is not of a known form.
    """
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}

    def convolutions(name: str, module: nn.Module) -> list[str]:
        children: tuple[str, ...] = ()
        if isinstance(module, ResnetBlock2D):
            children = ("conv1", "conv2", "conv_shortcut")
        elif isinstance(module, Downsample2D | Upsample2D):
            children = ("conv",)
        elif isinstance(module, Transformer2DModel):
            children = ("proj_in", "proj_out")
        return [f"{name}.{child}" for child in children if isinstance(plain_layer(module, child), nn.Conv2d)]

    linears = ("to_q", "to_k", "to_v", "to_out.0")
    for name, module in backbone.unet.named_modules(prefix="unet"):
        groups["convolutions"] += convolutions(name, module)
        if isinstance(module, BasicTransformerBlock):
            if module.attn1 is None or module.attn2 is None or module.only_cross_attention:
                raise ValueError(f"{name}: PETA needs one self- and one cross-attention in each transformer block")
            groups["self_attention"] += [f"{name}.attn1.{linear}" for linear in linears]
            groups["cross_attention"] += [f"{name}.attn2.{linear}" for linear in linears]
    for name, module in backbone.decoder.named_modules(prefix="decoder"):
        groups["decoder_convolutions"] += convolutions(name, module)
        if isinstance(module, Attention):
            groups["decoder_attention"] += [f"{name}.{linear}" for linear in linears]
    empty = [group for group, names in groups.items() if not names]
    if empty:
        raise ValueError(f"base without {', '.join(empty)}: PETA expects the blocks of Stable Diffusion")
    return {group: names for group, names in groups.items() if getattr(config, group)}


def attach_peta(backbone: SixPlaneBackbone, config: PetaConfig) -> PeftModel:
    """Add the adapter to the backbone and count that every expected module got it, of the right kind.

    Only the adapter and the new conv_out require gradients; with `full` all of the U-Net and the decoder (copies: the
    base's own tensors stay as they are). Raises ValueError naming what is missing or extra.
    """
    groups = expected_modules(backbone, config)
    if config.full:
        config.target_modules = DUMMY_TARGET_MODULES
        return get_peft_model(backbone, config)
    expected = {name for names in groups.values() for name in names}
    if not expected:
        raise ValueError("PetaConfig adapts nothing: switch on at least one of self_attention, ..., decoder_attention")
    config.target_modules = sorted(expected)
    peft_model = get_peft_model(backbone, config)
    found = {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)}
    plane_wise = {name for name, module in found.items() if isinstance(module, PlaneLora)}
    _compare("adapted modules", set(found), expected)
    _compare("plane-wise modules", plane_wise, set(groups.get("self_attention", ())) if config.plane_wise else set())
    return peft_model


@torch.no_grad()
def fuse_peta(backbone: SixPlaneBackbone) -> None:
    """Replace every adapted layer by a plain one with the adapter in its weights, in place and for good.

    Ordinary LoRA becomes W + B A, plane-wise LoRA six stacked weights. The base's own tensors are not changed.
    """
    kinds = (PetaLinear, PetaConv, ModulesToSaveWrapper)
    for name in [name for name, module in backbone.named_modules() if isinstance(module, kinds)]:
        module: Any = backbone.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            _replace(backbone, name, module.modules_to_save[module.active_adapters[0]].requires_grad_(False))
        else:
            _replace(backbone, name, module.fused())


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _compare(what: str, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ValueError(f"{what}: {len(found)} found, {len(expected)} expected; missing {missing}, extra {extra}")
