"""The networks of a run without memory, on the meta device: from configs on this machine, else as published.

The architectures of Stable Diffusion 1.5, 2.1 and XL, of diffusion transformers (`transformers`), MVDream, MV-Adapter
on 2.1 and RichDreamer are known: what is not here yet is built by them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prd.generators.triplane_turbo import TriplaneTurboConfig, TriplaneTurboModel
from prd.hub.shipped import HUB_ID, shipped
from prd.loading.single_file import SingleFile
from prd.loading.stable_diffusion import Base
from prd.loading.strict import build
from prd.loading.transformer_bases import SD3, TransformerKind
from prd.loading.weights import read_object
from prd.teachers.base import TeacherConfig, TeacherOptions, UNetTeacher
from prd.teachers.convert import WIDTHS, stable_diffusion_scheduler
from prd.teachers.loading import CONFIG_NAME, read_config, shared_folder
from prd.teachers.multiview import CAMERA_DIMENSIONS
from prd.teachers.mv_adapter import MVAdapterTeacher, adapted_layers
from prd.teachers.mvdream import MVDreamConfig, MVDreamTeacher
from prd.teachers.richdreamer import RichDreamerConfig, RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.text.sdxl import TwoTextEncoders
from prd.training.estimate.transformers import (
    VAE_16,
    meta_texts,
    published_texts,
    published_transformer,
    rows_and_width,
    texts_in,
    transformer_in,
)
from prd.utils.arguments import has_suffix

CAMERA = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": CAMERA_DIMENSIONS}
SD21 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SD15 = {"attention_head_dim": 8, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VOCABULARY = 49408  # of CLIP's tokenizer
TEACHERS: dict[Any, Any] = {MVDreamTeacher: MVDreamConfig, RichDreamerTeacher: RichDreamerConfig}


@dataclass(frozen=True)
class Architecture:
    """Configs of a Stable Diffusion's or a teacher's parts: a folder's config.json, or settings as published.

    unet    of the U-Net, or of the transformer of this `kind`
    text    of the text encoder, a pair of Stable Diffusion XL's two, or all of a transformer's
    source  where they are from: "config.json", or "as published"
    """

    unet: Any
    vae: Any
    text: Any
    source: str = "as published"
    kind: TransformerKind | None = None

    @property
    def text_width(self) -> int:
        """Channels of a prompt's embedding that the transformer takes."""
        assert self.kind is not None
        config = read_object(self.unet / "config.json") if isinstance(self.unet, Path) else self.unet
        return config[self.kind.text_width]


def published(context: int, camera: bool = False) -> Architecture:
    """Stable Diffusion 2.1-base (context 1024) or 1.5 (768); with cameras, MVDream's or RichDreamer's U-Net."""
    sizes, text = (SD21, VIT_H) if context == 1024 else (SD15, VIT_L)
    unet = {"block_out_channels": WIDTHS, "sample_size": 32 if camera else 64, **sizes, **(CAMERA if camera else {})}
    return Architecture(unet, VAE, CLIPTextConfig(vocab_size=VOCABULARY, **text))


def published_xl() -> Architecture:
    """Stable Diffusion XL 1.0."""
    return Architecture(SDXL, VAE, _xl_texts())


def _xl_texts() -> tuple[CLIPTextConfig, CLIPTextConfig]:
    large, larger = VIT_L | {"projection_dim": 768}, BIG_G | {"projection_dim": 1280}
    return CLIPTextConfig(vocab_size=VOCABULARY, **large), CLIPTextConfig(vocab_size=VOCABULARY, **larger)


def folder_of(place: str, part: str = "base") -> Path | None:
    """The folder of a model that is on this machine: shipped, a folder, or a Hub id in the Hub's cache."""
    if (found := shipped(place, part)) is not None:
        return found
    if Path(place).is_dir():
        return Path(place)
    if HUB_ID.fullmatch(place):
        cached = [try_to_load_from_cache(place, f"{part}/config.json") for part in ("unet", "transformer")]
        if there := [path for path in cached if isinstance(path, str)]:
            return Path(there[0]).parent.parent
    return None


