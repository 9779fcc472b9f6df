"""PixArt-Sigma and Stable Diffusion 3 as bases: folders that diffusers wrote, what they predict, what PETA adapts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import PeftModel
from torch import Tensor

from prd import TriplaneTurbo
from prd.adapters import PetaConfig, backbone_of
from prd.errors import ConfigError, ModelMismatch
from prd.generators import SavedConfig, TriplaneTurboModel
from prd.generators.adapter_files import base_hash
from prd.loading.stable_diffusion import Base, UnsupportedBase, load_base
from prd.text.loading import encoder_digest, load_encoder
from prd.training.estimate.counts import count_student
from prd.training.recipes import load_config
from prd.training.run.models import model_faults
from tests.adapters.tiny import adapted, check_training
from tests.compare import ROUNDING, relative_difference
from tests.conftest import use_assets
from tests.teachers.tiny_large import POOLED, make_pixart, make_sd3

KINDS: dict[str, Callable[[Path], Any]] = {"pixart": make_pixart, "sd3": make_sd3}
PROMPTS = ["a red cube", "a blue sphere"]
SIZES: dict[str, Any] = {"latent_size": 8, "head_width": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    for name, make in KINDS.items():
        make(place / f"parts of {name}").save_pretrained(place / name)
    return {name: place / name for name in KINDS}


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, Base]:
    return {name: load_base(folder) for name, folder in folders.items()}


def model_of(base: Base, *, trained: bool = True, **options: Any) -> TriplaneTurboModel:
    """A model with an adapter of rank 2 that is not at its start, unless `trained` is False."""
    return adapted(base.unet, base.vae, base.scheduler, trained=trained, base_hash=base.hashes, **options)


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embeds_of(base: Base, prompts: list[str]) -> Tensor:
    assert base.encoder is not None
    return base.encoder(prompts)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def direct(base: Base, x: Tensor, told: Tensor, text: Tensor) -> Tensor:
    """The prediction of the base's own transformer for pictures [B, C, h, w]; text as its encoder gives it."""
    if isinstance(base.scheduler, FlowMatchEulerDiscreteScheduler):
        tokens, pooled = text[:, :-1], text[:, -1, : 2 * POOLED]
        return base.unet(x, tokens, pooled_projections=pooled, timestep=told.expand(len(x))).sample
    mask = text[:, -1, : text.shape[1] - 1]
    sizes = {"resolution": None, "aspect_ratio": None}
    told = told.expand(len(x))
    return base.unet(x, text[:, :-1], told, sizes, encoder_attention_mask=mask).sample.chunk(2, dim=1)[0]


# -- what it predicts --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fresh", [True, False])
def test_six_like_planes_are_the_transformers_own_picture(name: str, fresh: bool, bases: dict[str, Base]) -> None:
    """Attention over like tokens, repeated, is attention over them once: a fresh adapter changes nothing.

    Where the text attends in one sequence with the planes, it is repeated with them.
    """
    base = bases[name]
    model, text = model_of(base, trained=not fresh), embeds_of(base, PROMPTS)
    x, t = noise(2, model.latent_shape[1], 8, 8), 500
    told = model.backbone.levels.told(torch.tensor(t))
    expected = direct(base, x, told, text)
    repeated = torch.cat([text[:, :-1].repeat(1, 6, 1), text[:, -1:]], dim=1) if name == "sd3" else text
    found = model.predict(x[:, None].expand(-1, 6, -1, -1, -1).contiguous(), t, repeated)
    for plane in range(6):
        assert (relative_difference(found[:, plane], expected) <= ROUNDING) is fresh


@torch.no_grad()
def test_a_flow_is_noised_denoised_and_stepped_as_diffusers_does(bases: dict[str, Base]) -> None:
    """K steps of DDIM are diffusers' Euler steps at the levels of its shift; the last one ends in x0."""
    base = bases["sd3"]
    model, text = model_of(base), embeds_of(base, PROMPTS)
    levels = model.backbone.levels.sigmas
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.scheduler.config)
    torch.testing.assert_close(levels.flip(0), scheduler.sigmas)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    timesteps = model.timesteps(4)
    torch.testing.assert_close(levels[timesteps], scheduler.sigmas[:-1])
    assert levels[timesteps].tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    x0, drawn = noise(2, *model.latent_shape), noise(2, *model.latent_shape, seed=3)
    one = scheduler.timesteps[1:2].expand(2)
    torch.testing.assert_close(model.add_noise(x0, drawn, timesteps[1]), scheduler.scale_noise(x0, one, drawn))
    x = drawn
    for t, told in zip(timesteps, scheduler.timesteps, strict=True):
        x = scheduler.step(model.predict(x, t, text), told, x).prev_sample
    assert relative_difference(model.sample_latents(text, latents=drawn), x) <= ROUNDING


