"""What is held out: the rule of the recipe, against the texts that it stands for, and the splits that are measured."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from prd.data.corpora import MixedPrompts
from prd.data.prompts import CorpusError, PromptsConfig, held_out_prompts, load_corpus
from prd.toybox.benchmark import ToyBox
from prd.toybox.world import COLORS, all_captions, open_captions, parse_caption, single_captions
from prd.training.recipes import load_config

FIFTH = """
    a red torus
    a red arrow
    a green sphere
    a green mug
    a blue wedge
    a blue cone
    a yellow mug
    a yellow torus
    a purple arrow
    a cyan cone
    a red torus on a green cube
    a red torus on a green cylinder
    a red torus on a blue cube
    a red torus on a blue cylinder
    a red torus on a yellow cube
    a red torus on a yellow cylinder
    a red torus on a purple cube
    a red torus on a purple cylinder
    a red torus on a cyan cube
    a red torus on a cyan cylinder
    a red arrow on a green cube
    a red arrow on a green cylinder
    a red arrow on a blue cube
    a red arrow on a blue cylinder
    a red arrow on a yellow cube
    a red arrow on a yellow cylinder
    a red arrow on a purple cube
    a red arrow on a purple cylinder
    a red arrow on a cyan cube
    a red arrow on a cyan cylinder
    a green sphere on a red cube
    a green sphere on a red cylinder
    a green sphere on a blue cube
    a green sphere on a blue cylinder
    a green sphere on a yellow cube
    a green sphere on a yellow cylinder
    a green sphere on a purple cube
    a green sphere on a purple cylinder
    a green sphere on a cyan cube
    a green sphere on a cyan cylinder
    a green mug on a red cube
    a green mug on a red cylinder
    a green mug on a blue cube
    a green mug on a blue cylinder
    a green mug on a yellow cube
    a green mug on a yellow cylinder
    a green mug on a purple cube
    a green mug on a purple cylinder
    a green mug on a cyan cube
    a green mug on a cyan cylinder
    a blue wedge on a red cube
    a blue wedge on a red cylinder
    a blue wedge on a green cube
    a blue wedge on a green cylinder
    a blue wedge on a yellow cube
    a blue wedge on a yellow cylinder
    a blue wedge on a purple cube
    a blue wedge on a purple cylinder
    a blue wedge on a cyan cube
    a blue wedge on a cyan cylinder
    a blue cone on a red cube
    a blue cone on a red cylinder
    a blue cone on a green cube
    a blue cone on a green cylinder
    a blue cone on a yellow cube
    a blue cone on a yellow cylinder
    a blue cone on a purple cube
    a blue cone on a purple cylinder
    a blue cone on a cyan cube
    a blue cone on a cyan cylinder
    a yellow mug on a red cube
    a yellow mug on a red cylinder
    a yellow mug on a green cube
    a yellow mug on a green cylinder
    a yellow mug on a blue cube
    a yellow mug on a blue cylinder
    a yellow mug on a purple cube
    a yellow mug on a purple cylinder
    a yellow mug on a cyan cube
    a yellow mug on a cyan cylinder
    a yellow torus on a red cube
    a yellow torus on a red cylinder
    a yellow torus on a green cube
    a yellow torus on a green cylinder
    a yellow torus on a blue cube
    a yellow torus on a blue cylinder
    a yellow torus on a purple cube
    a yellow torus on a purple cylinder
    a yellow torus on a cyan cube
    a yellow torus on a cyan cylinder
    a purple arrow on a red cube
    a purple arrow on a red cylinder
    a purple arrow on a green cube
    a purple arrow on a green cylinder
    a purple arrow on a blue cube
    a purple arrow on a blue cylinder
    a purple arrow on a yellow cube
    a purple arrow on a yellow cylinder
    a purple arrow on a cyan cube
    a purple arrow on a cyan cylinder
    a cyan cone on a red cube
    a cyan cone on a red cylinder
    a cyan cone on a green cube
    a cyan cone on a green cylinder
    a cyan cone on a blue cube
    a cyan cone on a blue cylinder
    a cyan cone on a yellow cube
    a cyan cone on a yellow cylinder
    a cyan cone on a purple cube
    a cyan cone on a purple cylinder
