"""Inputs that are wrong, and what is said of each.

Every text of `said` occurs in the message: the name of what is wrong, and what is allowed or what to do.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Value(NamedTuple):
    """A value of a key of the configuration, or of an option of a pipeline's call."""

    key: str
    value: Any
    said: tuple[str, ...]


class File(NamedTuple):
    """A file of prompts by its name and bytes."""

    name: str
    content: bytes
    said: tuple[str, ...]


class Damage(NamedTuple):
    """What happens to a folder with a saved model."""

    name: str
    damage: Callable[[Path], object]
    said: tuple[str, ...]


def value(key: str, given: Any, *said: str) -> Value:
    return Value(key, given, (key.rpartition(".")[2], *said))


# -- configuration: by the command line, by YAML, from Python ----------------------------------------------------------

AT_LEAST_1 = "greater than or equal to 1"
CONFIG = [
    value("seed", 1.5, "1.5", "integer"),
    value("seed", "abc", "'abc'", "integer"),
    value("seed", None, "None", "integer"),
    value("seed", -1, "-1"),
    value("seed", 2**70, str(2**70)),
    value("max_train_steps", 0, "0", AT_LEAST_1),
    value("max_train_steps", -3, "-3", AT_LEAST_1),
    value("max_train_steps", 1.5, "1.5", "integer"),
    value("max_train_steps", "many", "'many'", "integer"),
    value("schedule_steps", 0, AT_LEAST_1),
    value("max_train_minutes", 0, "greater than 0"),
    value("max_train_minutes", -1, "greater than 0"),
    value("max_train_minutes", math.nan, "finite"),
    value("max_train_minutes", math.inf, "finite"),
    value("mixed_precision", "fp8", "'fp8'", "'no', 'bf16' or 'fp16'"),
    value("train_batch_size", 0, AT_LEAST_1),
    value("gradient_accumulation_steps", 0, AT_LEAST_1),
    value("num_denoising_steps", 0, AT_LEAST_1),
    value("num_denoising_steps", 3, "must divide the 1000 timesteps", "try 1, 2 or 4"),
    value("rollout_batch_size", 0, AT_LEAST_1),
    value("background", 1.5, "less than or equal to 1"),
    value("background", -0.1, "greater than or equal to 0"),
    value("text_background", "perhaps", "'perhaps'", "boolean"),
    value("model.splat_heads", "perhaps", "'perhaps'", "boolean"),
    value("ema_decay", 1.0, "less than 1"),
    value("ema_decay", 0, "greater than 0"),
    value("checkpointing_steps", 0, AT_LEAST_1),
    value("checkpoints_total_limit", 0, AT_LEAST_1),
    value("num_threads", 0, AT_LEAST_1),
    value("renderer_schedule", "sometimes", "'sometimes'", "'all', 'alternate' or a list of volume, surface"),
    value("renderer_schedule", ["mesh"], "'mesh'", "volume, surface"),
    value("renderer_schedule", [], "must be 'all'"),
    value("output_dir", None, "None"),
    value("report_to", "teletype", "'teletype'", "null, all,", "tensorboard"),
    value("benchmark", "no.such.module", "'no.such.module'", "null for none"),
    value("benchmark", "os.path", "'os.path'"),
    value("init_from", "/absent", "'/absent'", "no such file or folder"),
    value("resume_from_checkpoint", "/absent", "'/absent'", "'latest'"),
    value("model.class", "no_such_model", "'no_such_model'", "triplane_turbo, atom, att3d, latte3d"),
    value("model.class", "no.such.Model", "no module 'no.such'"),
    value("model.rank", 0, AT_LEAST_1),
    value("model.rank", 2.5, "integer"),
    value("model.latent_size", 0, AT_LEAST_1),
    value("model.plane_channels", 0, AT_LEAST_1),
    value("model.sphere_radius", 0, "greater than 0"),
    value("model.sphere_radius", 2, "less than 1"),
    value("model.base", None, "None"),
    value("model.base", "/absent", "'/absent'", "no such file or folder"),
    value("model.base", "toybax", "'toybax'", "owner/name"),
    value("cameras.views", 0, AT_LEAST_1),
    value("cameras.views", 3, "must be 4", "mvdream and richdreamer"),
    value("cameras.azimuths", [0, 90], "views=4", "set views to their number"),
    value("cameras.projection", "isometric", "'isometric'", "'perspective' or 'orthographic'"),
    value("cameras.projection", "orthographic", "must be perspective", "mvdream and richdreamer"),
    value("cameras.elevation", [60, -30], "must be [low, high]"),
    value("cameras.elevation", [-100, 100], "greater than -90"),
    value("cameras.elevation", "high", "'high'"),
    value("cameras.fovy", 0, "greater than 0"),
    value("cameras.fovy", [40, 200], "less than 180"),
    value("cameras.relative_distance", [0, 1], "greater than 0"),
    value("renderers.volume.height", 0, AT_LEAST_1),
    value("renderers.volume.num_samples", 1, "greater than or equal to 2"),
    value("renderers.volume.inv_std", 0, "greater than 0"),
    value("renderers.volume.grid_resolution", 1, "greater than or equal to 2"),
    value("renderers.volume.class", "no_such", "'no_such'", "volume, surface, patch"),
    value("renderers.surface.grid_resolution", 0, "greater than or equal to 3"),
    value("renderers.volume", None, "mapping of settings"),
    value("renderers.volume.heigth", 32, "unknown", "'renderers.volume.height'"),
    value("teachers.mvdream.guidance_scale", "strong", "'strong'", "number"),
    value("teachers.mvdream.weight", -1, "greater than or equal to 0"),
    value("teachers.mvdream.eta", 2, "less than or equal to 1"),
    value("teachers.mvdream.eta", -0.5, "greater than or equal to 0"),
    value("teachers.mvdream.path", None, "None"),
    value("teachers.mvdream.path", "/absent", "'/absent'", "no such file or folder"),
    value("teachers.mv_adapter.image_height", 0, "greater than 0"),
    value("teachers.mv_adapter.adapter", "/absent", "'/absent'", "no such file or folder"),
    value("teachers.stable_diffusion.controlnet", "/absent", "'/absent'", "no such file or folder"),
    Value("teachers.mvdreem.weight", 1, ("mvdreem", "must be one of stable_diffusion, mvdream")),
    value("distillation.t_min", 2000, "less than or equal to 999"),
    value("distillation.t_min", -1, AT_LEAST_1),
    Value("distillation.t_max", 5, ("t_min=500", "must be below t_max=5")),
    value("distillation.t_max", 2000, "less than or equal to 1000"),
    value("distillation.weighting", "heavy", "'heavy'", "'dmd', 'uniform', 'sds' or 'sqrt'"),
    value("distillation.reference", "nothing", "'nothing'", "'shifted', 'noise', 'negative_prompt' or 'fake'"),
    value("distillation.reference_prompt", "blurry", "'blurry'", "reference='noise'", "to 'negative_prompt'"),
    value("distillation.noise", "pink", "'pink'", "'random' or 'inversion'"),
    value("distillation.inversion_steps", 0, AT_LEAST_1),
    value("distillation.inversion_steps", 2.5, "integer"),
    value("distillation.inversion_guidance_scale", "strong", "'strong'", "number"),
    value("distillation.inversion_guidance_scale", math.nan, "finite"),
    value("distillation.fake", 3, "3"),
    value("distillation.fake.rank", 0, AT_LEAST_1),
    value("distillation.fake.rank", "many", "'many'", "integer"),
    value("distillation.fake.rnak", 4, "unknown", "'distillation.fake.rank'"),
    value("distillation.fake.lr", 0, "greater than 0"),
    value("distillation.fake.lr", [1e-3, -1], "greater than 0"),
    value("distillation.fake.updates_per_step", 0, AT_LEAST_1),
    value("distillation.fake.teachers", [], "at least one teacher", "null for all"),
    Value(
        "distillation",
        {"reference": "fake", "fake": {"teachers": ["mvdreem"]}},
        ("distillation.fake.teachers='mvdreem'", "null for all, or of stable_diffusion, mvdream"),
    ),
    Value("teachers.mvdream", {"eta": 0.1}, ("teachers.*.eta", "must be 0", "reference=noise")),
    value("distillation.delta", 0, "greater than 0"),
    value("distillation.average_over", "all", "'all'", "'prompt' or 'image'"),
    value("regularizers.eikonal", [1, 2, 3], "at most 2 items"),
    value("regularizers.eikonal", "strong", "'strong'", "number"),
    value("regularizers.sparsity", -1, "greater than or equal to 0"),
    value("regularizers.smooth", 1, "must be one of eikonal, sparsity"),
    value("optimizer.name", "sgdd", "'sgdd'", "'adan' or 'adamw'"),
    value("optimizer.lr", 0, "greater than 0"),
    value("optimizer.lr", -1, "greater than 0"),
    value("optimizer.lr", math.nan, "finite"),
    value("optimizer.betas", [0.9], "adamw takes 2 values"),
    value("optimizer.betas", [0.9, 1.5], "less than 1"),
    value("optimizer.eps", -1, "greater than 0"),
    value("optimizer.weight_decay", -1, "greater than or equal to 0"),
    value("optimizer.warmup_steps", -1, "greater than or equal to 0"),
    value("optimizer.decay_fraction", 2, "less than or equal to 1"),
    value("optimizer.max_grad_norm", -1, "greater than 0"),
    value("optimizer", 5, "5"),
    Value("optimiser.lr", 1, ("unknown config key 'optimiser.lr'", "'optimizer.lr'")),
    value("validation.prompts", 5, "5"),
    value("validation.prompts", ["a red cube", ""], "empty"),
    value("validation.prompts", ["a red dog"], "'a red dog'", "sphere, cube"),
    value("validation.every_steps", 0, AT_LEAST_1),
    value("validation.num_inference_steps", 3, "must divide the 1000 timesteps"),
    value("validation.views", 0, AT_LEAST_1),
    value("validation.resolution", 0, AT_LEAST_1),
    value("validation.isosurface_resolution", 1, "greater than or equal to 2"),
    value("prompts.source", None, "None"),
    value("prompts.source", "/absent.txt", "'/absent.txt'", "an existing file ending in .txt"),
    value("prompts.stack_fraction", 2, "less than or equal to 1"),
    value("prompts.open_fraction", -0.1, "greater than or equal to 0"),
    value("validation.families", -1, "greater than or equal to 0"),
    value("validation.families", 1.5, "integer"),
    value("prompts.held_out", "sixth", "'sixth'", "fifth"),
    value("prompts.held_out", ["a red dog"], "'a red dog'", "remove or correct it"),
    value("prompts.texts", ["a red cube", " "], "empty"),
    value("prompts.embeddings", "/absent", "'/absent'", "no such folder"),
    value("interpolation.probability", 2, "less than or equal to 1"),
    value("library.alpha", 1, "library.source"),
    value("library.source", "/absent", "'/absent'", "no such folder"),
    value("stages", 5, "5"),
    value("stages", [{"until": 0.5}], "the last must be 1"),
    value("stages", [{"until": 1, "seed": 3}], "'seed' is no value of a stage"),
    value("teacher_options.offload", "sometimes", "'sometimes'", "boolean"),
    value("offload_text_encoders", "sometimes", "'sometimes'", "boolean"),
    value("model.base_dtype", "int8", "'int8'", "'bfloat16' or 'float16'"),
    value("model.base_dtype", "bfloat16", "needs mixed_precision=bf16"),
    value("trainable", ["nothing"], "'nothing'", "it has adapter"),
    Value("no_such_key", 1, ("unknown config key 'no_such_key'", "nearest")),
]

