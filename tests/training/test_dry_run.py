"""`prd train --dry-run`: what it counts is what the real parts are, what it says is missing is missing."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from prd.cli import main
from prd.rendering.background import TextBackground
from prd.training.estimate import costs, report
from prd.training.estimate.counts import count_step
from prd.training.estimate.report import dry_run, remedy, total_memory
from prd.training.optimizers import build_optimizer
from prd.training.parts import build_parts
from prd.training.precision import dtype_of, teachers_dtype
from prd.training.recipes import load_config
from prd.utils.counting import weight_bytes

RECIPES = ("triplane_turbo_sd21", "triplane_turbo_paper")
SMALL = ("--report_to=null", "--model.rank=4", "--teachers.mvdream.dtype=float16", "--text_background=true")


@pytest.fixture(scope="module")
def toy_counts():
    config = load_config("toybox", SMALL)
    return config, count_step(config)


def test_the_counts_of_a_toy_run_are_those_of_its_parts(toy_counts):
    config, counts = toy_counts
    parts = build_parts(config)
    trained = parts.model.trainable_parameters()
    assert counts.student.trained == sum(p.numel() for p in trained)
    own = [p for module in (parts.model, parts.text_encoder.model) for p in module.parameters()]
    assert counts.student.frozen == sum(p.numel() for p in own) - counts.student.trained
    assert counts.student.weight_bytes + counts.student.text_bytes == pytest.approx(
        weight_bytes(parts.model) + weight_bytes(parts.text_encoder.model), rel=1e-3
    )
    background = TextBackground(parts.text_encoder([""]).shape[-1])
    assert counts.background == sum(p.numel() for p in background.parameters())
    for name, teacher in parts.teachers.items():
        count = counts.teachers[name]
        assert count.parameters == sum(p.numel() for p in teacher.parameters())
        assert count.weight_bytes + count.text_bytes == weight_bytes(teacher)
        assert count.dtype == ("float16" if name == "mvdream" else "float32")
    # of the teachers' text encoders, Stable Diffusion's and MVDream's differ here in precision alone
    shared = {id(teacher.text_encoder): teacher.text_encoder for teacher in parts.teachers.values()}
    networks = sum(weight_bytes(t) - weight_bytes(t.text_encoder) for t in parts.teachers.values())
    assert costs.teacher_bytes(counts, offload=False) == networks + sum(map(weight_bytes, shared.values()))
    optimizer = build_optimizer(config.optimizer, trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(value.numel() for own in optimizer.state.values() for value in own.values() if value.numel() > 1)
    single = sum(p.numel() for p in trained if p.numel() == 1)
    assert state == costs.optimizer_copies(config) * (counts.student.trained - single)


def test_switches_lower_the_memory_until_it_fits(toy_counts):
    config, counts = toy_counts
    whole = total_memory(counts, config)
    found = remedy(counts, config, whole - 1e-4)
    assert found.fits and found.switches and found.gigabytes < whole
    assert found.switches[0].words.split()[0] == "--model.gradient_checkpointing"
    hopeless = remedy(counts, config, 0.1)
    assert not hopeless.fits and "does not fit" in str(hopeless)
    assert {switch.words.split()[0] for switch in hopeless.switches} >= {"--rollout_batch_size", "--train_batch_size"}
    last = hopeless.switches[-1].config
    assert last.train_batch_size == 1 and last.gradient_accumulation_steps == config.train_batch_size
    assert last.teacher_options.offload and last.model.gradient_checkpointing


def test_precision_of_teachers_is_float16_on_cuda_where_the_student_is_bfloat16(monkeypatch):
    config = load_config("toybox", ["--mixed_precision=bf16", "--teachers.mvdream.dtype=float32"])
    for cuda, expected in ((False, torch.bfloat16), (True, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert teachers_dtype(config) == dtype_of(config, config.teachers["richdreamer"]) == expected
        assert dtype_of(config, config.teachers["mvdream"]) == torch.float32
        asked = load_config("toybox", ["--mixed_precision=bf16", "--teacher_options.dtype=bfloat16"])
        assert teachers_dtype(asked) == torch.bfloat16
        assert teachers_dtype(load_config("toybox")) == torch.float32


def test_the_decoder_takes_the_memory_of_one_plane_whatever_the_number_of_prompts(toy_counts):
    config, counts = toy_counts
    model = dataclasses.replace(config.model, gradient_checkpointing=True)
    again = dataclasses.replace(config, model=model)
    one = count_step(again)
    assert one.student.decoder_bytes < 0.4 * (counts.student.decoder_bytes + counts.student.kept_bytes)
    assert one.student.kept_bytes < 0.3 * counts.student.kept_bytes
    large = dataclasses.replace(one.student, decoder_bytes=10**12)  # larger than all else
    sizes = [
        costs.memory(dataclasses.replace(one, student=large), dataclasses.replace(again, train_batch_size=n))
        for n in (1, 4)
    ]
    assert sizes[0]["largest at work"] == sizes[1]["largest at work"] == 1000


def test_what_stays_in_main_memory_is_not_counted(toy_counts):
    config, counts = toy_counts
    texts = dataclasses.replace(config, offload_text_encoders=True)
    before, after = (sum(costs.memory(counts, own).values()) for own in (config, texts))
    shared = {(t.text, t.dtype): t.text_bytes for t in counts.teachers.values()}
    assert before - after == pytest.approx((counts.student.text_bytes + sum(shared.values())) / 1e9, rel=1e-6)
    options = dataclasses.replace(config.teacher_options, offload=True)
    away = costs.memory(counts, dataclasses.replace(texts, teacher_options=options))
    largest = max(t.weight_bytes for t in counts.teachers.values())
    assert next(size for part, size in away.items() if part.startswith("teachers")) == pytest.approx(largest / 1e9)
    embedded = dataclasses.replace(config, prompts=dataclasses.replace(config.prompts, embeddings="e"))
    assert sum(costs.memory(counts, embedded).values()) == pytest.approx(after)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has memory of its own")
def test_what_is_offloaded_is_counted_where_there_is_main_memory_alone(toy_counts, monkeypatch):
    config, counts = toy_counts
    offload = ("--offload_text_encoders=true", "--teacher_options.offload=true")
    monkeypatch.setattr(report, "this_device", lambda: ("memory", total_memory(counts, config) - 1e-6))
    for words in ((), offload):
        told = report._fit_here(counts, load_config("toybox", [*SMALL, *words]))
        assert told.startswith("memory, ") and told.endswith("GB, offloaded parts included: does not fit")
    monkeypatch.setattr(report, "this_device", lambda: ("memory", total_memory(counts, config)))
    assert report._fit_here(counts, load_config("toybox", [*SMALL, *offload])).endswith(
        "GB, offloaded parts included: fits"
    )


def test_a_base_in_half_precision_is_counted(toy_counts):
    config, counts = toy_counts
    half = dataclasses.replace(
        config, mixed_precision="bf16", model=dataclasses.replace(config.model, base_dtype="bfloat16")
    )
    frozen = counts.student.weight_bytes - 4 * counts.student.trained
    assert count_step(half).student.weight_bytes - 4 * counts.student.trained < 0.55 * frozen
    words = [switch.words for switch in costs.switches(dataclasses.replace(config, mixed_precision="bf16"))]
    assert "--model.base_dtype bfloat16" in words and "--offload_text_encoders true" in words


def test_a_checkpoint_is_as_large_as_it_is_said_to_be(toy_counts):
    config, counts = toy_counts
    assert costs.checkpoint_bytes(counts, config) == 4 * counts.trained * 3  # AdamW
    adan = dataclasses.replace(config.optimizer, name="adan", betas=(0.98, 0.92, 0.99))
    averaged = dataclasses.replace(config, optimizer=adan, ema_decay=0.9)
    assert costs.checkpoint_bytes(counts, averaged) == 4 * counts.trained * 6
    assert costs.checkpoints_at_once(dataclasses.replace(config, max_train_steps=120)) == 4  # 50, 100, 120; one more
    assert costs.checkpoints_at_once(dataclasses.replace(config, max_train_steps=10)) == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_full_size_recipe_as_written_is_told_of_without_weights(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = time.process_time()  # of this process: the machine may be busy
    assert main(["train", "--dry-run", "--config", recipe]) == 0
    assert time.process_time() - begun < 60
    text = capsys.readouterr().out
    for said in ("22,684,160", "4 checkpoints of 457 MB", "H100 80 GB", "hours"):
        assert said in text
    missing = text.split("Missing\n")[1]
    for key in ("prompts.source", "teachers.mvdream.path", "teachers.richdreamer.path", "model.base"):
        assert f"- {key}=" in missing
    assert "global_batch_size=16: needs 8 processes" in text
    assert not list(tmp_path.iterdir())


def test_a_run_that_lacks_nothing_says_so(tmp_path):
    config = load_config("toybox", ["--report_to=null", f"--output_dir={tmp_path / 'run'}"])
    assert dry_run(config).endswith("Missing\nnothing") and not list(tmp_path.iterdir())


def test_another_model_is_refused_in_one_sentence(capsys):
    assert main(["train", "--dry-run", "--config", "atom_toybox"]) == 2
    assert "counts triplane_turbo alone" in capsys.readouterr().err


def test_embeddings_are_missed_in_the_precision_of_each_teacher(tmp_path):
    config = load_config("toybox", [f"--prompts.embeddings={tmp_path}", "--report_to=null"])
    assert "holds no embeddings" in dry_run(config).split("Missing")[1]


def test_the_folder_of_a_run_is_told_of(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    config = load_config("toybox", [f"--output_dir={Path(tmp_path)}"])
    assert "holds another run" in dry_run(config).split("Missing")[1]