@torch.no_grad()
def test_pixart_is_denoised_as_diffusers_does(bases: dict[str, Base]) -> None:
    base = bases["pixart"]
    model, text = model_of(base), embeds_of(base, PROMPTS)
    scheduler = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    x = noise(2, *model.latent_shape)
    expected = scheduler.step(model.predict(x, 700, text), 700, x).pred_original_sample
    assert relative_difference(model.denoise(x, 700, text), expected) <= ROUNDING
    a_text_of_each_plane = text[:, None].expand(-1, 6, -1, -1)
    assert relative_difference(model.predict(x, 700, a_text_of_each_plane), model.predict(x, 700, text)) <= ROUNDING
    shorter = torch.cat([text[:, :50], text[:, -1:]], dim=1)  # tokens that the mask leaves out change nothing
    assert relative_difference(model.predict(x, 700, shorter), model.predict(x, 700, text)) <= ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_decoder_is_given_what_its_vae_says(name: str, bases: dict[str, Base]) -> None:
    """latents / scaling_factor + shift_factor, where a U-Net's are taken raw."""
    base = bases[name]
    model, latents = model_of(base), noise(1, *(6, bases[name].vae.config.latent_channels, 8, 8))
    own = base.vae.config
    raw = latents / own.scaling_factor + (own.shift_factor or 0)
    expected = model.backbone.decode(raw.flatten(0, 1)).unflatten(0, (-1, 6))
    assert relative_difference(model.decode_planes(latents), expected) <= ROUNDING
    scaled = TriplaneTurboModel(base.unet, base.vae, base.scheduler, model.peta, SavedConfig(latent_scale=0.2, **SIZES))
    with pytest.raises(ValueError, match=r"latent_scale=0.2: this base has its VAE's own"):
        scaled.decode_planes(latents)


# -- folders and runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_full_fine_tuning_trains_the_whole_network(name: str, bases: dict[str, Base], tmp_path: Path) -> None:
    model = model_of(bases[name], full=True)
    network = sum(p.numel() for p in bases[name].unet.parameters())
    assert sum(p.numel() for p in model.trainable_parameters()) > network
    model.save_pretrained(tmp_path / "adapter")
    text, x = embeds_of(bases[name], PROMPTS), noise(2, *model.latent_shape)
    pipe: Any = TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=bases[name].name)
    assert relative_difference(pipe.model.denoise(x, 500, text), model.denoise(x, 500, text)) <= ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_text_is_what_its_own_encoder_gives(name: str, bases: dict[str, Base]) -> None:
    """The same embeddings and digest as of `load_encoder`, which teachers and `prd embed` use."""
    again, own = load_encoder(bases[name].name), bases[name].encoder
    assert own is not None and encoder_digest(again) == encoder_digest(own)
    assert relative_difference(again(PROMPTS), own(PROMPTS)) <= ROUNDING