"""
TEXTS = tuple(line.strip() for line in FIFTH.strip().splitlines())


def test_the_rule_holds_out_the_same_texts_in_the_same_order() -> None:
    assert len(TEXTS) == 110
    assert ToyBox().held_out_rules()["fifth"] == TEXTS
    for recipe in ("toybox", "atom_toybox", "att3d_toybox", "latte3d_toybox"):
        assert held_out_prompts(load_config(recipe).prompts) == TEXTS


def test_a_list_of_texts_holds_out_these_alone() -> None:
    config = load_config(
        "toybox", ["--prompts.held_out", "[a red cube, a blue mug]", "--prompts.open_fraction", "0"]
    ).prompts
    assert config.held_out == held_out_prompts(config) == ("a red cube", "a blue mug")
    assert len(load_corpus(config).prompts) == len(all_captions()) - 2
    assert held_out_prompts(load_config("toybox", ["--prompts.held_out", "[]"]).prompts) == ()


def test_the_rule_draws_what_the_texts_draw() -> None:
    named, listed = (load_corpus(PromptsConfig(held_out=held, stack_fraction=0.3)) for held in ("fifth", TEXTS))
    assert named == listed


def test_a_rule_is_of_a_benchmark() -> None:
    with pytest.raises(CorpusError, match="held_out='sixth': must be a list of texts, or a rule of the toy box: fifth"):
        load_corpus(PromptsConfig(held_out="sixth"))
    with pytest.raises(CorpusError, match="held_out='fifth': pig64 has no such rule; give a list of texts"):
        load_corpus(PromptsConfig(source="pig64", held_out="fifth"))
    texts = load_corpus(PromptsConfig(source="pig64", held_out="fifth", texts=("a pig",)))  # in the place of both
    assert texts.prompts == ["a pig"]


def test_single_objects_are_measured_whole_and_stacks_are_a_sample() -> None:
    splits = ToyBox().splits(TEXTS, 24)
    assert {name: len(texts) for name, texts in splits.items()} == {
        "single_seen": 38,
        "single_held_out": 10,
        "stack_seen": 24,
        "stack_held_out": 24,
    }
    assert splits["single_held_out"] != list(TEXTS[:10]) and set(splits["single_held_out"]) == set(TEXTS[:10])
    assert set(ToyBox().splits(TEXTS, 0)) == {"single_seen", "single_held_out"}
    assert ToyBox().splits(TEXTS, 24, 0) == splits
    assert len(ToyBox().splits(TEXTS)["stack_held_out"]) == 100


def test_families_are_measured_where_asked_each_as_often_as_asked() -> None:
    splits = ToyBox().splits(TEXTS, 0, 5)
    assert list(splits) == ["single_seen", "single_held_out", "family_seen", "family_held_out"]
    seen, unseen = splits["family_seen"], splits["family_held_out"]
    assert unseen == ["a blue cone"] * 5 + ["a cyan cone"] * 5
    assert seen[:5] == [seen[0]] * 5 and set(Counter(seen).values()) == {5}
    opened = {caption.text for caption in open_captions() if not caption.is_stack}
    forms = {f"a {color} {shape}" for color in COLORS for shape in ("cone", "cylinder")}
    assert set(seen) == (opened | forms) - set(unseen)


def test_a_family_is_held_out_with_the_last_of_its_members() -> None:
    red = [caption.text for caption in single_captions() if caption.words[0][0] == "red"]
    assert "a red toy" in ToyBox().splits(red[1:], 0, 2)["family_seen"]
    assert "a red toy" in ToyBox().splits(red, 0, 2)["family_held_out"]


def test_a_summary_of_families_is_described() -> None:
    asked = ["a cube"] * 2
    summary = ToyBox().summary(ToyBox().score(ToyBox().exact_field(asked), asked))
    (line, *_) = ToyBox().describe({"family_seen": summary})
    assert line.startswith("family_seen") and line.endswith("precision 1.000  coverage 0.50 (even draws 0.92)")


@pytest.mark.parametrize(("stacks", "open_words"), [(0.0, 0.0), (0.3, 0.25), (0.5, 1.0), (1.0, 0.5)])
def test_words_are_left_open_as_often_as_asked(stacks: float, open_words: float) -> None:
    corpus = load_corpus(PromptsConfig(held_out="fifth", stack_fraction=stacks, open_fraction=open_words))
    assert isinstance(corpus, MixedPrompts) and len(set(corpus.prompts)) == len(corpus.prompts)
    drawn = [parse_caption(text) for text in corpus.draw(2000, torch.Generator().manual_seed(1))]
    assert sum(c.is_open for c in drawn) / 2000 == pytest.approx(open_words, abs=0.04)
    assert sum(c.is_stack for c in drawn) / 2000 == pytest.approx(stacks, abs=0.04)
    hidden = set(TEXTS)
    for caption in drawn:
        assert caption.text not in hidden
        assert not hidden.issuperset(member.text for member, _ in caption.members)


def test_no_open_words_draw_what_they_always_did() -> None:
    corpus = load_corpus(PromptsConfig(held_out="fifth", stack_fraction=0.3))
    assert corpus == load_corpus(PromptsConfig(held_out="fifth", stack_fraction=0.3, open_fraction=0.0))
    assert isinstance(corpus, MixedPrompts) and corpus.probabilities == (0.7, 0.3)
    assert [len(group) for group in corpus.groups] == [38, 380]


def test_an_open_caption_is_not_held_out_but_its_members_are() -> None:
    with pytest.raises(
        CorpusError, match="held_out: 'a cube' leaves a word open; hold out captions that it stands for"
    ):
        load_corpus(PromptsConfig(held_out=("a red cube", "a cube")))


@pytest.mark.parametrize("text", ["a red toy", "an arrow on a green cube", "a red cone on a cylinder"])
def test_an_open_caption_has_the_shape_of_its_first_member(text: str) -> None:
    closed, form = parse_caption(text).members[0]
    vertices = torch.as_tensor(ToyBox().mesh(text)[0])
    assert float(ToyBox().exact_field([text]).sdf(vertices[None]).abs().max()) < 0.04
    assert ToyBox().exact_field([text]).scenes == [closed.parts(form)]
