"""A Stable Diffusion in a single file of the original layout: what it computes, its adapters, its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from prd import TriplaneTurbo
from prd.adapters import PetaConfig
from prd.generators import ModelMismatch, SavedConfig, TriplaneTurboModel
from prd.loading.latent_diffusion import RESNET, UNET_ENDS, VAE_ATTENTION
from prd.loading.stable_diffusion import UnsupportedBase, load_base

WIDTHS, VAE_WIDTHS = (64, 128), (32, 32)


def models(context: int) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """A Stable Diffusion 1.x (context 768) or 2.x (1024) with two narrow levels."""
    torch.manual_seed(0)
    old = context == 768
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=context,
        attention_head_dim=8 if old else (1, 2),
        use_linear_projection=not old,
    )
    vae = AutoencoderKL(
        block_out_channels=VAE_WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    return unet.eval(), vae.eval()


def full_size(context: int) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=context,
            attention_head_dim=8 if context == 768 else (5, 10, 20, 20),
            use_linear_projection=context == 1024,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    return unet, vae


def ldm_unet_key(key: str, layers: int) -> str:
    """The original key of a U-Net's diffusers key."""
    for old, new in UNET_ENDS.items():
        if key.startswith(new + "."):
            return old + key.removeprefix(new)
    side, level, kind, layer, rest = re.match(r"(down|up|mid)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
    if kind == "resnets":
        name, suffix = rest.rsplit(".", 1)
        rest = f"{next(old for old, new in RESNET.items() if new == name)}.{suffix}"
    if side == "mid":
        return f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{rest}"
    index, place = int(level) * (layers + 1) + int(layer), 0 if kind == "resnets" else 1
    if kind == "downsamplers":
        return f"input_blocks.{1 + int(level) * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = "up_blocks.0" not in key  # the deepest level of both test models and of Stable Diffusion has none
        return f"output_blocks.{int(level) * (layers + 1) + layers}.{1 + attends}.{rest}"
    return f"{'input_blocks' if side == 'down' else 'output_blocks'}.{index + (side == 'down')}.{place}.{rest}"


def ldm_vae_key(key: str, levels: int) -> str:
    """The original key of a VAE's diffusers key."""
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for old, new in VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def ldm_state(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Both models' weights as the original layout stores them."""
    layers = unet.config["layers_per_block"]
    state = {f"model.diffusion_model.{ldm_unet_key(k, layers)}": t for k, t in unet.state_dict().items()}
    assert len(state) == len(unet.state_dict())
    for key, tensor in vae.state_dict().items():
        old = ldm_vae_key(key, len(vae.config["block_out_channels"]))
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", old)
        state[f"first_stage_model.{old}"] = tensor[..., None, None] if convolution else tensor
    return state


def clip_state(open_clip: bool) -> tuple[CLIPTextModel, dict[str, Tensor]]:
    """A tiny text encoder, and its weights under the names a single file gives them."""
    torch.manual_seed(1)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act="gelu" if open_clip else "quick_gelu",
        )
    ).eval()
    plain = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    if not open_clip:
        positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
        return model, {f"cond_stage_model.transformer.text_model.{k}": t for k, t in plain.items()} | positions
    prefix, state = "cond_stage_model.model.", {}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for key, tensor in plain.items():
        if key in ends:
            state[prefix + ends[key]] = tensor
        elif "k_proj" not in key and "v_proj" not in key:
            old = key.replace("encoder.layers.", "transformer.resblocks.").replace(
                "self_attn.out_proj", "attn.out_proj"
            )
            for new, name in names.items():
                old = old.replace(new, name)
            if "q_proj" in key:
                tensor = torch.cat([plain[key.replace("q_proj", f"{kind}_proj")] for kind in "qkv"])
                old = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", old)
            state[prefix + old] = tensor
    last = {key.replace("resblocks.1", "resblocks.2"): t for key, t in state.items() if "resblocks.1" in key}
    return model, state | last | {
        f"{prefix}text_projection": torch.zeros(64, 64),
        f"{prefix}logit_scale": torch.ones(1),
    }


