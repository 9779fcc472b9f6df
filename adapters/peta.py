"""PETA: what is added to Stable Diffusion so that it denoises and decodes six planes (TriplaneTurbo, section 3.3).

The U-Net's self-attention gets plane-wise LoRA, six A/B pairs a projection; its cross-attention and its convolutions,
and the VAE decoder's attention and convolutions, get ordinary LoRA; the decoder gets a new last convolution. Nothing
is scaled by alpha / rank. Everything is one peft adapter around one module, so peft's own files and functions apply.

Which layers these are, a `Backbone` says of its kind of base: `prd.adapters.backbone` of U-Nets,
`prd.adapters.diffusion_transformers` of transformers.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Conv2d as LoraConv
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from prd.adapters.backbone import GROUPS as GROUPS
from prd.adapters.backbone import SELF_ATTENTION as SELF_ATTENTION
from prd.adapters.backbone import Backbone
from prd.adapters.backbone import SixPlaneBackbone as SixPlaneBackbone
from prd.adapters.backbone import shared_copy as shared_copy
from prd.adapters.planes import NUM_PLANES, PlaneLinear, PlanePatches
from prd.adapters.precision import HALF_PRECISIONS, added, computed_in

CONV_OUT = "decoder.conv_out"
OPTIONS = {  # of peft's LoraConfig that mean something here, or are peft's own records
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_type", "task_type", "auto_mapping"),
    *("peft_version", "runtime_config"),
}
MERGED_WIDTH = 8  # a trained convolution is merged up to this many output channels a rank (measured on one core)
PLANE_WISE = re.compile(  # layers with a pair of factors per plane, by their names in a `Backbone`
    r"unet\.(.*\.)?attn1\.to_(q|k|v|out\.0)"
    r"|transformer\.((.*\.)?attn1\.to_(q|k|v|out\.0)|pos_embed\.proj|proj_out)"
    r"|joint_transformer\.((.*\.)?attn2?\.to_(q|k|v|out\.0)|pos_embed\.proj|proj_out)"
)
NETWORKS = ("transformer", "joint_transformer")  # of a `Backbone`, beside a U-Net
JOINED = "joint_transformer."  # whose planes are one sequence


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
    """LoRA of a linear layer with one pair of factors per plane; input as `PlaneLinear`'s."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        peta = own_config(adapter_name, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        target: str = kwargs["target_name"]
        base: Any = self.get_base_layer()
        joined = target.startswith(JOINED)
        bias = peta.plane_bias and target.endswith("to_out.0")
        down = PlaneLinear(peta.num_planes, base.in_features, r, joined=joined)
        up = PlaneLinear(peta.num_planes, r, base.out_features, bias=bias, joined=joined)
        set_factors(self, adapter_name, down, up, r, config.inference_mode)

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
        own: Any = self.lora_B[self.active_adapters[0]]
        return with_planes(PlaneLinear(0, 0, 0, joined=own.joined), base, up, down, own.bias)


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


