"""What PETA adds to published diffusion transformers, on the meta device: every layer counted, the share of all."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import AutoencoderKL, PixArtTransformer2DModel, SD3Transformer2DModel

from prd.adapters import PetaConfig, attach_peta, backbone_of
from prd.training.estimate.architectures import VAE
from prd.training.estimate.transformers import LARGE_3_5, MEDIUM, MEDIUM_3_5, SIGMA, VAE_16
from prd.utils.construction import meta_weights

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
