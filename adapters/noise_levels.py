"""Noise levels of a base by timestep, and x0 from what its network predicts: a diffusion's or a flow's.

Both noise by x_t = alpha_t x0 + sigma_t noise at an integer timestep t in [0, T), so that Algorithm 1 and DDIM are the
same steps on either: of a flow DDIM's step is Euler's along the straight line from noise to x0.
"""

from __future__ import annotations

import operator
from typing import Any, Self

import torch
from torch import Tensor, nn


def as_timestep(timestep: Tensor | int, device: torch.device) -> Tensor:
    """An integer timestep, or a tensor of them, as a tensor on a device."""
    if isinstance(timestep, Tensor):
        return timestep.to(device)
    return torch.tensor(operator.index(timestep), dtype=torch.long, device=device)


class NoiseLevels(nn.Module):
    """Noise levels [T] of a base; they follow it to every device and stay in float32.

    name             of what the levels are: "alphas_cumprod" or "sigmas"
    prediction_type  what the network predicts
    """

    name: str

    def __init__(self, levels: Tensor, prediction_type: str) -> None:
        super().__init__()
        self.register_buffer(self.name, levels.to(torch.float32), persistent=False)
        self.prediction_type = prediction_type

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """Return the levels of a diffusers scheduler; ValueError for one of another kind."""
        raise NotImplementedError

    @property
    def levels(self) -> Tensor:
        return self.get_buffer(self.name)

    def __len__(self) -> int:
        return len(self.levels)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = self.levels
        super()._apply(fn, recurse)
        if self.levels.dtype != exact.dtype:
            self._buffers[self.name] = exact.to(self.levels.device)
        return self

    def at(self, timestep: Tensor | int, like: Tensor) -> Tensor:
        """The level [B or 1, 1, 1, 1, 1] at an integer timestep or [B] of them, in the type of `like`."""
        return self._levels_at(as_timestep(timestep, self.levels.device)).to(like.dtype).view(-1, 1, 1, 1, 1)

    def _levels_at(self, timestep: Tensor) -> Tensor:
        return self.levels[timestep.reshape(-1)].view(timestep.shape)  # an index of no dimension is read by the host

    def alpha_sigma(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t [B or 1, 1, 1, 1, 1] at an integer timestep or [B] of them."""
        raise NotImplementedError

    def told(self, timestep: Tensor) -> Tensor:
        """Return the network's input for integer timesteps."""
        return timestep

    def x0(self, x: Tensor, prediction: Tensor, timestep: Tensor | int) -> Tensor:
        """x0 [B, P, C, h, w] from noisy x and the network's prediction, both of that shape."""
        raise NotImplementedError


class DiffusionLevels(NoiseLevels):
    """alpha_t^2 = alphas_cumprod[t], sigma_t^2 = 1 - alpha_t^2; the network predicts the noise or v (Salimans & Ho)."""

    name = "alphas_cumprod"
    alphas_cumprod: Tensor

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """Return the levels of a scheduler with `alphas_cumprod`; ValueError for another kind of prediction."""
        found = scheduler.config.get("prediction_type")
        if found not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={found!r}: the base must predict epsilon or v_prediction")
        return cls(torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32, device="cpu"), found)

    def alpha_sigma(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        a = self.at(timestep, like)
        return a.sqrt(), (1 - a).sqrt()

    def x0(self, x: Tensor, prediction: Tensor, timestep: Tensor | int) -> Tensor:
        alpha, sigma = self.alpha_sigma(timestep, x)
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha
        return alpha * x - sigma * prediction


class FlowLevels(NoiseLevels):
    """alpha_t = 1 - sigma_t; the network predicts the velocity noise - x0 (rectified flow; Esser et al. 2024).

    sigma_t = shift s / (1 + (shift - 1) s) of even s = (t + 1) / T: K timesteps in equal strides are the K levels that
    the model samples from with its `shift`. The network is told sigma_t T.
    """

    name = "sigmas"
    sigmas: Tensor

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """Return the levels of a FlowMatchEulerDiscreteScheduler; ValueError for a scheduler of another kind."""
        config = scheduler.config
        if "shift" not in config or config.get("use_dynamic_shifting") or config.get("invert_sigmas"):
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__}: the base is a flow, whose noise levels have one `shift`; "
                "give the FlowMatchEulerDiscreteScheduler of its folder"
            )
        total, shift = int(config["num_train_timesteps"]), float(config["shift"])
        s = torch.arange(1, total + 1, dtype=torch.float64, device="cpu") / total
        return cls(shift * s / (1 + (shift - 1) * s), "flow")

    def alpha_sigma(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.at(timestep, like)
        return 1 - sigma, sigma

    def told(self, timestep: Tensor) -> Tensor:
        return self._levels_at(timestep.to(self.sigmas.device)) * len(self)

    def x0(self, x: Tensor, prediction: Tensor, timestep: Tensor | int) -> Tensor:
        return x - self.at(timestep, x) * prediction
