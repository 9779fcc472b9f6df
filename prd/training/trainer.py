"""The training loop: Progressive Rendering Distillation, and models that answer in one pass.

A step draws prompts, lets the model estimate a field for each (several one after the other, or one), renders the
estimates, lets the teachers judge them (`prd.training.objective`) and updates the trainable weights once. Gradients
are summed over estimates and micro-batches and exchanged between processes once per step, so the model needs no
wrapper.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch

from prd.data.batches import NOISE, Batch, Batches, dummy_of
from prd.distillation.asd import NonFinitePrediction
from prd.distillation.multi_teacher import MeanMetrics
from prd.evaluation.report import update_report
from prd.rendering.background import TextBackground
from prd.training.config import Stage, TrainConfig
from prd.training.diagnostics import NonFiniteDiagnostics
from prd.training.ema import WeightAverage
from prd.training.fake_scores import build_fake_scores, fake_config
from prd.training.gradients import NOT_FINITE, SkippedSteps, exchange_gradients, spoil_gradients
from prd.training.objective import Objective
from prd.training.optimizers import build_optimizer, lr_factor, train_only, trainable_parameters
from prd.training.parts import Parts, build_parts, check_parts, offloaded, with_classes
from prd.training.passes import TeacherPasses
from prd.training.plan import StepPlan
from prd.training.recipes import configured_parts
from prd.training.run.clock import TIME_IS_UP, Clock
from prd.training.run.folder import check_named, check_run, run_lock
from prd.training.run.heartbeat import at_estimate
from prd.training.run.isolation import isolated
from prd.training.run.logbook import Logbook
from prd.training.run.processes import StopRequest, begin_process
from prd.training.run.resume import load_resumed, resumed_config
from prd.training.run.session import begin_session, end_session, full_disk_explained, report_stop
from prd.training.run.snapshot import restore_trainer, save_trainer
from prd.training.validation import Validation
from prd.utils.progress import at, shown_loading

logger = logging.getLogger(__name__)


class Trainer:
    """One training run of a `TrainConfig`: steps and their loop, from the parts to a run folder.

    parts  what is trained and by what; None: as the config describes (`build_parts`)
    """

    @isolated
    def __init__(self, config: TrainConfig, parts: Parts | None = None) -> None:
        self.clock = Clock()
        check_named(config)
        config = with_classes(config, {} if parts is None else {**vars(parts), "distillation": parts.loss})
        self.accelerator, self.config = begin_process(config)
        self.folder = Path(config.output_dir)
        self.resumed = load_resumed(self.config)
        self.config = config = resumed_config(self.config, self.resumed, self.global_batch_size)
        torch.manual_seed(config.seed)
        if parts is not None:
            check_parts(parts.to(self.device, **offloaded(config)), config)
        if parts is None:
            with shown_loading(self.accelerator.is_main_process):
                parts = build_parts(config, self.device)
        self.parts = parts
        self.model, self.corpus, encoder = parts.model, parts.corpus, parts.text_encoder
        if self.accelerator.is_main_process:
            if found := self.corpus.report(encoder.tokenizer, encoder.length):
                logger.warning(found)
        dummy, width = dummy_of(self.model), encoder([""]).shape[-1]
        pools = config.text_background
        self.batches = Batches(config.seed, self.corpus, encoder, self.device, parts.library, dummy, pools)
        self.background = TextBackground(width).to(self.device) if config.text_background else None
        self.background_parameters = [] if self.background is None else list(self.background.parameters())
        self.plan = StepPlan(config, self.accelerator, self.clock, 0 if self.resumed is None else self.resumed.step)
        self.fakes = build_fake_scores(self.plan.stages, parts.teachers, self.accelerator, config.seed)
        self.passes = TeacherPasses(parts.teachers, self.fakes, self.accelerator.num_processes)
        self.enter(self.plan.stages[0])
        self.average: WeightAverage | None = None
        if config.ema_decay is not None:
            every = [*trainable_parameters(self.model, None), *self.background_parameters]
            self.average = WeightAverage(every, config.ema_decay)
        with shown_loading(self.accelerator.is_main_process):
            self.validation = Validation(
                config, self.model, encoder, self.corpus.prompts, self.average, parts.benchmark
            )
        self.skipped = SkippedSteps(self.accelerator, self.folder)
        self.first = self.first_prompt = 0  # the step a resumed run begins at, and the prompts drawn before it
        self.frames = 0  # rendered for the teachers, by all processes
        self.stop = StopRequest()
        self.stopping: str | None = None  # why all processes stop after this step

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def global_batch_size(self) -> int:
        """Prompts per optimiser step, over all processes and micro-batches."""
        return self.accelerator.num_processes * self.config.gradient_accumulation_steps * self.config.train_batch_size

    @property
    def frames_per_prompt(self) -> float:
        """Frames rendered so far over the prompts of the corpus: ATT3D's measure of cost."""
        return self.frames / len(self.corpus.prompts)

    def prompts_drawn(self, step: int) -> int:
        """Prompts drawn before an optimiser step: where the corpus goes on."""
        return self.first_prompt + (step - self.first) * self.global_batch_size

    # -- a stage -----------------------------------------------------------------------------------------------------

    def enter(self, stage: Stage) -> None:
        """Begin a stage: its parts of the model are trained, by an optimiser of its own."""
        self.accelerator.free_memory()  # holds every optimiser prepared, and unscales gradients for each
        self.model.begin_stage(stage.config.trainable)
        self.parameters = [*train_only(self.model, stage.config.trainable), *self.background_parameters]
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(stage.config.optimizer, self.parameters))
        self.follow(stage)

    def follow(self, stage: Stage) -> None:
        """Take the schedules and the objective of a stage, and leave what is trained as it is."""
        self.stage, configured = stage, configured_parts(self.plan.stages)
        self.objective = Objective(
            stage, self.parts, self.device, configured=configured, background=self.background, fakes=self.fakes
        )

    def follow_plan(self, done: int) -> None:
        """Follow the schedules that hold after `done` steps; the stage is left when the next step is taken."""
        if (stage := self.plan.follow(done, self.stage)) is not self.stage:
            self.follow(stage)

    def fit_steps(self, done: int) -> None:
        """Fit the number of steps to the minutes where that is due after `done` steps, alike in all processes."""
        if self.plan.fit(done, self.stage) and self.accelerator.is_main_process:
            self.plan.write(self.folder)
        self.follow_plan(done)

    # -- a step ------------------------------------------------------------------------------------------------------

    @isolated
    def train_step(self, step: int) -> dict[str, float]:
        """Take one optimiser step; returns what is logged."""
        if not self.stage.first <= step < self.stage.last:
            self.enter(self.plan.stage_at(step))
            self.plan.begin_stage(step)
            if self.average is not None:
                self.average.restart(self.parameters)
        config, log, diagnostics, reason = self.stage.config, MeanMetrics(), NonFiniteDiagnostics(), NOT_FINITE
        begun = time.time()
        lr = config.optimizer.lr * lr_factor(config.optimizer, step - self.stage.first, config.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for micro in range(config.gradient_accumulation_steps):
                self.accumulate(step, micro, log, diagnostics)
        except NonFinitePrediction as error:
            reason = str(error)
            spoil_gradients(self.parameters)
        own, self.stopping = exchange_gradients(self.accelerator, self.parameters, self.wishes())
        norm = self.accelerator.clip_grad_norm_(self.parameters, config.optimizer.max_grad_norm or float("inf"))
        finite = bool(torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()  # a scaler leaves a step that is not finite out by itself, and lowers its scale
        if finite:
            self.skipped.taken()
            if self.average is not None:
                self.average.update(step)
        else:
            self.skipped.skip(step, reason, own, diagnostics)
        log.add("skipped", float(not finite))
        log.add("skipped_total", float(self.skipped.total))
        self.train_fakes(step, finite, log)
        self.passes.count(log)
        self.frames += self.frames_of(step)
        log.add("frames_per_prompt", self.frames_per_prompt)
        return {"lr": lr, "gradient_norm": float(norm), **log.means(), "seconds": time.time() - begun}

    def train_fakes(self, step: int, finite: bool, log: MeanMetrics) -> None:
        """Train the fake scores on the renderings of a step; of one that was left out they are dropped."""
        if self.fakes is not None:
            config = fake_config(self.stage.at(step)) if finite else None
            self.fakes.forget() if config is None else self.fakes.update(config, log)

    def frames_of(self, step: int) -> int:
        """Frames that a step renders, over all processes."""
        renders = sum(len(self.objective.renderers_of(step, k)) for k in range(self.model.num_estimates))
        return self.global_batch_size * self.objective.views * renders

    def wishes(self) -> dict[str, bool]:
        """Reasons to stop by name, and whether this process has each; time is up by the main process's clock."""
        return {self.stop.name or "a signal": self.stop.name is not None, TIME_IS_UP: self.plan.out_of_time()}

    def accumulate(self, step: int, micro: int, log: MeanMetrics, diagnostics: NonFiniteDiagnostics) -> None:
        """Add the gradients of a micro-batch: the estimates of its prompts, rendered and judged."""
        config, model = self.config, self.model
        size, several = config.rollout_batch_size, config.gradient_accumulation_steps
        at(batch=f"batch {micro + 1} of {several}" if several > 1 else None, doing="embedding prompts")
        batch = self.draw(step, micro)
        noise = batch.draws(NOISE)
        at_estimate(0, size, model.num_estimates)
        with self.accelerator.autocast():
            for ks, field in model.rollout(batch.embeds, batch.inputs, noise, batch_size=size, first=micro == 0):
                loss = self.objective(batch, ks, field, step, log, diagnostics)
                loss = loss / config.gradient_accumulation_steps / model.num_estimates
                at(doing="backward pass")
                with torch.autocast(self.device.type, enabled=False):  # gradients in the precision of their operation
                    self.accelerator.backward(loss)
                at_estimate(ks.stop, size, model.num_estimates)

    def draw(self, step: int, micro: int) -> Batch:
        """The prompts of a micro-batch, with random numbers of their own."""
        config = self.config
        place = self.accelerator.process_index * config.gradient_accumulation_steps + micro
        samples = range(place * config.train_batch_size, (place + 1) * config.train_batch_size)  # of the whole step
        return self.batches.draw(self.stage, step, samples, self.prompts_drawn(step))

    # -- the run -----------------------------------------------------------------------------------------------------

    @isolated
    def save(self, step: int) -> Path:
        """Write `checkpoint-{step}`; to be called by every process."""
        return save_trainer(self, step)

    @isolated
    def resume(self) -> int:
        """Continue from the checkpoint the config names; returns the steps done, 0 without one."""
        return 0 if self.resumed is None else restore_trainer(self, self.resumed)

    @isolated
    def train(self) -> Path:
        """Run all steps and what comes before and after them; returns the run folder."""
        check_run(self.config)
        with run_lock(self.folder) if self.accelerator.is_main_process else nullcontext():
            first = begin_session(self)
            with self.stop:
                with full_disk_explained(self.folder):
                    done = self.loop(first)
                if done > first and done % self.config.checkpointing_steps:
                    self.save(done)
                report_stop(self, done)  # here, for launchers pass on a signal that the terminal has already sent
            end_session(self, done)
        return self.folder

    def loop(self, first: int) -> int:
        """Take the steps from `first` on, show, log and save them; returns how many the run has done."""
        config, main, done = self.config, self.accelerator.is_main_process, first
        with closing(Logbook(self.folder, self.accelerator, first, self.plan.max_train_steps)) as log:
            while done < self.plan.max_train_steps:
                try:
                    values = self.train_step(done)
                except FloatingPointError as error:
                    if done % config.checkpointing_steps:
                        self.save(done)  # the weights are those of the last good step
                    way = f"continue with --resume_from_checkpoint {self.folder / f'checkpoint-{done}'}"
                    raise FloatingPointError(f"{error}, and {way}") from error
                done += 1
                at(batch=None, estimate=None, doing="measuring and saving")
                if done == first + 1:
                    log.tell_first_step(60 * self.clock.minutes())
                if main:
                    log.write(done, values | self.validation.validate_periodically(done, self.plan.now.total_steps))
                self.fit_steps(done)
                log.advance(self.plan.max_train_steps)
                if done % config.checkpointing_steps == 0:
                    self.save(done)
                    if main:
                        update_report(self.folder)
                if self.accelerator.num_processes == 1:  # nobody to agree with: a signal of this very moment counts
                    self.stopping = self.stopping or self.stop.name
                if self.stopping:
                    self.plan.say_stopping(self.stopping, done)
                    break
        return done
