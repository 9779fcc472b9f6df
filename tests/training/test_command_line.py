"""What a key holds decides how its words are read: text as it is, places expanded, numbers as numbers."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from prd.data.prompts import PromptsConfig
from prd.data.shape_library import LibraryConfig
from prd.errors import ConfigError
from prd.generators.triplane_turbo import TriplaneTurboConfig
from prd.rendering.volume import VolumeConfig
from prd.teachers.stable_diffusion import StableDiffusionTeacherConfig
from prd.training.classes import SECTIONS
from prd.training.config import TrainConfig
from prd.training.galleries import mesh_names, prompt_generators
from prd.training.recipes import dump_config, from_dict, load_config, parse_args, stages_of, to_dict

NEGATIVE = "teachers.mvdream.negative_prompt"
TEXTS = ["007", "12:30:00", "0x10", "0o7", "1_0", "010", "1e3", "1.50", "true", "null", "~", "[a, b]", "{a: b}", "a: b",
         "ugly # blurry", "1:30", "ugly, bad anatomy: extra limbs", "", "'quoted'", "2026-01-01"]  # fmt: skip


def value(config: TrainConfig, key: str) -> Any:
    found: Any = to_dict(config)
    for name in key.split("."):
        found = found[name]
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is(text):
    assert value(parse_args([f"--{NEGATIVE}={text}"]), NEGATIVE) == text
    if text not in ("", "~"):
        assert parse_args([f"--output_dir={text}"]).output_dir == text


@pytest.mark.parametrize("text", ["007", "12:30:00", "0x10", "1_0", "010", "1e3", "1.50", "2026-01-01", "no", "1:30"])
def test_a_text_without_quotes_is_taken_as_it_is_in_a_file_too(text, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"output_dir: {text}\nprompts: {{held_out: [{text}]}}\nteachers: {{mvdream: {{negative_prompt: {text}}}}}\n",
        encoding="utf-8",
    )
    config = load_config(tmp_path / "a.yaml")
    assert config.output_dir == value(config, NEGATIVE) == text and config.prompts.held_out == (text,)
    words = ["--teachers.mvdream", f"{{negative_prompt: {text}}}"]
    assert value(parse_args(words), NEGATIVE) == text
    assert from_dict(to_dict(config)).output_dir == text


def test_null_is_no_text_where_there_may_be_none():
    config = parse_args(["--report_to", "null", "--init_from=null", "--benchmark", "null", "--trainable", "null"])
    assert config.report_to is config.init_from is config.benchmark is config.trainable is None


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("[]", ()),
        ("[a red cube, 007, true, null, 1:30, 1_0]", ("a red cube", "007", "true", "null", "1:30", "1_0")),
        ("""["a, b", 'c: d', "e # f", '[g]']""", ("a, b", "c: d", "e # f", "[g]")),
        ("a red cube, with: a # sign", ("a red cube, with: a # sign",)),
        ("null", ("null",)),
    ],
)
def test_texts_are_a_list_in_brackets_or_one_text(text, texts):
    assert parse_args(["--validation.prompts", text]).validation.prompts == texts
    assert parse_args(["--prompts.texts", text]).prompts.texts == texts
    held_out = parse_args(["--prompts.held_out", text]).prompts.held_out
    assert held_out == texts or held_out == text


@pytest.mark.parametrize("text", ["[a: b]", "[a", "[a] b", "[[a]]", "[a\udce9]", ""])
def test_what_is_no_list_of_texts_is_one_sentence(text):
    with pytest.raises(ConfigError, match="^validation.prompts=") as caught:
        parse_args([f"--validation.prompts={text}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["validation.prompts", "prompts.texts", "prompts.held_out", NEGATIVE])
@pytest.mark.parametrize("text", ["caf\udce9", "a\0b"])
def test_what_is_no_valid_text_is_one_sentence(key, text):
    with pytest.raises(ConfigError, match=f"^{key}=.*(half a character|NUL)"):
        parse_args([f"--{key}={text}"])


PLACES = (
    *("output_dir", "init_from", "resume_from_checkpoint", "prompts.source", "prompts.embeddings", "library.source"),
    *("model.base", "teachers.mvdream.path", "teachers.stable_diffusion.controlnet"),
)


@pytest.mark.parametrize("key", PLACES)
def test_home_and_variables_mean_the_same_in_every_place(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOMEWHERE", "runs/b")
    monkeypatch.delenv("ABSENT", raising=False)
    nested = "{" + key.replace(".", ": {") + ": ~/a" + "}" * (key.count(".") + 1)
    text = f"extends: toybox\n{nested.strip('{}') if '.' not in key else nested[1:-1]}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    for config in (parse_args([f"--{key}=~/a"]), load_config("~/a.yaml")):
        assert value(config, key) == str(tmp_path / "a")
    assert value(parse_args([f"--{key}=$SOMEWHERE"]), key) == "runs/b"
    assert value(parse_args([f"--{key}=owner/name"]), key) == "owner/name"
    with pytest.raises(ConfigError, match=rf"^{key}='\$ABSENT/a': the environment variable ABSENT is not set"):
        parse_args([f"--{key}=$ABSENT/a"])


def test_a_place_may_be_a_path_in_python(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path / "a")
    assert TrainConfig(output_dir=Path("~/a")).output_dir == home
    assert PromptsConfig(source=Path("~/a"), embeddings="~/a").embeddings == home
    assert LibraryConfig(source=Path("~/a")).source == TriplaneTurboConfig(base="~/a").base == home
    teacher = StableDiffusionTeacherConfig(path=Path("~/a"), controlnet="~/a")
    assert teacher.path == teacher.controlnet == home


@pytest.mark.parametrize("seed", [0, 2**53 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_large_seed_draws(seed):
    config = parse_args(["--seed", str(seed)])
    assert config.seed == seed
    first, second = (g.initial_seed() for g in prompt_generators(config.seed, ["a", "b"]))
    assert (second - first) % 2**64 == 1


@pytest.mark.parametrize("seed", ["-1", str(2**64), "true", "1.5", "x", "null"])
def test_another_seed_is_refused_by_its_name(seed):
    with pytest.raises(ConfigError, match="^seed="):
        parse_args(["--seed", seed])


def test_numbers_of_numpy_and_torch_are_numbers():
    config = VolumeConfig(num_samples=np.int64(8), inv_std=np.float32(2), max_rays=torch.tensor(7))
    assert (config.num_samples, config.inv_std, config.max_rays) == (8, 2.0, 7)
    assert {type(config.num_samples), type(config.max_rays)} == {int} and type(config.inv_std) is float
    assert dump_config(TrainConfig(seed=np.uint64(2**64 - 1), max_train_steps=np.int32(3)))
    for wrong in (True, np.bool_(True), torch.tensor(True)):
        for name in ("num_samples", "beta", "max_rays", "cull_below"):
            with pytest.raises(ValueError, match=name):
                VolumeConfig(**{name: wrong})
    with pytest.raises(ConfigError, match="optimizer.lr=True: must be a number, not true or false"):
        parse_args(["--optimizer.lr", "true"])


def configs(kind: type) -> dict[str, type]:
    """A config's class and those of its sections, by name."""
    found = {kind.__name__: kind}
    for hint in get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= configs(hint)
    return found


