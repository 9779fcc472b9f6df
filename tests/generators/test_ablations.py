"""The paper's ablations are settings: each builds, learns in every part it names, and comes back from disk."""

import dataclasses

import pytest
import torch

from prd.adapters.peta import PlaneLora
from prd.generators import TriplaneTurboModel
from prd.training.recipes import load_config
from tests.adapters.tiny import tiny_base
from tests.compare import ROUNDING, relative_difference


class TinyBase:
    """A base as `from_base` reads it."""

    name, revision = "tiny", None
    public_name = ""
    hashes: dict[str, str] = {}

    def __init__(self) -> None:
        self.unet, self.vae, self.scheduler = tiny_base()


def student(steps: int = 4, **model: object) -> TriplaneTurboModel:
    config = load_config("toybox")
    section = dataclasses.replace(config.model, plane_channels=3, head_width=8, latent_size=4, **{"rank": 2, **model})
    return TriplaneTurboModel.from_base(TinyBase(), section, steps)


def adapter_size(model: TriplaneTurboModel, part: str = "") -> int:
    return sum(p.numel() for n, p in model.peft.named_parameters() if p.requires_grad and "lora_" in n and part in n)


SETTINGS: dict[str, dict] = {
    "K = 1": {"steps": 1},
    "K = 2": {"steps": 2},
    "rank 8": {"rank": 8},
    "rank 32": {"rank": 32},
    "basic LoRA": {"plane_wise": False, "self_attention_rank": 12},
    "no convolutions": {"convolutions": False, "decoder_convolutions": False},
    "full": {"full": True},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_ablation_learns_and_is_saved(setting: dict, tmp_path) -> None:
    model, text = student(**setting), torch.randn(1, 77, 12)
    latents = torch.randn(1, 6, 4, 4, 4)
    trained = model.trainable_parameters()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        x0 = latents
        for t in model.timesteps(model.config.num_inference_steps):
            x0 = model.denoise(model.add_noise(x0.detach(), latents, t), t, text)
        loss = (model.decode(x0).sdf(torch.zeros(1, 1, 3)) + 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = TriplaneTurboModel.from_adapter(tmp_path, *tiny_base())
    assert loaded.peta.full == model.peta.full and loaded.config == model.config
    k = model.config.num_inference_steps
    one, two = (m.generate(text, latents=latents, num_inference_steps=k).planes for m in (model, loaded))
    assert relative_difference(two, one) <= ROUNDING


def test_basic_lora_of_six_times_the_rank_has_as_many_parameters() -> None:
    plane_wise, basic = student(), student(plane_wise=False, self_attention_rank=12)
    assert adapter_size(plane_wise, "attn1") == adapter_size(basic, "attn1") > 0
    assert adapter_size(plane_wise) == adapter_size(basic)
    assert not any(isinstance(module, PlaneLora) for module in basic.modules())


def test_parameters_grow_with_the_rank_and_full_trains_everything() -> None:
    sizes = [adapter_size(student(rank=rank)) for rank in (8, 16, 32)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 2 * sizes[1]
    full = student(full=True)
    frozen = [n for n, p in full.backbone.named_parameters() if not p.requires_grad and ".original_module." not in n]
    assert all(name.startswith("post_quant_conv.") for name in frozen)
