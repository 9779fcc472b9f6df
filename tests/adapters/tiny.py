"""A tiny random Stable Diffusion, and what tests of all kinds of bases share."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from prd import TriplaneTurbo
from prd.adapters import PetaConfig
from prd.generators import SavedConfig, TriplaneTurboModel
from prd.training.recipes import load_config
from prd.training.trainer import Trainer


def tiny_base(
    seed: int = 0, *, prediction_type: str = "epsilon", linear: bool = True, **unet_config: Any
) -> tuple[UNet2DConditionModel, AutoencoderKL, DDIMScheduler]:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=linear,
        **unet_config,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    return unet.eval(), vae.eval(), scheduler


def adapted(
    network: Any, vae: Any, scheduler: Any, *, trained: bool = True, base_hash: Any = None, **options: Any
) -> TriplaneTurboModel:
    """A model of a base's parts with an adapter of rank 2 that is not at its start, unless `trained` is False."""
    torch.manual_seed(1)
    peta = PetaConfig(**{"r": 2, "plane_channels": 4, **options})
    model = TriplaneTurboModel(
        network, vae, scheduler, peta, SavedConfig(latent_size=8, head_width=8), base_hash=base_hash
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def check_training(base: Path, folder: Path, *words: str) -> None:
    """Two steps on a base with the toy box's teachers: all that is trained moves; then a mesh of what was saved."""
    small = ["--train_batch_size=1", "--num_denoising_steps=2", "--optimizer.warmup_steps=0", "--num_threads=1"]
    sizes = ["--renderers.volume.grid_resolution=16", "--renderers.surface.grid_resolution=16", "--model.rank=2"]
    trainer = Trainer(load_config("toybox", [*small, *sizes, f"--model.base={base}", *words]))
    start = {name: tensor.clone() for name, tensor in trainer.model.trained_state_dict().items()}
    for step in range(2):  # one factor of each pair starts at zero: the other moves in the second step
        assert trainer.train_step(step)["skipped"] == 0
    now = trainer.model.trained_state_dict()
    assert [name for name, tensor in start.items() if torch.equal(now[name], tensor)] == []
    trainer.model.save_pretrained(folder)
    pipe: Any = TriplaneTurbo.from_pretrained(folder, base=str(base))
    assert len(pipe("a red cube", isosurface_resolution=16, texture_size=16).meshes[0].faces)
