"""PETA on a tiny base: what is adapted, what it computes, and peft's own way of opening it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from peft import PeftModel, get_peft_model_state_dict

from prd.adapters import PetaConfig, SixPlaneBackbone, attach_peta
from prd.adapters.peta import SELF_ATTENTION, PetaConv, PetaLinear, PlaneLora, expected_modules
from prd.adapters.planes import PlaneConvOut, PlaneLinear
from prd.utils.counting import LiveBytes
from tests.adapters.tiny import tiny_base
from tests.compare import ROUNDING, relative_difference

CONFIG: dict[str, Any] = {"r": 2, "plane_channels": 3}


def adapted(**options: object) -> tuple[SixPlaneBackbone, PeftModel]:
    unet, vae, _ = tiny_base()
    config = PetaConfig(**{**CONFIG, **options})
    backbone = SixPlaneBackbone(unet, vae, config)
    model = attach_peta(backbone, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return backbone, model


def test_fresh_adapter_changes_nothing_in_the_unet() -> None:
    unet, vae, _ = tiny_base()
    config = PetaConfig(**CONFIG)
    backbone = SixPlaneBackbone(unet, vae, config)
    latents, text = torch.randn(12, 4, 4, 4), torch.randn(2, 77, 12)
    with torch.no_grad():
        before = backbone.denoise(latents, torch.tensor(500), text)
        attach_peta(backbone, config)
        torch.testing.assert_close(backbone.denoise(latents, torch.tensor(500), text), before)


@torch.no_grad()
def test_a_latent_consistency_model_is_told_its_guidance() -> None:
    """As diffusers' pipeline tells it at a guidance scale of 7.5."""
    unet, vae, _ = tiny_base(time_cond_proj_dim=10)
    backbone = SixPlaneBackbone(unet, vae, PetaConfig(**CONFIG))
    one, text = torch.randn(1, 4, 4, 4), torch.randn(1, 77, 12)
    pipeline: Any = LatentConsistencyModelPipeline
    told = pipeline.get_guidance_scale_embedding(None, torch.tensor([7.5 - 1]), embedding_dim=10)
    wanted = unet(one, torch.tensor(500), text, timestep_cond=told).sample
    found = backbone.denoise(one.expand(6, -1, -1, -1), torch.tensor(500), text)
    assert relative_difference(found, wanted.expand_as(found)) <= ROUNDING
    assert relative_difference(wanted, unet(one, torch.tensor(500), text).sample) > ROUNDING


def test_base_is_shared_and_stays_unadapted() -> None:
    unet, vae, _ = tiny_base()
    names, weights = set(dict(unet.named_modules())), {n: p.clone() for n, p in unet.named_parameters()}
    config = PetaConfig(**CONFIG)
    backbone = SixPlaneBackbone(unet, vae, config)
    attach_peta(backbone, config)
    assert set(dict(unet.named_modules())) == names
    assert backbone.unet.conv_in.weight is unet.conv_in.weight
    assert all(torch.equal(p, weights[n]) for n, p in unet.named_parameters())


def test_planes_of_a_sample_see_each_other_and_no_other_sample() -> None:
    backbone, _ = adapted()
    latents, text = torch.randn(12, 4, 4, 4), torch.randn(2, 77, 12)
    with torch.no_grad():
        before = backbone.denoise(latents, torch.tensor(500), text)
        latents[2] += 1.0
        changed = (backbone.denoise(latents, torch.tensor(500), text) - before).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [True] * 6 + [False] * 6


def test_text_once_a_sample_equals_text_once_a_plane() -> None:
    backbone, _ = adapted()
    latents, text = torch.randn(12, 4, 4, 4), torch.randn(2, 77, 12)
    with torch.no_grad():
        once = backbone.denoise(latents, torch.tensor(10), text)
        repeated = backbone.denoise(latents, torch.tensor(10), text.repeat_interleave(6, dim=0))
    torch.testing.assert_close(once, repeated, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="once per sample or once per plane"):
        backbone.denoise(latents, torch.tensor(10), text.repeat(4, 1, 1)[:5])


def test_batched_plane_weights_equal_six_layers() -> None:
    layer = PlaneLinear(6, 3, 5, bias=True)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(12, 4, 3)
    separate = torch.stack([x[i] @ layer.weight[i % 6].T + layer.bias[i % 6] for i in range(12)])
    torch.testing.assert_close(layer(x), separate)


