"""Conversion of the published TriplaneTurbo checkpoint to a model of this library: `prd convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from prd.adapters.convert import (
    HEADS,
    LAYERS,
    CheckpointError,
    convert_published,
    published_config,
    published_layers,
    read_published,
)
from prd.adapters.peta import PetaConfig, SixPlaneBackbone
from prd.errors import MissingFile
from prd.generators.adapter_files import SavedConfig
from prd.generators.triplane_turbo import TriplaneTurboModel
from prd.loading.stable_diffusion import Base
from prd.loading.whose_weights import other_file, other_model
from prd.utils.arguments import expanded_path

LATENT_SIZE = 32  # of the published pipeline, whatever its base draws
SDF_BIAS = 0.5  # sdf = MLP + |p| - 0.5
PAPER_SHARE = 0.025


@dataclass(frozen=True)
class AddedParameters:
    """Count of what a published checkpoint adds to its base, as published (before to_out is folded).

    layers    adapted attentions and convolutions, and the decoder's new conv_out
    adapters  parameters of these layers, conv_out's among them
    heads     parameters of the three MLPs
    base      parameters of what is adapted: the U-Net, the VAE decoder and post_quant_conv, their own conv_out counted
    """

    layers: int
    adapters: int
    heads: int
    base: int

    @property
    def share(self) -> float:
        return (self.adapters + self.heads) / self.base

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.adapters:,} parameters, and {self.heads:,} in the heads: "
            f"{100 * self.share:.2f} % of the {self.base:,} of the U-Net and the VAE decoder "
            f"(the paper says {100 * PAPER_SHARE:.1f} %)"
        )


def count_added(state: dict[str, Tensor], unet: UNet2DConditionModel, vae: AutoencoderKL) -> AddedParameters:
    """Count the parameters of a published state dict beside those of its base; both may be on the meta device."""
    backbone = SixPlaneBackbone(unet, vae, PetaConfig())
    decoder: nn.Module = vae.get_submodule("decoder")
    return AddedParameters(
        layers=len(published_layers(backbone)),
        adapters=sum(tensor.numel() for name, tensor in state.items() if name.startswith(LAYERS)),
        heads=sum(t.numel() for name, t in state.items() if name.split(".")[1:2] and name.split(".")[1] in HEADS),
        base=sum(
            p.numel() for module in (backbone.unet, decoder, backbone.post_quant_conv) for p in module.parameters()
        ),
    )


def published_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a published `.pth`; FileNotFoundError, or CheckpointError for one that holds no adapter."""
    path = expanded_path(path, "checkpoint")
    if not path.is_file():
        raise MissingFile(f"{path}: no such file; give the published .pth")
    try:
        state = read_published(path)
    except CheckpointError as error:
        if other := other_file(path, "TriplaneTurbo"):
            raise CheckpointError(f"{path}: {other}") from error
        raise
    if not any(name.startswith(LAYERS) for name in state):
        other = other_model(state, "TriplaneTurbo") or f"holds no tensor of {LAYERS}*; give the published .pth"
        raise CheckpointError(f"{path}: {other}")
    return state


def model_from_published(
    state: dict[str, Tensor], base: Base, *, source: str | Path, latent_size: int | None = None
) -> tuple[TriplaneTurboModel, AddedParameters]:
    """Return the model of a published `.pth`, and what it adds to its base.

    state        from `published_state`; source is its file, for messages
    latent_size  h = w of the latents that are drawn; None: 32 as published, or the base's own size if that is smaller

    Raises ValueError for a latent size or a base that it cannot have, and CheckpointError naming missing, unknown or
    misshapen entries, or another base.
    """
    if not isinstance(base.unet, UNet2DConditionModel):
        raise ValueError(
            f"base={base.name!r}: is a {type(base.unet).__name__}, and the published adapter is a U-Net's; give Stable "
            "Diffusion 2.1-base"
        )
    if (found := base.scheduler.config.prediction_type) != "epsilon":
        raise ValueError(
            f"base={base.name!r}: predicts {found}, and the published adapter was trained on a base that predicts "
            "epsilon; give Stable Diffusion 2.1-base"
        )
    multiple = 2 ** (len(base.unet.config["block_out_channels"]) - 1)
    if latent_size is not None and (latent_size < 1 or latent_size % multiple):
        raise ValueError(
            f"latent_size={latent_size}: must be a positive multiple of {multiple}, as its U-Net halves it"
        )
    backbone = SixPlaneBackbone(base.unet, base.vae, PetaConfig())
    width = state.get("geometry.sdf_network.layers.0.weight")
    try:
        peta = published_config(state, backbone)
        converted = convert_published(state, backbone)
        config = SavedConfig(
            base=base.public_name,
            base_revision=base.revision,
            latent_size=min(LATENT_SIZE, base.unet.config["sample_size"]) if latent_size is None else latent_size,
            head_width=0 if width is None else width.shape[0],
            bias_radius=SDF_BIAS,
        )
        model = TriplaneTurboModel(base.unet, base.vae, base.scheduler, peta, config, base_hash=base.hashes)
        model.load_trained_state_dict(converted)
    except ValueError as error:
        raise CheckpointError(f"{source} on the base {base.name!r}: {error}") from error
    return model, count_added(state, base.unet, base.vae)