@torch.no_grad()
def test_sd3_does_without_its_t5(folders: dict[str, Path], bases: dict[str, Base], tmp_path: Path) -> None:
    """Its tokens are zeros then; the hashes of the text encoder are others, those of the network the same."""
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "without"))
    shutil.rmtree(folder / "text_encoder_3")
    base = load_base(folder)
    found, whole = embeds_of(base, PROMPTS), embeds_of(bases["sd3"], PROMPTS)
    assert not found[:, -257:-1].any() and whole[:, -257:-1].any()
    assert torch.equal(found[:, :-257], whole[:, :-257])
    assert base.hashes["float16"] == bases["sd3"].hashes["float16"]
    assert base.hashes["text_encoder.float16"] != bases["sd3"].hashes["text_encoder.float16"]


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_without_the_last_row_are_refused(name: str, bases: dict[str, Base]) -> None:
    model = model_of(bases[name])
    embeds = embeds_of(bases[name], PROMPTS)
    latents = noise(len(PROMPTS), *model.latent_shape)
    model.generate(embeds, num_inference_steps=1, latents=latents)
    without = embeds[:, :-1]
    no_t5 = torch.cat([embeds[:, :77], torch.zeros_like(embeds[:, 77:-1])], dim=1)  # ends with a row of zeros
    for wrong in (without, no_t5, embeds[0, 0], embeds[:, :0]):
        with pytest.raises(ValueError, match="the last row must be the"):
            model.generate(wrong, num_inference_steps=1, latents=latents)
    with pytest.raises(ValueError, match="the last row must be the"):
        TriplaneTurbo(model, encoder=None)(prompt_embeds=without, num_inference_steps=1, latents=latents)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_saved_and_opened_on_its_base_alone(name: str, bases: dict[str, Base], tmp_path: Path) -> None:
    model = model_of(bases[name])
    assert base_hash(model.backbone).items() <= bases[name].hashes.items()
    model.save_pretrained(tmp_path / "adapter")
    pipe: Any = TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=bases[name].name)
    again: Any = TriplaneTurbo(model, bases[name].encoder)
    planes = [
        p("a red cube", output_type="planes", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).planes
        for p in (pipe, again)
    ]
    assert relative_difference(*planes) <= ROUNDING
    record = json.loads((tmp_path / "adapter/config.json").read_text(encoding="utf-8"))
    assert record["prediction_type"] == ("flow" if name == "sd3" else "epsilon")
    assert ("sigmas" in record["noise_schedule"]) is (name == "sd3")
    other = "pixart" if name == "sd3" else "sd3"
    with pytest.raises(ModelMismatch):
        TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=bases[other].name)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_peft_opens_the_adapter_by_itself(name: str, bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases[name]
    model, text = model_of(base), embeds_of(base, PROMPTS)
    model.save_pretrained(tmp_path / "adapter")
    config: Any = PetaConfig.from_pretrained(str(tmp_path / "adapter"))
    opened = backbone_of(base.unet, base.vae, config, base.scheduler)
    PeftModel.from_pretrained(opened, str(tmp_path / "adapter"), config=config)
    x = noise(2, *model.latent_shape)
    assert relative_difference(opened.predict_x0(x, 500, text), model.denoise(x, 500, text)) <= ROUNDING


def test_another_shift_is_another_base(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path) -> None:
    model_of(bases["sd3"]).save_pretrained(tmp_path / "adapter")
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "shifted"))
    edit(folder / "scheduler/scheduler_config.json", shift=1.5)
    with pytest.raises(ModelMismatch, match="trained on the noise schedule"):
        TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=str(folder))


@pytest.mark.parametrize("name", KINDS)
def test_another_scaling_of_the_vae_is_another_base(
    name: str, bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path
) -> None:
    model_of(bases[name]).save_pretrained(tmp_path / "adapter")
    folder = Path(shutil.copytree(folders[name], tmp_path / "scaled"))
    edit(folder / "vae/config.json", scaling_factor=0.5)
    with pytest.raises(ModelMismatch, match="trained on a VAE with the scaling .*'factor': 0.5"):
        TriplaneTurbo.from_pretrained(tmp_path / "adapter", base=str(folder))


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_and_generates(
    name: str, folders: dict[str, Path], tmp_path: Path, random_toybox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with the toy box's teachers: all that is trained moves; then a mesh."""
    use_assets(monkeypatch, random_toybox)
    own = ["--model.latent_size=8", "--model.gradient_checkpointing=true"]
    check_training(folders[name], tmp_path / "adapter", *own)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_counted_before_it_starts(name: str, folders: dict[str, Path], bases: dict[str, Base]) -> None:
    own = [f"--model.base={folders[name]}", "--model.latent_size=8", "--model.rank=2", "--report_to=null"]
    config = load_config("toybox", own)
    assert [fault for fault in model_faults(config) if "model.base" in str(fault)] == []
    counts = count_student(config)
    model = TriplaneTurboModel.from_base(bases[name], config.model)
    text: Any = bases[name].encoder
    assert counts.trained == sum(p.numel() for p in model.trainable_parameters())
    own_parameters = sum(p.numel() for module in (model, text.model) for p in module.parameters())
    assert counts.frozen == own_parameters - counts.trained
    assert counts.network == "transformer" and counts.denoise.total > 0 and counts.network_bytes > 0


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "sd3",
        "scheduler/scheduler_config.json",
        {"use_dynamic_shifting": True},
        "no flow with noise levels of one shift",
    ),
    ("sd3", "vae/config.json", {"latent_channels": 4}, "vae latent_channels 4"),
    ("sd3", "transformer/config.json", {"joint_attention_dim": None}, "joint_attention_dim None"),
    ("sd3", "transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "Flux.*12 billion"),
    ("pixart", "transformer/config.json", {"use_additional_conditions": True}, "told sizes, as PixArt-alpha's is"),
    ("pixart", "transformer/config.json", {"in_channels": 8}, "transformer in_channels 8"),
    ("pixart", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "predicts v_prediction"),
    ("pixart", "transformer/config.json", {"_class_name": "SanaTransformer2DModel"}, "transformer Sana"),
]