def test_conv_out_keeps_each_kinds_channels() -> None:
    layer, x = PlaneConvOut(4, 3), torch.randn(12, 4, 5, 5)
    full = layer._conv_forward(x, layer.weight, layer.bias).unflatten(0, (2, 6))
    expected = torch.cat([full[:, :3, :3], full[:, 3:, 3:]], dim=1).flatten(0, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_the_decoder_is_recomputed_plane_by_plane_to_the_same_gradient(samples: int, half: bool) -> None:
    backbone, model = adapted()
    latents = torch.randn(6 * samples, 4, 16, 16, requires_grad=True)
    leaves = [latents, *(p for n, p in model.named_parameters() if p.requires_grad and "unet" not in n)]
    found, rows, peaks = [], list[int](), []
    backbone.decoder.mid_block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for recompute in (False, True):
        with LiveBytes([*model.parameters(), *model.buffers(), latents]) as count:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                planes = backbone.decode(latents, recompute=recompute)
            kept = count.live
            weight = torch.randn(planes.shape, generator=torch.Generator().manual_seed(2))
            gradient = torch.autograd.grad((planes.float() * weight).sum(), leaves)
            peaks.append((kept, count.peak))
        found.append((planes, gradient))
    assert rows == [6 * samples, *[1] * 12 * samples]  # once forward, once in the backward pass
    (_, most), (least, one) = peaks
    assert least < most / 20 and one < most / (3 * samples)
    tolerance = 0.05 if half else ROUNDING
    assert relative_difference(found[1][0].float(), found[0][0].float()) < tolerance
    for ours, whole in zip(found[1][1], found[0][1], strict=True):
        assert relative_difference(ours, whole) < tolerance


def test_a_recomputed_plane_has_the_random_numbers_of_the_first_time() -> None:
    backbone, _ = adapted()
    masks: list[torch.Tensor] = []
    for module in backbone.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
            module.train()
            module.register_forward_hook(lambda _, args, out: masks.append((out != 0).detach()))
    planes = backbone.decode(torch.randn(6, 4, 4, 4, requires_grad=True), recompute=True)
    layers = len(masks) // 6
    assert layers and not torch.equal(masks[0], masks[layers])  # planes differ
    planes.sum().backward()
    first = [masks[i : i + layers] for i in range(0, 6 * layers, layers)]
    again = [masks[i : i + layers] for i in range(6 * layers, 12 * layers, layers)]
    for ours, before in zip(again, reversed(first), strict=True):  # from the last plane to the first
        assert all(map(torch.equal, ours, before))


def stepped(layer: Any) -> Any:
    """The adapted layer after one small step: every entry of B moved by the learning rate, as by Adan at first."""
    (up,) = layer.lora_B.values()
    with torch.no_grad():
        up.weight.copy_(2e-4 * torch.randn(up.weight.shape, generator=torch.Generator().manual_seed(5)).sign())
    return layer


@pytest.mark.parametrize("kind", ["convolution", "linear", "plane-wise linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_base", [False, True])
def test_a_small_step_is_felt_under_autocast(kind: str, dtype: torch.dtype, half_base: bool) -> None:
    """On CUDA autocast hands layers after a norm float32: what they compute in is half precision all the same."""
    torch.manual_seed(0)
    config = PetaConfig(r=16, target_modules=["0"])
    base = torch.nn.Conv2d(64, 64, 3, padding=1) if kind == "convolution" else torch.nn.Linear(64, 64)
    adapter = {"convolution": PetaConv, "linear": PetaLinear, "plane-wise linear": PlaneLora}[kind]
    layer = stepped(adapter(base, "default", config=config, r=16, lora_alpha=16, target_name="0"))
    x = torch.randn(6, 64, 8, 8) if kind == "convolution" else torch.randn(6, 64, 64)
    exact = layer(x) - base(x)
    assert layer(x).dtype == torch.float32 and exact.abs().max() < 0.1 * base(x).abs().max()
    if half_base:
        base.to(dtype)
    with torch.autocast("cpu", dtype):
        found = layer(x)
        change = found - base(x).float()
    assert found.dtype == torch.float32
    cosine = F.cosine_similarity(change.flatten(), exact.flatten(), dim=0)
    assert cosine > 0.99
    (up,) = layer.lora_B.values()
    (gradient,) = torch.autograd.grad((found * exact.detach()).sum(), up.weight)
    (right,) = torch.autograd.grad((layer(x.to(base.weight.dtype)).float() * exact.detach()).sum(), up.weight)
    assert relative_difference(gradient, right) < 0.05
    with torch.autocast("cpu", dtype):
        assert layer(x.to(dtype)).dtype == dtype  # what is in half precision stays so


def test_scale_is_one_and_b_starts_at_zero() -> None:
    unet, vae, _ = tiny_base()
    config = PetaConfig(**CONFIG, rank_pattern={r".*\.conv1": 4})
    backbone = SixPlaneBackbone(unet, vae, config)
    attach_peta(backbone, config)
    layers: list[Any] = [m for m in backbone.modules() if hasattr(m, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    assert {layer.r["default"] for layer in layers} == {2, 4}
    assert all(not layer.lora_B["default"].weight.any() for layer in layers)
    wide = torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers if layer.r["default"] == 2])
    assert wide.std().item() == pytest.approx(1 / 2, rel=0.05)


def test_convolutional_projections_are_adapted_and_linear_ones_are_not() -> None:
    for linear in (True, False):
        unet, vae, _ = tiny_base(linear=linear)
        config = PetaConfig(**CONFIG)
        names = expected_modules(SixPlaneBackbone(unet, vae, config), config)["convolutions"]
        assert any(name.endswith("proj_in") for name in names) is not linear
        assert not any(name in ("unet.conv_in", "unet.conv_out") for name in names)


def test_basic_lora_of_the_same_size() -> None:
    def size(**options: object) -> int:
        return sum(p.numel() for p in adapted(**options)[1].parameters() if p.requires_grad)

    backbone, _ = adapted(plane_wise=False)
    assert not any(isinstance(module, PlaneLora) for module in backbone.modules())
    assert size(plane_wise=False, rank_pattern={SELF_ATTENTION.pattern: 12}) == size()
    assert size(plane_wise=False) < size()


def test_groups_can_be_left_out() -> None:
    backbone, _ = adapted(convolutions=False, decoder_attention=False)
    names = [name for name, module in backbone.named_modules() if hasattr(module, "lora_A")]
    assert names and all(".attn" in name or name.startswith("decoder.") for name in names)
    assert not any("decoder.mid_block.attentions" in name for name in names)


def test_peft_opens_what_peft_saved(tmp_path) -> None:
    backbone, model = adapted()
    model.save_pretrained(tmp_path)
    unet, vae, _ = tiny_base()
    config = PetaConfig.from_pretrained(tmp_path)
    assert isinstance(config, PetaConfig) and config.num_planes == 6
    other = SixPlaneBackbone(unet, vae, config)
    opened = PeftModel.from_pretrained(other, tmp_path, config=config)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(opened)
    assert saved.keys() == loaded.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    latents, text = torch.randn(6, 4, 4, 4), torch.randn(1, 77, 12)
    with torch.no_grad():
        for one, two in (
            (backbone.denoise(latents, torch.tensor(3), text), other.denoise(latents, torch.tensor(3), text)),
            (backbone.decode(latents), other.decode(latents)),
        ):
            # what was opened requires no gradient, for which torch multiplies by another routine
            assert relative_difference(two, one) <= ROUNDING


def test_bad_configs_and_bases_are_named() -> None:
    with pytest.raises(ValueError, match="r=0: must be a positive integer"):
        PetaConfig(r=0)
    unet, vae, _ = tiny_base()
    with pytest.raises(TypeError, match="Linear"):
        SixPlaneBackbone(torch.nn.Linear(1, 1), vae, PetaConfig(**CONFIG))
    plain = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="base without self_attention, cross_attention"):
        attach_peta(SixPlaneBackbone(plain, vae, PetaConfig(**CONFIG)), PetaConfig(**CONFIG))


@pytest.mark.parametrize(
    "option",
    [
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_dropout": 0.5},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"plane_wise": "no"},
        {"exclude_modules": ["conv1"]},
    ],
)
def test_options_that_would_be_ignored_are_refused(option: dict) -> None:
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}".replace("[", r"\[")):
        PetaConfig(**{**CONFIG, **option})


def test_a_second_adapter_needs_its_own_config() -> None:
    from peft import LoraConfig

    _, model = adapted()
    with pytest.raises(TypeError, match="PetaConfig.from_pretrained"):
        model.add_adapter("second", LoraConfig(target_modules=["attn1.to_q"]))
