"""What is seen of a run while it is loaded, and inside of a step that takes long."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from prd.loading.strict import load_strict
from prd.teachers import StableDiffusionTeacher
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.run import heartbeat
from prd.training.trainer import Trainer
from prd.utils.progress import at, counted, loading, shown_loading

SMALL = (
    *("--num_threads=1", "--train_batch_size=1", "--num_denoising_steps=2", "--report_to=null", "--benchmark=null"),
    *("--renderers.volume.grid_resolution=12", "--renderers.surface.grid_resolution=12", "--max_train_minutes=null"),
    *("--renderers.volume.num_samples=8", "--validation.prompts=[]", "--model.latent_size=4", "--max_train_steps=2"),
)
BAR = re.compile(r"([^:\r\n]+): \|[^|]*\| ([\d.e-]+) of ([\d.e-]+) GB, [\d.]+ s")
PLACE = re.compile(r"(estimates? [^,]+), ([^\]]*?), (\d+) s")


class SlowTeacher(StableDiffusionTeacher):
    """A teacher that takes its time."""

    seconds = 1.0

    def predict_noise(self, *args: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().predict_noise(*args)


def shown(capfd: Any) -> str:
    return capfd.readouterr().err


@pytest.fixture
def run(random_toybox, tmp_path):
    def trained(*words: str, teacher: type[StableDiffusionTeacher] = StableDiffusionTeacher) -> Trainer:
        config = load_config("toybox", [*SMALL, *words, f"--output_dir={tmp_path / 'run'}"])
        slow = teacher.from_pretrained(str(random_toybox / "stable_diffusion"))
        trainer = Trainer(config, build_parts(config, teachers={"stable_diffusion": slow}))
        trainer.train()
        return trainer

    return trained


def test_a_long_step_shows_the_estimate_the_renderer_and_the_teacher(run, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 0.2)
    run("--renderer_schedule=all", "--rollout_batch_size=1", teacher=SlowTeacher)
    found = {(match[1], match[2]) for match in PLACE.finditer(shown(capfd))}
    for estimate in ("estimate 1 of 2", "estimate 2 of 2"):
        for renderer in ("volume", "surface"):
            assert (estimate, f"teacher stable_diffusion, renderer {renderer}") in found
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    at(doing="nothing that anybody follows")
    (entry,) = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert entry["seconds_to_first_step"] > 4 * SlowTeacher.seconds


def test_a_short_step_shows_what_it_did_before(run, capfd, tmp_path):
    run("--rollout_batch_size=2", "--checkpointing_steps=1")
    text = shown(capfd)
    assert not PLACE.search(text) and "s/step=" in text
    run("--rollout_batch_size=2", "--resume_from_checkpoint=checkpoint-1", "--allow_config_change")
    first, second = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert first["seconds_to_first_step"] > 0 and second["seconds_to_first_step"] > 0


@pytest.mark.parametrize(
    ("first", "size", "count", "said"),
    [
        (0, 1, 4, "estimate 1 of 4, estimating"),
        (2, 2, 4, "estimates 3 to 4 of 4, estimating"),
        (3, 2, 4, "estimate 4 of 4, estimating"),
        (0, 1, 1, "estimating"),
        (4, 2, 4, "updating the weights"),
    ],
)
def test_the_place_is_said_in_words(first, size, count, said, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 0.02)
    words: list[str] = []

    class Bar:
        disable, set_postfix_str = False, words.append

    beat = heartbeat.Heartbeat(Bar())
    at(estimate="estimate 9 of 9")
    heartbeat.at_estimate(first, size, count)
    time.sleep(0.3)
    beat.close()
    assert words and words[-1].rpartition(", ")[0] == said


def test_a_bar_that_is_not_shown_has_no_thread():
    class Bar:
        disable = True

    beat = heartbeat.Heartbeat(Bar())
    assert not beat.thread.is_alive()
    beat.close()


def test_each_thing_that_is_loaded_has_one_bar_with_its_name_and_size(random_toybox, capfd, tmp_path):
    config = load_config("toybox", [*SMALL, f"--output_dir={tmp_path / 'run'}"])
    capfd.readouterr()
    Trainer(config)
    last = {match[1]: match for match in BAR.finditer(shown(capfd))}
    things = ["base, U-Net", "base, VAE", "base, text encoder"]
    assert list(last) == things + [f"teacher {name}" for name in ("stable_diffusion", "mvdream", "richdreamer")]
    for name, match in last.items():
        assert match[2] == match[3] and float(match[2]) > 0, name
    stored = sum(path.stat().st_size for path in (random_toybox / "mvdream").rglob("*.safetensors")) / 1e9
    assert float(last["teacher mvdream"][3]) >= 0.95 * stored  # without the files' headers


def test_the_bars_of_libraries_are_silent_meanwhile_and_back_afterwards(capfd):
    before = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    downloads = are_progress_bars_disabled()
    with shown_loading():
        assert not diffusers_logging.is_progress_bar_enabled()
        assert not transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == downloads  # they have names
    assert before == (diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled())
    assert are_progress_bars_disabled() == downloads


def test_nothing_is_shown_where_nobody_asked_and_what_we_do_not_read_is_a_line(capfd):
    tensors = {"a": torch.zeros(250_000), "b": torch.zeros(250_000)}
    with loading("a thing"):
        assert dict(counted(tensors)) == tensors
    with shown_loading(False), loading("of another process"):
        list(counted(tensors))
    assert shown(capfd) == ""
    with shown_loading():
        with loading("of its own class"):
            pass
        with loading("two parts"), loading("one of them"):
            list(counted(tensors))
            list(counted(tensors))
        with pytest.raises(RuntimeError), loading("broken"):
            raise RuntimeError
    text = shown(capfd)
    assert re.search(r"of its own class: \d+\.\d s", text) and "one of them" not in text
    assert ("two parts", "0.004", "0.004") in BAR.findall(text)


def test_a_damaged_part_is_still_refused_in_its_sentence(random_toybox, tmp_path, capfd):
    from diffusers import AutoencoderKL

    from prd.errors import CheckpointError

    folder = tmp_path / "vae"
    folder.mkdir()
    source = random_toybox / "stable_diffusion" / "vae"
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({"odd": torch.tensor([float("nan")])}, folder / "diffusion_pytorch_model.safetensors")
    with shown_loading(), loading("base, VAE"), pytest.raises(CheckpointError, match="odd holds NaN"):
        load_strict(AutoencoderKL, str(tmp_path), "vae", None)
