"""What a recorded folder says besides its tensors (meta.json, configs, the .pth, full-size keys) is what we build."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from prd.adapters.convert import (
    HEADS,
    LAYERS,
    convert_published,
    published_config,
    published_layers,
    read_published,
)
from prd.adapters.peta import PetaConfig, SixPlaneBackbone, attach_peta
from prd.fields.triplane import TriplaneHeads

if TYPE_CHECKING:
    from tests.parity.generator import GeneratorParity

SELF_ATTENTION = ("TriplaneSelfAttentionLoRAAttnProcessor", "self_lora_type")
CROSS_ATTENTION = ("TriplaneCrossAttentionLoRAAttnProcessor", "cross_lora_type")
DECODER_ATTENTION = ("TriplaneSelfAttentionLoRAAttnProcessor", "vae_attn_type")
CONVOLUTION = ("TriplaneLoRAConv2dLayer", "locon_type")
KINDS = {  # group: the published class, and the setting that names its type
    "self_attention": SELF_ATTENTION,
    "cross_attention": CROSS_ATTENTION,
    "decoder_attention": DECODER_ATTENTION,
    "convolutions": CONVOLUTION,
    "decoder_convolutions": CONVOLUTION,
}
TYPES = {
    "self_lora_type": "hexa_v1",
    "cross_lora_type": "vanilla",
    "locon_type": "vanilla_v1",
    "vae_attn_type": "basic",
}
GEOMETRY: dict[str, Any] = {
    "radius": 1.0,
    "normal_type": "analytic",
    "sdf_bias": "sphere",
    "rotate_planes": "v1",
    "split_channels": "v1",
    "geo_interpolate": "v1",
    "tex_interpolate": "v2",
    "isosurface_deformable_grid": True,
    "n_feature_dims": 3,
}
MLP: dict[str, Any] = {"otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none", "n_hidden_layers": 2}
BASE: dict[
    str, dict[str, Any]
] = {  # settings of Stable Diffusion which the published generator, and the student, do without
    "scheduler_config.json": {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True},
    "base_vae_config.json": {"scaling_factor": 0.18215},
}


def compare_records(parity: GeneratorParity) -> None:
    """Report every record besides the tensors of io.safetensors."""
    _meta(parity)
    for name, settings in BASE.items():
        config = json.loads((parity.folder / name).read_text(encoding="utf-8"))
        _equal(parity, name, {key: config.get(key, value) for key, value in settings.items()}, settings)
    checkpoints = sorted(parity.folder.glob("*.pth"))
    if not checkpoints:
        raise FileNotFoundError(f"{parity.folder}: holds no .pth of the published layout")
    for path in checkpoints:
        state = read_published(path)
        same = state.keys() == parity.published.keys() and all(
            torch.equal(state[name], parity.published[name]) for name in state
        )
        parity.io.report(path.name, f"{len(state)} tensors as in adapter_state_dict.safetensors", ok=same)
    for path in sorted(parity.folder.glob("*full_size_keys.json")):
        try:
            text, agree = _full_size(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            text, agree = str(error), False
        parity.io.report(path.name, text, ok=agree)


def _equal(parity: GeneratorParity, name: str, recorded: Any, built: Any) -> None:
    different = "" if recorded == built else f" against {built}"
    text = str(recorded) if len(str(recorded)) < 200 else f"{len(recorded)} entries"
    parity.io.report(name, text + different[:200], ok=recorded == built)


def _meta(parity: GeneratorParity) -> None:
    meta, tensors, student = parity.meta, parity.io.tensors, parity.student
    geometry: dict[str, Any] = meta["geometry_config"]
    space, mlp, published = geometry["space_generator_config"], geometry["mlp_network_config"], parity.published
    own = {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in tensors.items()}
    _equal(parity, "meta.json tensors", meta["tensors"], own)
    size = meta["latent_size"]
    sides = [size, size] if isinstance(size, int) else list(size)
    _equal(parity, "meta.json batch", [meta["batch"], sides], [parity.batch, list(tensors["latents_T"].shape[-2:])])
    _equal(parity, "meta.json geometry", {name: geometry[name] for name in GEOMETRY}, GEOMETRY)
    _equal(parity, "meta.json heads", mlp, {**MLP, "n_neurons": student.config.head_width})
    built: dict[str, Any] = {"timestep": len(student.alphas_cumprod) - 1, "output_dim": 2 * student.peta.plane_channels}
    built |= {**TYPES, "prompt_bias": False}
    _equal(parity, "meta.json planes", {name: space[name] for name in built}, built)
    _equal(parity, "meta.json ranks", sorted(space["training_type"].split("-")), _training_type(parity))
    ups = sum(name.endswith("up.weight") for name in published)
    _equal(parity, "meta.json layers that begin at zero", meta["n_zero_init_params"], ups)
    _equal(parity, "meta.json keys not in the released layout", meta["state_dict_keys_not_in_release_layout"], [])
    layers: list[dict[str, Any]] = meta["peft_layer_index_to_module"]
    described = [{key: entry[key] for key in ("index", "module", "class", "type")} for entry in layers]
    _equal(parity, "meta.json layers", described, describe(parity.layers))
    shapes = {
        f"{LAYERS}{entry['index']}.{name}": list(shape) for entry in layers for name, shape in entry["shapes"].items()
    }
    own_shapes = {name: list(t.shape) for name, t in published.items() if name.startswith(LAYERS)}
    _equal(parity, "meta.json layer shapes", shapes, own_shapes)


def _training_type(parity: GeneratorParity) -> list[str]:
    """The ranks of the layers as the published setting names them (the decoder's attention shares one of them)."""
    found: dict[str, set[int]] = defaultdict(set)
    for name, tensor in parity.published.items():
        if name.startswith(LAYERS) and name.endswith("down.weight"):
            group = parity.layers[int(name.removeprefix(LAYERS).split(".")[0])][0]
            found[group].add(tensor.shape[0])
    convolutions = found["convolutions"] | found["decoder_convolutions"]
    kinds = {"self_lora": found["self_attention"], "cross_lora": found["cross_attention"], "locon": convolutions}
    return sorted(f"{kind}_rank_{rank}" for kind, ranks in kinds.items() for rank in ranks)


def describe(layers: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Number, name, class and type under which the published code knew each adapted module."""
    described = []
    for index, (group, module) in enumerate(layers):
        name = ("" if module.startswith("unet.") else "vae.") + module
        if group in KINDS:
            kind, setting = KINDS[group]
            suffix = "lora_layer" if group.endswith("convolutions") else "processor"
            described.append({"index": index, "module": f"{name}.{suffix}", "class": kind, "type": TYPES[setting]})
        else:
            described.append({"index": index, "module": name, "class": "Conv2d", "type": None})
    return described


def _full_size(record: dict[str, Any]) -> tuple[str, bool]:
    """Every key of a released-layout checkpoint at Stable Diffusion's size, without its memory.

    The base is 2.x or 1.x: the width of its text and its kind of projections are read off the recorded layers.
    """
    shapes: dict[str, list[int]] = record["state_dict"]
    modules: list[str] = [entry["module"] for entry in record["index_to_module"]]
    cross = [name.endswith("attn2.processor") for name in modules].index(True)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=shapes[f"{LAYERS}{cross}.to_k_lora.down.weight"][1],
            use_linear_projection=not any(".proj_in." in name for name in modules),
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        backbone = SixPlaneBackbone(unet, vae, PetaConfig())
        layers = published_layers(backbone)
        state: dict[str, Tensor] = {key: torch.empty(shape) for key, shape in shapes.items()}
        config = published_config(state, backbone)
        heads = TriplaneHeads(config.plane_channels, state[f"geometry.{next(iter(HEADS))}.layers.0.weight"].shape[0])
        own = {f"heads.{name}": parameter.shape for name, parameter in heads.named_parameters()}
        adapted = attach_peta(backbone, config)
        own |= {plain(name): p.shape for name, p in adapted.named_parameters() if p.requires_grad}
        converted = convert_published(state, backbone)
    count = sum(tensor.numel() for key, tensor in state.items() if key.startswith(LAYERS))
    agree = (
        record["index_to_module"] == describe(layers)
        and len(layers) == record["num_layers"]
        and count == record["num_peft_params"]
        and own == {name: tensor.shape for name, tensor in converted.items()}
    )
    return f"{len(layers)} layers, {count} parameters", agree


def plain(name: str) -> str:
    """The key in a saved adapter of a parameter of the peft model."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")
