"""Rules with a name for what is held out of training on the toy box (`prompts.held_out`), and the splits to measure."""

from __future__ import annotations

from collections.abc import Sequence

from prd.evaluation.benchmark import spread
from prd.toybox.world import Caption, all_captions, open_captions, single_captions, stack_captions

# ten of the 48 single objects: each colour and each shape of them occurs in another one, which is trained on
FIFTH_SINGLES = (
    *("a red torus", "a red arrow", "a green sphere", "a green mug", "a blue wedge"),
    *("a blue cone", "a yellow mug", "a yellow torus", "a purple arrow", "a cyan cone"),
)


def fifth() -> tuple[str, ...]:
    """Return a fifth of the world: ten single objects, and every stack that one of them tops, 110 captions."""
    tops = {caption.words[0]: caption.text for caption in single_captions() if caption.text in FIFTH_SINGLES}
    stacks: dict[str, list[str]] = {text: [] for text in FIFTH_SINGLES}
    for caption in stack_captions():
        if caption.words[0] in tops:
            stacks[tops[caption.words[0]]].append(caption.text)
    return (*FIFTH_SINGLES, *(text for texts in stacks.values() for text in texts))


RULES = {"fifth": fifth}


def held_out_rules() -> dict[str, tuple[str, ...]]:
    """Return the captions of each rule, in its order."""
    return {name: rule() for name, rule in RULES.items()}


def measured_splits(held_out: Sequence[str], limit: int | None = None, draws: int = 0) -> dict[str, list[str]]:
    """Return the captions to measure: all single objects and `limit` evenly spread stacks, each seen or held out.

    draws  times that each single object with several right answers is measured once more, for the diversity of the
           answers, in the splits "family_seen" and "family_held_out"; 0: not at all

    A split without captions is left out: {"single_seen": ..., "single_held_out": ..., "stack_seen": ..., ...}. An open
    caption is held out where all of its members are.
    """
    hidden = set(held_out)
    splits: dict[str, list[str]] = {}
    for kind, is_stack in (("single", False), ("stack", True)):
        for name, wanted in (("seen", False), ("held_out", True)):
            captions = [c.text for c in all_captions() if c.is_stack == is_stack and (c.text in hidden) == wanted]
            captions = spread(captions, limit) if is_stack else captions
            if captions:
                splits[f"{kind}_{name}"] = captions
    for caption in families() if draws else ():
        name = "family_held_out" if hidden.issuperset(member.text for member, _ in caption.members) else "family_seen"
        splits.setdefault(name, []).extend([caption.text] * draws)
    return splits


def families() -> list[Caption]:
    """Return the captions of single objects with several right answers: the open ones, and words with two forms."""
    return [c for c in (*open_captions(), *single_captions()) if not c.is_stack and len(c.members) > 1]
