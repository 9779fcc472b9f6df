"""Checkpoints: whole or absent, and a resumed run is the uninterrupted one."""

import json
import random
import warnings

import numpy as np
import pytest
import torch

from prd.training.run import checkpoints
from prd.training.run.checkpoints import (
    CheckpointError,
    archive_newer_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
    verify_checkpoint,
)

TENSORS = {"adapter": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}}


def test_round_trip(tmp_path):
    shared = torch.arange(8.0)
    groups = {**TENSORS, "ema": {"whole": shared, "view": shared[::2]}}
    folder = save_checkpoint(tmp_path, 7, groups, {"epoch": 1, "lr": 0.1})
    assert folder.name == "checkpoint-7"
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.step, checkpoint.state) == (7, {"epoch": 1, "lr": 0.1})
    for group, tensors in groups.items():
        for name, value in tensors.items():
            torch.testing.assert_close(checkpoint.tensors[group][name], value, rtol=0, atol=0)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_the_limit_keeps_the_newest_by_number(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, TENSORS, {}, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_a_step_saved_twice_holds_the_second(tmp_path):
    save_checkpoint(tmp_path, 3, TENSORS, {"run": 1})
    save_checkpoint(tmp_path, 3, TENSORS, {"run": 2})
    assert load_checkpoint(tmp_path / "checkpoint-3").state == {"run": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def _truncate(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _flip(folder):
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _spoil_manifest(folder):
    (folder / "manifest.json").write_text('{"step": 9, "fil', encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip,
        _spoil_manifest,
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "extra.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage, tmp_path):
    save_checkpoint(tmp_path, 8, TENSORS, {})
    damage(save_checkpoint(tmp_path, 9, TENSORS, {}))
    with pytest.raises(CheckpointError, match="checkpoint-9"):
        load_checkpoint(tmp_path / "checkpoint-9")
    with pytest.warns(UserWarning, match="checkpoint-9"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    _flip(save_checkpoint(tmp_path, 9, TENSORS, {}))
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        latest_checkpoint(tmp_path)


def test_later_checkpoints_are_set_aside_and_none_is_lost(tmp_path):
    for note in ("first", "second"):
        for step in (2, 4, 10):
            save_checkpoint(tmp_path, step, TENSORS, {"note": note})
        archive_newer_checkpoints(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    for place, note in (("4", "first"), ("10", "first"), ("4.2", "second"), ("10.2", "second")):
        assert load_checkpoint(tmp_path / f"abandoned-checkpoint-{place}").state["note"] == note
    assert archive_newer_checkpoints(tmp_path, 2) == [] == archive_newer_checkpoints(tmp_path / "absent", 0)


def test_none_yet(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="manifest.json"):
        verify_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("moment", ["save_file", "_digest", "flush"])
def test_a_run_killed_while_writing_keeps_the_last_whole_one(moment, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 8, TENSORS, {}, total_limit=1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 9, TENSORS, {}, total_limit=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    save_checkpoint(tmp_path, 9, TENSORS, {}, total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


def _network(seed):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    return network, torch.optim.AdamW(network.parameters(), lr=0.1, betas=(0.9, 0.99))


def _train(network, optimizer, steps):
    losses = []
    for _ in range(steps):
        x = torch.randn(5, 4) + random.random() + float(np.random.standard_normal())
        loss = network(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_resumed_is_uninterrupted(tmp_path):
    random.seed(0)
    np.random.seed(0)
    network, optimizer = _network(0)
    _train(network, optimizer, 3)
    random.gauss(0, 1)  # leaves a second value cached in the generator's state
    tensors, plain = optimizer_state(optimizer)
    groups = {"model": network.state_dict(), "optimizer": tensors, "rng": rng_state()}
    save_checkpoint(tmp_path, 3, groups, {"optimizer": plain})
    expected = [*_train(network, optimizer, 4), random.gauss(0, 1)]

    other, other_optimizer = _network(1)
    checkpoint = load_checkpoint(tmp_path / "checkpoint-3")
    other.load_state_dict(checkpoint.tensors["model"])
    load_optimizer_state(other_optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    set_rng_state(checkpoint.tensors["rng"])
    assert [*_train(other, other_optimizer, 4), random.gauss(0, 1)] == expected


def test_the_optimizer_of_another_model_is_refused():
    network, optimizer = _network(0)
    _train(network, optimizer, 1)
    tensors, plain = optimizer_state(optimizer)
    with pytest.raises(CheckpointError, match="parameters a group"):
        load_optimizer_state(torch.optim.AdamW(torch.nn.Linear(4, 8).parameters()), tensors, plain)
    wide = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Linear(9, 1))
    with pytest.raises(CheckpointError, match="shape"):
        load_optimizer_state(torch.optim.AdamW(wide.parameters()), tensors, plain)


def test_the_state_is_json(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_checkpoint(tmp_path, 1, TENSORS, {"betas": (0.9, 0.99)})
    assert json.loads((folder / "state.json").read_text(encoding="utf-8")) == {"betas": [0.9, 0.99]}
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, TENSORS, {"object": object()})
    assert latest_checkpoint(tmp_path) == folder