# -- options of a call: from Python, and by the command line where it has a word for them ------------------------------

FLAGS = {
    "num_inference_steps": "--steps",
    "isosurface_resolution": "--resolution",
    "target_faces": "--faces",
    "texture_size": "--texture",
    "coarse_factor": "--coarse-factor",
    "close_handles": "--close-handles",
    "metallic": "--metallic",
    "roughness": "--roughness",
    "lods": "--lods",
    "prompt": "",
}
CALL = [
    value("prompt", "", "is empty"),
    value("prompt", " \t\n", "is empty"),
    value("prompt", [], "at least one"),
    value("prompt", 3, "must be a string"),
    value("prompt", None, "must be a string"),
    value("prompt", ["a red cube", None], "must be a string"),
    value("prompt", b"a red cube", "must be a string"),
    value("prompt", "a \udc80 cube", "surrogate"),
    value("num_inference_steps", 0, "divisor of 1000", "try 4"),
    value("num_inference_steps", 3, "divisor of 1000", "try 4"),
    value("num_inference_steps", 2000, "divisor of 1000", "try 4"),
    value("num_inference_steps", 1.5, "divisor of 1000", "try 4"),
    value("num_inference_steps", True, "divisor of 1000", "try 4"),
    value("num_meshes_per_prompt", 0, "in 1..1024"),
    value("num_meshes_per_prompt", 10**30, "in 1..1024"),
    value("num_meshes_per_prompt", "2", "an integer"),
    value("isosurface_resolution", 1, "in 2..2048"),
    value("isosurface_resolution", 99999, "in 2..2048"),
    value("isosurface_resolution", 64.5, "in 2..2048"),
    value("target_faces", 3, "at least 4"),
    value("target_faces", -1, "at least 4"),
    value("texture_size", 0, "in 16..8192"),
    value("texture_size", 15, "in 16..8192"),
    value("texture_size", 9000, "in 16..8192"),
    value("coarse_factor", 1, "in 2..159"),
    value("coarse_factor", 500, "in 2..159"),
    value("close_handles", -0.5, "in 0..2"),
    value("close_handles", 3, "in 0..2"),
    value("close_handles", math.nan, "in 0..2"),
    value("close_handles", math.inf, "in 0..2"),
    value("metallic", 1.5, "in 0..1"),
    value("metallic", math.nan, "in 0..1"),
    value("roughness", -0.1, "in 0..1"),
    value("lods", 0, "in 1..8"),
    value("lods", 9, "in 1..8"),
    value("topology", "any", "'any'", "'keep', 'free'"),
    value("keep", "some", "'some'", "'all', 'largest'"),
    value("on_empty", "ignore", "'ignore'", "'raise', 'flag'"),
    value("output_type", "usd", "'usd'", "'mesh', 'field', 'planes'"),
    value("generator", 5, "torch.Generator"),
    value("generator", [torch.Generator(), torch.Generator()], "one per sample"),
    value("latents", torch.full((1, 4, 8, 8), math.nan), "NaN"),
    value("latents", torch.zeros(1, 3, 8, 8), "3"),
    value("textur_size", 64, "no such argument"),
    value("guidance_scale", 7.5, "no such argument"),
]

