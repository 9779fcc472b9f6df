"""What PETA adapts in a diffusion transformer: of tiny ones, and of published ones on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtTransformer2DModel, SD3Transformer2DModel

from prd.adapters import PetaConfig, attach_peta, backbone_of
from prd.adapters.peta import PlanePatchLora
from prd.generators.published import model_from_published
from prd.generators.triplane_turbo import TriplaneTurboConfig, TriplaneTurboModel
from prd.loading.stable_diffusion import Base
from prd.training.estimate.architectures import VAE
from prd.training.estimate.transformers import LARGE_3_5, MEDIUM, MEDIUM_3_5, SIGMA, VAE_16
from prd.utils.construction import meta_weights
from tests.compare import ROUNDING, relative_difference
from tests.teachers.tiny_large import make_pixart, make_sd3

KINDS = {"pixart": make_pixart, "sd3": make_sd3}

SD3: dict[str, Any] = {"network": SD3Transformer2DModel, "vae": VAE_16}
PUBLISHED: dict[str, dict[str, Any]] = {  # with the rank of the recipe, or the one that comes to the paper's 2.5 %
    "PixArt-Sigma": {
        "network": PixArtTransformer2DModel,
        "config": SIGMA,
        "vae": {},
        "parameters": 610_856_096,
        "blocks": 28,
        "attentions": 28,
        "of_text": 28 * 4,
        "rank": 7,
        "share": 0.0242,
    },
    "Stable Diffusion 3 medium": {
        **SD3,
        "config": MEDIUM,
        "parameters": 2_028_328_000,
        "blocks": 24,
        "attentions": 24,
        "of_text": 23 * 4 + 2,
        "rank": 20,
        "share": 0.0248,
    },
    "Stable Diffusion 3.5 medium": {
        **SD3,
        "config": MEDIUM_3_5,
        "parameters": 2_243_171_520,
        "blocks": 24,
        "attentions": 24 + 13,
        "of_text": 23 * 4 + 2,
        "rank": 16,
        "share": 0.0247,
    },
    "Stable Diffusion 3.5 large": {
        **SD3,
        "config": LARGE_3_5,
        "parameters": 8_056_627_520,
        "blocks": 38,
        "attentions": 38,
        "of_text": 37 * 4 + 2,
        "rank": 32,
        "share": 0.0247,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layer_of_a_published_transformer_is_adapted(name: str) -> None:
    known = PUBLISHED[name]
    config = PetaConfig(r=known["rank"], plane_channels=32)
    with meta_weights():
        network, vae = known["network"](**known["config"]), AutoencoderKL(**{**VAE, **known["vae"]})
        backbone = backbone_of(network, vae, config)
        peft = attach_peta(backbone, config)
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == known["parameters"]
    groups = {group: len(names) for group, names in backbone.layers().items()}
    assert groups["self_attention"] == 4 * known["attentions"]
    assert groups["cross_attention"] == known["of_text"]
    assert groups["convolutions"] == 2 * known["blocks"] + 2
    assert len(backbone.plane_wise_layers()) == 4 * known["attentions"] + 2
    added = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    frozen = parameters + sum(p.numel() for p in vae.get_submodule("decoder").parameters())
    assert added / frozen == pytest.approx(known["share"], abs=1e-4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    pipelines = {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}
    return {name: Base(name, p.transformer, p.vae, p.scheduler, None) for name, p in pipelines.items()}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_adapted_is_counted(name: str, bases: dict[str, Base]) -> None:
    groups = backbone_of(bases[name].unet, bases[name].vae, PetaConfig()).layers()
    assert {group: len(names) for group, names in groups.items() if not group.startswith("decoder")} == {
        "self_attention": 2 * 4,
        "cross_attention": 2 * 4 if name == "pixart" else 4 + 2,  # the last block's text is read, and not put out
        "convolutions": 2 + 2 * 2,
    }


@torch.no_grad()
def test_a_patch_embedding_of_each_plane_is_six_convolutions(bases: dict[str, Base]) -> None:
    config = PetaConfig(r=2, plane_channels=4)
    backbone = backbone_of(bases["sd3"].unet, bases["sd3"].vae, config)
    attach_peta(backbone, config)
    layer = backbone.get_submodule("joint_transformer.pos_embed.proj")
    assert isinstance(layer, PlanePatchLora)
    up: Any = layer.lora_B["default"]
    torch.manual_seed(0)
    x = torch.randn(12, 16, 8, 8)
    up.weight.normal_()
    up.bias.normal_()
    delta = (up.weight @ layer.lora_A["default"].weight).unflatten(2, (16, 2, 2))
    base: Any = layer.get_base_layer()
    separate = [
        torch.nn.functional.conv2d(x[i, None], base.weight + delta[i % 6], base.bias + up.bias[i % 6], stride=2)
        for i in range(12)
    ]
    assert relative_difference(layer(x), torch.cat(separate)) <= ROUNDING
    assert relative_difference(layer.fused()(x), torch.cat(separate)) <= ROUNDING


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_that_is_not_known_is_refused(name: str, bases: dict[str, Base]) -> None:
    backbone = backbone_of(bases[name].unet, bases[name].vae, PetaConfig())
    backbone.network.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"transformer\.extra: is a Linear that PETA does not know"):
        attach_peta(backbone, PetaConfig())
    backbone = backbone_of(bases[name].unet, bases[name].vae, PetaConfig())
    backbone.network.transformer_blocks[1] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1: is a Linear, which PETA does not know"):
        attach_peta(backbone, PetaConfig())


def test_another_network_is_refused(bases: dict[str, Base]) -> None:
    with pytest.raises(TypeError, match="base is a AutoencoderKL: PETA adapts UNet2DConditionModel, PixArt"):
        backbone_of(bases["sd3"].vae, bases["sd3"].vae, PetaConfig())
    with pytest.raises(ValueError, match="DDIMScheduler: the base is a flow"):
        backbone_of(bases["sd3"].unet, bases["sd3"].vae, PetaConfig(), DDIMScheduler())
    with pytest.raises(ValueError, match="the published adapter is a U-Net's; give Stable Diffusion 2.1-base"):
        model_from_published({}, bases["pixart"], source="x.pth")


@pytest.mark.parametrize("name", KINDS)
def test_the_rank_of_self_attention_is_its_own(name: str, bases: dict[str, Base]) -> None:
    config = TriplaneTurboConfig(rank=2, self_attention_rank=3, plane_channels=4, head_width=8, latent_size=8)
    model = TriplaneTurboModel.from_base(bases[name], config)
    ranks = {n: m.r["default"] for n, m in model.backbone.named_modules() if hasattr(m, "lora_A")}
    assert {n for n, rank in ranks.items() if rank == 3} == set(model.backbone.layers()["self_attention"])
