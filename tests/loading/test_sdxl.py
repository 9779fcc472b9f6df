"""Stable Diffusion XL as a base: folders that diffusers wrote, its two text encoders, what PETA adapts at full size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prd import TriplaneTurbo
from prd.adapters import PetaConfig
from prd.adapters.peta import SixPlaneBackbone, attach_peta
from prd.generators import SavedConfig, TriplaneTurboModel
from prd.loading.stable_diffusion import UnsupportedBase, load_base
from prd.text.loading import encoder_digest, load_encoder
from prd.toybox.models import make_tokenizer, make_vae
from prd.utils.construction import meta_weights
from tests.adapters.tiny import check_training
from tests.compare import ROUNDING, relative_difference
from tests.conftest import use_assets

PROMPTS = ["a red cube", "a blue sphere"]
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "cross_attention_dim": 16 + 32,
}
FULL = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    """A tiny Stable Diffusion XL with random weights."""
    torch.manual_seed(0)
    tokenizers = make_tokenizer(), make_tokenizer()
    ends = {key: getattr(tokenizers[0], key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizers[0]),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=tokenizers[0].model_max_length,
            **ends,
        )

    return StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=CLIPTextModel(config(16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config(32)).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=UNet2DConditionModel(**UNET).eval(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


@pytest.fixture(scope="module")
def folder(pipeline: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("xl") / "base"
    pipeline.save_pretrained(place)
    return place


def model_of(folder: Path) -> TriplaneTurboModel:
    base = load_base(folder)
    torch.manual_seed(1)
    peta = PetaConfig(r=2, plane_channels=4)
    model = TriplaneTurboModel(base.unet, base.vae, base.scheduler, peta, SavedConfig(latent_size=8, head_width=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


@torch.no_grad()
def test_text_is_what_diffusers_encodes(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Tokens as they are, and the pooled embedding in one more row."""
    encoder = load_base(folder).encoder
    assert encoder is not None
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    embeds = encoder(PROMPTS)
    assert relative_difference(embeds[:, :-1], tokens) <= ROUNDING
    assert relative_difference(embeds[:, -1, :24], pooled) <= ROUNDING
    assert not bool(embeds[:, -1, 24:].any())
    again = load_encoder(str(folder))
    assert encoder_digest(again) == encoder_digest(encoder)
    assert relative_difference(again(PROMPTS), embeds) <= ROUNDING


@torch.no_grad()
def test_the_unet_is_told_text_and_size(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    model = model_of(folder)
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    sizes = pipeline._get_add_time_ids((1024, 1024), (0, 0), (1024, 1024), torch.float32, 24)
    latents = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    added = {"text_embeds": pooled.repeat_interleave(6, dim=0), "time_ids": sizes.expand(12, -1)}
    six = tokens.repeat_interleave(6, dim=0)
    expected = model.backbone.network(latents.flatten(0, 1), 500, encoder_hidden_states=six, added_cond_kwargs=added)[0]
    encoder = load_base(folder).encoder
    assert encoder is not None
    found = model.predict(latents, 500, encoder(PROMPTS))
    assert relative_difference(found.flatten(0, 1), expected) <= ROUNDING
    of_each_plane = encoder(PROMPTS)[:, None].expand(-1, 6, -1, -1)
    assert relative_difference(model.predict(latents, 500, of_each_plane), found) <= ROUNDING
    other = encoder(PROMPTS).clone()
    other[:, -1] += 1
    assert relative_difference(model.predict(latents, 500, other), found) > 1e-3


def test_an_adapter_is_saved_and_opened(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder)
    model.save_pretrained(tmp_path / "adapter")
    pipe: Any = TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=str(folder))
    again: Any = TriplaneTurbo(model, load_base(folder).encoder)
    planes = [
        p("a red cube", output_type="planes", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).planes
        for p in (pipe, again)
    ]
    assert planes[0].shape[:2] == (1, 6)
    assert relative_difference(*planes) <= ROUNDING


def test_embeddings_without_the_pooled_row_are_refused(folder: Path) -> None:
    pipe: Any = TriplaneTurbo(model_of(folder), load_base(folder).encoder)
    embeds = pipe.encoder(PROMPTS)
    assert pipe(prompt_embeds=embeds, num_inference_steps=1, output_type="planes").planes.shape[:2] == (2, 6)
    with pytest.raises(ValueError, match="the last row must be the pooled embedding, 24 numbers"):
        pipe(prompt_embeds=embeds[:, :-1], num_inference_steps=1)


def test_it_trains(folder: Path, tmp_path: Path, random_toybox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with the toy box's teachers: all that is trained moves, and is generated from."""
    use_assets(monkeypatch, random_toybox)
    check_training(folder, tmp_path / "adapter")


def test_wrong_folders_are_named(folder: Path, tmp_path: Path) -> None:
    """The refiner, whose sizes leave another pooled embedding; a part that is not there; a decoder that overflows."""
    other = Path(shutil.copytree(folder, tmp_path / "refiner"))
    config = json.loads((other / "unet/config.json").read_text(encoding="utf-8"))
    config["projection_class_embeddings_input_dim"] = 24 + 5 * 8
    (other / "unet/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedBase, match="a pooled embedding of 16 beside a text_encoder_2 of 24"):
        load_base(other)
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    shutil.rmtree(lacking / "tokenizer_2")
    assert load_base(lacking).encoder is None
    with pytest.raises((UnsupportedBase, FileNotFoundError), match="tokenizer_2"):
        load_base(lacking, text=True)
    with pytest.raises(ValueError, match="overflows in it; give bfloat16 or float32"):
        load_base(folder, dtype=torch.float16)


def test_every_layer_of_the_real_one_is_adapted() -> None:
    """On the meta device: Stable Diffusion XL's 2,567,463,684 parameters, and what PETA adds to them."""
    with meta_weights():
        unet = UNet2DConditionModel(**FULL)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
        config = PetaConfig(r=16, plane_channels=32)
        backbone = SixPlaneBackbone(unet, vae, config)
        peft = attach_peta(backbone, config)
    added = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert backbone.pooled == 1280
    blocks = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    assert len(blocks) == 70  # transformer blocks
    frozen = sum(p.numel() for p in [*unet.parameters(), *vae.decoder.parameters()])
    assert added / frozen == pytest.approx(0.0323, abs=1e-4)  # of rank 16
