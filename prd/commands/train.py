"""`prd train`: a run of a recipe, or what it would need."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

DRY_RUN, REHEARSE = ("--dry-run", "--dry_run"), ("--rehearse",)

TRAIN_HELP = """usage: prd train [--dry-run | --rehearse] [--config RECIPE_OR_YAML] [--section.key VALUE ...]

Every value of the configuration can be set by its dotted name; without options the default recipe is trained.
Text is taken as it is, lists of texts are written in brackets, "[a red cube, a mug]", and all other values are YAML.
A recipe's max_train_minutes fits steps and schedules to them; --max_train_steps alone is a fixed number of steps.
--dry-run loads and writes nothing: it prints what the run needs (memory, hours, disk) and what is missing.
--rehearse takes two steps, saves, resumes, shows and measures, in OUTPUT_DIR-rehearsal, which is removed if all passed.
Common ones: --output_dir, --max_train_steps, --seed, --mixed_precision, --resume_from_checkpoint latest, --report_to.
The keys and their defaults (recipes change them):
"""


def run_train(overrides: Sequence[str]) -> int:
    """Train by the words of a command line; returns the exit status."""
    from prd.training.recipes import parse_args, shipped_recipes

    if {"-h", "--help"} & set(overrides):
        from prd.training.config import TrainConfig
        from prd.training.recipes import dump_config

        print(f"{TRAIN_HELP}\n{dump_config(TrainConfig())}\nrecipes: {', '.join(shipped_recipes())}")
        return 0
    from prd.errors import ConfigError, PrdError

    words = [word for word in overrides if word not in (*DRY_RUN, *REHEARSE)]
    try:
        config = parse_args(words)
        if set(DRY_RUN) & set(overrides):
            from prd.training.estimate.report import dry_run

            print(dry_run(config))
            return 0
        if set(REHEARSE) & set(overrides):
            from prd.training.run.rehearsal import rehearse

            if (report := rehearse(config)) is not None:
                print(report)
            return 0
        from prd.training.run.folder import check_run

        check_run(config)
        if os.environ.get("RANK", "0") == "0":
            from prd.training.command_line import split_config
            from prd.training.run.resume import departures

            print(departures(config, split_config(words)[0]))
        from prd.training.objective import CollapseError
        from prd.training.trainer import Trainer

        try:
            Trainer(config).train()
        except (CollapseError, FloatingPointError) as error:
            raise ConfigError(str(error)) from error
    except (ValueError, OSError, PrdError) as error:  # ConfigError, CheckpointError, ModelMismatch, a missing file
        print(f"prd train: {error}", file=sys.stderr)
        return 2
    return 0
