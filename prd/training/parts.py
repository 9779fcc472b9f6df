"""The parts of a training run: what `Trainer` steps, made from the config or given by the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from prd.data.embeddings import Embeddings
from prd.data.prompts import Corpus, load_corpus
from prd.data.shape_library import ShapeLibrary, open_library
from prd.evaluation.benchmark import Benchmark, resolve_benchmark
from prd.generators.single_pass import SinglePassGenerator
from prd.teachers.base import Teacher, UNetTeacher
from prd.teachers.offload import set_offload
from prd.text.encoders import PromptEncoder
from prd.training.build import build_generator, load_teachers, shared_encoder
from prd.training.config import TrainConfig


@dataclass
class Parts:
    """What a run trains and what it is trained by.

    model         the network, of which some parts are trained
    text_encoder  makes the embeddings [B, L, Ct] that the model is given
    corpus        the prompts
    teachers      by name, frozen
    library       of 3D shapes, for a model that takes point clouds; None without
    benchmark     measures what the model makes of its captions; None: nothing does
    """

    model: Any
    text_encoder: PromptEncoder
    corpus: Corpus
    teachers: dict[str, Teacher] = field(default_factory=dict)
    library: ShapeLibrary | None = None
    benchmark: Benchmark | None = None

    def to(self, device: torch.device, *, offload: bool = False) -> Parts:
        """Move every part to a device; offload: teachers stay in main memory between their calls."""
        self.model.to(device)
        for teacher in self.teachers.values():
            if isinstance(teacher, torch.nn.Module):
                set_offload(teacher) if offload else teacher.to(device)
        self.text_encoder.model.to(device)
        return self


def build_parts(config: TrainConfig, device: torch.device | str = "cpu") -> Parts:
    """The parts that a config describes, on a device."""
    device = torch.device(device)
    corpus = load_corpus(config.prompts, config.seed)
    embeddings = None if config.prompts.embeddings is None else Embeddings(config.prompts.embeddings)
    if embeddings is not None:
        embeddings.check_covers(corpus.prompts)
    model, encoder = build_generator(config)
    model.to(device)
    teachers = load_teachers(config)
    if isinstance(model, SinglePassGenerator) and not config.teacher_options.offload:
        encoder = shared_encoder(encoder, list(teachers.values()))
    parts = Parts(model, encoder, corpus, teachers).to(device, offload=config.teacher_options.offload)
    if embeddings is not None:
        parts.text_encoder = embeddings.encoder(encoder, "student")
        for teacher in teachers.values():
            if isinstance(teacher, UNetTeacher):
                teacher.prompt_encoder = embeddings.encoder(teacher.prompt_encoder, teacher.name)
    parts.benchmark = resolve_benchmark(config.benchmark, config.prompts.source)
    parts.library = open_library(config.library, parts.text_encoder, model)
    return parts
