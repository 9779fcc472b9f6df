"""A training step end to end on random models: every signal arrives, nothing frozen moves, draws repeat."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, UNet2DConditionModel

from prd.data.prompts import held_out_prompts
from prd.errors import ConfigError
from prd.teachers import DepthControlTeacher
from prd.training import objective
from prd.training import trainer as trainer_module
from prd.training.gradients import MOST_SKIPPED
from prd.training.objective import CollapseError
from prd.training.recipes import load_config
from prd.training.run.checkpoints import CheckpointError
from prd.training.trainer import Trainer
from tests.teachers.tiny import save_deepfloyd

SMALL = [
    *("--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "2", "--optimizer.warmup_steps", "1"),
    *(
        "--renderers.volume.grid_resolution",
        "16",
        "--renderers.surface.grid_resolution",
        "16",
        "--renderers.volume.num_samples",
        "16",
    ),
]
TRAINED = ("lora_A", "lora_B", "modules_to_save", "heads.")  # in the name of each tensor that may move
TEACHERS = ("stable_diffusion", "mvdream", "richdreamer")


def make(*overrides: str) -> Trainer:
    return Trainer(load_config("toybox", [*SMALL, *overrides]))


def group_of(name: str) -> str:
    """The adapter group of a trained parameter."""
    if name.startswith("heads."):
        return ".".join(name.split(".")[:2])  # sdf, deformation, rgb
    if "decoder.conv_out.modules_to_save" in name:
        return "conv_out"
    assert "lora_" in name, name
    if "decoder." in name:
        return "decoder A" if "lora_A" in name else "decoder B"
    kind = "self-attention" if ".attn1." in name else "cross-attention" if ".attn2." in name else "convolutions"
    return kind + (" A" if "lora_A" in name else " B")


def gradients(trainer: Trainer) -> dict[str, float]:
    """The largest gradient of each group."""
    found: dict[str, float] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
            found[group_of(name)] = max(found.get(group_of(name), 0.0), size)
    return found


def frozen_hash(trainer: Trainer) -> str:
    """Return a hash of every weight that must not move: base, text encoder, teachers."""
    digest = hashlib.sha256()
    modules = [
        trainer.model,
        trainer.parts.text_encoder.model,
        *(teacher for teacher in trainer.parts.teachers.values()),
    ]
    for module in modules:
        for name, tensor in module.state_dict().items():
            if not any(part in name for part in TRAINED):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_every_teacher_renderer_and_adapter_group_has_a_gradient_and_nothing_frozen_moves(toybox, monkeypatch):
    trainer = make("--renderer_schedule", "all")
    reached: dict[str, float] = {}
    judge = objective.multi_teacher_loss

    def watched(views, *words, renderer, **options):
        def keep(gradient):
            reached[renderer] = max(reached.get(renderer, 0.0), float(gradient.abs().max()))

        views.rgb.register_hook(keep)
        return judge(views, *words, renderer=renderer, **options)

    monkeypatch.setattr(objective, "multi_teacher_loss", watched)
    before = frozen_hash(trainer)
    start = [p.detach().clone() for p in trainer.parameters]
    first = trainer.train_step(0)
    at_first = gradients(trainer)
    trainer.train_step(1)
    later = gradients(trainer)
    for renderer in ("volume", "surface"):
        assert reached[renderer] > 0
        for teacher in TEACHERS:
            assert first[f"gradient_norm/{teacher}/{renderer}"] > 0
            assert first[f"weight/{teacher}/{renderer}"] > 0
    adapters = ("self-attention", "cross-attention", "convolutions", "decoder")
    groups = {f"{kind} {side}" for kind in adapters for side in "AB"}
    groups |= {"conv_out", "heads.sdf", "heads.deformation", "heads.rgb"}
    assert set(later) == groups
    assert not [g for g in groups if later[g] == 0]
    assert not [
        g for g in groups if not g.endswith(" A") and at_first[g] == 0
    ]  # B is zero at first, hence A's gradient
    assert frozen_hash(trainer) == before
    moved = [not torch.equal(a, b) for a, b in zip(start, trainer.parameters, strict=True)]
    assert all(moved)
    assert first["gradient_norm"] > 0 and first["skipped"] == 0


def losses(trainer: Trainer, steps: int = 2) -> list[dict[str, float]]:
    rows = [trainer.train_step(step) for step in range(steps)]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_parameter_no_renderer_reached_is_updated_by_zero_as_among_several_processes(toybox):
    """Weight decay and moments move it then; several processes cannot tell what none of them reached."""
    trainer = make("--renderer_schedule", "[volume]", "--optimizer.weight_decay", "0.5")
    unreached = [p for n, p in trainer.model.named_parameters() if n.startswith("heads.deformation.")]
    start = [p.detach().clone() for p in unreached]
    trainer.train_step(0)
    assert unreached and all(p.grad is not None and not p.grad.any() for p in unreached)
    assert any(not torch.equal(p, s) for p, s in zip(unreached, start, strict=True))


def test_the_same_seed_repeats_and_the_renderers_alternate(toybox):
    one, two = (losses(make("--renderer_schedule", "alternate", "--seed", "7")) for _ in range(2))
    assert one == two
    (other,) = losses(make("--renderer_schedule", "alternate", "--seed", "8"), steps=1)
    assert other != one[0]
    for step in one:  # K = 2: each renderer has its turn
        assert all(f"gradient_norm/mvdream/{renderer}" in step for renderer in ("volume", "surface"))
    turns = [
        make("--renderer_schedule", "alternate").objective.renderers_of(step, k) for step, k in ((0, 0), (0, 1), (1, 0))
    ]
    assert turns == [("volume",), ("surface",), ("surface",)]


def test_a_vanished_object_stops_the_run(toybox, monkeypatch):
    trainer = make("--renderer_schedule", "[volume]")
    decode = trainer.model.decode

    def vanished(latents):
        field = decode(latents)
        field.bias_radius = -5.0
        return field

    monkeypatch.setattr(trainer.model, "decode", vanished)
    with pytest.raises(CollapseError, match="the object has vanished; lower optimizer.lr"):
        trainer.train_step(0)


def test_a_teacher_that_predicts_nan_is_named_and_the_step_is_skipped(toybox, monkeypatch, caplog, tmp_path):
    trainer = make("--renderer_schedule", "[volume]", "--output_dir", str(tmp_path), "--rollout_batch_size", "1")
    teacher = next(t for t in trainer.parts.teachers.values() if t.name == "richdreamer")
    monkeypatch.setattr(teacher, "predict_noise", lambda x, t, condition: torch.full_like(x, float("nan")))
    start = [p.detach().clone() for p in trainer.parameters]
    with caplog.at_level(logging.WARNING):
        row = trainer.train_step(0)
    assert row["skipped"] == row["skipped_total"] == 1
    assert re.search(
        r"step 0: teacher=richdreamer: non-finite noise prediction for prompts \[0\] \('a .*'\)", caplog.text
    )
    (line,) = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    suspect = json.loads(line)
    assert suspect["step"] == suspect["k"] == suspect["process"] == 0 and suspect["prompts"][0] in caplog.text
    cameras = suspect["cameras"][0]
    assert [c["distance"] for c in cameras] == pytest.approx([2.4] * 4, abs=0.01)
    assert (cameras[1]["azimuth"] - cameras[0]["azimuth"]) % 360 == pytest.approx(90, abs=0.01)
    assert f"azimuth {cameras[0]['azimuth']:.1f}" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.parameters, strict=True))
    with pytest.raises(FloatingPointError, match="in a row"):
        for step in range(1, 30):
            trainer.train_step(step)


def test_too_many_steps_without_a_gradient_end_the_run_with_the_way_to_resume(toybox, monkeypatch, tmp_path):
    words = [
        "--validation.prompts",
        "[]",
        "--prompts.held_out",
        "[]",
        "--report_to",
        "null",
        "--renderer_schedule",
        "[volume]",
    ]
    trainer = make("--output_dir", str(tmp_path), "--max_train_steps", "30", *words)
    plain, steps = trainer.accumulate, []

    def spoiled(step, *rest):
        plain(step, *rest)
        steps.append(step)
        if step:
            trainer.parameters[0].grad.fill_(float("inf"))

    monkeypatch.setattr(trainer, "accumulate", spoiled)
    limit = MOST_SKIPPED
    way = rf"step {limit}: {limit} steps in a row .*--allow_config_change.* --resume_from.*checkpoint-{limit}$"
    with pytest.raises(FloatingPointError, match=way):
        trainer.train()
    assert steps == list(range(limit + 1))
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, limit + 1) for _ in range(2)]  # K = 2 each
    assert load_config(tmp_path / "config.yaml").num_threads == 1
    again = make("--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest", *words)
    assert again.resume() == limit and again.skipped.in_a_row == 0 and again.skipped.total == limit
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, again.parameters, strict=True))


def test_a_loss_scale_changes_no_update_and_leaves_overflow_out(toybox, monkeypatch, tmp_path):
    plain = make("--output_dir", str(tmp_path), "--renderer_schedule", "[volume]")
    scaled = make("--output_dir", str(tmp_path), "--renderer_schedule", "[volume]")
    accelerator = scaled.accelerator  # as on a GPU in fp16, with the arithmetic of float32
    accelerator.scaler = scaled.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
    scaled.optimizer.__setstate__({})  # what preparing it with a scaler sets
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    monkeypatch.setattr(accelerator, "autocast", nullcontext)
    monkeypatch.setattr(accelerator, "native_amp", True)
    first, second = plain.train_step(0), scaled.train_step(0)
    assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)
    for a, b in zip(plain.parameters, scaled.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    accumulate, before = scaled.accumulate, [p.detach().clone() for p in scaled.parameters]

    def overflowing(*words):
        accumulate(*words)
        scaled.parameters[0].grad.fill_(float("inf"))

    monkeypatch.setattr(scaled, "accumulate", overflowing)
    for step in range(1, 11):
        scaled.train_step(step)
    assert scaled.skipped.in_a_row == MOST_SKIPPED and accelerator.scaler.get_scale() == 2
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters, strict=True))
    with pytest.raises(FloatingPointError, match="11 steps in a row"):
        scaled.train_step(11)


@pytest.fixture
def any_precision():
    """Accelerate settles the precision of a process once; here it is forgotten before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_runs_and_stays_near_float32(toybox, any_precision):
    half = make("--mixed_precision", "bf16", "--renderer_schedule", "all")
    rows = [half.train_step(0)]
    any_precision(True)
    rows.append(make("--mixed_precision", "no", "--renderer_schedule", "all").train_step(0))
    assert rows[0]["skipped"] == 0 and rows[0] != rows[1]
    assert rows[0]["gradient_norm"] == pytest.approx(rows[1]["gradient_norm"], rel=0.5)
    assert {p.dtype for p in half.parameters} == {torch.float32}