@pytest.mark.parametrize("name, file, changes, found", WRONG)
def test_another_transformer_is_refused_before_a_weight_is_read(
    name: str, file: str, changes: dict[str, Any], found: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))
    edit(folder / file, **changes)
    with pytest.raises(
        UnsupportedBase, match=f"{found}.*PETA adapts Stable Diffusion 1.x and 2.x, XL, 3 and 3.5, PixArt"
    ):
        load_base(folder)


def test_wrong_folders_and_inputs_are_named(folders: dict[str, Path], bases: dict[str, Base], tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(folders["sd3"], tmp_path / "lacking"))
    shutil.rmtree(lacking / "tokenizer_2")
    assert load_base(lacking).encoder is None
    with pytest.raises((UnsupportedBase, FileNotFoundError), match="tokenizer_2"):
        load_base(lacking, text=True)
    with pytest.raises(ValueError, match="overflows in it; give bfloat16 or float32"):
        load_base(folders["pixart"], dtype=torch.float16)
    assert load_base(folders["sd3"], dtype=torch.float16, text=False).vae.dtype == torch.float16
    for name, key, found in (
        ("sd3", "pooled_projection_dim", "two CLIPs of 24"),
        ("pixart", "caption_channels", "wide"),
    ):
        other = Path(shutil.copytree(folders[name], tmp_path / f"other {name}"))
        network = bases[name].unet
        type(network).from_config({**network.config, key: 32}).save_pretrained(other / "transformer")
        with pytest.raises(UnsupportedBase, match=found):
            load_base(other)
    broken = Path(shutil.copytree(folders["pixart"], tmp_path / "broken"))
    edit(broken / "transformer/config.json", num_layers=3)
    with pytest.raises(UnsupportedBase, match="transformer: .* missing tensors"):
        load_base(broken)
    model = model_of(bases["sd3"])
    text = embeds_of(bases["sd3"], PROMPTS)
    with pytest.raises(ValueError, match="Stable Diffusion 3 reads one text per sample, 2 here"):
        model.predict(noise(2, *model.latent_shape), 5, text[:, None].expand(-1, 6, -1, -1))
    with pytest.raises(ValueError, match=r"latents of 8 x 7: must be multiples of 2, the side of a patch"):
        model.predict(noise(2, 6, 16, 8, 7), 5, text)
    with pytest.raises(ValueError, match=r"latents of 18 x 8: the base has positions for 16 at most"):
        model.predict(noise(2, 6, 16, 18, 8), 5, text)
    with pytest.raises(ValueError, match="attends by torch's own attention alone"):
        model.set_attention(torch.nn.functional.scaled_dot_product_attention)
    own = ["--model.latent_size=9", "--report_to=null", f"--model.base={folders['sd3']}"]
    with pytest.raises((ValueError, ConfigError), match="latents of 9 x 9"):
        TriplaneTurboModel.from_config(load_config("toybox", own).model)


def test_another_attention_is_pixarts_too(bases: dict[str, Base]) -> None:
    """The planes' alone: attention to the text is masked, and torch's."""
    model, text, called = model_of(bases["pixart"]), embeds_of(bases["pixart"], PROMPTS), list[int]()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        called.append(key.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    x = noise(2, *model.latent_shape)
    before = model.denoise(x, 500, text)
    model.set_attention(attention)
    assert relative_difference(model.denoise(x, 500, text), before) <= ROUNDING
    assert called == [6 * 16] * 2
