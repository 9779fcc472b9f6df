"""A tiny random Stable Diffusion."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


def tiny_base(
    seed: int = 0, *, prediction_type: str = "epsilon", linear: bool = True
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
