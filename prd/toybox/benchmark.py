"""The toy box as a benchmark: its captions, exact fields, splits and measure (`prd.evaluation.benchmark`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from prd.data.corpora import Corpus, MixedPrompts, check_held_out
from prd.data.prompt_files import CorpusError
from prd.data.worlds import MESH_RESOLUTION
from prd.evaluation.benchmark import Benchmark
from prd.fields.protocol import Field
from prd.isosurface.extract import extract_isosurface
from prd.isosurface.marching_cubes import Surface
from prd.toybox import splits, world
from prd.toybox.score import ToyBoxScore, score_field, summarise
from prd.toybox.world import ExactField, all_captions, open_captions, opened_forms, parse_caption


class ToyBox(Benchmark):
    """The closed world of six colours and eight shapes, alone or on a base."""

    name, title = "toybox", "the toy box"

    def captions(self) -> list[str]:
        """Return every closed caption, single objects first; each open one asks for some of these."""
        return [caption.text for caption in all_captions()]

    def exact_field(self, prompts: Sequence[str]) -> ExactField:
        """Return the exact shapes of captions; of a family the first member."""
        return ExactField(prompts)

    def score(self, field: Field, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> list[ToyBoxScore]:
        """Compare generated shapes with the exact ones: R@1, IoU, colour, topology, orientation; see `score_field`."""
        return score_field(field, prompts, device=device)

    def summary(self, scores: Sequence[ToyBoxScore]) -> dict[str, Any]:
        """Return means over scores, and IoU and the orientation margin by shape; see `summarise`."""
        return summarise(scores)

    def describe(self, summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return a line per split, then the IoU and the orientation of the seen single objects by shape."""
        lines = [
            f"{name:16s} {summary['count']:4d} prompts  R@1 {summary['r_at_1']:.3f}  IoU {summary['iou']:.3f}  "
            f"colour error {summary['color_error']:.3f}  right topology {summary['right_topology']:.2f} "
            f"(outside {summary['right_outside']:.2f})"
            f"{_diversity(summary)}"
            for name, summary in summaries.items()
        ]
        if singles := summaries.get("single_seen"):
            lines.append("IoU by shape      " + "  ".join(f"{k} {v:.2f}" for k, v in singles["iou_by_shape"].items()))
            margins = singles["orientation_margin"].items()
            lines.append("orientation       " + "  ".join(f"{k} {v:+.2f}" for k, v in margins))
        return lines

    def held_out_rules(self) -> dict[str, tuple[str, ...]]:
        """Return the rules of `prd.toybox.splits`: "fifth"."""
        return splits.held_out_rules()

    def splits(self, held_out: Sequence[str] = (), limit: int | None = None, draws: int = 0) -> dict[str, list[str]]:
        """Return single objects, all, and stacks, at most `limit`, each seen and held out; see `measured_splits`.

        draws  of each caption in the splits of families
        """
        return splits.measured_splits(held_out, limit, draws)

    def corpus(
        self,
        held_out: Sequence[str] = (),
        *,
        seed: int = 0,
        stack_fraction: float = 0.0,
        open_fraction: float = 0.0,
    ) -> Corpus:
        """Return the captions not held out, drawn with replacement: stacks with a probability, else single objects.

        open_fraction  the probability of a caption that leaves one word of them open
        """
        captions = all_captions()
        if unclear := {caption.text for caption in open_captions()}.intersection(held_out):
            raise CorpusError(
                f"prompts.held_out: {min(unclear)!r} leaves a word open; hold out captions that it stands for"
            )
        check_held_out(held_out, [c.text for c in captions], self.title)
        hidden = set(held_out)
        groups: list[tuple[float, tuple[str, ...]]] = []
        for fraction, is_stack in ((1 - stack_fraction, False), (stack_fraction, True)):
            kept = [c for c in captions if c.is_stack == is_stack and c.text not in hidden]
            opened = dict.fromkeys(form.text for caption in kept for form in opened_forms(caption))
            groups += [(fraction * (1 - open_fraction), tuple(c.text for c in kept))]
            groups += [(fraction * open_fraction, tuple(opened))]
        groups = [(p, g) for p, g in groups if p > 0]
        if any(not group for _, group in groups):
            raise CorpusError("prompts.held_out: leaves no single object or no stack to train on; hold out fewer")
        return MixedPrompts(tuple(g for _, g in groups), tuple(p for p, _ in groups))

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError, listing colours, shapes and bases, for a prompt that is no caption."""
        parse_caption(prompt)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that no caption contains."""
        return world.unknown_words(prompt)

    def mesh(self, prompt: str) -> Surface:
        """Return the exact surface of a caption, of a family the first member; colours do not matter."""
        return _mesh(tuple(shape for _, shape in parse_caption(prompt).words))


def _diversity(summary: Mapping[str, Any]) -> str:
    """The part of a summary that several draws per caption add; "" without."""
    if "coverage" not in summary:
        return ""
    precision, coverage, even = (summary[name] for name in ("precision", "coverage", "coverage_of_even_draws"))
    return f"  precision {precision:.3f}  coverage {coverage:.2f} (even draws {even:.2f})"


@lru_cache(maxsize=64)
def _mesh(shapes: tuple[str, ...]) -> Surface:
    colours = ("red", "blue")
    text = " on ".join(f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=False))
    with torch.no_grad():
        (mesh,) = extract_isosurface(ExactField([text]), MESH_RESOLUTION)
    return mesh