def test_fp16_is_refused_without_a_gpu_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer_module, "build_parts", None)
    with pytest.raises(ConfigError, match="mixed_precision='fp16': needs a CUDA device; use bf16 or no"):
        make("--mixed_precision", "fp16")


def test_gradient_checkpointing_changes_no_number(toybox):
    (again,), (once,) = (losses(make("--model.gradient_checkpointing", on), steps=1) for on in ("true", "false"))
    # Planes are decoded one by one, which rounds otherwise; cosines are of numbers up to 1, however near 0 they are.
    cosines = {name for name in once if name.startswith("cosine/")}
    assert {n: again[n] for n in cosines} == pytest.approx({n: once[n] for n in cosines}, abs=1e-4, nan_ok=True)
    assert again.keys() == once.keys()
    rest = once.keys() - cosines
    assert {n: again[n] for n in rest} == pytest.approx({n: once[n] for n in rest}, rel=1e-4, abs=1e-6, nan_ok=True)


def test_a_student_that_stops_depending_on_the_prompt_is_warned_of(toybox, monkeypatch, caplog):
    trainer = make("--validation.spread_steps", "2", "--schedule_steps", "4", "--validation.prompts", "[]")
    held_out = held_out_prompts(trainer.config.prompts)
    assert len(trainer.validation.watched) == 4 and set(trainer.validation.watched) <= set(held_out)
    assert trainer.validation.spread() == trainer.validation.spread() > 0
    spreads = iter([0.05, 0.04, 0.001])
    monkeypatch.setattr(trainer.validation, "spread", lambda: next(spreads))
    with caplog.at_level(logging.WARNING):
        look = partial(trainer.validation.validate_periodically, schedule_steps=4)
        assert "prompt_spread" not in look(1)
        assert look(2)["prompt_spread"] == 0.05 and look(4)["prompt_spread"] == 0.04
        assert "depending" not in caplog.text
        look(6)
    assert "step 6: the shapes of different prompts differ by 0.001" in caplog.text


