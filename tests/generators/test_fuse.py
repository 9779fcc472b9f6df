"""A fused student: the same planes, its own weights, an adapter that can still be saved."""

import pytest
import torch

from prd.adapters import PetaConfig
from prd.adapters.peta import PetaConv, PlaneLora
from prd.generators import SavedConfig, TriplaneTurboModel
from tests.adapters.tiny import tiny_base
from tests.compare import ROUNDING, relative_difference

TEXT = torch.randn(2, 77, 12, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(2, 6, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def student(base: tuple | None = None, **peta: object) -> TriplaneTurboModel:
    config = SavedConfig(latent_size=4, head_width=8, base="me/tiny", base_revision="1" * 40)
    model = TriplaneTurboModel(*(base or tiny_base()), PetaConfig(**{"r": 2, "plane_channels": 3, **peta}), config)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("peta", [{}, {"plane_bias": True}, {"plane_wise": False}, {"full": True}])
def test_a_fused_student_makes_the_same_planes(peta: dict) -> None:
    model = student(**peta)
    before = model.generate(TEXT, latents=LATENTS).planes
    after = model.fuse().generate(TEXT, latents=LATENTS).planes
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert not any(isinstance(module, PlaneLora | PetaConv) for module in model.modules())
    single = model.generate(TEXT[1:], latents=LATENTS[1:]).planes
    torch.testing.assert_close(single, after[1:], atol=1e-5, rtol=1e-4)


def test_the_base_keeps_its_weights_and_the_adapter_can_be_saved(tmp_path) -> None:
    unet, vae, scheduler = tiny_base()
    weights = {name: tensor.clone() for name, tensor in [*unet.named_parameters(), *vae.named_parameters()]}
    model = student((unet, vae, scheduler))
    state, digest = {n: t.clone() for n, t in model.trained_state_dict().items()}, model.base_hash()
    model.fuse().fuse()
    assert all(torch.equal(t, weights[n]) for n, t in [*unet.named_parameters(), *vae.named_parameters()])
    assert model.base_hash() == digest
    model.save_pretrained(tmp_path)
    loaded = TriplaneTurboModel.from_adapter(tmp_path, *tiny_base()).trained_state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_fused_student_refuses_what_it_cannot_do() -> None:
    model = student().fuse()
    with pytest.raises(ValueError, match="fused: build another one from its base to train"):
        model.trainable_parameters()
    with pytest.raises(ValueError, match="fused: build another one from its base to load an adapter"):
        model.load_trained_state_dict({})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_half_precision_is_as_close_as_unfused(dtype: torch.dtype) -> None:
    exact = student().generate(TEXT, latents=LATENTS).planes
    errors = [
        (model.to(dtype).generate(TEXT, latents=LATENTS).planes - exact).square().mean().sqrt().item()
        for model in (student(), student().fuse())
    ]
    assert errors[1] <= 1.5 * errors[0] and errors[1] > 0


def test_large_planes_are_decoded_one_by_one_to_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student()
    whole = model.decode_planes(LATENTS).detach()
    monkeypatch.setattr("prd.adapters.backbone.LARGE_LATENT", 1)
    seen = []
    hook = model.backbone.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        single = model.decode_planes(LATENTS)
    hook.remove()
    assert seen == [1] * 12
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=1e-5)


def test_another_attention_is_used_and_gives_the_same() -> None:
    model = student()
    before = model.denoise(LATENTS, 499, TEXT).detach()
    calls = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape)
        return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v

    model.set_attention(attention)
    torch.testing.assert_close(model.denoise(LATENTS, 499, TEXT).detach(), before, atol=1e-5, rtol=1e-4)
    assert calls
    model.set_attention(None)
    assert relative_difference(model.denoise(LATENTS, 499, TEXT), before) <= ROUNDING
