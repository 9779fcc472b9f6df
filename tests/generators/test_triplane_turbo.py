"""What TriplaneTurbo's model has besides the contract of models: parametrisations, planes, bases, precision."""

import json
import math

import pytest
import torch

from prd.adapters import PetaConfig
from prd.errors import ModelMismatch
from prd.generators import SavedConfig, TriplaneTurboModel
from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.adapters.tiny import tiny_base
from tests.compare import ROUNDING, relative_difference


def student(
    seed: int = 0, *, prediction_type: str = "epsilon", gradient_checkpointing: bool = False, **options: object
) -> TriplaneTurboModel:
    base = tiny_base(seed, prediction_type=prediction_type)
    config = SavedConfig(latent_size=4, head_width=8, base="me/tiny", base_revision="1" * 40, **options)
    return TriplaneTurboModel(
        *base, PetaConfig(r=2, plane_channels=3), config, gradient_checkpointing=gradient_checkpointing
    )


def trained(seed: int = 0, **options: object) -> TriplaneTurboModel:
    model = student(seed, **options)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


TEXT = torch.randn(2, 77, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoise_inverts_the_noising(prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the exact epsilon or v as the U-Net's answer, x0 is the latent that was noised."""
    model = student(prediction_type=prediction_type)
    x0, noise = torch.randn(2, 6, 4, 4, 4), torch.randn(2, 6, 4, 4, 4)
    t = torch.tensor([900, 30])
    noisy = model.add_noise(x0, noise, t)
    a = model.alphas_cumprod[t].view(2, 1, 1, 1, 1)
    answer = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0
    monkeypatch.setattr(model.backbone, "predict", lambda *_: answer)
    torch.testing.assert_close(model.denoise(noisy, t, TEXT), x0, atol=1e-4, rtol=1e-4)


def test_timesteps_and_bad_numbers_of_steps() -> None:
    model = student()
    assert model.timesteps(1) == [999]
    assert model.timesteps(2) == [999, 499]
    assert model.timesteps(4) == [999, 749, 499, 249]
    for k in (0, -1, 3, 2.0, True):
        with pytest.raises(ValueError, match=rf"num_inference_steps={k}: must be a positive divisor of 1000 .* try 4"):
            model.timesteps(k)


def test_planes_and_decoder_channels() -> None:
    """Geometry planes are the first C channels of conv_out, texture planes the last C."""
    model = trained()
    latents = torch.randn(2, 6, 4, 4, 4)
    with torch.no_grad():
        field = model.decode(latents)
        conv_out = model.backbone.decoder.conv_out.modules_to_save["default"]
        conv_out.weight[3:].zero_()
        conv_out.bias[3:].zero_()
        silenced = model.decode(latents)
    assert field.planes.shape == (2, 6, 3, 8, 8)
    assert relative_difference(silenced.planes[:, :3], field.planes[:, :3]) <= ROUNDING
    assert not silenced.planes[:, 3:].any() and field.planes[:, 3:].any()


def test_latents_are_decoded_raw_unless_a_scale_is_given() -> None:
    latents = torch.randn(1, 6, 4, 4, 4)
    with torch.no_grad():
        raw, scaled = trained().decode_planes(latents), trained(latent_scale=0.5).decode_planes(latents / 2)
    torch.testing.assert_close(raw, scaled)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_everything_trainable_learns_and_nothing_else(gradient_checkpointing: bool) -> None:
    model = trained(gradient_checkpointing=gradient_checkpointing)
    field = model.decode(model.denoise(torch.randn(2, 6, 4, 4, 4), 499, TEXT))
    points = torch.rand(2, 20, 3) * 2 - 1
    sdf, deformation = field.sdf_and_deformation(points)
    (sdf.square().sum() + deformation.square().sum() + field.rgb(points).square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert all("lora_" in n or "conv_out.modules_to_save" in n or "heads." in n for n, p in model.named_parameters()
               if p.requires_grad)  # fmt: skip


def test_another_base_is_refused(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    other = student(seed=1)
    before = {name: tensor.clone() for name, tensor in other.trained_state_dict().items()}
    with pytest.raises(ModelMismatch, match="'me/tiny'.*allow_other_base=True"):
        other.load_adapter(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.trained_state_dict().items())
    other.load_adapter(tmp_path, allow_other_base=True)
    assert relative_difference(other.heads.sdf[0].weight, before["heads.sdf.0.weight"]) > 100 * ROUNDING


def test_one_changed_base_weight_is_noticed_and_half_precision_is_not(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        unet, vae, scheduler = tiny_base()
        TriplaneTurboModel.from_adapter(tmp_path, unet.to(dtype), vae.to(dtype), scheduler)
    unet, vae, scheduler = tiny_base()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 0.1
    with pytest.raises(ModelMismatch, match="weights differ"):
        TriplaneTurboModel.from_adapter(tmp_path, unet, vae, scheduler)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_the_field_stays_float32(dtype: torch.dtype) -> None:
    model, latents = trained(), torch.randn(2, 6, 4, 4, 4)
    expected = model.generate(TEXT, latents=latents).planes
    model.to(dtype)
    field = model.generate(TEXT, latents=latents)
    assert model.dtype == dtype and field.planes.dtype == model.alphas_cumprod.dtype == torch.float32
    assert field.grid(4)[0].dtype == torch.float32
    assert (field.planes - expected).abs().max() < 0.1 * expected.abs().max()


def test_an_adapter_is_four_files_and_a_missing_setting_is_named(tmp_path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "heads.safetensors",
    ]
    fresh = student()
    before = {name: tensor.clone() for name, tensor in fresh.trained_state_dict().items()}
    record = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del record["bias_radius"]
    (tmp_path / "config.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelMismatch, match=r"missing \['bias_radius'\]"):
        fresh.load_adapter(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.trained_state_dict().items())


def test_bad_inputs_are_named() -> None:
    model = student()
    latents = torch.randn(2, 6, 4, 4, 4)
    with pytest.raises(ValueError, match=r"latents=\(2, 4, 4, 4\): expected \[B, 6, 4, h, w\]"):
        model.denoise(latents[:, 0], 999, TEXT)
    with pytest.raises(ValueError, match=r"prompt_embeds=\(1, 77, 12\): expected \[2, L, Ct\]"):
        model.denoise(latents, 999, TEXT[:1])
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        model.generate(TEXT, [torch.Generator()])
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        student(prediction_type="sample")


def test_a_learnt_width_reaches_the_renderer_and_comes_back(tmp_path) -> None:
    """`inv_std`: s of NeuS is trained with the heads, saved and loaded with them; without it nothing is there."""
    model = student(inv_std=30.0)
    (variance,) = [p for name, p in model.named_parameters() if name.endswith("inv_std.variance")]
    assert any(p is variance for p in model.trainable_parameters())
    alpha = model.alpha()
    assert float(alpha.inv_std.detach()) == pytest.approx(30.0, rel=1e-4)
    alpha(torch.zeros(1), -torch.ones(1), torch.full((1,), 0.1)).sum().backward()
    assert variance.grad != 0
    with torch.no_grad():
        variance.add_(0.05)
    assert model.half().alpha().inv_std.dtype == torch.float32  # as the heads
    model.save_pretrained(tmp_path)
    again = TriplaneTurboModel.from_adapter(tmp_path, *tiny_base(0))
    assert again.config.inv_std == 30.0
    assert float(again.alpha().inv_std.detach()) == pytest.approx(30.0 * math.exp(0.5), rel=1e-4)

    plain = student()
    assert plain.alpha() is None
    assert set(model.trained_state_dict()) - set(plain.trained_state_dict()) == {"heads.inv_std.variance"}
    plain.save_pretrained(tmp_path / "plain")
    assert "inv_std" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ModelMismatch, match=r"missing \['heads.inv_std.variance'\]"):
        student(inv_std=30.0).load_adapter(tmp_path / "plain")


def test_splat_heads_are_trained_saved_and_begin_on_an_adapter_without_them(tmp_path) -> None:
    """`splat_heads`: a fourth MLP that answers 0 at first; without it the files are those of before."""
    plain = student()
    plain.save_pretrained(tmp_path / "plain")
    assert "splat_heads" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    model = student(splat_heads=True)
    added = set(model.trained_state_dict()) - set(plain.trained_state_dict())
    assert added == {f"heads.splats.{layer}.weight" for layer in (0, 2, 4)}
    model.load_adapter(tmp_path / "plain")
    for name, tensor in plain.trained_state_dict().items():
        assert torch.equal(model.trained_state_dict()[name], tensor), name
    points = torch.rand(1, 5, 3) - 0.5
    field = model.generate(TEXT[:1], torch.Generator().manual_seed(0))
    assert float(field.splat_residuals(points).detach().abs().max()) == 0
    assert plain.generate(TEXT[:1]).splat_residuals(points) is None

    parameters = {id(parameter) for parameter in model.trainable_parameters()}
    assert all(id(parameter) in parameters for parameter in model.heads.splats.parameters())
    with torch.no_grad():
        model.heads.splats[4].weight.fill_(0.5)
    model.save_pretrained(tmp_path / "splats")
    again = TriplaneTurboModel.from_adapter(tmp_path / "splats", *tiny_base(0))
    assert again.config.splat_heads and torch.equal(again.heads.splats[4].weight, model.heads.splats[4].weight)
    with pytest.raises(ModelMismatch, match="extra .*heads.splats"):
        student().load_adapter(tmp_path / "splats")
    with pytest.raises(ValueError, match="splat_heads='yes'"):
        SavedConfig(splat_heads="yes")  # type: ignore[arg-type]


def test_a_recipe_trains_splat_heads(toybox, tmp_path) -> None:
    """A renderer of splats in a recipe, from the shipped adapter: a step moves the head, and the run's adapter has it.

    The last layer begins at 0, so that the first step moves it alone.
    """
    words = ["--model.splat_heads", "true", "--init_from", "toybox", "--renderer_schedule", "splats"]
    words += ["--renderers.splats.grid_resolution", "16", "--renderers.splats.height", "8"]
    words += ["--renderers.splats.width", "8", "--optimizer.warmup_steps", "1", "--train_batch_size", "1"]
    words += ["--num_denoising_steps", "1", "--validation.prompts", "[]", "--max_train_steps", "1"]
    words += ["--teachers.richdreamer.enabled", "false", "--teachers.mvdream.enabled", "false"]
    trainer = Trainer(load_config("toybox", [*words, "--output_dir", str(tmp_path / "run")]))
    assert float(trainer.model.heads.splats[4].weight.detach().abs().max()) == 0
    trainer.train_step(0)
    moved = trainer.model.heads.splats[4].weight.detach().clone()
    assert float(moved.abs().max()) > 0 and bool(torch.isfinite(moved).all())
    trainer.model.save_pretrained(tmp_path / "run" / "adapter")
    pipe = TriplaneTurbo.from_pretrained(tmp_path / "run")
    assert torch.equal(pipe.model.heads.splats[4].weight, moved)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), "30"])
def test_a_learnt_width_out_of_range_is_named(value: object) -> None:
    with pytest.raises(ValueError, match="inv_std="):
        SavedConfig(inv_std=value)  # type: ignore[arg-type]


def test_a_recipe_trains_the_width(toybox, tmp_path) -> None:
    """`model.inv_std` of a recipe: a step of training moves it, and the run folder's adapter holds it."""
    words = ["--model.inv_std", "20", "--renderer_schedule", "volume", "--optimizer.warmup_steps", "1"]
    words += ["--train_batch_size", "1", "--num_denoising_steps", "1", "--validation.prompts", "[]"]
    words += ["--teachers.stable_diffusion.enabled", "false", "--teachers.richdreamer.enabled", "false"]
    words += ["--renderers.volume.height", "8", "--renderers.volume.width", "8", "--max_train_steps", "2"]
    trainer = Trainer(load_config("toybox", [*words, "--output_dir", str(tmp_path / "run")]))
    before = float(trainer.model.alpha().inv_std.detach())
    trainer.train_step(0)
    trainer.train_step(1)
    after = float(trainer.model.alpha().inv_std.detach())
    assert before == pytest.approx(20, rel=1e-4) and 0 < abs(after - before) < 10
    trainer.model.save_pretrained(tmp_path / "run" / "adapter")
    assert float(TriplaneTurbo.from_pretrained(tmp_path / "run").model.alpha().inv_std.detach()) == after