def base_architecture(place: str) -> Architecture:
    """The parts of a Stable Diffusion: of its folder or file, else those of its published version by its name."""
    if has_suffix(Path(place), ".safetensors") and Path(place).is_file():
        file = SingleFile(Path(place))
        return replace(published(file.context), source="the file's header")
    folder = folder_of(place)
    if folder is not None and (kind := transformer_in(folder)) is not None:
        return Architecture(folder / "transformer", folder / "vae", texts_in(kind, folder), "config.json", kind)
    if folder is not None:
        unet, vae, text = (folder / part for part in ("unet", "vae", "text_encoder"))
        if all((part / "config.json").is_file() for part in (unet, vae, text)):
            second = folder / "text_encoder_2"
            texts = (text, second) if (second / "config.json").is_file() else text
            return Architecture(unet, vae, texts, "config.json")
    if (known := published_transformer(place)) is not None:
        kind, config = known
        sizes = {**VAE, **VAE_16} if kind is SD3 else VAE
        return Architecture(config, sizes, published_texts(kind, _xl_texts()), kind=kind)
    if "xl" in Path(place).name.lower():
        return published_xl()
    is_first = any(version in place.lower() for version in ("v1-", "1-5", "1.5", "v1.", "sd15"))
    return published(768 if is_first else 1024)


def meta_text_encoder(architecture: Architecture) -> Any:
    """The text encoder without memory; of several all as one module, as of XL."""
    config = architecture.text
    if architecture.kind is not None:
        return meta_texts(config, architecture.text_width)
    if isinstance(config, tuple):
        return TwoTextEncoders(build(CLIPTextModel, config[0]), build(CLIPTextModelWithProjection, config[1]))
    return build(CLIPTextModel, config)


def embedding_shape(text: Any) -> tuple[int, int]:
    """Rows and channels of a prompt's embedding by a text encoder."""
    if (found := rows_and_width(text)) is not None:
        return found
    length = text.config.max_position_embeddings
    return (length + 1, text.width) if isinstance(text, TwoTextEncoders) else (length, text.config.hidden_size)


def meta_student(config: TriplaneTurboConfig, architecture: Architecture, num_denoising_steps: int) -> Any:
    """The model that a run trains, without memory."""
    kind, vae = architecture.kind, build(AutoencoderKL, architecture.vae)
    network = build(UNet2DConditionModel if kind is None else kind.network, architecture.unet)
    torch.nn.Module.to(network, "meta")  # tables of positions are made with values
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0) if kind is SD3 else stable_diffusion_scheduler()
    base = Base(config.base, network, vae, scheduler, None)
    with torch.device("meta"):
        return TriplaneTurboModel.from_base(base, config, num_denoising_steps)


@dataclass(frozen=True)
class MetaTeacher:
    """A teacher without memory, and what identifies its text encoder: two of one text and dtype share it."""

    teacher: UNetTeacher
    text: str
    source: str


def meta_teacher(kind: Any, config: TeacherConfig, options: TeacherOptions, dtype: torch.dtype) -> MetaTeacher | None:
    """A teacher of the library's without memory; None for Stable Diffusion XL's and for any other class."""
    if kind not in (StableDiffusionTeacher, MVAdapterTeacher, *TEACHERS):
        return None
    owner = StableDiffusionTeacher if kind is MVAdapterTeacher else kind  # of the folder
    place, folder = config.path, folder_of(config.path, owner.name)
    settings = TEACHERS[kind]() if kind in TEACHERS else None
    if folder is None or not (folder / "unet/config.json").is_file():
        context = 1024 if kind is MVDreamTeacher else 768
        parts = base_architecture(place) if settings is None else published(context, camera=True)
        text = "ViT-H" if parts.text.hidden_size == VIT_H["hidden_size"] else "ViT-L"
    else:
        if settings is not None and (folder / CONFIG_NAME).is_file():
            settings = read_config(str(folder), type(settings))
        base = shared_folder(str(folder), getattr(settings, "base", None))
        shared = base_architecture(base) if base else None
        shares_vae = getattr(settings, "shares_vae", False)
        text_config = shared.text if shared else folder / "text_encoder"
        vae = shared.vae if shared and shares_vae else folder / "vae"
        parts = Architecture(folder / "unet", vae, text_config, "config.json")
        text = str(Path(base).resolve() if base and Path(base).exists() else base or folder.resolve())
    unet, encoder = build(UNet2DConditionModel, parts.unet), meta_text_encoder(parts)
    own: dict[str, Any] = {"unet": unet, "scheduler": stable_diffusion_scheduler(), "tokenizer": None}
    own |= {"text_encoder": encoder} | ({} if settings is None else {"config": settings})
    if kind is not RichDreamerTeacher:
        vae = build(AutoencoderKL, parts.vae)
        vae.decoder = vae.post_quant_conv = None  # as loading does
        own |= {"vae": vae, "checkpoint_vae": options.checkpoint_vae}
    if kind is MVAdapterTeacher:
        own["condition_encoder"] = kind.make_encoder(unet)
        adapted_layers(unet, own["condition_encoder"])
    teacher = kind(**own).to(device="meta", dtype=dtype)
    return MetaTeacher(teacher, text, parts.source)
