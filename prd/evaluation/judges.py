"""Judges: what is looked at of each item, and what all of it amounts to, for each kind of protocol."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prd.errors import ConfigError
from prd.evaluation import formulas
from prd.evaluation.drawing import draw
from prd.evaluation.geometry import GOOD, measure_geometry
from prd.evaluation.inputs import PICTURES, Item
from prd.evaluation.protocols import VIEW_WORDS, Pictures, Protocol
from prd.evaluation.statistics import bootstrap_interval, weighted_mean
from prd.meshes.files import read_file_mesh
from prd.utils.arguments import expanded_path
from prd.utils.files import replace_file

if TYPE_CHECKING:
    from prd.evaluation.run import EvaluationConfig
    from prd.evaluation.scorers import FeatureScorer

logger = logging.getLogger(__name__)

FOLDER = "pictures"  # of the report
THUMBNAILS = Pictures(size=192)  # of a mesh whose geometry is measured
FEW = 2000  # pictures: below, a Frechet distance is biased (clean-fid)
Found = dict[str, Any]
Rows = list[dict[str, Any]]


class Judge:
    """A protocol at work: on an item (`look`, in any process) and on all of them (`conclude`, in one)."""

    reads_captions = False  # whether `look` depends on the caption

    def __init__(self, protocol: Protocol, config: EvaluationConfig, output: Path) -> None:
        self.protocol, self.config, self.output = protocol, config, output

    @property
    def model(self) -> str | None:
        return None

    @property
    def digest(self) -> str:
        return ""

    def look(self, item: Item, key: str) -> Found:
        """Return what is found of an item, plain values; raises ValueError for one that cannot be judged."""
        raise NotImplementedError

    def conclude(self, items: Sequence[Item], found: Sequence[Found]) -> tuple[Rows, dict[str, Any]]:
        """Return a row per item and the figures of the summary."""
        raise NotImplementedError


class GeometryJudge(Judge):
    """Measures meshes, without a model."""

    def look(self, item: Item, key: str) -> Found:
        if item.mesh is None:
            raise ValueError(f"{item.file}: geometry needs a mesh, and this is a folder of pictures or a picture")
        mesh = read_file_mesh(item.mesh, up=self.config.up)
        found: Found = {"figures": measure_geometry(mesh)}
        names = [f"{FOLDER}/{key}_{k}.png" for k in range(len(THUMBNAILS.azimuths))]
        for name, image in zip(names, draw(mesh, THUMBNAILS), strict=True):
            save_picture(self.output / name, image)
        return found | {"pictures": names}

    def conclude(self, items: Sequence[Item], found: Sequence[Found]) -> tuple[Rows, dict[str, Any]]:
        rows = [row_of(item, one, one.get("figures", {})) for item, one in zip(items, found, strict=True)]
        judged = [row for row in rows if "error" not in row]
        figures: dict[str, Any] = {}
        intervals: dict[str, Any] = {}
        for name in [] if not judged else [k for k in judged[0] if k not in ("file", "caption", FOLDER)]:
            values = [float(row[name]) for row in judged if row[name] is not None]
            figures[name] = weighted_mean(values) if values else None
            intervals[name] = bootstrap_interval(values)
        if judged:
            clean = [float(row["self_intersections"] == 0) for row in judged]
            figures[GOOD[-1]], intervals[GOOD[-1]] = weighted_mean(clean), bootstrap_interval(clean)
        return rows, figures | ({"intervals": intervals} if judged else {})


class ClipJudge(Judge):
    """The base of all judges with a CLIP: its loading, and the pictures of an item."""

    def __init__(self, protocol: Protocol, config: EvaluationConfig, output: Path) -> None:
        from prd.evaluation.scorers import load_scorer

        super().__init__(protocol, config, output)
        place = config.clip or protocol.model
        if place is None:
            raise ConfigError(f"clip: {protocol.name} takes any scorer and names none; give one")
        self.scorer: FeatureScorer = load_scorer(
            place, config.device, half_on_cuda=protocol.half_on_cuda, features=protocol.measure != "quality"
        )

    @property
    def model(self) -> str | None:
        return self.scorer.name

    @property
    def digest(self) -> str:
        return self.scorer.digest

    def pictures(self, item: Item, key: str) -> tuple[list[Image.Image], list[str]]:
        """Return the pictures of an item, drawn if they are not kept already, and their places for the page."""
        settings = self.protocol.pictures
        assert settings is not None
        if item.mesh is None:
            return [self._checked(path, settings, item) for path in self._counted(item, settings)], [
                path.absolute().as_posix() for path in item.pictures
            ]
        names = [f"{FOLDER}/{picture_key(item, settings, self.config.up)}_{k}.png" for k in range(_count(settings))]
        places = [self.output / name for name in names]
        if not all(place.is_file() for place in places):
            mesh = read_file_mesh(item.mesh, up=self.config.up)
            for place, image in zip(places, draw(mesh, settings), strict=True):
                save_picture(place, image)
        return [_opened(place) for place in places], names

    def _counted(self, item: Item, settings: Pictures) -> Sequence[Path]:
        count = _count(settings)
        if self.protocol.fixed_views and len(item.pictures) != count:
            raise ValueError(
                f"{item.file}: {len(item.pictures)} pictures, and {self.protocol.name} judges {count} views"
            )
        return item.pictures

    def _checked(self, path: Path, settings: Pictures, item: Item) -> Image.Image:
        picture = _opened(path)
        if picture.size != (settings.size, settings.size):
            raise ValueError(
                f"{item.file}: {path.name} is {picture.size[0]}x{picture.size[1]}, and {self.protocol.name} judges "
                f"pictures of {settings.size}x{settings.size}"
            )
        if self.protocol.alpha == "composited" and picture.has_transparency_data:
            grey = round(255 * settings.background)
            back = Image.new("RGBA", picture.size, (grey, grey, grey, 255))
            return Image.alpha_composite(back, picture.convert("RGBA")).convert("RGB")
        return picture

    def look(self, item: Item, key: str) -> Found:
        images, places = self.pictures(item, key)
        features = self.scorer.image_features(images, self.protocol.resize)
        names = (
            [Path(place).stem for place in places] if item.mesh is None else [f"rgb_{k}" for k in range(len(places))]
        )
        return {"features": packed(features), "pictures": places, "names": names}

    def aggregate(self, rows: Rows, names: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
        """Return the means of figures over prompts or pictures and their intervals; a miss counts as 0."""
        figures: dict[str, Any] = {}
        intervals: dict[str, Any] = {}
        for name in names:
            kept = [k for k, row in enumerate(rows) if "error" not in row or self.protocol.failures == "miss"]
            if not kept or all("error" in row for row in rows):
                continue
            values = [float(rows[k].get(name, 0.0)) for k in kept]
            weights = [counts[k] for k in kept] if self.protocol.average == "pictures" else None
            figures[name], intervals[name] = weighted_mean(values, weights), bootstrap_interval(values, weights)
        return figures | ({"intervals": intervals} if intervals else {})


class RetrievalJudge(ClipJudge):
    """Pictures among captions."""

    def conclude(self, items: Sequence[Item], found: Sequence[Found]) -> tuple[Rows, dict[str, Any]]:
        captions = [item.caption for item in items]
        asked = [*captions, *(query for query in self.config.queries if query not in set(captions))]
        judged = ["error" not in one for one in found] + [True] * (len(asked) - len(captions))
        texts = formulas.candidates_of(self.protocol, asked, judged)
        features = self.scorer.text_features(texts) if texts else np.zeros((0, 1), np.float32)
        index = {text: k for k, text in enumerate(texts)}
        rows, counts = [], []
        for item, one in zip(items, found, strict=True):
            figures: dict[str, Any] = {}
            if "error" not in one:
                right = index[self.protocol.text(item.caption)]
                figures = formulas.retrieval(self.protocol, _array(one), features, right)
            rows.append(row_of(item, one, figures))
            counts.append(len(one.get("pictures", ())))
        names = ["r_probability", "r_at_1"] if self.protocol.probability else [_score_name(self.protocol), "r_at_1"]
        summary: dict[str, Any] = {"candidates": len(texts)} | self.aggregate(rows, names, counts)
        if self.protocol.name == "prd-code" and any("error" not in row for row in rows):
            named = [
                {name: view["clip_score"] for name, view in zip(one["names"], row["views"], strict=True)}
                for one, row in zip(found, rows, strict=True)
                if "error" not in row
            ]
            summary["clip_score_printed"] = formulas.printed_clip_score(named)
        return rows, summary


class ViewsJudge(ClipJudge):
    """Each view among the words of all views."""

    def conclude(self, items: Sequence[Item], found: Sequence[Found]) -> tuple[Rows, dict[str, Any]]:
        rows = []
        for item, one in zip(items, found, strict=True):
            figures: dict[str, Any] = {}
            if "error" not in one:
                words = self.scorer.text_features([self.protocol.text(item.caption, word) for word in VIEW_WORDS])
                figures = formulas.views_figures(self.protocol, _array(one), words)
            rows.append(row_of(item, one, figures))
        names = ["view_score", "mean_view_score", "janus", "front_back_similarity"]
        return rows, self.aggregate(rows, names[:2], []) | self._janus(rows, names[2:])

    @staticmethod
    def _janus(rows: Rows, names: Sequence[str]) -> dict[str, Any]:
        """Means over judged prompts: a failure has no second front."""
        judged = [row for row in rows if "error" not in row]
        return {name: weighted_mean([row[name] for row in judged]) for name in names} if judged else {}


class QualityJudge(ClipJudge):
    """T3Bench's quality, by any scorer."""

    reads_captions = True

    def look(self, item: Item, key: str) -> Found:
        settings = self.protocol.pictures
        assert settings is not None
        if item.mesh is None:
            raise ValueError(f"{item.file}: {self.protocol.name} draws {_count(settings)} views and needs a mesh")
        mesh = read_file_mesh(item.mesh, up=self.config.up)
        scores: list[NDArray[np.float32]] = []
        best, batch = (-np.inf, np.zeros((1, 1, 3), np.uint8)), list[NDArray[np.uint8]]()
        for image in draw(mesh, settings):
            batch.append(image)
            if len(batch) == 90:  # a divisor of 810
                scores.append(self.scorer.score(batch, [item.caption])[:, 0])
                top = int(scores[-1].argmax())
                best = max(best, (float(scores[-1][top]), batch[top]), key=lambda pair: pair[0])
                batch = []
        name = f"{FOLDER}/{key}_best.png"
        save_picture(self.output / name, best[1])
        shape = (-1, len(settings.fovys))
        return {"quality": formulas.quality(np.concatenate(scores).reshape(shape)), "pictures": [name]}

    def conclude(self, items: Sequence[Item], found: Sequence[Found]) -> tuple[Rows, dict[str, Any]]:
        rows, values = [], []
        assert self.protocol.pictures is not None
        black = np.zeros((self.protocol.pictures.size, self.protocol.pictures.size, 3), np.uint8)
        for item, one in zip(items, found, strict=True):
            rows.append(row_of(item, one, {"quality": one["quality"]} if "error" not in one else {}))
            failed = "error" in one
            values.append(
                float(self.scorer.score([black], [item.caption])[0, 0]) * 20 + 50 if failed else one["quality"]
            )
            if failed:
                rows[-1]["quality_of_black"] = values[-1]
        if all("error" in row for row in rows):
            return rows, {}
        return rows, {"quality": weighted_mean(values), "intervals": {"quality": bootstrap_interval(values)}}