# -- files of prompts: as prompts.source, and of `prd embed` -----------------------------------------------------------

FILES = [
    File("empty.txt", b"", ("empty.txt", "no prompt")),
    File("blank.txt", b"\n \n\t\n", ("blank.txt", "no prompt")),
    File("bytes.txt", b"a red cube\n\xff\xfe\x00bad", ("bytes.txt", "UTF-8")),
    File("latin.csv", "prompt\nein Würfel\n".encode("latin-1"), ("latin.csv", "UTF-8")),
    File("comma.csv", b"prompt\na shiny, red cube\na cat\n", ("comma.csv", "2", "quote")),
    File("later.csv", b"prompt,n\na cat,1\na shiny, red cube,2\n", ("later.csv", "3", "quote")),
    File("other.csv", b"caption\na cat\n", ("other.csv", "prompt", "caption")),
    File("nothing.csv", b"", ("nothing.csv",)),
    File("semicolons.csv", b"prompt;n\na cat;1\n", ("semicolons.csv", "by commas, not by ';'")),
    File("long.csv", b'prompt\n"' + 200_000 * b"a" + b'"\n', ("long.csv", "2", "131,072 characters")),
    File("header.csv", b"prompt\n", ("header.csv", "no prompt")),
    File("list.json", b'{"a": 1}', ("list.json",)),
    File("broken.json", b'["a red cube", ', ("broken.json",)),
    File("numbers.json", b"[1, 2]", ("numbers.json",)),
    File("broken.jsonl", b'{"prompt": "a cat"}\n{"prompt": \n', ("broken.jsonl", "2")),
    File("other.jsonl", b'{"caption": "a cat"}\n', ("other.jsonl", "prompt")),
    File("cut.parquet", b"PAR1 and no more", ("cut.parquet",)),
    File("prompts.xlsx", b"PK\x03\x04", ("prompts.xlsx", ".txt")),
    File("folder.txt/", b"", ("folder.txt",)),
]


