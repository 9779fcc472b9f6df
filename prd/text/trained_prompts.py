"""The words and forms of the prompts that a model was trained on: recorded beside its weights, compared with a prompt.

    TrainedPrompts.of(["a red cube", "a blue cube", "a red mug"]).unfamiliar("a red dog")
    # "none of the 3 prompts it was trained on holds dog"

A form is a prompt without its content words, as "a _ _ on a _ _". It says something of a model only where the prompts
have a closed grammar, a few forms with many prompts each; of other corpora the words alone are kept, and of those with
a large vocabulary their number of prompts alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

KEY = "trained_on"  # of a model's record
MAX_LETTERS = 100_000  # of all words together; of more, neither words nor forms are kept
MAX_FORMS = 64
LEAST_PER_FORM = 2  # prompts, in the mean, that a form needs
GAP = "_"
SHOWN = 5  # words or forms in a message
TOKENS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
ARTICLES = {"an": "a"}  # one form, whichever of them a word asks for
GLUE = frozenset(
    "a an the this that these those some any each every no one two three four five and or but not with without of on "
    "in at to from by for as over under above below behind beside between near next into onto inside outside around "
    "through up down is are was were be being been has have had having it its his her their who which while".split()
)


@dataclass(frozen=True)
class TrainedPrompts:
    """Words and forms of training prompts, in small letters.

    prompts  how many there are
    words    all of them; None: more than MAX_LETTERS
    forms    by form, the words that stand at each of its gaps; None: the prompts have no closed grammar
    """

    prompts: int
    words: frozenset[str] | None
    forms: Mapping[str, tuple[frozenset[str], ...]] | None

    @classmethod
    def of(cls, prompts: Iterable[str]) -> Self:
        """Read all prompts of a corpus once, each distinct one given once."""
        count, words = 0, set[str]()
        forms: dict[str, tuple[set[str], ...]] = {}
        has_words = has_forms = True
        for prompt in prompts:
            count += 1
            if not has_words:
                continue
            found = words_of(prompt)
            words.update(found)
            has_words = sum(map(len, words)) <= MAX_LETTERS if count % 1000 == 0 else True
            if has_forms:
                form, content = split_form(found)
                for gap, word in zip(forms.setdefault(form, tuple(set() for _ in content)), content, strict=True):
                    gap.add(word)
                has_forms = len(forms) <= MAX_FORMS
        letters = sum(len(word) for gaps in forms.values() for gap in gaps for word in gap)
        has_words &= sum(map(len, words)) <= MAX_LETTERS
        has_forms &= has_words and letters <= MAX_LETTERS and LEAST_PER_FORM * len(forms) <= count
        kept = {form: tuple(map(frozenset, gaps)) for form, gaps in forms.items()}
        return cls(count, frozenset(words) if has_words else None, kept if has_forms else None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        forms = None
        if self.forms is not None:
            forms = {form: [sorted(gap) for gap in gaps] for form, gaps in sorted(self.forms.items())}
        return {"prompts": self.prompts, "words": None if self.words is None else sorted(self.words), "forms": forms}

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """Return what `as_dict` gave; TypeError or ValueError for anything else."""
        if not isinstance(record, dict) or record.keys() != {"prompts", "words", "forms"}:
            raise ValueError(f"{KEY} must hold prompts, words and forms")
        prompts, words, forms = record["prompts"], record["words"], record["forms"]
        if type(prompts) is not int:
            raise TypeError(f"{KEY}.prompts must be a number")
        read = None
        if forms is not None:
            if not isinstance(forms, dict) or not all(isinstance(gaps, list) for gaps in forms.values()):
                raise TypeError(f"{KEY}.forms must hold lists of words by form")
            read = {form: tuple(_words(gap, "forms") for gap in gaps) for form, gaps in forms.items()}
        return cls(prompts, None if words is None else _words(words, "words"), read)

    def unfamiliar(self, prompt: str) -> str | None:
        """Say which words, or which form, of a prompt none of the training prompts has; None: all is familiar."""
        found = words_of(prompt)
        new = [word for word in dict.fromkeys(found) if self.words is not None and word not in self.words]
        faults = [f"holds {_listed(new)}"] if new else []
        form, content = split_form(found)
        if self.forms is not None and form not in self.forms:
            known = _listed([repr(each) for each in sorted(self.forms)])
            faults.append(f"has the form {form!r} (they have {known})" if found else "is without words")
        elif self.forms is not None and not new:
            strange = [word for word, gap in zip(content, self.forms[form], strict=True) if word not in gap]
            faults += [f"has {_listed(strange)} at that place of {form!r}"] if strange else []
        return f"none of the {self.prompts} prompts it was trained on {' or '.join(faults)}" if faults else None


def words_of(text: str) -> list[str]:
    """Return the words of a text in their order, in small letters: letters and digits, and signs such as emoji."""
    tokens = TOKENS.findall(unicodedata.normalize("NFKC", text).casefold())
    return [token for token in tokens if token[0].isalnum() or not unicodedata.category(token).startswith("P")]


def split_form(words: Iterable[str]) -> tuple[str, list[str]]:
    """Return the form of a prompt's words, GAP for each content word, and these."""
    content: list[str] = []
    form = []
    for word in words:
        if word in GLUE:
            form.append(ARTICLES.get(word, word))
        else:
            form.append(GAP)
            content.append(word)
    return " ".join(form), content


def _words(value: Any, name: str) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{KEY}.{name} must be lists of words")
    return frozenset(value)


def _listed(names: list[str]) -> str:
    names = [name if len(name) <= 60 else f"{name[:60]}..." for name in names]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
