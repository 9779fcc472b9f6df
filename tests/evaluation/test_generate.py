"""A generator's meshes are made once per prompt; prompts without a surface become rows that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trimesh import creation

from prd.errors import ConfigError
from prd.evaluation.generate import GenerationConfig, generate_items, generated_items
from prd.evaluation.inputs import prompt_set
from prd.evaluation.run import EvaluationConfig, Processes, evaluate
from prd.meshes.mesh import Mesh

PROMPTS = ["a box", "nothing", "a field that is not finite", "a box, again"]


class Pipe:
    """A generator that makes boxes, but for two prompts."""

    draws_noise = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, prompt: str, **options: Any) -> Any:
        self.calls.append(prompt)
        assert options["on_empty"] == "flag" and options["num_inference_steps"] == 2
        if "finite" in prompt:
            raise ValueError("field.sdf: gave NaN")
        box = creation.box()
        vertices, normals = box.vertices.astype(np.float32), np.array(box.vertex_normals, np.float32)
        mesh = Mesh(vertices, np.asarray(box.faces, np.int64), normals, np.full_like(vertices, 0.5))
        return SimpleNamespace(meshes=[None if prompt == "nothing" else mesh])


def test_meshes_are_made_once_and_failures_are_rows(tmp_path: Path) -> None:
    pipe, config = Pipe(), GenerationConfig(model="a/b", steps=2)
    for rank in (0, 1):
        generate_items(pipe, PROMPTS, config, tmp_path, rank=rank, count=2)
    assert sorted(pipe.calls) == sorted(PROMPTS)
    generate_items(pipe, PROMPTS, config, tmp_path)
    assert len(pipe.calls) == 4
    items = generated_items(PROMPTS, tmp_path)
    report = evaluate(items, EvaluationConfig(protocol="geometry", output=tmp_path), Processes())
    rows = report["rows"]
    assert [row["caption"] for row in rows] == PROMPTS and report["summary"]["coverage"] == 0.5
    assert rows[0]["watertight"] and "no surface" in rows[1]["error"] and "NaN" in rows[2]["error"]


def test_other_settings_are_another_evaluation() -> None:
    digests = {
        GenerationConfig(model="a/b", seed=seed, faces=faces).digest(prompts)
        for seed in (0, 1)
        for faces in (100, 200)
        for prompts in (PROMPTS, PROMPTS[:2])
    }
    assert len(digests) == 8


def test_sets_of_prompts_are_found_by_name(tmp_path: Path) -> None:
    assert len(prompt_set("pig64")) == 64 and len(prompt_set("animal2400", split="train")) == 300
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\na cat\n", encoding="utf-8")
    assert prompt_set(str(tmp_path / "prompts.txt")) == ["a cat", "a dog"]
    with pytest.raises(ConfigError, match="train, unseen, test"):
        prompt_set("pig64", split="all")