def test_a_disabled_teacher_is_not_asked(toybox):
    trainer = make("--renderer_schedule", "[surface]", "--teachers.mvdream.enabled", "false")
    row = trainer.train_step(0)
    assert not [name for name in row if "mvdream" in name]
    assert row["gradient_norm/richdreamer/surface"] > 0


@pytest.mark.parametrize(("average", "background"), [("null", "false"), ("0.9", "true")])
def test_a_resumed_run_equals_an_uninterrupted_one(toybox, tmp_path, average, background):
    options = ["--schedule_steps", "3", "--ema_decay", average, "--checkpointing_steps", "2"]
    options += ["--text_background", background]
    whole = make(*options, "--output_dir", str(tmp_path / "whole"))
    start = [parameter.detach().clone() for parameter in whole.parameters]
    for step in range(3):
        whole.train_step(step)

    first = make(*options, "--output_dir", str(tmp_path / "parts"))
    for step in range(2):
        first.train_step(step)
    first.save(2)
    second = make(*options, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "latest")
    assert second.resume() == 2
    second.train_step(2)

    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)
    if background == "true":  # the last ones, trained along
        count = len(list(whole.background.parameters()))
        assert count and all(
            not torch.equal(a, b) for a, b in zip(start[-count:], whole.parameters[-count:], strict=True)
        )
    if average != "null":
        assert all(torch.equal(a, b) for a, b in zip(whole.average.tensors, second.average.tensors, strict=True))