class DistanceJudge(ClipJudge):
    """The distance of all pictures from a folder of reference pictures, in features of the model."""

    def __init__(self, protocol: Protocol, config: EvaluationConfig, output: Path) -> None:
        super().__init__(protocol, config, output)
        folder = expanded_path(config.reference or "", "reference")
        self.references = (
            sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES) if folder.is_dir() else []
        )
        if len(self.references) < 2:
            raise ConfigError(f"reference={str(folder)!r}: must be a folder with at least two pictures")

    def conclude(self, items: Sequence[Item], found: Sequence[Found]) -> tuple[Rows, dict[str, Any]]:
        rows = [row_of(item, one, {}) for item, one in zip(items, found, strict=True)]
        made = [_array(one) for one in found if "error" not in one]
        if not made:
            return rows, {}
        features = np.concatenate(made)
        reference = self.scorer.image_features([_opened(path) for path in self.references], self.protocol.resize)
        for name, count in (("rendered", len(features)), ("reference", len(reference))):
            if count < FEW:
                logger.warning("%s: %d %s pictures are under %d: biased", self.protocol.name, count, name, FEW)
        distance = formulas.frechet_distance if self.protocol.measure == "fid" else formulas.kernel_distance
        name = "fid" if self.protocol.measure == "fid" else "kid"
        counts = {"pictures": len(features), "reference_pictures": len(reference)}
        return rows, {name: distance(features, reference), **counts, "few_pictures": min(counts.values()) < FEW}