# -- folders with a saved model: of `load_pipeline`, `prd generate --model` and init_from ------------------------------


def cut(name: str, keep: int = 100) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def changed(name: str, **values: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**found, **values}), encoding="utf-8")

    return write


def flipped(name: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 64
        (folder / name).write_bytes(content)

    return write


def foreign(name: str) -> Callable[[Path], object]:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return lambda folder: (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 1234\n"
ADAPTER = [
    Damage("no weights", gone("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    Damage("cut weights", cut("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    Damage("empty weights", cut("adapter_model.safetensors", 0), ("adapter_model.safetensors",)),
    Damage("flipped bit", flipped("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    Damage("foreign weights", foreign("adapter_model.safetensors"), ("adapter does not fit", "missing")),
    Damage("LFS pointer", text("adapter_model.safetensors", POINTER), ("adapter_model.safetensors", "git lfs pull")),
    Damage("no adapter config", gone("adapter_config.json"), ("adapter_config.json",)),
    Damage("broken adapter config", text("adapter_config.json", "{"), ("adapter_config.json",)),
    Damage("list for a config", text("config.json", "[]"), ("config.json",)),
    Damage("broken config", text("config.json", '{"rank": '), ("config.json",)),
    Damage("other class", changed("config.json", _class_name="Unknown"), ("Unknown",)),
    Damage("no rank", changed("config.json", rank=0), ("rank", "0")),
    Damage("text for a number", changed("config.json", latent_size="big"), ("latent_size", "big")),
    Damage("unknown key", changed("config.json", colour="red"), ("colour",)),
    Damage("other rank", changed("config.json", rank=3), ("rank",)),
]
