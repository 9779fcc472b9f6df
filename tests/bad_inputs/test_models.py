"""Models that are not what their key names are refused by that key in one sentence, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prd.cli import main
from prd.errors import PrdError
from prd.loading.latent_diffusion import UNET, VAE
from prd.training.recipes import load_config
from prd.training.run.folder import check_run, run_faults

SECONDS = 2.0
AUTHORS = {"_class_name": "MultiViewUNetModel", "in_channels": 4}
TEACHERS = ("stable_diffusion", "mvdream", "richdreamer")


class Case(NamedTuple):
    """A scene made in a folder that holds the toy box's models, the words of a run in it, and what is said of it."""

    name: str
    make: Callable[[Path], object]
    words: tuple[str, ...]
    said: tuple[str, ...]


def write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def changed(path: Path, **values: object) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


def raw(path: Path) -> None:
    """A file of weights as authors publish it, which is never read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no weights")


def single_file(path: Path, width: int, *others: str) -> None:
    """A single file's header: a U-Net and a VAE of a text width."""
    shapes = {
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, width),
        f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
        f"{VAE}decoder.conv_in.weight": (8, 4, 3, 3),
        **dict.fromkeys(others, (1,)),
    }
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)


def embeddings(folder: Path, *made: tuple[str, int, str]) -> None:
    """Manifests of finished embeddings: names, widths and precisions of their encoders."""
    for number, (name, width, dtype) in enumerate(made):
        own = {"encoder": str(number), "name": name, "dtype": dtype, "shape": [8, width]}
        write(folder / str(number) / "manifest.json", {**own, "texts": 0, "shard_rows": 1})
        np.save(folder / str(number) / "index.npy", np.zeros((3, 0), dtype=np.uint64))


