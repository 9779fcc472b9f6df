"""Scorers: how well each picture fits each text, by a model of anyone's.

    scorer = load_scorer("openai/clip-vit-base-patch32")          # transformers: a folder or a Hub id
    scorer = load_scorer("open_clip:ViT-B-32/laion2b_s34b_b79k")  # open_clip: a model, and a tag or a file of weights
    scorer.score(images, texts)                                   # [images, texts]

Pictures are resized by Pillow alone, so that transformers' CLIP needs no torchvision; open_clip is in the extra `eval`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prd.errors import ConfigError, ModelMismatch
from prd.hub.shipped import HUB_ID, shipped, shipped_names
from prd.loading.weight_hashes import weights_hash
from prd.utils.arguments import expanded_path
from prd.utils.imports import load_class

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
OPEN_CLIP = "open_clip:"
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
BATCH = 64  # pictures or texts at a time
Resize = Literal["bicubic", "bilinear"]
Images = Sequence[Image.Image | NDArray[np.uint8]]


@runtime_checkable
class Scorer(Protocol):
    """A judge of pictures by texts."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Return a hash of its weights."""
        ...

    def score(self, images: Images, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return [images, texts]: higher where a picture fits a text better."""
        ...


class ClipScorer:
    """A CLIP: the cosine between features of pictures and texts.

    A subclass gives `module`, `encode_images` of pixels [N, 3, S, S] and `encode_texts`; both return [N, D].
    """

    name: str
    module: torch.nn.Module
    size: int  # height and width of its pictures, pixels
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def encode_images(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_texts(self, texts: list[str]) -> Tensor:
        raise NotImplementedError

    @cached_property
    def digest(self) -> str:
        """Hash of its weights, rounded to bfloat16."""
        return weights_hash(dict(self.module.state_dict()))["bfloat16"][:16]

    @property
    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(p for p in self.module.parameters() if p.is_floating_point())
        return weight.device, weight.dtype

    @torch.no_grad()
    def image_features(self, images: Images, resize: Resize = "bicubic") -> NDArray[np.float32]:
        """Return unit features [N, D] of pictures of any size; resize: see `pixels_of`."""
        device, dtype = self._place
        parts = []
        for start in range(0, len(images), BATCH):
            arrays = [pixels_of(image, self.size, resize) for image in images[start : start + BATCH]]
            mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device="cpu")
            pixels = (torch.from_numpy(np.stack(arrays)) - mean) / std
            parts.append(self.encode_images(pixels.permute(0, 3, 1, 2).contiguous().to(device, dtype)).float().cpu())
        return _unit(torch.cat(parts))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit features [N, D] of texts; what is longer than the model reads is cut off."""
        parts = [
            self.encode_texts(list(texts[start : start + BATCH])).float().cpu() for start in range(0, len(texts), BATCH)
        ]
        return _unit(torch.cat(parts))

    def score(self, images: Images, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the cosines [images, texts]."""
        return self.image_features(images) @ self.text_features(texts).T


class TransformersClip(ClipScorer):
    """CLIP of transformers, from a folder or the Hub; ModelMismatch for what is no whole CLIP."""

    def __init__(self, place: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model, info = CLIPModel.from_pretrained(
                place, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=False
            )
            tokenizer = CLIPTokenizer.from_pretrained(place)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelMismatch(
                f"clip={place!r}: cannot be loaded as transformers' CLIP ({type(error).__name__}: {reason}); give a "
                "folder with config.json, model.safetensors and its tokenizer, or a Hub id"
            ) from None
        if missing := sorted(info["missing_keys"]):
            raise ModelMismatch(f"clip={place!r}: lacks {len(missing)} weights of a CLIP, as {missing[0]}")
        self.name, self.module, self.tokenizer = place, model.to(device).eval(), tokenizer
        self.size, self.limit = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
        settings = Path(place) / "preprocessor_config.json"
        if settings.is_file():
            found = json.loads(settings.read_text(encoding="utf-8"))
            self.mean, self.std = tuple(found.get("image_mean", MEAN)), tuple(found.get("image_std", STD))

    def encode_images(self, pixels: Tensor) -> Tensor:
        found: Any = self.module.get_image_features(pixel_values=pixels)  # type: ignore[operator]
        return getattr(found, "pooler_output", found)

    def encode_texts(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        found: Any = self.module.get_text_features(**batch.to(self._place[0]))  # type: ignore[operator]
        return getattr(found, "pooler_output", found)


class OpenClip(ClipScorer):
    """A model of open_clip with the weights of a tag, or of a file on this disk; ConfigError for what is not there."""

    def __init__(self, place: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        try:
            import open_clip
        except (ImportError, RuntimeError, OSError) as error:  # the second: of a torchvision that does not fit torch
            raise ConfigError(
                f"clip={place!r}: open_clip cannot be imported ({error}); install the extra `eval`, with a torchvision "
                "that fits torch, or give a folder or Hub id of transformers' CLIP"
            ) from None
        model, _, weights = place.removeprefix(OPEN_CLIP).partition("/")
        if model not in open_clip.list_models():
            raise ConfigError(f"clip={place!r}: open_clip has no model {model!r}; see open_clip.list_models()")
        tags, file = open_clip.list_pretrained_tags_by_model(model), expanded_path(weights or ".", "clip")
        if weights not in tags and not file.is_file():
            raise ConfigError(
                f"clip={place!r}: {weights!r} is no file and no tag of {model}; it has {', '.join(tags) or 'none'}"
            )
        try:
            self.module, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=weights if weights in tags else str(file), device=device
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelMismatch(f"clip={place!r}: cannot be loaded ({type(error).__name__}: {reason})") from None
        self.module = self.module.to(dtype).eval()
        self.name, self.tokenizer = place, open_clip.get_tokenizer(model)
        visual: Any = self.module.visual
        size = visual.image_size
        self.size = size[0] if isinstance(size, tuple) else size
        self.mean, self.std = tuple(visual.image_mean or MEAN), tuple(visual.image_std or STD)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.module.encode_image(pixels)  # type: ignore[operator]

    def encode_texts(self, texts: list[str]) -> Tensor:
        return self.module.encode_text(self.tokenizer(texts).to(self._place[0]))  # type: ignore[operator]


@runtime_checkable
class FeatureScorer(Scorer, Protocol):
    """A scorer with unit features of pictures and texts, whose products are its scores; `ClipScorer` is one."""

    def image_features(self, images: Images, resize: Resize = "bicubic") -> NDArray[np.float32]: ...

    def text_features(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


def load_scorer(place: str, device: str | None = None, *, half_on_cuda: bool = False, features: bool = True) -> Any:
    """Return the scorer that a place names.

    place     "open_clip:MODEL/TAG_OR_FILE", a shipped name, a folder or Hub id of transformers' CLIP, or an import path
              of a class of one's own, which is made without arguments
    device    default: cuda where there is one
    features  whether it must be a `FeatureScorer`, as protocols with candidates need, or any `Scorer`

    Raises ConfigError or ModelMismatch, in one sentence, for one that is not there or cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if half_on_cuda and device.startswith("cuda") else torch.float32
    if place.startswith(OPEN_CLIP):
        return OpenClip(place, device, dtype)
    path = shipped(place, "clip") or expanded_path(place, "clip")
    if not path.is_dir() and IMPORT_PATH.fullmatch(place):
        return load_class(place, FeatureScorer if features else Scorer, key="clip")()
    if not path.is_dir() and not HUB_ID.fullmatch(place):
        names = shipped_names("clip")
        raise ConfigError(
            f"clip={place!r}: is no folder, no Hub id owner/name, no {OPEN_CLIP}MODEL/TAG_OR_FILE and no "
            "import path; " + (f"these ship: {', '.join(names)}" if names else "no CLIP ships with the package")
        )
    scorer = TransformersClip(str(path) if path.is_dir() else place, device, dtype)
    if shipped(place, "clip"):
        scorer.name = f"the CLIP of {place}"
    return scorer


def pixels_of(image: Image.Image | NDArray[np.uint8], size: int, resize: Resize = "bicubic") -> NDArray[np.float32]:
    """Return a picture as pixels [size, size, 3] in [0, 1].

    resize  "bicubic": the shorter side to `size`, then the middle, as CLIP does; "bilinear": the square at the left
            of the picture's height, then to `size`. Alpha is dropped.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    width, height = picture.size
    if resize == "bilinear":
        picture = picture.convert("RGB").crop((0, 0, height, height)).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture, np.float32) / np.float32(255)
    picture = picture.convert("RGB") if picture.mode not in ("RGB", "RGBA") else picture
    short = min(width, height)
    scaled = (int(size * width / short), int(size * height / short))
    picture = picture if scaled == (width, height) else picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"), np.float32) / np.float32(255)


def _unit(features: Tensor) -> NDArray[np.float32]:
    return (features / features.norm(dim=1, keepdim=True)).numpy()
