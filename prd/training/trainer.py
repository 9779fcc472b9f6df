"""The Accelerate loop around Progressive Rendering Distillation, and around generators that answer in one pass.

A step draws prompts, rolls the student out over K timesteps (`prd.distillation.progressive`) or asks a generator once,
renders each estimate, lets the teachers judge (`prd.training.supervision`), and updates what is trained once. Gradients
are summed over the estimates and the micro-batches and exchanged between processes once a step, so the generator needs
no wrapper.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from prd.distillation.asd import NonFinitePrediction
from prd.distillation.draws import draw_normal
from prd.distillation.progressive import JudgeLog, rollout
from prd.fields import Field
from prd.generators.generator import Generator
from prd.generators.single_pass import SinglePassGenerator
from prd.memory import keep_freed_memory
from prd.rendering.background import TextBackground
from prd.teachers.base import UNetTeacher
from prd.toybox.score import summarise
from prd.toybox.world import parse_caption
from prd.training.batches import NOISE, Batch, Batches, dummy_of
from prd.training.budget import END_SHARE, HARD_LIMIT, Budget, planned, stage_start, with_fit
from prd.training.build import build_generator, build_optimizer, learning_rate, load_teachers, shared_encoder
from prd.training.checkpoints import (
    CheckpointError,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    save_checkpoint,
    set_aside_later,
    set_rng_state,
)
from prd.training.config import ConfigError, Stage, TrainConfig, dump_config, save_config, stages_of, to_dict
from prd.training.embeddings import Embeddings
from prd.training.files import write_whole
from prd.training.library import open_library
from prd.training.processes import StopRequest, choose_threads, end_with_launcher
from prd.training.prompts import load_corpus
from prd.training.report import write_report
from prd.training.resume import load_resumed, plain, resumed_config
from prd.training.run_folder import (
    check_run,
    metrics_line,
    open_metrics,
    peak_memory,
    run_data_parallel,
    sole_writer,
    write_environment,
)
from prd.training.sanity import CollapseWatch, Witness, prompt_spread, record_skipped, watched_prompts
from prd.training.supervision import Supervision, renderers_of
from prd.training.validation import (
    contact_sheet,
    export_meshes,
    make_fields,
    measure,
    save_gallery,
    time_end,
    toybox_splits,
)

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10  # steps in a row without a finite gradient
TIME_IS_UP = "max_train_minutes"


class Trainer:
    """One training run of a `TrainConfig`, from the base model to a run folder."""

    def __init__(self, config: TrainConfig) -> None:
        self.started = time.time()
        config = replace(config, num_threads=choose_threads(config.num_threads))
        keep_freed_memory()
        end_with_launcher()
        if config.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError("mixed_precision='fp16': needs a CUDA device; use bf16 or no")
        self.folder = Path(config.output_dir)
        places = ProjectConfiguration(str(self.folder), logging_dir=str(self.folder / "trackers"))
        run_data_parallel()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=config.report_to, project_config=places
        )
        assert config.num_threads is not None
        torch.set_num_threads(config.num_threads)  # Accelerate may have set another number
        self.config = config
        self.resumed = load_resumed(config)
        self.config = config = resumed_config(config, self.resumed, self.prompts_a_step)
        torch.manual_seed(config.seed)
        self.corpus = load_corpus(config.prompts, config.seed)
        embeddings = None if config.prompts.embeddings is None else Embeddings(config.prompts.embeddings)
        if embeddings is not None:
            embeddings.check_covers(self.corpus.prompts)
        self.student, self.encoder = build_generator(config)
        if self.accelerator.is_main_process:
            if found := self.corpus.report(self.encoder.tokenizer, self.encoder.length):
                logger.warning(found)
        self.student.to(self.device)
        self.teachers = load_teachers(config, self.device)
        if isinstance(self.student, SinglePassGenerator) and not config.teachers.offload:
            self.encoder = shared_encoder(self.encoder, [teacher for teacher, _ in self.teachers])
        self.encoder.model.to(self.device)
        text_width = self.encoder([""]).shape[-1]
        if embeddings is not None:
            self.encoder = embeddings.encoder(self.encoder, "student")
            for teacher in (teacher for teacher, _ in self.teachers if isinstance(teacher, UNetTeacher)):
                teacher.prompt_encoder = embeddings.encoder(teacher.prompt_encoder, teacher.name)
        self.batches = Batches(
            config.seed,
            self.corpus,
            self.encoder,
            self.device,
            open_library(config.library, self.encoder, self.student),
            dummy_of(self.student),
        )
        self.background = TextBackground(text_width).to(self.device) if config.text_background else None
        begun = 0 if self.resumed is None else self.resumed.step
        self.plan = planned(config, max(0, begun - 1))  # the config with the numbers of steps that hold now
        self.budget: Budget | None = None
        if config.max_train_minutes is not None and not config.fits:
            minutes, most = config.max_train_minutes, config.max_train_steps
            self.budget = Budget(minutes, most, done=begun, clock=lambda: 60 * self.minutes())
        self.end_seconds = END_SHARE * 60 * (config.max_train_minutes or 0.0)  # taken by `finish`
        self.stages = stages_of(self.plan)
        self.enter(self.stages[0])
        if config.prompts.source == "toybox":
            check_captions(config.validation.prompts)
        self.average: list[Tensor] | None = None
        if config.ema_decay is not None:
            self.average = [p.detach().clone() for p in self.every_parameter()]
        self.first = self.first_prompt = 0  # the step a resumed run begins at, and the prompts drawn before it
        self.skipped = self.skipped_total = 0  # steps in a row, and in this run
        self.frames = 0  # rendered for the teachers, by all processes
        self.minutes_before = 0.0  # of the run that is resumed
        self.watch, self.watched = CollapseWatch(), watched_prompts(config, self.corpus.prompts)
        self.stop = StopRequest()
        self.stopping: str | None = None  # why all processes stop after this step

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def prompts_a_step(self) -> int:
        """Prompts of an optimiser step, over all processes and batches."""
        config = self.config
        return self.accelerator.num_processes * config.gradient_accumulation_steps * config.train_batch_size

    def prompts_drawn(self, step: int) -> int:
        """Prompts drawn before an optimiser step: where the corpus goes on."""
        return self.first_prompt + (step - self.first) * self.prompts_a_step

    # -- a stage -----------------------------------------------------------------------------------------------------

    def stage_at(self, step: int) -> Stage:
        """The stage that an optimiser step belongs to."""
        return next((stage for stage in self.stages if step < stage.last), self.stages[-1])

    def enter(self, stage: Stage) -> None:
        """Begin a stage: its parts of the generator are trained, by an optimiser of its own."""
        self.accelerator.free_memory()  # holds every optimiser prepared, and unscales gradients for each
        if isinstance(self.student, SinglePassGenerator):
            self.student.begin_stage(stage.config.trained)
        chosen = trained_parameters(self.student, stage.config.trained)
        for parameter in trained_parameters(self.student, None):
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.parameters = [*chosen, *(() if self.background is None else self.background.parameters())]
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(stage.config, self.parameters))
        self.follow(stage)

    def follow(self, stage: Stage) -> None:
        """Take the schedules and the supervision of a stage, and leave what is trained as it is."""
        self.stage = stage
        self.lr_factor = learning_rate(stage.config)
        self.supervision = Supervision(
            stage,
            self.config,
            self.teachers,
            self.device,
            alpha=self.student.alpha if isinstance(self.student, SinglePassGenerator) else None,
            background=self.background,
        )

    def every_parameter(self) -> list[torch.nn.Parameter]:
        """What any stage trains."""
        own = () if self.background is None else self.background.parameters()
        return [*trained_parameters(self.student, None), *own]

    def fit_steps(self, done: int) -> None:
        """Fit the number of steps to the minutes where that is due after `done` steps, alike in all processes."""
        if self.budget is not None and self.budget.due(done):
            number = 0
            if self.accelerator.is_main_process:
                start = stage_start(self.config, self.stages.index(self.stage))
                number = self.budget.fit(done, end_seconds=self.end_seconds, stage_start=start)
            numbers = [number]
            if self.accelerator.num_processes > 1:
                broadcast_object_list(numbers)
            if self.budget.accept(done, numbers[0]):
                self.config = with_fit(self.config, done, numbers[0])
                if self.accelerator.is_main_process:
                    save_config(self.config, self.folder / "config.yaml")
        self.replan(done)

    def replan(self, done: int) -> None:
        """Follow the schedules that hold after `done` steps; the stage is left when the next step is taken."""
        plan, before = planned(self.config, done), self.plan
        self.plan = plan
        if (plan.max_train_steps, plan.schedule_steps) != (before.max_train_steps, before.schedule_steps):
            index = self.stages.index(self.stage)
            self.stages = stages_of(plan)
            self.follow(self.stages[index])

    # -- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns what is logged."""
        if not self.stage.first <= step < self.stage.last:
            self.enter(self.stage_at(step))
            self.restart_average()
            if self.budget is not None:
                self.budget.begin(step)
        config, log, witness = self.stage.config, JudgeLog(), Witness()
        begun = time.time()
        lr = config.optimizer.lr * self.lr_factor(step - self.stage.first)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        reason = "the gradient is not finite"
        try:
            for micro in range(config.gradient_accumulation_steps):
                self.accumulate(step, micro, log, witness)
        except NonFinitePrediction as error:
            reason = str(error)
            for parameter in self.parameters:  # every process must skip the same step
                parameter.grad = torch.full_like(parameter, float("nan"))
        own = self.exchange_gradients()
        limit = config.optimizer.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        finite = bool(torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()  # a scaler leaves a step that is not finite out by itself, and lowers its scale
        if finite:
            self.update_average(step)
            self.skipped = 0
        else:
            self.skip(step, reason, own, witness)
        log.add("skipped", float(not finite))
        log.add("skipped_total", float(self.skipped_total))
        self.frames += self.frames_of(step)
        log.add("frames_per_prompt", self.frames / len(self.corpus.prompts))
        return {"lr": lr, "gradient_norm": float(norm), **log.means(), "seconds": time.time() - begun}

    def frames_of(self, step: int) -> int:
        """Frames that a step renders, over all processes: ATT3D's measure of cost, over the prompts of the corpus."""
        config = self.stage.config
        estimates = 1 if isinstance(self.student, SinglePassGenerator) else config.num_denoising_steps
        renders = sum(len(renderers_of(config, step, k)) for k in range(estimates))
        return self.prompts_a_step * config.cameras.views * renders

    def skip(self, step: int, reason: str, own: Tensor | None, witness: Witness) -> None:
        """Count a step without a finite gradient and record who was asked; FloatingPointError after too many in a row.

        own  this process's gradient before the exchange: the one that spoiled it tells; None: there is no other
        """
        self.skipped += 1
        self.skipped_total += 1
        if own is None or not bool(torch.isfinite(own).all()):
            found = witness.suspects(reason)
            said = record_skipped(self.folder, step, self.accelerator.process_index, found)
            logger.warning("step %d: %s; the step was skipped: %s", step, reason, said)
        if self.skipped >= MOST_SKIPPED and not self.scale_is_high():
            raise FloatingPointError(
                f"step {step}: {self.skipped} steps in a row had no finite gradient; lower optimizer.lr "
                "(with --allow_config_change)"
            )

    def scale_is_high(self) -> bool:
        """Whether fp16's loss scale can still be lowered: until then a gradient that overflows is expected."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def accumulate(self, step: int, micro: int, log: JudgeLog, witness: Witness) -> None:
        """A micro-batch: the estimates of its prompts, rendered and judged, gradients added up."""
        batch, generator = self.draw(step, micro), self.student

        def supervise(ks: range, field: Field) -> Tensor:
            loss = self.supervision(batch, ks, field, step, log, witness)
            return loss / self.config.gradient_accumulation_steps

        @torch.autocast(self.device.type, enabled=False)  # each operation's gradient in the precision it ran in
        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss)

        with self.accelerator.autocast():
            if isinstance(generator, SinglePassGenerator):
                generator.train(micro == 0)  # spectral norms iterate once a step, however it is shared out
                field = generator.generate(batch.embeds, **batch.inputs)
                generator.eval()
                backward(supervise(range(1), field))
                return

            latents = batch.draws(NOISE)

            def noise(k: int) -> Tensor:
                return draw_normal((len(batch.prompts), *generator.latent_shape), latents).to(self.device)

            rollout(
                generator,
                supervise,
                backward,
                prompt_embeds=batch.embeds,
                timesteps=generator.timesteps(self.config.num_denoising_steps),
                noise=noise,
                at_once=self.config.estimates_at_once,
            )

    def draw(self, step: int, micro: int) -> Batch:
        """The prompts of a micro-batch, with random numbers of their own."""
        config = self.config
        place = self.accelerator.process_index * config.gradient_accumulation_steps + micro
        samples = range(place * config.train_batch_size, (place + 1) * config.train_batch_size)  # of the whole step
        return self.batches.draw(self.stage, step, samples, self.prompts_drawn(step))

    def exchange_gradients(self) -> Tensor | None:
        """Average the accumulated gradients over the processes, in one exchange a step.

        The wish of any process to stop travels along, so that all stop at the same step. Returns this process's own
        gradient in one piece, None for a process alone.
        """
        wishes = {self.stop.name or "a signal": self.stop.name is not None, TIME_IS_UP: self.out_of_time()}
        own = None
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient  # also alone: the optimizer must not skip here what it updates among several processes
        if self.accelerator.num_processes > 1:
            flags = gradients[0].new_tensor([float(wish) for wish in wishes.values()])
            whole = torch.cat([*(g.flatten() for g in gradients), flags])  # large models have no room for another copy
            own = whole[: -len(flags)]
            mean = self.accelerator.reduce(whole, reduction="mean")
            *parts, flags = mean.split([p.numel() for p in self.parameters] + [len(flags)])
            for p, part in zip(self.parameters, parts, strict=True):
                p.grad = part.view_as(p)
            wishes = dict(zip(wishes, (flags > 0).tolist(), strict=True))
        self.stopping = next((why for why, wished in wishes.items() if wished), None)
        return own

    def minutes(self) -> float:
        """Since this process began; what the resumed run had taken before is `minutes_before`."""
        return (time.time() - self.started) / 60

    def out_of_time(self) -> bool:
        """Whether the main process has run longer than `max_train_minutes` by far, in spite of the number fitted."""
        limit = self.config.max_train_minutes
        return limit is not None and self.accelerator.is_main_process and self.minutes() > HARD_LIMIT * limit

    @torch.no_grad()
    def restart_average(self) -> None:
        """Begin the moving average of what a new stage trains anew: a stage may have given it other weights."""
        if self.average is not None:
            trained = {id(parameter) for parameter in self.parameters}
            for average, parameter in zip(self.average, self.every_parameter(), strict=True):
                if id(parameter) in trained:
                    average.copy_(parameter)

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """The moving average of the trained weights, with a shorter memory at the start."""
        if self.average is not None and self.config.ema_decay is not None:
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.every_parameter()], 1 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The averaged weights in the student's place, if the run averages them."""
        if self.average is None:
            yield
            return
        parameters = list[Tensor](self.every_parameter())
        trained = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(parameters, trained)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, step: int) -> Path:
        """Write `checkpoint-{step}`, all that the next step depends on; to be called by every process."""
        tensors, plain = optimizer_state(self.optimizer)
        groups = {self.student.folder_name: self.student.trained_state_dict(), "optimizer": tensors}
        if self.background is not None:
            groups["background"] = self.background.state_dict()
        if self.average is not None:
            groups["average"] = {str(i): value for i, value in enumerate(self.average)}
        for process, state in enumerate(gather_object([rng_state()])):
            groups[f"rng-{process}"] = state
        scaler = self.accelerator.scaler
        values = {
            "optimizer": plain,
            "scaler": None if scaler is None else scaler.state_dict(),
            "config": to_dict(self.config),
            "prompts_a_step": self.prompts_a_step,
            "prompts_drawn": self.prompts_drawn(step),  # the position in the corpus
            "skipped_total": self.skipped_total,
            "frames": self.frames,
            "minutes": self.minutes_before + self.minutes(),
            "best_spread": self.watch.best,
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder, step, groups, values, total_limit=self.config.checkpoints_total_limit)
        return self.folder / f"checkpoint-{step}"

    def resume(self) -> int:
        """Continue from the checkpoint the config names; returns the steps done, 0 without one."""
        checkpoint, self.resumed = self.resumed, None
        if checkpoint is None:
            return 0
        tensors, state = checkpoint.tensors, checkpoint.state
        self.student.load_trained_state_dict(tensors[self.student.folder_name])
        self.enter(self.stage_at(max(0, checkpoint.step - 1)))  # whose optimiser was saved
        if self.background is not None:
            if "background" not in tensors:
                raise CheckpointError("the checkpoint holds no background; resume without text_background")
            self.background.load_state_dict(tensors["background"], strict=True)
        load_optimizer_state(self.optimizer, tensors["optimizer"], state["optimizer"])
        if self.average is not None:
            if "average" not in tensors:
                raise CheckpointError("the checkpoint holds no averaged weights; resume without ema_decay")
            self.average = [tensors["average"][str(i)].to(self.device) for i in range(len(self.average))]
        if (scaler := self.accelerator.scaler) is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        if own := tensors.get(f"rng-{self.accelerator.process_index}"):  # none for a process that has joined
            set_rng_state(own)
        self.first, self.first_prompt = checkpoint.step, state["prompts_drawn"]
        self.skipped_total, self.frames = state["skipped_total"], state["frames"]
        self.watch.best, self.minutes_before = state["best_spread"], state["minutes"]
        self.replan(checkpoint.step)
        return checkpoint.step

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """The whole run; returns its folder."""
        check_run(self.config)
        with sole_writer(self.folder) if self.accelerator.is_main_process else nullcontext():
            return self._train()

    def _train(self) -> Path:
        config, main = self.config, self.accelerator.is_main_process
        if main:
            write_environment(self.folder, self.accelerator.num_processes)
            save_config(config, self.folder / "config.yaml")
            print(dump_config(config))
        first = self.resume()
        if main and (later := set_aside_later(self.folder, first)):
            logger.warning("of a course this run has left, renamed: %s", ", ".join(str(place) for place in later))
        if main and first == 0:
            contact_sheet(self.student, self.encoder, config.validation.prompts, config, self.folder / "before.png")
        if main and self.budget is not None and config.prompts.source == "toybox":
            self.student.eval()  # spectral norms, which iterate in training, stay as they are; a step sets its own mode
            self.end_seconds = time_end(self.student, self.encoder, config)
        self.accelerator.init_trackers("prd", config=plain(to_dict(config)))
        with self.stop:
            try:
                done = self.loop(first)
            except OSError as error:  # a full disk
                raise OSError(
                    f"{error}: the run stopped; its checkpoints in {self.folder} are whole: make room, and continue "
                    "with --resume_from_checkpoint latest"
                ) from error
            if done > first and done % config.checkpointing_steps:
                self.save(done)
            stopped = self.stopping not in (None, TIME_IS_UP)
            if stopped and main:
                write_report(self.folder)
                print(f"stopped by {self.stopping} after {done} steps; continue with --resume_from_checkpoint latest")
        if main and not stopped:
            with self.averaged_weights():
                self.finish(done)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.folder

    def loop(self, first: int) -> int:
        """The steps from `first` on, shown, logged and saved; returns how many the run has done."""
        config, main = self.config, self.accelerator.is_main_process
        metrics = open_metrics(self.folder / "metrics.jsonl", first) if main else None
        total = self.plan.max_train_steps
        bar = tqdm(initial=first, total=total, disable=not main, desc="train", mininterval=1.0)
        shown: dict[str, str] = {}
        done = first
        while done < self.plan.max_train_steps:
            step = done
            try:
                values = self.train_step(step)
            except FloatingPointError as error:
                path = self.folder / f"checkpoint-{step}"
                if step % config.checkpointing_steps:
                    self.save(step)  # the weights are those of the last good step
                raise FloatingPointError(f"{error}, and continue with --resume_from_checkpoint {path}") from error
            done = step + 1
            if main and metrics is not None:
                values |= self.look(done)
                shown |= {"s/step": f"{values['seconds']:.2f}", "peak": f"{values['peak_gigabytes']:.1f} GB"}
                if "r_at_1" in values:
                    shown["R@1"] = f"{values['r_at_1']:.2f}"
                self.accelerator.log(values, step=done)
                metrics.write(metrics_line(done, values))
                metrics.flush()
                bar.set_postfix(shown, refresh=False)
            self.fit_steps(done)
            bar.total = self.plan.max_train_steps
            bar.update()
            if done % config.checkpointing_steps == 0:
                self.save(done)
                if main:
                    write_report(self.folder)
            if self.accelerator.num_processes == 1:  # nobody to agree with: a signal of this very moment counts
                self.stopping = self.stopping or self.stop.name
            if self.stopping:
                logger.warning("%s: stopping after %d steps", self.stopping, done)
                if self.stopping == TIME_IS_UP and done < self.plan.max_train_steps:
                    logger.warning(
                        "the run has taken %.3g times its max_train_minutes=%s: the machine became slower, and the "
                        "schedules stop in the middle; resume the run for the remaining %d steps",
                        *(HARD_LIMIT, config.max_train_minutes, self.plan.max_train_steps - done),
                    )
                break
        bar.close()
        return done

    def look(self, done: int) -> dict[str, float]:
        """What the main process measures between steps, each thing every so many."""
        config, values = self.config, {"peak_gigabytes": peak_memory(self.device)}
        every = config.validation.every_steps
        if every and done % every == 0 and config.prompts.source == "toybox" and config.validation.prompts:
            values["r_at_1"] = self.quick_recognition()
        gallery = config.validation.gallery_steps
        if gallery and done % gallery == 0:
            values |= self.gallery(done)
        every = config.validation.spread_steps
        if every and done % every == 0 and len(self.watched) > 1:
            values["prompt_spread"] = self.spread()
            assert self.plan.schedule_steps is not None  # settled when the run began
            if warning := self.watch.check(values["prompt_spread"], done / self.plan.schedule_steps):
                logger.warning("step %d: %s", done, warning)
        return values

    @torch.no_grad()
    def spread(self) -> float:
        """How far the shapes of the watched prompts differ, all from the same noise."""
        generators = [torch.Generator().manual_seed(self.config.seed) for _ in self.watched]
        embeds = self.encoder(self.watched).to(self.device)
        shapes = make_fields(self.student, embeds, generators, self.config.validation.num_inference_steps)
        return prompt_spread(shapes, len(self.watched), self.device)

    def gallery(self, steps: int) -> dict[str, float]:
        """Draw, measure and export the validation prompts as they are after `steps`; returns the means."""
        with self.averaged_weights():
            folder = self.folder / "gallery" / f"step-{steps:06d}"
            means = save_gallery(self.student, self.encoder, self.config, folder)
        write_report(self.folder)
        return {f"gallery/{name}": value for name, value in means.items()}

    def quick_recognition(self) -> float:
        """R@1 of the validation prompts, shown in the progress bar and used for nothing else."""
        with self.averaged_weights():
            scores = measure(
                self.student,
                self.encoder,
                self.config.validation.prompts,
                seed=self.config.seed,
                num_inference_steps=self.config.validation.num_inference_steps,
            )
        return sum(s.recognised for s in scores) / len(scores)

    def finish(self, steps: int) -> None:
        """Save the adapter trained for `steps`, then show and measure what it makes."""
        config, folder = self.config, self.folder
        self.student.save_pretrained(folder / self.student.folder_name)
        contact_sheet(self.student, self.encoder, config.validation.prompts, config, folder / "after.png")
        export_meshes(self.student, self.encoder, config.validation.prompts, config, folder / "meshes")
        if config.prompts.source == "toybox":
            report: dict = {}
            lines = []
            for name, prompts in toybox_splits(config.prompts.held_out, config.validation.stacks).items():
                scores = measure(
                    self.student,
                    self.encoder,
                    prompts,
                    seed=config.seed,
                    num_inference_steps=config.validation.num_inference_steps,
                )
                report[name] = {"summary": summarise(scores), "scores": [s.as_dict() for s in scores]}
                summary = report[name]["summary"]
                lines.append(
                    f"{name:16s} {summary['count']:4d} prompts  R@1 {summary['r_at_1']:.3f}  IoU {summary['iou']:.3f}  "
                    f"colour error {summary['color_error']:.3f}  right topology {summary['right_topology']:.2f}"
                )
            singles = report["single_seen"]["summary"]
            lines.append("IoU by shape      " + "  ".join(f"{k} {v:.2f}" for k, v in singles["iou_by_shape"].items()))
            margins = singles["orientation_margin"].items()
            lines.append("orientation       " + "  ".join(f"{k} {v:+.2f}" for k, v in margins))
            write_whole(folder / "scores.json", json.dumps(report, indent=1) + "\n")
            record = {
                "train_steps": steps,
                "fits": to_dict(config)["fits"],
                "frames_per_prompt": round(self.frames / len(self.corpus.prompts), 1),
                "minutes": round(self.minutes_before + self.minutes(), 1),
                "seed": config.seed,
                "held_out": list(config.prompts.held_out),
                "measured": {name: part["summary"] for name, part in report.items()},
            }
            write_whole(folder / self.student.folder_name / "record.json", json.dumps(record, indent=1) + "\n")
            print("\n".join(lines))
        write_report(folder)
        print(f"run folder: {folder}  ({self.minutes():.1f} minutes)")


def check_captions(prompts: Sequence[str]) -> None:
    """ConfigError for a validation prompt that the toy box cannot measure."""
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as error:
            raise ConfigError(f"validation.prompts: {error}") from None


def trained_parameters(generator: Generator, trained: Sequence[str] | None) -> list[torch.nn.Parameter]:
    """The parameters of the parts named, None: of all; ConfigError for a part that there is not."""
    parts = generator.parts()
    if unknown := sorted(set(trained or ()) - parts.keys()):
        raise ConfigError(f"trained={unknown[0]!r}: is no part of this generator; it has {', '.join(parts)}")
    return [parameter for name, part in parts.items() if trained is None or name in trained for parameter in part]