@pytest.mark.parametrize("context", [768, 1024])
def test_a_single_file_computes_what_the_models_it_was_made_of_do(context: int, tmp_path: Path, toybox: Path) -> None:
    unet, vae = models(context)
    clip, text = clip_state(open_clip=context == 1024)
    path = tmp_path / "model.SafeTensors"  # a suffix is one in any case
    save_file({k: t.clone().contiguous() for k, t in (ldm_state(unet, vae) | text).items()}, path)
    shutil.copytree(toybox / "stable_diffusion" / "tokenizer", tmp_path / "tokenizer")
    base = load_base(str(path), prediction_type="epsilon")
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, context)
    tokens = torch.randint(0, 1024, (2, 77))
    with torch.no_grad():
        torch.testing.assert_close(base.unet(x, t, words).sample, unet(x, t, words).sample)
        torch.testing.assert_close(base.vae.decode(x).sample, vae.decode(x).sample)
        assert base.encoder is not None
        torch.testing.assert_close(base.encoder.model(tokens).last_hidden_state, clip(tokens).last_hidden_state)
    assert base.scheduler.config.prediction_type == "epsilon" and not any(
        p.requires_grad for p in base.unet.parameters()
    )
    half = load_base(str(path), dtype=torch.bfloat16, prediction_type="epsilon", text=False)
    assert half.encoder is None and half.unet.dtype == half.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_adapter_finds_its_base_again_in_a_single_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Conv projections and context 768; the hash of the weights is the same by whichever way they came."""
    unet, vae = models(768)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    config = SavedConfig(base="made/elsewhere", base_revision="c0ffee", latent_size=4, head_width=8)
    student = TriplaneTurboModel(unet, vae, scheduler, PetaConfig(r=2, plane_channels=4), config)
    student.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "model.safetensors"
    state = {k: t.to(dtype).clone().contiguous() for k, t in ldm_state(unet, vae).items()}
    save_file(state, path)
    pipe = TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=str(path))
    text, latents = torch.randn(1, 77, 768), torch.randn(1, 6, 4, 4, 4)
    if dtype == torch.float32:
        ours, theirs = (s.generate(text, latents=latents).planes for s in (pipe.model, student))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**state, first: state[first] * 2}, path)
    with pytest.raises(ModelMismatch, match="'made/elsewhere', whose weights differ"):
        TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=str(path))


def sparse_file(state: dict[str, Tensor], path: Path) -> None:
    """A float16 file of these names and shapes whose gigabytes of zeros take no room on disk."""
    header, end = {}, 0
    for key, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("context", [768, 1024])
def test_every_key_of_a_full_size_file_finds_its_place(context: int, tmp_path: Path) -> None:
    unet, vae = full_size(context)
    path = tmp_path / "model.safetensors"
    sparse_file(ldm_state(unet, vae), path)
    base = load_base(str(path), dtype=torch.float16, prediction_type="epsilon")
    path.unlink()
    for one, two in ((base.unet, unet), (base.vae, vae)):
        assert {k: t.shape for k, t in one.state_dict().items()} == {k: t.shape for k, t in two.state_dict().items()}
    heads = [[m.heads for m in u.modules() if isinstance(m, Attention)] for u in (base.unet, unet)]
    assert heads[0] == heads[1] and base.encoder is None
    for name in ("use_linear_projection", "cross_attention_dim", "down_block_types", "up_block_types", "sample_size"):
        assert base.unet.config[name] == unet.config[name]


def test_a_single_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = {k: t.clone().contiguous() for k, t in ldm_state(*models(768)).items()}
    path = tmp_path / "model.safetensors"

    def refused(match: str, tensors: dict[str, Tensor], **options: object) -> None:
        save_file(tensors, path)
        with pytest.raises(UnsupportedBase, match=match):
            load_base(str(path), **options)  # type: ignore[arg-type]

    one, first = torch.zeros(1), "model.diffusion_model.input_blocks.0.0.weight"
    refused(r"XL in one file, .* \(it has conditioner.embedders", {**state, "conditioner.embedders.0.w": one})
    refused("is no latent-diffusion", {**state, first: one})
    refused(r"Stable Diffusion 3", {"model.diffusion_model.joint_blocks.0.w": one})
    refused(r"is Flux", {"double_blocks.0.w": one})
    refused("holds no VAE", {k: t for k, t in state.items() if not k.startswith("first_stage")})
    refused("takes 9 channels", {**state, first: torch.zeros(64, 9, 3, 3)})
    refused(
        "1 missing tensors, conv_in.bias among them",
        {k: t for k, t in state.items() if k != first.replace("weight", "bias")},
    )
    refused("does not say what", {k: t.clone().contiguous() for k, t in ldm_state(*models(1024)).items()})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedBase, match="not a whole safetensors file"):
        load_base(str(path))
    for name in ("old.ckpt", "old.CKPT"):
        with pytest.raises(UnsupportedBase, match=f"{name}: pickled weights are never loaded"):
            load_base(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_base(str(tmp_path / "absent.safetensors"))
