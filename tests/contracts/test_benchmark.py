"""The contract of `Benchmark`, over every benchmark: what training, galleries and comparisons may rely on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from examples.custom_world import BallsAndBoxes
from prd.data.prompts import CorpusError, PromptsConfig, held_out_prompts, load_corpus
from prd.errors import ConfigError
from prd.evaluation.benchmark import Benchmark, Score, find_benchmark, measured_splits, resolve_benchmark
from prd.fields.protocol import AutogradGradient, Field
from prd.hub import shipped
from prd.hub.shipped import shipped_benchmarks
from prd.meshes.read import sample_points
from prd.toybox import asset
from prd.toybox.benchmark import ToyBox
from prd.utils.imports import missing_members

CUSTOM = "examples.custom_world.BallsAndBoxes"
BENCHMARKS: list[Benchmark] = [ToyBox(), BallsAndBoxes()]

pytestmark = pytest.mark.parametrize("world", BENCHMARKS, ids=lambda world: world.name)


class Altered(AutogradGradient):
    """A field with its shapes shrunk, or its colours mixed up."""

    def __init__(self, field: Field, *, scale: float = 1.0, channels: Sequence[int] = (0, 1, 2)) -> None:
        self.field, self.scale, self.channels = field, scale, list(channels)

    def sdf(self, points: Tensor) -> Tensor:
        return self.field.sdf(points / self.scale) * self.scale

    def rgb(self, points: Tensor) -> Tensor:
        return self.field.rgb(points)[..., self.channels]


def some(world: Benchmark) -> list[str]:
    """Captions from all over the benchmark."""
    captions = world.captions()
    return captions[:: max(1, len(captions) // 4)][:4]


def test_it_has_every_member(world: Benchmark) -> None:
    assert not missing_members(world, Benchmark)
    assert world.name and world.title


def test_captions_are_distinct_and_always_the_same(world: Benchmark) -> None:
    captions = world.captions()
    assert len(captions) == len(set(captions)) > 1 and captions == world.captions()
    for caption in captions:
        assert caption.strip() == caption
        world.check_prompt(caption)
        assert world.unknown_words(caption) == []


def test_another_text_is_refused_with_what_is_known(world: Benchmark) -> None:
    for call in (world.check_prompt, lambda text: world.exact_field([text])):
        with pytest.raises(ValueError, match="caption='a marble dragon': .*red"):
            call("a marble dragon")
    assert world.unknown_words("a marble red dragon") == ["marble", "dragon"]
    with pytest.raises(ValueError, match="dragon"):
        world.score(world.exact_field(some(world)[:1]), ["a marble dragon"])


@torch.no_grad()
def test_exact_fields_are_scored_perfect(world: Benchmark) -> None:
    prompts = some(world)
    scores = world.score(world.exact_field(prompts), prompts)
    assert [score.prompt for score in scores] == prompts
    for score in scores:
        assert isinstance(score, Score) and score.recognised is True
        figures = score.figures()
        assert figures["r_at_1"] == 1 and figures["iou"] == pytest.approx(1)
        assert figures["color_error"] == pytest.approx(0, abs=1e-3)
        assert json.loads(json.dumps(score.as_dict()))["prompt"] == score.prompt


@torch.no_grad()
def test_wrong_fields_are_not(world: Benchmark) -> None:
    prompts = some(world)
    field = world.exact_field(prompts)
    right, smaller, recoloured, others = (
        world.score(made, prompts)
        for made in (
            field,
            Altered(field, scale=0.7),
            Altered(field, channels=(2, 0, 1)),
            world.exact_field([*prompts[1:], prompts[0]]),
        )
    )
    for exact, small, mixed, other in zip(right, smaller, recoloured, others, strict=True):
        assert small.figures()["iou"] < 0.6 * exact.figures()["iou"]
        assert mixed.figures()["color_error"] > exact.figures()["color_error"] + 0.1
        assert mixed.figures()["iou"] == exact.figures()["iou"]
        assert not other.recognised
    assert not any(score.recognised for score in recoloured)


@torch.no_grad()
def test_each_sample_is_scored_by_itself(world: Benchmark) -> None:
    prompts = some(world)
    together = world.score(Altered(world.exact_field(prompts), scale=0.9), prompts)
    for prompt, score in zip(prompts, together, strict=True):
        (alone,) = world.score(Altered(world.exact_field([prompt]), scale=0.9), [prompt])
        assert alone.prompt == score.prompt and alone.recognised == score.recognised
        assert alone.figures() == pytest.approx(score.figures(), abs=1e-6)


@torch.no_grad()
def test_a_summary_is_the_mean_and_is_described(world: Benchmark) -> None:
    prompts = some(world)
    scores = [*world.score(world.exact_field(prompts), prompts)]
    scores += world.score(world.exact_field([*prompts[1:], prompts[0]]), prompts)
    summary = world.summary(scores)
    assert summary["count"] == 8
    for figure in ("r_at_1", "iou", "color_error"):
        assert summary[figure] == pytest.approx(sum(s.figures()[figure] for s in scores) / 8, abs=1e-4)
    assert summary["r_at_1"] == 0.5
    assert world.summary([]) == {}
    assert json.loads(json.dumps(summary)) == summary
    names = list(world.splits())
    lines = world.describe({name: summary for name in names})
    for name in names:
        assert any(line.startswith(name) and "R@1 0.500" in line for line in lines)


def test_splits_tell_seen_from_held_out(world: Benchmark) -> None:
    captions = world.captions()
    hidden = captions[:: max(2, len(captions) // 9)]
    splits = world.splits(hidden)
    measured = [text for texts in splits.values() for text in texts]
    assert sorted(measured) == sorted(captions)  # each once
    for name, texts in splits.items():
        assert texts and name.endswith(("seen", "held_out"))
        assert {text in set(hidden) for text in texts} == {name.endswith("held_out")}
    assert not [name for name in world.splits() if name.endswith("held_out")]
    few = world.splits(hidden, 2)
    assert set(few) == set(splits) and all(set(texts) <= set(splits[name]) for name, texts in few.items())


def test_captions_with_several_answers_are_repeated_in_splits_of_their_own(world: Benchmark) -> None:
    hidden = world.captions()[1:3]
    once, thrice = world.splits(hidden), world.splits(hidden, None, 3)
    assert list(thrice)[: len(once)] == list(once)  # and after them the others
    assert {name: texts for name, texts in thrice.items() if name in once} == once
    source = world.name if world.name in shipped_benchmarks() else CUSTOM
    assert measured_splits(world, PromptsConfig(source=source, held_out=tuple(hidden)), None, 3) == thrice
    for name in set(thrice) - set(once):
        assert name.endswith(("seen", "held_out")) and set(Counter(thrice[name]).values()) == {3}
        for text in set(thrice[name]):
            world.check_prompt(text)


def test_what_is_held_out_is_never_drawn(world: Benchmark) -> None:
    captions = world.captions()
    hidden = captions[1:3]
    corpus = world.corpus(hidden, seed=3)
    assert corpus.prompts and not set(hidden) & set(corpus.prompts) and set(corpus.prompts) < set(captions)

    def draw(n: int) -> list[str]:
        return [corpus.prompt(i, torch.Generator().manual_seed(i)) for i in range(n)]

    drawn = draw(600)
    assert set(drawn) == set(corpus.prompts) and drawn == draw(600)
    tokenizer = AutoTokenizer.from_pretrained(asset("stable_diffusion") + "/tokenizer")
    assert corpus.report(tokenizer, 16) is None
    assert set(world.corpus(hidden, seed=3, open_fraction=0.5).prompts) >= set(corpus.prompts)
    with pytest.raises(CorpusError, match="held_out: 'a marble dragon' is not a prompt of"):
        world.corpus(["a marble dragon"])
    with pytest.raises(CorpusError, match="hold out fewer"):
        world.corpus(captions)


def test_rules_hold_out_some_captions_and_a_config_names_them(world: Benchmark) -> None:
    source = {"toybox": "toybox"}.get(world.name, CUSTOM)
    for rule, texts in world.held_out_rules().items():
        assert 0 < len(set(texts)) == len(texts) and set(texts) < set(world.captions())
        config = PromptsConfig(source=source, held_out=rule)
        assert held_out_prompts(config) == texts
        assert load_corpus(config).prompts == load_corpus(PromptsConfig(source=source, held_out=texts)).prompts
    with pytest.raises(CorpusError, match=f"held_out='tenth': must be a list of texts, or a rule of {world.title}"):
        load_corpus(PromptsConfig(source=source, held_out="tenth"))


def test_texts_are_what_a_run_has_seen(world: Benchmark) -> None:
    """A run of a few texts is measured by them and by what it was not trained on, whatever the config holds out."""
    texts = tuple(some(world)[:2])
    name = world.name if world.name in shipped_benchmarks() else CUSTOM
    given: list[Any] = [(), (texts[0],), *world.held_out_rules()]
    for held_out in given:
        config = PromptsConfig(source=name, texts=texts, held_out=held_out)
        assert held_out_prompts(config) == ()
        splits = measured_splits(world, config)
        seen = {text for split, captions in splits.items() if split.endswith("seen") for text in captions}
        unseen = {text for split, captions in splits.items() if split.endswith("held_out") for text in captions}
        assert seen == set(texts) and unseen and unseen <= set(world.captions()) - seen
    assert measured_splits(world, PromptsConfig(source=name)) == world.splits()


@torch.no_grad()
def test_the_mesh_lies_on_the_exact_surface(world: Benchmark) -> None:
    for prompt in some(world)[:2]:
        points = sample_points(world.mesh(prompt), 300, torch.Generator().manual_seed(0))
        assert world.exact_field([prompt]).sdf(points[None]).abs().max() < 0.04


def test_a_config_finds_it(world: Benchmark) -> None:
    name = world.name if world.name in shipped_benchmarks() else CUSTOM
    assert type(resolve_benchmark(name, None)) is type(world)
    assert type(resolve_benchmark("auto", name)) is type(world)
    assert resolve_benchmark(None, name) is None
    assert resolve_benchmark("auto", "pig64") is None and find_benchmark("prompts.jsonl") is None
    texts = some(world)[:2]  # in the place of the source's prompts
    assert type(resolve_benchmark("auto", name, texts)) is type(world)
    assert resolve_benchmark("auto", name, [*texts, "a dragon"]) is None
    assert type(resolve_benchmark(name, "pig64", ["a dragon"])) is type(world)  # as asked
    with pytest.raises(ConfigError, match="benchmark='toybax': is no benchmark; give toybox, the import path"):
        resolve_benchmark("toybax", name)
    with pytest.raises(ConfigError, match="'examples.custom_world' has no class or function 'Ball'"):
        resolve_benchmark("examples.custom_world.Ball", name)
    with pytest.raises(ConfigError, match="is no Benchmark: it lacks .*captions"):
        resolve_benchmark("examples.custom_world.Exact", name)


def test_the_words_a_shipped_encoder_lists_are_those_of_its_benchmark(world: Benchmark) -> None:
    """Pipelines warn of words by the index alone, without the benchmark's code."""
    about: dict[str, Any] = shipped.about(world.name)
    if world.name not in shipped_benchmarks():
        assert about == {}
        return
    words = {word for text in world.captions() for word in text.split()}
    asked = {word for texts in world.splits((), 0, 1).values() for text in texts for word in text.split()}
    assert words <= set(about["vocabulary"]) <= words | asked  # encoders that know open captions have their words too
    assert about["title"] == world.title
    assert shipped.unknown_words(world.name, "A marble red dragon") == world.unknown_words("A marble red dragon")
