"""Files of weights as they are met in the wild, over every place that loads some: read alike, or refused alike."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prd.errors import CheckpointError, PrdError
from prd.loading.stable_diffusion import load_base
from prd.loading.strict import load_tokenizer
from prd.pipelines.auto import load_pipeline
from prd.teachers import DeepFloydTeacher, DepthControlTeacher, StableDiffusionTeacher
from prd.teachers.convert import read_checkpoint
from prd.text.loading import load_encoder
from tests.conftest import use_assets
from tests.generators.tiny_single_pass import save_run
from tests.teachers.tiny import save_controlnet, save_deepfloyd, save_teacher

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 1234\n"
)


@dataclass(frozen=True)
class Place:
    """A place that loads weights: the folder of a part in what it is given, and how that part is loaded."""

    kind: str  # of the saved folder
    part: str
    load: Callable[[Path], Any]


def base_text(folder: Path) -> Any:
    encoder = load_base(str(folder)).encoder
    assert encoder is not None
    return encoder.model


PLACES = {
    "base unet": Place("stable_diffusion", "unet", lambda folder: load_base(str(folder)).unet),
    "base text": Place("stable_diffusion", "text_encoder", base_text),
    "teacher unet": Place("stable_diffusion", "unet", lambda f: StableDiffusionTeacher.from_pretrained(str(f)).unet),
    "teacher vae": Place("stable_diffusion", "vae", lambda f: StableDiffusionTeacher.from_pretrained(str(f)).vae),
    "encoder": Place("stable_diffusion", "text_encoder", lambda folder: load_encoder(str(folder)).model),
    "t5": Place("deepfloyd", "text_encoder", lambda f: DeepFloydTeacher.from_pretrained(str(f)).text_encoder),
    "t5 encoder": Place("deepfloyd", "text_encoder", lambda folder: load_encoder(str(folder)).model),
    "controlnet": Place(
        "controlnet",
        "control",
        lambda f: DepthControlTeacher.from_pretrained(str(f / "sd"), controlnet=str(f / "control")).controlnet,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    save_teacher(root / "stable_diffusion", "stable_diffusion")
    save_deepfloyd(root / "deepfloyd")
    shutil.copytree(root / "stable_diffusion", root / "controlnet/sd")
    save_controlnet(root / "controlnet/control", root / "stable_diffusion/unet")
    return root


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param]


@pytest.fixture
def folder(saved: Path, place: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / place.kind, tmp_path / "folder"))


def take(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Remove the one file of weights of a folder; its stem and tensors."""
    (path,) = folder.glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    return path.stem, tensors