class PlanePatchLora(PetaConv):
    """LoRA of a patch embedding with one pair of factors and one bias per plane; input [B * P, C, h, w].

    The bias is a plane's own embedding, as there is one of each position.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        peta = own_config(adapter_name, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        base: Any = self.get_base_layer()
        patch = base.kernel_size[0]
        down = PlanePatches(peta.num_planes, base.in_channels, r, patch)
        up = PlanePatches(peta.num_planes, r, base.out_channels, 1, bias=True)
        set_factors(self, adapter_name, down, up, r, config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = only_adapter(self, x)
        if name is None:
            return LoraConv.forward(self, x, *args, **kwargs)
        return added(self.base_layer(x), self.lora_B[name](self.lora_A[name](x)), x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("six planes cannot be merged into one weight")

    def fused(self) -> nn.Module:
        """`PlanePatches` with W + B_p A_p and b + b_p as the weight and the bias of plane p."""
        base, up, down = fusable(self)
        own: Any = self.lora_B[self.active_adapters[0]]
        return with_planes(PlanePatches(0, 0, 0, base.kernel_size[0]), base, up, down, own.bias)


def own_config(adapter_name: str, config: LoraConfig) -> PetaConfig:
    """The config, which must be a PetaConfig; TypeError for another."""
    if not isinstance(config, PetaConfig):
        raise TypeError(
            f"adapter {adapter_name!r} has a {type(config).__name__}: give peft the adapter's own config, "
            "config=PetaConfig.from_pretrained(folder)"
        )
    return config


def set_factors(adapted: Any, name: str, down: PlaneLinear, up: PlaneLinear, r: int, inference_mode: bool) -> None:
    """Give an adapted layer factors of its own: A ~ N(0, 1 / r) as a standard deviation, B = 0."""
    nn.init.normal_(down.weight, std=1 / r)
    nn.init.zeros_(up.weight)
    adapted.lora_A[name], adapted.lora_B[name] = down, up
    adapted._move_adapter_to_device_of_base_layer(name)
    adapted.set_adapter(adapted.active_adapters, inference_mode=inference_mode)


def with_planes(layer: PlaneLinear, base: Any, up: Tensor, down: Tensor, bias: Tensor | None) -> PlaneLinear:
    """`layer` with the base's weight and bias and the change of each plane: up [P, out, r], down [P, r, in]."""
    planes = len(up)
    layer.weight = frozen(torch.baddbmm(base.weight.flatten(1).expand(planes, -1, -1), up, down))
    biases: list[Tensor] = [each for each in (base.bias, bias) if each is not None]
    total: Any = sum(biases)
    layer.bias = frozen(total.to(base.weight.dtype).expand(planes, -1).contiguous()) if biases else None
    return layer


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
    self_attention: bool = field(default=True)  # attn1 of the U-Net; an MM-DiT's of the image
    cross_attention: bool = field(default=True)  # attn2 of the U-Net; an MM-DiT's of the text
    # ResNet, down- and upsampling, projections by convolutions; of a transformer patches in and out and feed-forward
    convolutions: bool = field(default=True)
    decoder_attention: bool = field(default=True)
    decoder_convolutions: bool = field(default=True)
    full: bool = field(default=False)  # full fine-tuning: the whole network and decoder are trained and saved, no LoRA

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
        network = next((name for name in NETWORKS if name in (self.modules_to_save or ())), "unet")
        self.modules_to_save = [network, "decoder"] if self.full else [CONV_OUT]
        super().__post_init__()
        layers: Any = {nn.Linear: self._linear, nn.Conv2d: self._conv}
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
        kind = PlaneLora if self._is_plane_wise(kwargs) else PetaLinear
        return kind(target, adapter_name, config=config, **kwargs)

    def _conv(self, target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> LoraLayer:
        kind = PlanePatchLora if self._is_plane_wise(kwargs) else PetaConv
        return kind(target, adapter_name, config=config, **kwargs)

    def _is_plane_wise(self, layer: Mapping[str, Any]) -> bool:
        return self.plane_wise and PLANE_WISE.fullmatch(layer["target_name"]) is not None

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


def expected_modules(backbone: Backbone, config: PetaConfig) -> dict[str, list[str]]:
    """The names of the modules that PETA adapts in this base, by group; ValueError as `Backbone.layers`."""
    return {group: names for group, names in backbone.layers().items() if getattr(config, group)}


def attach_peta(backbone: Backbone, config: PetaConfig) -> PeftModel:
    """Add the adapter to the backbone and count that every expected module got it, of the right kind.

    Only the adapter and the new conv_out require gradients; with `full` all of the network and the decoder (copies: the
    base's own tensors stay as they are). Raises ValueError naming what is missing or extra.
    """
    groups = expected_modules(backbone, config)
    if config.full:
        config.target_modules = DUMMY_TARGET_MODULES
        config.modules_to_save = [backbone.network_name, "decoder"]
        return get_peft_model(backbone, config)
    expected = {name for names in groups.values() for name in names}
    if not expected:
        raise ValueError("PetaConfig adapts nothing: switch on at least one of self_attention, ..., decoder_attention")
    config.target_modules = sorted(expected)
    peft_model = get_peft_model(backbone, config)
    found = {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)}
    plane_wise = {name for name, module in found.items() if isinstance(module, PlaneLora | PlanePatchLora)}
    _compare("adapted modules", set(found), expected)
    _compare("plane-wise modules", plane_wise, backbone.plane_wise_layers() & expected if config.plane_wise else set())
    return peft_model


@torch.no_grad()
def fuse_peta(backbone: Backbone) -> None:
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