def test_nothing_to_resume_from_is_said(toybox, tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        make("--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest").resume()


def test_settings_that_would_do_nothing_are_refused(toybox):
    with pytest.raises(ConfigError, match="eta"):
        load_config("toybox", ["--teachers.richdreamer.eta", "0.1"])
    with pytest.raises(ConfigError, match="cameras.views=3"):
        make("--cameras.views", "3")


def test_validation_prompts_are_checked_before_training(toybox):
    with pytest.raises(ConfigError, match="validation.prompts.*pink"):
        make("--validation.prompts", "[a pink cube]")


def test_how_the_teachers_are_kept_changes_no_number_and_grad_clip_does(toybox):
    plain = losses(make(), steps=1)
    kept = ["--teacher_options.checkpoint_vae", "true", "--teacher_options.offload", "true"]
    offloaded = make(*kept)
    assert all(teacher.offload for teacher in offloaded.parts.teachers.values())
    assert losses(offloaded, steps=1) == plain
    assert losses(make("--distillation.grad_clip", "0.001"), steps=1) != plain
    half = make("--teacher_options.dtype", "bfloat16")
    assert {teacher.unet.dtype for teacher in half.parts.teachers.values()} == {torch.bfloat16}
    assert losses(half, steps=1)[0]["skipped"] == 0


def test_stable_diffusion_with_depth_control_and_sides(toybox, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(toybox / "stable_diffusion" / "unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8)).save_pretrained(tmp_path)
    words = ["--teachers.stable_diffusion.controlnet", str(tmp_path)]
    trainer = make(
        *words, "--teachers.stable_diffusion.view_dependent_prompts", "true", "--renderer_schedule", "[volume]"
    )
    teacher = trainer.parts.teachers["stable_diffusion"]
    assert isinstance(teacher, DepthControlTeacher) and teacher.view_dependent
    row = trainer.train_step(0)
    assert row["skipped"] == 0 and row["gradient_norm/stable_diffusion/volume"] > 0
    assert [text for text in teacher.prompt_encoder.encoded if text.endswith(" view")]


def test_deepfloyd_among_the_teachers(toybox, tmp_path):
    words = ["--teachers.deepfloyd.enabled", "true", "--teachers.deepfloyd.path", str(save_deepfloyd(tmp_path))]
    row = make(*words, "--renderer_schedule", "[volume]").train_step(0)
    assert row["gradient_norm/deepfloyd/volume"] > 0
    assert -1 <= row["cosine/stable_diffusion-deepfloyd/volume"] <= 1


def test_the_published_input_convention_reaches_the_normal_teacher(toybox):
    trainer = make("--teachers.richdreamer.input_convention", "triplane_turbo")
    (normal,) = [teacher for teacher in trainer.parts.teachers.values() if teacher.name == "richdreamer"]
    assert normal.config.image_range == (0.0, 1.0) and normal.config.resize == "area"
