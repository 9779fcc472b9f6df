"""The arithmetic of the protocols: from unit features or scores of pictures to figures of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prd.evaluation.drawing import icosphere
from prd.evaluation.protocols import VIEW_WORDS, Protocol

Features = NDArray[np.floating]  # unit, [pictures, D] or [texts, D]
LOGIT_SCALE = 100.0  # of CLIP


def candidates_of(protocol: Protocol, captions: Sequence[str], judged: Sequence[bool]) -> list[str]:
    """Return the texts that a protocol's pictures choose from, each once, in the order of the captions."""
    texts = [protocol.text(c) for c, ok in zip(captions, judged, strict=True) if ok or protocol.candidates == "all"]
    return list(dict.fromkeys(texts))


def retrieval(protocol: Protocol, pictures: Features, candidates: Features, right: int) -> dict[str, Any]:
    """Return the figures of one prompt's pictures [V, D] among candidates [T, D], `right` of which is its own.

    Each is the mean over the pictures; `views` has them for each picture.
    """
    cosine = pictures @ candidates.T  # [V, T]
    if protocol.probability:
        logits = protocol.weight * cosine.astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        values = {"r_probability": (weights / weights.sum(axis=1, keepdims=True))[:, right]}
    else:
        name = "clip_score" if protocol.cut else "cosine"
        values = {name: protocol.weight * (cosine.clip(0) if protocol.cut else cosine)[:, right]}
    values["r_at_1"] = ((cosine.clip(0) if protocol.cut else cosine).argmax(axis=1) == right).astype(np.float32)
    views = [{name: float(value[k]) for name, value in values.items()} for k in range(len(pictures))]
    return {name: float(value.mean()) for name, value in values.items()} | {"views": views}


def printed_clip_score(named: Sequence[Mapping[str, float]]) -> float:
    """Return the mean over distinct picture names, the last picture of each: what the published script prints.

    named  for each prompt in order, the scores of its pictures by their names without suffix
    """
    last: dict[str, float] = {}
    for scores in named:
        last |= scores
    return float(np.mean(list(last.values())))


def views_figures(protocol: Protocol, pictures: Features, words: Features) -> dict[str, Any]:
    """Return how well each view [V, D] is told by its own words among those of all views [V, D].

    view_score             probability of a view's own words, the least of the views
    mean_view_score        the same, mean over the views
    janus                  probability of the front's words, the largest of the other views: a second front
    front_back_similarity  cosine of the pictures of front and back: near 1 where the back shows the front again
    """
    logits = protocol.weight * (pictures @ words.T).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    share = weights / weights.sum(axis=1, keepdims=True)  # [view, words]
    own = share.diagonal()
    return {
        "view_score": float(own.min()),
        "mean_view_score": float(own.mean()),
        "janus": float(share[1:, 0].max()),
        "front_back_similarity": float(pictures[0] @ pictures[len(pictures) // 2]),
        "views": [{"words": word, "share": float(value)} for word, value in zip(VIEW_WORDS, own, strict=True)],
    }


def quality(scores: NDArray[np.floating]) -> float:
    """Return T3Bench's quality of scores [162, 5] of the views: see the protocol's formula."""
    sphere = icosphere()
    smooth = np.asarray(scores, np.float64).max(axis=1)
    for _ in range(3):
        smooth = np.array(
            [(smooth[k] + smooth[list(near)].sum()) / (len(near) + 1) for k, near in enumerate(sphere.vertex_neighbors)]
        )
    return float(smooth.max() * 20 + 50)


def auc(wrong: Sequence[float], right: Sequence[float]) -> float:
    """Return the probability that a wrong mesh has a larger value than a right one (ties count half)."""
    a, b = np.asarray(wrong)[:, None], np.asarray(right)[None]
    return float((a > b).mean() + (a == b).mean() / 2)


def frechet_distance(one: Features, other: Features) -> float:
    """Return the Frechet distance of Gaussians fitted to features [N, D] and [M, D] (FID, arXiv 1706.08500)."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    gap = one.mean(axis=0) - other.mean(axis=0)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, basis = np.linalg.eigh(a)
    root = (basis * np.sqrt(values.clip(0))) @ basis.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()  # trace of (a b)^(1/2)
    return float(gap @ gap + np.trace(a) + np.trace(b) - 2 * cross)


def kernel_distance(one: Features, other: Features, subsets: int = 100, most: int = 1000) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets."""
    generator, size = np.random.default_rng(0), min(len(one), len(other), most)
    total = 0.0
    for _ in range(subsets):
        x = other[generator.choice(len(other), size, replace=False)].astype(np.float64)
        y = one[generator.choice(len(one), size, replace=False)].astype(np.float64)
        within = (x @ x.T / x.shape[1] + 1) ** 3 + (y @ y.T / x.shape[1] + 1) ** 3
        across = (x @ y.T / x.shape[1] + 1) ** 3
        total += (within.sum() - within.trace()) / (size - 1) - across.sum() * 2 / size
    return float(total / subsets / size)
