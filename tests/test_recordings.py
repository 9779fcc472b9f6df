"""The compact form of recordings gives back what went in, and a damaged file is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.compact import as_draws, compact, packed
from tests.fixtures.draws import normals, stream
from tests.recordings import OWN, original_layout, restored, unpack


def test_streams_are_those_of_torch() -> None:
    torch.manual_seed(7)
    assert torch.rand(100).tolist() == stream(7)[:100].tolist()
    torch.manual_seed(7)
    assert abs(torch.randn(100).double().numpy() - normals(7, 0, 100)).max() < 2e-6


def test_random_weights_are_stored_as_draws_without_loss(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.GroupNorm(4, 20))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    draws = as_draws(tensors, list(tensors), 4, (3,))
    assert draws.keys() == tensors.keys()
    (tmp_path / "weights.xz").write_bytes(packed(tensors, draws))
    found = restored(tmp_path / "weights.xz")
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in tensors.items()}


def test_a_folder_comes_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder, out, back = tmp_path / "folder", tmp_path / "out", tmp_path / "back"
    (folder / "room").mkdir(parents=True)
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2])}
    save_file(tensors, folder / "room" / "io.safetensors")
    torch.save({"epoch": 3, "state_dict": tensors}, folder / "room" / "model.pth")
    (folder / "room" / "meta.json").write_text("{}", encoding="utf-8")
    compact(folder, out)
    assert len(list(out.rglob("*.xz"))) == 1  # the same tensors are stored once
    unpack(out, back)
    assert load_file(back / "room" / "io.safetensors").keys() == tensors.keys()
    checkpoint = torch.load(back / "room" / "model.pth", weights_only=True)
    assert checkpoint["epoch"] == 3 and list(checkpoint["state_dict"]) == ["b", "a"]
    index = json.loads((out / "compact.json").read_text(encoding="utf-8"))
    index["room/model.pth"]["sha256"] = index["room/io.safetensors"]["sha256"] = "0"
    (out / "compact.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="io.safetensors.xz: does not give the recorded tensors"):
        unpack(out, tmp_path / "bad")


def test_the_original_layout_is_read_in_place(tmp_path: Path) -> None:
    with original_layout(tmp_path) as folder:
        assert folder == tmp_path


def test_the_repositorys_set_is_small() -> None:
    assert 0 < sum(path.stat().st_size for path in OWN.rglob("*") if path.is_file()) < 8_000_000
