"""The optimiser of a stage, its learning rate, and Adan (Xie et al. 2022, arXiv:2208.06677, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prd.generators.protocol import Generator
from prd.training.config import ConfigError, TrainConfig

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
            state["step"] = torch.zeros(())  # on the CPU: read every step
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


def build_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Adan over the trainable parameters."""
    o = config.optimizer
    if o.name == "adan":
        return Adan(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    first, second = o.betas
    return torch.optim.AdamW(parameters, lr=o.lr, betas=(first, second), eps=o.eps, weight_decay=o.weight_decay)


def learning_rate(config: TrainConfig) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: linear warm-up, constant, linear decay at the end."""
    o, total = config.optimizer, config.schedule_steps or config.max_train_steps
    decay_start = total * (1 - o.decay_fraction)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, o.warmup_steps))
        late = max(0.0, step - decay_start) / max(1.0, total - decay_start)
        return warm * max(o.final_lr_fraction, 1 - (1 - o.final_lr_fraction) * late)

    return factor


def trainable_parameters(model: Generator, trainable: Sequence[str] | None) -> list[torch.nn.Parameter]:
    """The parameters of the parts named, None: of all; ConfigError for a part that there is not."""
    parts = model.parts()
    if unknown := sorted(set(trainable or ()) - parts.keys()):
        raise ConfigError(f"trained={unknown[0]!r}: is no part of this generator; it has {', '.join(parts)}")
    return [parameter for name, part in parts.items() if trainable is None or name in trainable for parameter in part]
