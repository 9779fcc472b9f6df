"""Fake scores of a run: one for each teacher that the loss asks for one, trained beside the student."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prd.adapters.lora import lora_copy
from prd.distillation.asd import AsdConfig
from prd.distillation.fake_score import FakeReference, FakeScore, FakeScoreConfig
from prd.distillation.multi_teacher import MeanMetrics
from prd.errors import CheckpointError, ConfigError
from prd.teachers.base import Teacher, UNetTeacher
from prd.training.config import Stage, TrainConfig
from prd.training.gradients import exchange_gradients
from prd.training.optimizers import OptimizerConfig, build_optimizer
from prd.training.run.checkpoints import load_optimizer_state, optimizer_state
from prd.utils.checked_types import number

logger = logging.getLogger(__name__)


class FakeScores:
    """The fake scores of a run by their teachers' names, and the optimiser of all of them.

    They belong to no stage: a stage whose loss asks for none leaves them as they are. They are saved in checkpoints,
    not with the model.
    """

    def __init__(
        self, config: FakeScoreConfig, teachers: Mapping[str, Teacher], accelerator: Accelerator, seed: int
    ) -> None:
        self.accelerator = accelerator
        self.scores: dict[str, FakeScore] = {}
        for name in config.teachers or teachers:
            teacher = teachers.get(name)
            if not isinstance(teacher, UNetTeacher):
                found = f"is a {type(teacher).__name__} without a U-Net" if name in teachers else "is not enabled"
                raise ConfigError(
                    f"distillation.fake.teachers={name!r}: {found}; name those that have one, as "
                    "distillation.fake.teachers: [mvdream]"
                )
            unet = lora_copy(teacher.unet, config.rank, seed)
            self.scores[name] = FakeScore(teacher, unet)
            for parameter in self.scores[name].named_parameters().values():  # a teacher that is kept elsewhere stays
                parameter.data = parameter.data.to(accelerator.device)
        every = [p for score in self.scores.values() for p in score.named_parameters().values()]
        self.optimizer = build_optimizer(OptimizerConfig(eps=1e-8), every)

    def reference(self, name: str, draws: Sequence[torch.Generator]) -> FakeReference | None:
        """The fake score of a teacher for one call of the loss, with draws for its training; None if it has none."""
        return FakeReference(self.scores[name], draws) if name in self.scores else None

    def update(self, config: FakeScoreConfig, log: MeanMetrics) -> None:
        """Train on what the loss has shown since the last call; the gradients are exchanged once per update.

        An update whose gradient is not finite is left out and counted.
        """
        shown = {name: score for name, score in self.scores.items() if score.seen}
        parameters = [p for score in shown.values() for p in score.named_parameters().values()]
        for group in self.optimizer.param_groups:
            group["lr"] = number(config.lr)
        for _ in range(config.updates_per_step if shown else 0):
            self.optimizer.zero_grad(set_to_none=True)
            for name, score in shown.items():
                log.add(f"fake_loss/{name}", score.accumulate())
            exchange_gradients(self.accelerator, parameters, {})
            finite = all(bool(torch.isfinite(p.grad).all()) for p in parameters if p.grad is not None)
            if finite:
                self.optimizer.step()
            else:
                logger.warning("the gradient of the fake scores is not finite; the update was skipped")
            log.add("fake_skipped", float(not finite))
        self.forget()

    def forget(self) -> None:
        """Drop what the loss has shown: the step was left out."""
        self.optimizer.zero_grad(set_to_none=True)
        for score in self.scores.values():
            score.seen.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable weights of all of them, "TEACHER.PARAMETER"."""
        return {
            f"{name}.{key}": p for name, score in self.scores.items() for key, p in score.named_parameters().items()
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of `state_dict`; CheckpointError for those of other teachers or of another rank."""
        own = self.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
            raise CheckpointError(
                "the checkpoint's fake scores are of other teachers or of another rank; resume with its "
                "distillation.fake.teachers and distillation.fake.rank"
            )
        for key, parameter in own.items():
            parameter.copy_(tensors[key])

    def save(self, groups: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Add their state to the tensors and values of a checkpoint."""
        tensors, plain = optimizer_state(self.optimizer)
        groups["fake"], groups["fake_optimizer"], values["fake_optimizer"] = self.state_dict(), tensors, plain

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Undo `save`; CheckpointError for a checkpoint without."""
        if "fake" not in groups:
            raise CheckpointError("the checkpoint holds no fake scores; resume with another distillation.reference")
        self.load_state_dict(groups["fake"])
        load_optimizer_state(self.optimizer, groups["fake_optimizer"], values["fake_optimizer"])


def build_fake_scores(
    stages: Sequence[Stage], teachers: Mapping[str, Teacher], accelerator: Accelerator, seed: int
) -> FakeScores | None:
    """The fake scores that the stages' losses ask for, None if none does.

    Raises ConfigError for stages that ask for different ones, and for teachers that cannot have one.
    """
    asked = [own for stage in stages if (own := fake_config(stage.config)) is not None]
    if not asked:
        return None
    for name in ("rank", "teachers"):
        if len({getattr(own, name) for own in asked}) > 1:
            raise ConfigError(
                f"distillation.fake.{name}: differs between stages; give those with fake scores one value"
            )
    return FakeScores(asked[0], teachers, accelerator, seed)


def fake_config(config: TrainConfig) -> FakeScoreConfig | None:
    """Settings of the fake scores of a stage; None if its loss asks for none."""
    loss = config.distillation
    return loss.fake if isinstance(loss, AsdConfig) and loss.reference == "fake" else None
