"""Where training prompts come from, and that those held out are never drawn."""

from __future__ import annotations

import json

import pytest
import torch

from prd.training.config import ConfigError, PromptsConfig, load_config
from prd.training.prompts import load_corpus

HELD_OUT = ("a red cube", "a blue torus on a red cube")


def test_held_out_prompts_are_never_drawn():
    corpus = load_corpus(PromptsConfig(held_out=HELD_OUT, stack_fraction=0.5))
    assert not set(HELD_OUT) & set(corpus.prompts)
    assert len(corpus.groups[0]) == 47  # 6 colours by 8 shapes, less one
    drawn = corpus.draw(3000, torch.Generator().manual_seed(0))
    assert set(drawn) <= set(corpus.prompts)
    assert len(set(drawn) & set(corpus.groups[0])) == 47  # every other one is


def test_the_recipe_holds_out_whole_stacks_of_what_it_holds_out():
    config = load_config("toybox").prompts
    corpus = load_corpus(config)
    singles = [p for p in config.held_out if " on " not in p]
    assert len(singles) >= 5
    assert not [p for p in corpus.prompts for s in singles if p == s or p.startswith(f"{s} on ")]
    words = {w for p in corpus.prompts for w in p.split()}
    assert {w for p in singles for w in p.split()} <= words  # each word is trained on


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_stacks_come_as_often_as_asked(fraction):
    drawn = load_corpus(PromptsConfig(stack_fraction=fraction)).draw(2000, torch.Generator().manual_seed(1))
    assert sum(" on " in p for p in drawn) / 2000 == pytest.approx(fraction, abs=0.03)


def test_the_same_generator_draws_the_same_prompts():
    corpus = load_corpus(PromptsConfig())
    one, two = (corpus.draw(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two != corpus.draw(8, torch.Generator().manual_seed(4))


def test_text_and_json_files_are_read_without_doubles_and_blanks(tmp_path):
    text, listed, split = tmp_path / "a.txt", tmp_path / "a.json", tmp_path / "b.json"
    text.write_text("a cat\n\n  a dog \na cat\n", encoding="utf-8")
    listed.write_text(json.dumps(["a cat", "a dog"]))
    split.write_text(json.dumps({"train": ["a cat", "a dog"], "test": ["a cow"]}))
    for path in (text, listed, split):
        assert load_corpus(PromptsConfig(source=str(path))).prompts == ["a cat", "a dog"]
    assert load_corpus(PromptsConfig(source=str(text), held_out=("a cat",))).prompts == ["a dog"]


def test_errors_name_the_key_and_the_value(tmp_path):
    text, empty, numbers = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.json"
    text.write_text("a cat\n")
    empty.write_text("\n")
    numbers.write_text("[1, 2]")
    for config, message in (
        (PromptsConfig(source=str(tmp_path / "absent.txt")), "prompts.source=.*absent.txt.*existing"),
        (PromptsConfig(source=str(empty)), "holds no prompt"),
        (PromptsConfig(source=str(numbers)), "list of strings"),
        (PromptsConfig(source=str(text), held_out=("a cow",)), "held_out: 'a cow' is not a prompt of"),
        (PromptsConfig(source=str(text), held_out=("a cat",)), "no prompt is left"),
        (PromptsConfig(held_out=("a pink cube",)), "held_out: 'a pink cube' is not a prompt of the toy box"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_corpus(config)