def is_bare(hint: Any) -> bool:
    """Whether an annotation takes a number without the check that refuses true and false."""
    if hasattr(hint, "__metadata__"):
        return hint.__origin__ in (int, float) and not any("Before" in type(m).__name__ for m in hint.__metadata__)
    return hint in (int, float) or any(map(is_bare, get_args(hint)))


def test_every_number_of_every_config_is_checked_alike():
    found = configs(TrainConfig)
    for section in SECTIONS.values():
        for part in section.built_in.values():
            kind = getattr(part, "config_class", section.config)
            if inspect.isclass(kind):
                found |= configs(kind)
    assert len(found) > 15
    bare = [
        f"{name}.{field}"
        for name, kind in found.items()
        for field, hint in get_type_hints(kind, include_extras=True).items()
        if is_bare(hint)
    ]
    assert bare == []


def test_a_stage_is_named_and_ends_as_it_is_written():
    config = parse_args(["--stages", "[{name: 007, until: 0.50}, {until: 1.0}]"])
    assert [stage.name for stage in stages_of(config)] == ["007", "2"]
    assert from_dict(to_dict(config)) == config and "0.5" in dump_config(config)


def test_file_names_of_prompts_are_safe():
    prompts = [
        "../../etc",
        "a/b\\c:d*e?",
        "CON",
        "nul",
        "lpt1",
        "\u7acb" * 300,
        "e\u0301",
        "\xe9",
        "...",
        "a\nb\x07",
        "-",
    ]
    names = mesh_names(prompts)
    assert len(set(names)) == len(prompts)
    assert names[:5] == ["etc.glb", "a_b_c_d_e.glb", "con_.glb", "nul_.glb", "lpt1_.glb"]
    assert names[6:8] == ["\xe9.glb", "\xe9_2.glb"] and names[8] == "prompt.glb"
    assert all(len(name.encode()) < 210 and not set(name) & set('/\\:*?"<>|\0\n\x07') for name in names)
