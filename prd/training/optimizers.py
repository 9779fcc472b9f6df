"""The optimiser of a stage, its learning rate, and Adan (Xie et al. 2022, arXiv:2208.06677, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from prd.errors import ConfigError
from prd.utils.checked_types import CHECKS, Float, Fraction, Int, NonNegative, Positive


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class OptimizerConfig:
    """Settings of the optimiser of what is trained, and of its learning rate."""

    name: Literal["adan", "adamw"] = "adamw"  # Adan takes three betas, AdamW two
    lr: Positive = 1e-3  # peak learning rate
    betas: tuple[Annotated[Float, Field(ge=0, lt=1)], ...] = (0.9, 0.99)  # moment decays
    eps: Positive = 1e-12  # added to the denominator
    weight_decay: NonNegative = 0.0  # decoupled
    warmup_steps: Annotated[Int, Field(ge=0)] = 20  # linear warm-up of lr
    decay_fraction: Fraction = 0.4  # last part of the run over which lr falls linearly; 0: constant
    final_lr_fraction: Fraction = 0.05  # of the peak, at the end of that decay
    max_grad_norm: Positive | None = None  # clip the gradient's global norm; null: not

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        expected = {"adan": 3, "adamw": 2}[self.name]
        if len(self.betas) != expected:
            raise ValueError(f"betas={list(self.betas)}: {self.name} takes {expected} values")
        return self


MOMENTS = ("exp_avg", "exp_avg_diff", "exp_avg_sq")


class Adan(torch.optim.Optimizer):
    """Adan with bias correction and decoupled weight decay, one fused call an operation over all parameters.

    lr            step size
    betas         shares kept of the moments of the gradient, of its change, and of its square, each in [0, 1)
    eps           added to the denominator
    weight_decay  decoupled: parameters are divided by 1 + lr * weight_decay after the update

    The state of a parameter is tensors alone: `step`, the three moments and the gradient before. The change at a
    parameter's first step is zero. Parameters without a gradient are left as they are.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value}: must not be negative")
        if len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: must be three numbers from 0 up to, but not including, 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # bias correction needs one count a call: parameters that joined later are updated among themselves
            by_step: dict[float, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(self._begin(parameter), []).append(parameter)
            for count, parameters in by_step.items():
                self._update(group, parameters, count)
        return loss

    def _begin(self, parameter: Tensor) -> float:
        """Count a step of a parameter, with its state made at the first; returns the count."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # on the CPU: read every step
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter)
            state["previous_grad"] = parameter.grad.clone()  # type: ignore[union-attr]
        state["step"] += 1
        return float(state["step"])

    def _update(self, group: dict[str, Any], parameters: list[Tensor], count: float) -> None:
        keep_m, keep_v, keep_n = group["betas"]
        gradients = [p.grad for p in parameters if p.grad is not None]  # all of them: for the type checker
        m, v, n = ([self.state[p][name] for p in parameters] for name in MOMENTS)
        previous = [self.state[p]["previous_grad"] for p in parameters]
        change = torch._foreach_sub(gradients, previous)
        torch._foreach_lerp_(m, gradients, 1 - keep_m)
        torch._foreach_lerp_(v, change, 1 - keep_v)
        nesterov = torch._foreach_add(gradients, change, alpha=keep_v)  # g + (1 - beta_2 of the paper) * change
        torch._foreach_mul_(n, keep_n)
        torch._foreach_addcmul_(n, nesterov, nesterov, 1 - keep_n)

        correct_m, correct_v, correct_n = (1 - keep**count for keep in (keep_m, keep_v, keep_n))
        denominator = torch._foreach_sqrt(n)
        torch._foreach_div_(denominator, correct_n**0.5)
        torch._foreach_add_(denominator, group["eps"])
        lr = group["lr"]
        torch._foreach_addcdiv_(parameters, m, denominator, -lr / correct_m)
        torch._foreach_addcdiv_(parameters, v, denominator, -lr * keep_v / correct_v)
        if group["weight_decay"]:
            torch._foreach_div_(parameters, 1 + lr * group["weight_decay"])
        torch._foreach_copy_(previous, gradients)


def build_optimizer(config: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Adan over the trainable parameters."""
    common: dict[str, Any] = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "adan":
        return Adan(parameters, betas=config.betas, **common)
    first, second = config.betas
    return torch.optim.AdamW(parameters, betas=(first, second), **common)


def lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, constant, linear decay up to step `total`."""
    decay_start = total * (1 - config.decay_fraction)
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    late = max(0.0, step - decay_start) / max(1.0, total - decay_start)
    return warm * max(config.final_lr_fraction, 1 - (1 - config.final_lr_fraction) * late)


def trainable_parameters(model: Any, trainable: Sequence[str] | None) -> list[torch.nn.Parameter]:
    """The parameters of a model's parts named, None: of all; ConfigError for a part that it does not have."""
    parts = model.parts()
    if unknown := sorted(set(trainable or ()) - parts.keys()):
        raise ConfigError(f"trainable={unknown[0]!r}: is no part of this model; it has {', '.join(parts)}")
    return [parameter for name, part in parts.items() if trainable is None or name in trainable for parameter in part]


def train_only(model: Any, trainable: Sequence[str] | None) -> list[torch.nn.Parameter]:
    """Let only the parameters of the parts named (None: of all) require a gradient; returns these."""
    chosen = trainable_parameters(model, trainable)
    for parameter in trainable_parameters(model, None):
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen
