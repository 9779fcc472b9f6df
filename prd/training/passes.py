"""Cost of a run at its teachers, so that losses can be compared at equal teacher calls."""

from __future__ import annotations

from collections.abc import Mapping

from prd.distillation.multi_teacher import MeanMetrics
from prd.teachers.base import Teacher, UNetTeacher
from prd.training.fake_scores import FakeScores


class TeacherPasses:
    """The number of images that the U-Nets of teachers and fake scores have evaluated, over all processes.

    A prediction is one pass; an image that a fake score is trained on is three, with the backward pass. Teachers that
    are no `UNetTeacher` count none.
    """

    def __init__(self, teachers: Mapping[str, Teacher], fakes: FakeScores | None, processes: int) -> None:
        models = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, UNetTeacher)}
        fake_models = {f"{name}_fake": score.model for name, score in (fakes.scores if fakes else {}).items()}
        self.models, self.processes, self.total = {**models, **fake_models}, processes, 0
        self.before = {name: model.passes for name, model in self.models.items()}

    def count(self, log: MeanMetrics) -> None:
        """Log the passes since the last call by model, of those that were asked, and all of the run so far."""
        for name, model in self.models.items():
            passes = (model.passes - self.before[name]) * self.processes
            self.before[name] = model.passes
            self.total += passes
            if passes:
                log.add(f"passes/{name}", passes)
        log.add("teacher_passes", self.total)
