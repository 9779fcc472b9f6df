"""Write a model of your own: a small network of position, modulated by the text (FiLM, Perez et al. 2018).

    python examples/custom_generator.py                     # three steps on the toy box
    PYTHONPATH=examples prd train --model "{class: custom_generator.FilmModel, width: 96}"

The last line names it by its import path, as `model: {class: ...}` of a recipe does."""

import sys

import torch
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn

from prd.fields.protocol import AutogradGradient
from prd.generators.single_pass import SinglePassModel
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.utils.checked_types import CHECKS, Count, Radius


@settings(frozen=True, kw_only=True, config=CHECKS)
class FilmConfig:
    """Settings of `FilmModel`; the first three are those of every single-pass model."""

    text_encoder: str = "toybox"  # folder or Hub id of the text encoder
    text_length: Count | None = None  # tokens per prompt; null: as the text encoder gives them
    text_width: Count | None = None  # channels of a token; null: as the text encoder gives them
    width: Count = 64  # channels of the hidden layers
    depth: Count = 3  # hidden layers
    frequencies: Count = 4  # of the sinusoidal encoding of positions
    sphere_radius: Radius = 0.5  # the signed distance is the network's output plus |p| - sphere_radius, scene units


class FilmModel(SinglePassModel):
    """Text embeddings [B, L, Ct] to the scale and shift of every hidden layer, and the layers that they modulate."""

    class_name = "FiLM"
    config_class = FilmConfig

    def __init__(self, config: FilmConfig) -> None:
        super().__init__(config)
        inputs = [3 + 6 * config.frequencies] + [config.width] * (config.depth - 1)
        self.film = nn.Linear(config.text_width or 0, 2 * config.depth * config.width)
        self.layers = nn.ModuleList(nn.Linear(channels, config.width) for channels in inputs)
        self.out = nn.Linear(config.width, 4, bias=False)
        nn.init.normal_(self.out.weight, std=0.01)  # training starts near the sphere

    def generate(
        self, prompt_embeds: Tensor, generator: object = None, *, num_inference_steps: int | None = None
    ) -> "FilmField":
        self.check_embeds(prompt_embeds)
        return FilmField(self, self.film(prompt_embeds.to(self.dtype).mean(dim=1)))


class FilmField(AutogradGradient):
    """B shapes: modulations film [B, depth * 2 * width] of the model's layers."""

    def __init__(self, model: FilmModel, film: Tensor) -> None:
        self.model, self.film = model, film.unflatten(1, (model.config.depth, 2, 1, model.config.width))

    def _values(self, points: Tensor) -> Tensor:  # [B, N, 3] -> [B, N, 4]
        angles = torch.cat([points * torch.pi * 2**i for i in range(self.model.config.frequencies)], dim=-1)
        x = torch.cat([points, angles.sin(), angles.cos()], dim=-1).to(self.film.dtype)
        for layer, film in zip(self.model.layers, self.film.unbind(1), strict=True):
            x = nn.functional.silu((1 + film[:, 0]) * layer(x) + film[:, 1])  # scale and shift [B, 1, width]
        return self.model.out(x).float()

    def sdf(self, points: Tensor) -> Tensor:  # [B, N, 1], scene units, positive outside
        return self._values(points)[..., :1] + points.norm(dim=-1, keepdim=True) - self.model.config.sphere_radius

    def rgb(self, points: Tensor) -> Tensor:  # [B, N, 3] in [0, 1]
        return self._values(points)[..., 1:].sigmoid()


if __name__ == "__main__":
    few = ["--output_dir", "runs/custom_generator", "--max_train_steps", "3", *sys.argv[1:]]
    config = load_config("toybox", ["--model", "{class: custom_generator.FilmModel}", *few])
    Trainer(config, build_parts(config, model=FilmModel.from_config(config.model))).train()
