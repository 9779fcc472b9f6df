"""Pig64 and Animal2400: prompts composed from the word lists of AToM (arXiv 2402.00867, appendix C.1 and C.2).

Both sets are ATT3D's (arXiv 2306.07349, section 4). AToM prints their words in full; they stand here in its order.
"""

from __future__ import annotations

ACTIVITIES = (  # of both sets
    "riding a motorcycle",
    "sitting on a chair",
    "playing the guitar",
    "holding a shovel",
    "holding a blue balloon",
    "holding a book",
    "wielding a katana",
    "riding a bike",
)
PIG_THEMES = (
    "made out of gold",
    "carved out of wood",
    "wearing a leather jacket",
    "wearing a tophat",
    "wearing a cape",
    "wearing a party hat",
    "wearing a sombrero",
    "wearing medieval armor",
)
ANIMALS = (
    "a squirrel",
    "a raccoon",
    "a pig",
    "a monkey",
    "a robot",
    "a lion",
    "a rabbit",
    "a tiger",
    "an orangutan",
    "a bear",
)
ANIMAL_THEMES = (
    "wearing a leather jacket",
    "wearing a sweater",
    "wearing a cape",
    "wearing medieval armor",
    "wearing a backpack",
    "wearing a suit",
)
HATS = (
    "wearing a party hat",
    "wearing a sombrero",
    "wearing a helmet",
    "wearing a tophat",
    "wearing a baseball cap",
)
Splits = dict[str, tuple[str, ...]]  # "train", "unseen" (never trained on) and "test" (both)


def pig64() -> Splits:
    """Return `a pig {activity} {theme}`: 56 prompts to train on, 8 unseen, all 64 to test on.

    The unseen ones are the diagonal, the i-th activity with the i-th theme (AToM, figure 4; ATT3D, figure 2).
    """
    numbered = [(f"a pig {a} {t}", i == j) for i, a in enumerate(ACTIVITIES) for j, t in enumerate(PIG_THEMES)]
    return _splits([(prompt, not diagonal) for prompt, diagonal in numbered])


def animal2400() -> Splits:
    """Return `{animal} {activity} {theme} {hat}`: 300 prompts to train on, 2100 unseen, all 2400 to test on.

    The sizes are those of the 12.5 % split AToM and ATT3D report; which 300 they took is not in the papers ("sampled
    homogeneously", ATT3D). Here every animal, theme and hat meet in one activity, the (animal + theme + hat)-th modulo
    8: the diagonal of Pig64 in four dimensions.
    """
    return _splits(
        [
            (f"{animal} {activity} {theme} {hat}", k == (i + j + m) % len(ACTIVITIES))
            for i, animal in enumerate(ANIMALS)
            for k, activity in enumerate(ACTIVITIES)
            for j, theme in enumerate(ANIMAL_THEMES)
            for m, hat in enumerate(HATS)
        ]
    )


def _splits(prompts: list[tuple[str, bool]]) -> Splits:
    """Return the splits of (prompt, whether it is trained on)."""
    return {
        "train": tuple(prompt for prompt, trained in prompts if trained),
        "unseen": tuple(prompt for prompt, trained in prompts if not trained),
        "test": tuple(prompt for prompt, _ in prompts),
    }