def put(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def put_shards(folder: Path, stem: str, index: str | None, tensors: dict[str, Tensor], **options: torch.dtype) -> None:
    """Two shards `stem-0000N-of-00002`, and their index."""
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map: dict[str, str] = {}
    for i, half in enumerate(halves, start=1):
        name = f"{stem}-{i:05d}-of-00002.safetensors"
        put(folder / name, {key: tensors[key] for key in half}, **options)
        weight_map |= dict.fromkeys(half, name)
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def fp16(folder: Path) -> None:
    stem, tensors = take(folder)
    put(folder / f"{stem}.fp16.safetensors", tensors, torch.float16)


def bf16(folder: Path) -> None:
    stem, tensors = take(folder)
    put(folder / f"{stem}.bf16.safetensors", tensors, torch.bfloat16)


def fp16_beside_a_pointer(folder: Path) -> None:
    stem, tensors = take(folder)
    put(folder / f"{stem}.fp16.safetensors", tensors, torch.float16)
    (folder / f"{stem}.safetensors").write_text(POINTER, encoding="utf-8")


def sharded(folder: Path) -> None:
    stem, tensors = take(folder)
    put_shards(folder, stem, f"{stem}.safetensors.index.json", tensors)


def sharded_fp16(folder: Path) -> None:
    stem, tensors = take(folder)
    put_shards(folder, f"{stem}.fp16", f"{stem}.safetensors.index.fp16.json", tensors, dtype=torch.float16)


def sharded_without_index(folder: Path) -> None:
    stem, tensors = take(folder)
    put_shards(folder, stem, None, tensors)


def in_capitals(folder: Path) -> None:
    stem, tensors = take(folder)
    put(folder / f"{stem}.SAFETENSORS", tensors)


def hidden(folder: Path) -> None:
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\0\5\26\7 Mac OS X")


READ = [fp16, bf16, fp16_beside_a_pointer, sharded, sharded_fp16, sharded_without_index, in_capitals, hidden]


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_it_is_read(kind: Callable[[Path], None], place: Place, folder: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in place.load(folder).state_dict().items()}
    kind(folder / place.part)
    found = place.load(folder).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        half = "16" in kind.__name__ and tensor.is_floating_point()
        torch.testing.assert_close(found[name], tensor, rtol=1e-2 if half else 0, atol=1e-2 if half else 0)


def pointer(folder: Path) -> None:
    stem, _ = take(folder)
    (folder / f"{stem}.safetensors").write_text(POINTER, encoding="utf-8")


def pointers_to_shards(folder: Path) -> None:
    sharded(folder)
    for path in folder.glob("*.safetensors"):
        path.write_text(POINTER, encoding="utf-8")


def pickled(folder: Path) -> None:
    _, tensors = take(folder)
    torch.save(tensors, folder / "pytorch_model.bin")


def pointer_for_the_config(folder: Path) -> None:
    (folder / "config.json").write_text(POINTER, encoding="utf-8")


def no_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")


def absent(folder: Path) -> None:
    take(folder)


def missing_shard(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("*-00002-of-00002*")).unlink()


def missing_shard_without_index(folder: Path) -> None:
    sharded_without_index(folder)
    next(folder.glob("*-00001-of-00002*")).unlink()


def truncated(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(b"")


def not_a_number(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path)


def index_of_elsewhere(folder: Path) -> None:
    sharded(folder)
    (path,) = folder.glob("*.index.json")
    index = path.read_text(encoding="utf-8").replace('"weight_map": {', '"weight_map": {"x": "../model.safetensors", ')
    path.write_text(index, encoding="utf-8")


REFUSED: dict[Callable[[Path], None], str] = {
    pointer: "Git LFS pointer .*git lfs pull",
    pointers_to_shards: "Git LFS pointer .*git lfs pull",
    pickled: "pytorch_model.bin: pickled weights are never loaded.*convert",
    pointer_for_the_config: "config.json: is a Git LFS pointer",
    no_config: "config.json.* can't decode byte 0xff .*download it again",
    absent: "has no weights",
    missing_shard: "lacks 1 of the 2 files of its weights, .*-00002-of-00002.safetensors",
    missing_shard_without_index: "lacks 1 of the 2 files of its weights, .*-00001-of-00002.safetensors",
    truncated: "is not a whole safetensors file .*download it again",
    empty: "is not a whole safetensors file .*download it again",
    not_a_number: "holds NaN or infinity",
    index_of_elsewhere: "must list files beside it",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_it_is_refused_in_one_sentence(
    kind: Callable[[Path], None], place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind(folder / place.part)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(PrdError, match=REFUSED[kind]) as caught:
        place.load(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_was_not_fetched_is_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "stable_diffusion", tmp_path / "folder"))
    (folder / "tokenizer/vocab.json").write_text(POINTER, encoding="utf-8")
    for load in (load_base, load_encoder, StableDiffusionTeacher.from_pretrained):
        with pytest.raises(PrdError, match=r"vocab.json: is a Git LFS pointer"):
            load(str(folder))
    with pytest.raises(FileNotFoundError, match="owner/absent: is no folder here, and the Hub did not give it"):
        load_tokenizer(StableDiffusionTeacher.tokenizer_class, "owner/absent", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="absent/tokenizer: no such folder"):
        load_tokenizer(StableDiffusionTeacher.tokenizer_class, str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["owner/absent", "a b/c", "./absent", "absent/", "-a/b", "x" * 300, 5, None])
def test_a_text_encoder_that_is_not_there_is_named(name: Any) -> None:
    with pytest.raises((PrdError, TypeError), match=re.escape(str(name)[:80])) as caught:
        load_encoder(name, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_files_of_the_authors_layers_are_found_alike(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "stable_diffusion", tmp_path / "folder"))
    whole = read_checkpoint(folder)
    sharded(folder / "unet")
    hidden(folder / "unet")
    assert read_checkpoint(folder).keys() == whole.keys()
    pointer_file = tmp_path / "model.ckpt"
    pointer_file.write_text(POINTER, encoding="utf-8")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_checkpoint(pointer_file)


@pytest.mark.parametrize("saved_as", ["adapter", "atom"])
@pytest.mark.parametrize(
    "kind, message",
    [
        (pointer, "Git LFS pointer .*git lfs pull"),
        (truncated, "is not a whole safetensors file"),
        (pickled, "pickled weights are never loaded"),
        (fp16, "fp16.safetensors is there instead"),
        (sharded, "is there instead"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_saved_models_are_the_files_that_were_saved(
    saved_as: str, kind: Callable[[Path], None], message: str, random_toybox: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, random_toybox)
        source = random_toybox / "adapter" if saved_as == "adapter" else save_run("atom", tmp_path / "run")
        folder = Path(shutil.copytree(source, tmp_path / "saved"))
        heads = folder / "heads.safetensors"
        if saved_as == "adapter":
            heads.rename(tmp_path / heads.name)
        else:
            folder = folder if (folder / "config.json").is_file() else folder / "generator"
        hidden(folder)
        for path in folder.glob("._*.safetensors"):
            path.unlink()
        kind(folder)
        if saved_as == "adapter":
            (tmp_path / heads.name).rename(heads)
        with pytest.raises((PrdError, FileNotFoundError), match=message) as caught:
            load_pipeline(str(folder))
        assert "\n" not in str(caught.value)
