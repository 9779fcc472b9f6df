"""Training prompts: which ones a config asks for, without those that it holds out.

corpus = load_corpus(PromptsConfig(source="toybox", held_out="fifth"))      # see `prd.data.corpora`
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from prd.data.compositional import animal2400, pig64
from prd.data.corpora import Corpus, ShuffledPrompts, check_held_out
from prd.data.prompt_files import CorpusError, check_unused, source_key, stored_prompts
from prd.data.worlds import find_world
from prd.utils.checked_types import CHECKS, Fraction, Place, Prompt, Text

__all__ = [
    *("Corpus", "CorpusError", "PromptsConfig", "ShuffledPrompts"),
    *("held_out_prompts", "load_corpus", "shuffled"),
]

SETS = {"pig64": pig64, "animal2400": animal2400}


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class PromptsConfig:
    """Settings of the prompts that a model is trained on."""

    texts: tuple[Prompt, ...] = ()  # the prompts themselves, in the place of a source and of held_out
    source: Place = "toybox"  # a benchmark, "pig64", "animal2400", a .txt .json .jsonl .csv .parquet file, or a Hub id
    column: str = "prompt"  # of a .jsonl, .csv or .parquet file or a Hub dataset
    split: str = "train"  # of a .json file of splits, a Hub dataset, "pig64" or "animal2400"
    revision: str | None = None  # branch, tag or commit of a Hub dataset
    embeddings: Place | None = None  # folder `prd embed` wrote; null: prompts are encoded in the batch
    held_out: Text | tuple[Text, ...] = ()  # prompts never trained on: texts, or the name of a rule of the benchmark
    stack_fraction: Fraction = 0.0  # toy box: probability of drawing "a .. on a .." instead of a single object
    open_fraction: Fraction = 0.0  # toy box: probability of leaving a word open, as in "a cube" and "a red toy"


def held_out_prompts(config: PromptsConfig) -> tuple[str, ...]:
    """Return the texts that a config holds out, those of a rule in the rule's order; none of `texts`.

    Raises CorpusError for a rule that the source does not have.
    """
    if config.texts:
        return ()  # they stand in the place of a source and of what is held out of it
    if not isinstance(config.held_out, str):
        return config.held_out
    world = find_world(config.source, "prompts.source")
    if world is None:
        check_source(config)  # what is wrong with the source comes first
        raise CorpusError(
            f"prompts.held_out={config.held_out!r}: {config.source} has no such rule; give a list of texts, [] for none"
        )
    if config.held_out not in (rules := world.held_out_rules()):
        raise CorpusError(
            f"prompts.held_out={config.held_out!r}: must be a list of texts, or a rule of {world.title}: "
            f"{', '.join(rules) or 'it has none'}"
        )
    return tuple(rules[config.held_out])


def check_source(config: PromptsConfig) -> None:
    """Raise CorpusError for a source that is neither a benchmark, nor shipped, nor a file, nor a Hub id."""
    if config.texts:
        check_unused(config, "prompts.texts are the prompts themselves", "column", "split", "revision")
    elif find_world(config.source, "prompts.source") is not None:
        check_unused(config, f"{config.source} is no table and no dataset", "column", "split", "revision")
    elif config.source in SETS:
        check_unused(config, f"{config.source} is no table and no dataset of the Hub", "column", "revision")
    else:
        source_key(config)


def load_corpus(config: PromptsConfig, seed: int = 0) -> Corpus:
    """Load the training prompts of a config, without those held out, in the order of a seed.

    Raises CorpusError for a source that does not exist, cannot be read or holds no prompt, an unknown column or split,
    and for a held-out prompt the corpus lacks.
    """
    check_source(config)
    if config.texts:
        return ShuffledPrompts(list(dict.fromkeys(config.texts)), seed, "prompts.texts")
    held_out = held_out_prompts(config)
    if (world := find_world(config.source, "prompts.source")) is not None:
        fractions = {"stack_fraction": config.stack_fraction, "open_fraction": config.open_fraction}
        return world.corpus(held_out, seed=seed, **fractions)
    if config.source in SETS:
        splits = SETS[config.source]()
        if config.split not in splits:
            raise CorpusError(f"prompts.split={config.split!r}: {config.source} has {', '.join(splits)}")
        known = splits[config.split]
        check_held_out(held_out, known, config.source)
        kept = [p for p in known if p not in set(held_out)]
        if not kept:
            raise CorpusError(f"prompts.source={config.source!r}: no prompt is left after prompts.held_out")
        return ShuffledPrompts(kept, seed, config.source)
    return ShuffledPrompts(stored_prompts(config), seed, config.source)