def adapter(path: Path, pixels: int) -> None:
    """The first layer of an MV-Adapter's encoder of camera maps, which gathers so many pixels each way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"adapter.conv_in.weight": torch.zeros(8, 6 * pixels**2, 3, 3)}, path)


def adapted(name: str, file: str) -> str:
    return f"--teachers.{name}={{path: stable_diffusion, adapter: {file}}}"


MV, RD, SD = "--teachers.mvdream.path=", "--teachers.richdreamer.path=", "--teachers.stable_diffusion.path="
CASES = [
    Case("a teacher's own file", lambda f: raw(f / "mv.pt"), (f"{MV}mv.pt",), (
        "teachers.mvdream.path='mv.pt'", "is a file, not a folder", "prd.teachers.convert mvdream")),
    Case("a folder of the teacher's file", lambda f: raw(f / "mv/sd-v2.1-base-4view.pt"), (f"{MV}mv",), (
        "teachers.mvdream.path='mv'", "sd-v2.1-base-4view.pt and no unet", "prd.teachers.convert mvdream")),
    Case("an empty folder", lambda f: (f / "rd").mkdir(), (f"{RD}rd",), (
        "teachers.richdreamer.path='rd'", "no unet/config.json", "prd.teachers.convert richdreamer")),
    Case("the authors' layers", lambda f: write(f / "mv/unet/config.json", AUTHORS), (f"{MV}mv",), (
        "teachers.mvdream.path='mv'", "MultiViewUNetModel", "prd.teachers.convert mvdream")),
    Case("no settings", lambda f: (f / "mvdream/teacher_config.json").unlink(), (f"{MV}mvdream",), (
        "teachers.mvdream.path='mvdream'", "no teacher_config.json", "prd.teachers.convert mvdream")),
    Case("no settings of the other", lambda f: (f / "richdreamer/teacher_config.json").unlink(),
         (f"{RD}richdreamer",), (
        "richdreamer.path='richdreamer'", "no teacher_config.json", "prd.teachers.convert richdreamer")),
    Case("swapped", lambda f: None, (f"{MV}richdreamer", f"{RD}mvdream"), (
        "teachers.mvdream.path='richdreamer'", "holds RichDreamer's model, not MVDream's", "richdreamer.path")),
    Case("swapped, the other", lambda f: None, (f"{RD}mvdream",), (
        "teachers.richdreamer.path='mvdream'", "holds MVDream's model, not RichDreamer's", "teachers.mvdream.path")),
    Case("a Stable Diffusion for MVDream", lambda f: None, (f"{MV}stable_diffusion",), (
        "teachers.mvdream.path='stable_diffusion'", "holds Stable Diffusion's model", "stable_diffusion.path")),
    Case("MVDream for a Stable Diffusion", lambda f: None, (f"{SD}mvdream",), (
        "teachers.stable_diffusion.path='mvdream'", "holds MVDream's model", "teachers.mvdream.path")),
    Case("a teacher's base that is gone", lambda f: changed(f / "mvdream/teacher_config.json", base="../gone"),
         (f"{MV}mvdream",), ("teachers.mvdream.path='mvdream'", "names the base '../gone'", "--base")),
    Case("a teacher's base of another machine", lambda f: changed(f / "mvdream/teacher_config.json", base="/absent/sd"),
         (f"{MV}mvdream",), ("teachers.mvdream.path='mvdream'", "names the base '/absent/sd'", "--base")),
    Case("a teacher without a text", lambda f: shutil.rmtree(f / "richdreamer/text_encoder"), (f"{RD}richdreamer",), (
        "teachers.richdreamer.path='richdreamer'", "no text_encoder/config.json", "--base")),
    Case("the adapter of the other base", lambda f: adapter(f / "a.safetensors", 16),
         (adapted("mv_adapter", "a.safetensors"),), (
        "teachers.mv_adapter.adapter='a.safetensors'", "not 384 channels", "mvadapter_t2mv_sdxl.safetensors for XL")),
    Case("the adapter of the other base in a folder",
         lambda f: adapter(f / "a/mvadapter_t2mv_sdxl.safetensors", 8), (adapted("mv_adapter_xl", "a"),), (
        "teachers.mv_adapter_xl.adapter='a'", "not 1536 channels", "mvadapter_t2mv_sdxl.safetensors for XL")),
    Case("no adapter in a folder", lambda f: (f / "a").mkdir(), (adapted("mv_adapter", "a"),), (
        "teachers.mv_adapter.adapter='a': holds no mvadapter_t2mv_sd21.safetensors", "give the file")),
    Case("another file for an adapter", lambda f: single_file(f / "sd.safetensors", 1024),
         (adapted("mv_adapter", "sd.safetensors"),), (
        "teachers.mv_adapter.adapter='sd.safetensors'", "adapter.conv_in.weight is missing")),
    Case("a cut file for an adapter", lambda f: raw(f / "a.safetensors"), (adapted("mv_adapter", "a.safetensors"),), (
        "teachers.mv_adapter.adapter='a.safetensors'", "not a whole safetensors file")),
    Case("no base in a folder", lambda f: (f / "base").mkdir(), ("--model.base=base",), (
        "model.base='base'", "neither model_index.json nor unet/config.json")),
    Case("a multi-view model for a base", lambda f: None, ("--model.base=mvdream",), (
        "model.base='mvdream'", "Stable Diffusion 1.x and 2.x")),
    Case("a base without text", lambda f: shutil.rmtree(f / "stable_diffusion/text_encoder"),
         ("--model.base=stable_diffusion",), ("model.base='stable_diffusion'", "no text_encoder/config.json")),
    Case("a base without tokenizer", lambda f: shutil.rmtree(f / "stable_diffusion/tokenizer"),
         ("--model.base=stable_diffusion",), ("model.base='stable_diffusion'", "no tokenizer")),
    Case("a pickle for a base", lambda f: raw(f / "sd.ckpt"), ("--model.base=sd.ckpt",), (
        "model.base='sd.ckpt'", "never loaded", ".safetensors")),
    Case("a cut file for a base", lambda f: raw(f / "sd.safetensors"), ("--model.base=sd.safetensors",), (
        "model.base='sd.safetensors'", "not a whole safetensors file")),
    Case("2.x in a file", lambda f: single_file(f / "sd.safetensors", 1024), ("--model.base=sd.safetensors",), (
        "model.prediction_type=None", "sd.safetensors", "epsilon", "v_prediction")),
    Case("epsilon of a v model", lambda f: single_file(f / "sd.safetensors", 1024, "v_pred"),
         ("--model.base=sd.safetensors", "--model.prediction_type=epsilon"), ("model.base=", "predicts v")),
    Case("a prediction type of a folder", lambda f: None,
         ("--model.base=stable_diffusion", "--model.prediction_type=epsilon"),
         ("model.prediction_type='epsilon'", "single .safetensors file", "leave it out")),
    Case("a prediction type there is not", lambda f: None, ("--model.prediction_type=flow",), (
        "model.prediction_type='flow'", "'epsilon' or 'v_prediction'")),
    Case("embeddings of another precision", lambda f: embeddings(f / "e", ("sd", 64, "float32")),
         ("--prompts.embeddings=e", "--mixed_precision=bf16"),
         ("prompts.embeddings='e'", "sd in float32", "loaded in bfloat16", "prd embed", "--dtype bfloat16")),
    Case("embeddings of one teacher's precision", lambda f: embeddings(f / "e", ("sd", 64, "float32")),
         ("--prompts.embeddings=e", "--teachers.mvdream.dtype=float16"),
         ("prompts.embeddings='e'", "teachers.mvdream.path is loaded in float16", "--dtype float16")),
    Case("embeddings of half the student", lambda f: embeddings(f / "e", ("sd", 64, "bfloat16")),
         ("--prompts.embeddings=e", "--mixed_precision=bf16"),
         ("prompts.embeddings='e'", "model.base is loaded in float32", "--dtype float32")),
    Case("embeddings of another width", lambda f: embeddings(f / "e", ("other", 1024, "float32")),
         ("--prompts.embeddings=e",), ("prompts.embeddings='e'", "other in float32", "--dtype float32")),
    Case("a precision there is not", lambda f: None, ("--teachers.mvdream.dtype=float8",), (
        "teachers.mvdream.dtype='float8'", "'float32', 'bfloat16' or 'float16'")),
]  # fmt: skip


@pytest.fixture
def scene(random_toybox: Path, toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the toy box's models, to work in."""
    for name in TEACHERS:
        shutil.copytree(random_toybox / name, tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def words_of(case: Case, place: Path) -> Sequence[str]:
    return [*case.words, f"--output_dir={place / 'run'}", "--report_to=null"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_model_that_is_not_what_its_key_names(
    case: Case, scene: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prd.training.parts.build_parts", lambda *_, **__: pytest.fail("a model was loaded"))
    case.make(scene)
    begun = time.process_time()
    assert main(["train", *words_of(case, scene)]) == 2
    assert time.process_time() - begun < SECONDS
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in message and len(message) < 700
    assert [text for text in case.said if text not in message] == [], message
    assert not (scene / "run").exists()


def test_every_fault_is_listed_at_once(scene: Path) -> None:
    words = [
        f"{MV}richdreamer",
        f"{RD}mvdream",
        "--model.base=/absent",
        "--prompts.source=/absent.txt",
        "--prompts.held_out=[]",
    ]
    faults = run_faults(load_config("toybox", [*words, f"--output_dir={scene / 'run'}", "--report_to=null"]))
    keys = ("prompts.source=", "model.base=", "teachers.mvdream.path=", "teachers.richdreamer.path=")
    assert len(faults) == 4 and all(fault.startswith(key) for fault, key in zip(faults, keys, strict=True)), faults


def test_what_is_right_passes(scene: Path) -> None:
    embeddings(scene / "e", ("sd", 64, "float32"), ("sd", 64, "float16"))
    single_file(scene / "first.safetensors", 768)
    single_file(scene / "second.safetensors", 1024)
    places = [f"--teachers.{name}.path={name}" for name in TEACHERS]
    for words in (
        [],
        ["--model.base=stable_diffusion", *places],
        [f"{MV}{scene / 'mvdream'}", f"{RD}owner/richdreamer", "--model.base=owner/base"],
        ["--prompts.embeddings=e"],
        ["--prompts.embeddings=e", "--teachers.mvdream.dtype=float16"],
        ["--model.base=first.safetensors"],
        ["--model.base=second.safetensors", "--model.prediction_type=epsilon"],
        ["--model.base=second.safetensors", "--model.prediction_type=v_prediction"],
    ):
        config = load_config("toybox", [*words, f"--output_dir={scene / 'run'}", "--report_to=null"])
        try:
            check_run(config)
        except PrdError as error:
            pytest.fail(f"{words}: {error}")
