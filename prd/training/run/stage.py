"""One network trained from scratch on a plain loss: optimizer, average of the weights, log, and a state to resume from.

For what stands beside the method, such as the networks of a small world; a student has `prd.training.trainer`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prd.training.run import checkpoints
from prd.training.run.folder import open_metrics

DONE = {"done": True}  # the last line of a log


class Stage:
    """A stage of a training: NAME's log is log_NAME.jsonl in `folder`, its state while it is trained unfinished_NAME.

    settings      what decides what the stage becomes: the first line of its log
    steps         its number of steps
    seed          of `generator`, from which all of its draws come
    lr            of AdamW, betas 0.9 and 0.99
    save_seconds  between two states to resume from; a state that is there is gone on from
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modules: Sequence[nn.Module],
        settings: Mapping[str, Any],
        *,
        steps: int,
        seed: int,
        lr: float,
        save_seconds: float = 180.0,
    ) -> None:
        self.folder, self.name, self.modules, self.steps = folder, name, list(modules), steps
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.lr = lr
        self.average = [p.detach().clone() for p in self.parameters]
        self.running: float | None = None
        self.unfinished, self.save_seconds = unfinished(folder, name), save_seconds
        self.saved = self.start = time.time()
        self.first = self.restore() if checkpoints.latest_checkpoint(self.unfinished) else 0
        self.log = log_path(folder, name)
        with open_metrics(self.log, self.first) as log:
            log.write("" if self.first else json.dumps(dict(settings)) + "\n")

    def save(self, step: int) -> None:
        """Write the state after `step` steps aside, then in the place of the one before."""
        optimizer, settings = checkpoints.optimizer_state(self.optimizer)
        draws = {**checkpoints.rng_state(), "generator": self.generator.get_state()}
        tensors: dict[str, dict[str, Tensor]] = {"optimizer": optimizer, "draws": draws}
        for group, own in (("weights", self.parameters), ("average", self.average)):
            tensors[group] = {str(i): tensor for i, tensor in enumerate(own)}
        state = {"optimizer": settings, "running": self.running, "seconds": time.time() - self.start}
        checkpoints.save_checkpoint(self.unfinished, step, tensors, state, total_limit=1)
        self.saved = time.time()

    @torch.no_grad()
    def restore(self) -> int:
        """Undo `save`; returns the number of steps that are done."""
        folder = checkpoints.latest_checkpoint(self.unfinished)
        assert folder is not None
        found = checkpoints.load_checkpoint(folder)
        for group, own in (("weights", self.parameters), ("average", self.average)):
            for i, tensor in enumerate(own):
                tensor.copy_(found.tensors[group][str(i)])
        checkpoints.load_optimizer_state(self.optimizer, found.tensors["optimizer"], found.state["optimizer"])
        self.generator.set_state(found.tensors["draws"].pop("generator"))
        checkpoints.set_rng_state(found.tensors["draws"])
        self.running, self.start = found.state["running"], time.time() - found.state["seconds"]
        return found.step

    def each_step(self) -> Iterator[int]:
        """Yield step numbers with the learning rate set: 3 % warm-up, constant, linear decay over the second half."""
        numbers = range(self.first, self.steps)
        for step in tqdm(numbers, desc=self.name, mininterval=5, initial=self.first, total=self.steps):
            done = step / self.steps
            factor = min(1.0, (step + 1) / (0.03 * self.steps)) * min(1.0, max(0.02, 2 * (1 - done)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * factor
            yield step

    def update(self, step: int, loss: Tensor) -> None:
        """One optimizer step, the moving average of the weights, and a line in the log every 100 steps."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        value = loss.item()
        self.running = value if self.running is None else 0.98 * self.running + 0.02 * value
        if step % 100 == 99 or step + 1 == self.steps:
            self.write(step=step + 1, loss=round(self.running, 5))
        if step + 1 < self.steps and time.time() - self.saved >= self.save_seconds:
            self.save(step + 1)

    def write(self, **values: Any) -> None:
        """Add a line to the log, by default of the last step."""
        line = {"seconds": round(time.time() - self.start, 1), "step": self.steps, **values}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights in place."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)
        for module in self.modules:
            module.eval()


def unfinished(folder: Path, name: str) -> Path:
    """The folder of a stage's states while it is trained."""
    return folder / f"unfinished_{name}"


def log_path(folder: Path, name: str) -> Path:
    return folder / f"log_{name}.jsonl"


def is_done(folder: Path, name: str, settings: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether a stage is to be left out: it is done, and the command resumes.

    SystemExit where a state would be lost, or where one to resume was made with other settings.
    """
    place, log = unfinished(folder, name), log_path(folder, name)
    stopped = checkpoints.latest_checkpoint(place) is not None
    if stopped and not resume:
        raise SystemExit(f"{place}: {name} was stopped in the middle; give --resume to go on, or remove the folder")
    first, *rest = (log.read_text(encoding="utf-8") if log.is_file() else "").splitlines() or [""]
    done = bool(resume and rest and rest[-1] == json.dumps(DONE))
    if (stopped or done) and first != json.dumps(dict(settings)):
        given = f"{first or 'nothing known'}, not {json.dumps(dict(settings))}"
        raise SystemExit(f"{log}: {name} was begun with {given}; give the same, or begin anew without --resume")
    if done:
        shutil.rmtree(place, ignore_errors=True)
    return done


def mark_done(folder: Path, name: str) -> None:
    """Write the last line of a stage's log, and remove the states to resume from."""
    with log_path(folder, name).open("a", encoding="utf-8") as log:
        log.write(json.dumps(DONE) + "\n")
    shutil.rmtree(unfinished(folder, name), ignore_errors=True)
