"""Multi-view diffusion on a diffusers U-Net: joint-view self-attention and a camera vector.

MVDream (arXiv 2308.16512, section 3.1) inflates every self-attention to the tokens of all views of a scene and adds an
embedding of each view's camera to the timestep embedding. Both fit an ordinary `UNet2DConditionModel`: an attention
processor, and `class_embed_type="projection"`, whose two linear layers with a SiLU between are MVDream's.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from prd.cameras import Cameras, CamerasConfig
from prd.utils.arguments import integer

CameraEncoding = Literal["mvdream", "richdreamer", "fourier"]
CAMERA_DIMENSIONS = 16  # of every encoding


def check_settings(num_views: int, camera_encoding: str, base: str | None) -> None:
    """Raise ValueError for invalid settings of a multi-view teacher."""
    if (integer(num_views) or 0) < 1:
        raise ValueError(f"num_views={num_views!r}: must be a positive integer")
    if camera_encoding not in get_args(CameraEncoding):
        raise ValueError(f"camera_encoding={camera_encoding!r}: must be one of {', '.join(get_args(CameraEncoding))}")
    if base is not None and (not isinstance(base, str) or not base):
        raise ValueError(f"base={base!r}: must be a folder beside this one ('../name'), a Hub id, or null")


def own_cameras(teacher: object) -> CamerasConfig | None:
    """The cameras of a teacher's own, its attribute `cameras`; None where that is no `CamerasConfig`: the run's."""
    found = getattr(teacher, "cameras", None)
    return found if isinstance(found, CamerasConfig) else None


class JointViewAttnProcessor:
    """Self-attention over the tokens of `num_views` consecutive batch entries (MVDream's 3D attention)."""

    def __init__(self, num_views: int) -> None:
        self.num_views = num_views

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B*V, L, C]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("encoder_hidden_states, attention_mask: joint-view attention is unmasked self-attention")
        rows, length, width = hidden_states.shape
        views = self.num_views
        if rows % views:
            raise ValueError(f"batch={rows}: must be a multiple of num_views={views}")
        query, key, value = (
            linear(hidden_states).view(rows // views, views * length, attn.heads, -1).transpose(1, 2)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B, heads, V*L, C / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
        return attn.to_out[1](attn.to_out[0](mixed))


def set_joint_attention(unet: UNet2DConditionModel, num_views: int) -> None:
    """Let every self-attention (`attn1`) of `unet` span `num_views` views; cross-attention is left unchanged."""
    joint = {name: JointViewAttnProcessor(num_views) for name in self_attentions(unet)}
    unet.set_attn_processor({**unet.attn_processors, **joint})


def self_attentions(unet: UNet2DConditionModel) -> list[str]:
    """Names of the processors of every self-attention; ValueError for a U-Net without."""
    found = [name for name in unet.attn_processors if name.endswith("attn1.processor")]
    if not found:
        raise ValueError(f"unet={type(unet).__name__}: has no self-attention (attn1) for the views to meet in")
    return found


def camera_vector(cameras: Cameras, encoding: CameraEncoding) -> Tensor:
    """Camera input of a multi-view teacher, one vector per image, [B*V, 16].

    "mvdream": camera-to-world with its translation scaled to unit length, flattened (MVDream's normalize_camera).
    "richdreamer": the same turned by -90 degrees about z, translation times twice the relative distance (rel_x2).
    "fourier": sines and cosines of azimuth and elevation: small networks do not read angles out of matrices.

    Raises ValueError for orthographic cameras, which no such model knows, and for another encoding.
    """
    if cameras.orthographic:
        raise ValueError("cameras: orthographic; a camera vector is of a perspective camera")
    matrix = cameras.camera_to_world
    direction = F.normalize(cameras.position, dim=-1)  # [B, V, 3]
    if encoding == "fourier":
        azimuth, elevation = cameras.azimuth, cameras.elevation
        waves = [f(k * azimuth) * 1.5 for k in (1, 2, 3, 4, 6) for f in (torch.cos, torch.sin)]
        waves += [elevation * 3, elevation * 3 * azimuth.cos(), elevation * 3 * azimuth.sin()]
        waves += [(4 * elevation).sin(), (4 * elevation).cos(), torch.ones_like(elevation)]
        return torch.stack(waves, dim=-1).flatten(0, 1)
    if encoding == "mvdream":
        rotation, translation = matrix[..., :3, :3], direction
    elif encoding == "richdreamer":
        turn = matrix.new_tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # Rz(-90 degrees)
        rotation = turn @ matrix[..., :3, :3]
        translation = (turn @ direction[..., None])[..., 0] * (2 * cameras.relative_distance[..., None])
    else:
        raise ValueError(f"camera_encoding={encoding!r}: must be 'mvdream', 'richdreamer' or 'fourier'")
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    return torch.cat([top, matrix[..., 3:, :]], dim=-2).flatten(0, 1).flatten(1)