JUDGES: dict[str, type[Judge]] = {
    "geometry": GeometryJudge,
    "retrieval": RetrievalJudge,
    "views": ViewsJudge,
    "quality": QualityJudge,
    "fid": DistanceJudge,
    "kid": DistanceJudge,
}


def judge_of(protocol: Protocol, config: EvaluationConfig, output: Path) -> Judge:
    """Return what judges by a protocol; ConfigError or ModelMismatch where its model cannot be loaded."""
    return JUDGES[protocol.measure](protocol, config, output)


def row_of(item: Item, found: Found, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an item in the report."""
    row: dict[str, Any] = {"file": item.file, "caption": item.caption}
    if "error" in found:
        return row | {"error": found["error"]}
    return row | figures | {FOLDER: found.get("pictures", [])}


def save_picture(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a picture [H, W, 3], whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda aside: Image.fromarray(image).save(aside, format="png", compress_level=1))


def picture_key(item: Item, settings: Pictures, up: str | None) -> str:
    """Return the name of an item's pictures: by the contents of its files and how they are drawn."""
    return hashlib.sha256(f"{item.digest()} {settings} {up}".encode()).hexdigest()[:32]


def _count(settings: Pictures) -> int:
    return 162 * len(settings.fovys) if settings.sphere else len(settings.azimuths)


def _opened(path: Path) -> Image.Image:
    """A picture in memory; ValueError for a file that is none."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name}: cannot be read as a picture ({type(error).__name__}: {error})") from None


def packed(features: NDArray[np.float32]) -> dict[str, Any]:
    """Return an array as plain values that are small and exact."""
    data = np.ascontiguousarray(features, "<f4")
    return {"shape": list(data.shape), "float32": base64.b64encode(data.tobytes()).decode("ascii")}


def _array(found: Found) -> NDArray[np.float32]:
    kept = found["features"]
    return np.frombuffer(base64.b64decode(kept["float32"]), "<f4").reshape(kept["shape"])


def _score_name(protocol: Protocol) -> str:
    return "clip_score" if protocol.cut else "cosine"
