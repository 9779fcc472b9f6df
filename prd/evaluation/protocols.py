"""The protocols of the field by name, each a frozen record of everything that moves its numbers.

What stands here was read from the published scripts and papers named in `source`; two that differ in one entry are two
protocols, and their numbers never stand in one column. `PROTOCOLS` is all of them by name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prd.errors import ConfigError

VIT_B_32, VIT_L_14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
FOUR = (0.0, 90.0, 180.0, 270.0)
VIEW_WORDS = ("front", "left side", "back", "right side")  # of FOUR: azimuth 90 is the +Y side


@dataclass(frozen=True)
class Pictures:
    """The way a mesh is drawn: the rasteriser of `prd.rendering`, unlit, one sample per pixel."""

    elevation: float = 15.0  # degrees
    azimuths: tuple[float, ...] = FOUR  # degrees, 0 before the front
    size: int = 512  # pixels, height and width
    fovy: float = 50.0  # degrees
    distance: float = 3.0  # of the camera from the origin
    normalisation: Literal["box", "mean"] = "box"  # centre of the box, or mean of the vertices, to the origin
    extent: float = 0.9  # largest coordinate after it
    background: float = 1.0  # grey value in [0, 1]
    light: str = "none"
    renderer: str = "prd rasteriser"
    sphere: bool = False  # cameras on the 162 vertices of an icosphere in the place of elevation and azimuths
    fovys: tuple[float, ...] = ()  # several fields of view of each camera, degrees


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a protocol's numbers, beside the weights of its model.

    measure      what is computed: "geometry" (no model), "retrieval" (pictures among captions), "views" (pictures among
                 view words), "quality" (any scorer on a sphere of views), "fid" or "kid" (against other pictures)
    template     of a caption's text; deleted: characters taken out of captions first; replaced: underscores are spaces
    model        the CLIP that the source names; None for none
    resize       of pictures for the model: "bicubic" with a centre crop (CLIP's own), or "bilinear"
    formula      in words, of each picture
    weight       of the cosine; cut: whether it is cut at 0; probability: whether a softmax over the candidates follows
    average      of figures: over prompts, or over all pictures
    candidates   the captions to choose from: "all", or "judged": those of items with pictures
    failures     items without a mesh: "miss" (0 for each figure), "left out", or "black" (judged as black pictures)
    fixed_views  whether a folder of pictures must hold as many as there are views
    alpha        of such pictures: composited over the background, or dropped
    quirks       what a careful reader would not expect, each on purpose
    """

    name: str
    source: str
    measure: Literal["geometry", "retrieval", "views", "quality", "fid", "kid"]
    pictures: Pictures | None = None
    template: str = "{}"
    deleted: str = ""
    replaced: bool = False
    model: str | None = None
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    formula: str = ""
    weight: float = 1.0
    cut: bool = False
    probability: bool = False
    average: Literal["prompts", "pictures"] = "prompts"
    half_on_cuda: bool = False
    candidates: Literal["all", "judged", "none"] = "all"
    failures: Literal["miss", "left out", "black"] = "miss"
    fixed_views: bool = True
    alpha: Literal["composited", "dropped"] = "composited"
    quirks: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """Return a hash of the record."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]

    def text(self, caption: str, view: str = "") -> str:
        """Return what the model reads of a caption; view: the words of a view, where the template has them."""
        for character in self.deleted:
            caption = caption.replace(character, "")
        caption = caption.replace("_", " ") if self.replaced else caption
        return self.template.replace("{view}", view).replace("{}", caption)


GEOMETRY = Protocol(
    name="geometry",
    source="ours; defined in docs/evaluation.md",
    measure="geometry",
    formula="counts and shares of the mesh as it is in the file",
    candidates="none",
    failures="left out",
)
PRD_PAPER = Protocol(
    name="prd-paper",
    source="Progressive Rendering Distillation (CVPR 2025), section 4, as a careful reader runs it",
    measure="retrieval",
    pictures=Pictures(),
    template="A photo depicts {}",
    model=VIT_B_32,
    formula="CLIP score 2.5 max(cos, 0) and R@1 of each picture among all captions",
    weight=2.5,
    cut=True,
)
PRD_CODE = Protocol(
    name="prd-code",
    source="TriplaneTurbo, evaluation/clipscore/compute.py",
    measure="retrieval",
    pictures=Pictures(),
    template="A photo depicts{}",
    deleted=",.",
    replaced=True,
    model=VIT_B_32,
    formula="2.5 max(cos, 0), and R@1 of each picture by the first of the largest max(cos, 0)",
    weight=2.5,
    cut=True,
    average="pictures",
    half_on_cuda=True,
    candidates="judged",
    failures="left out",
    fixed_views=False,
    alpha="dropped",
    quirks=(
        "no space between 'A photo depicts' and the caption",
        "captions are read from folder names: commas and full stops are deleted, underscores become spaces",
        "captions that this makes equal are one candidate",
        "prompts without pictures leave the average and the candidates",
        "cosines below 0 are equal: the first candidate wins",
        "alpha is dropped, not composited",
        "half precision on CUDA",
        "clip_score_printed: the script averages over distinct picture names, so the last prompt's pictures alone",
    ),
)
RPROB = Protocol(
    name="rprob",
    source="ATT3D (arXiv 2306.07349) and AToM (arXiv 2402.00867): R-probability; no code exists",
    measure="retrieval",
    pictures=Pictures(),
    model=VIT_B_32,
    formula="softmax of 100 cos over the query set, its value at the right caption, mean over four views",
    weight=100.0,
    probability=True,
    quirks=("the papers name no backbone: ViT-B/32 unless --clip names another",),
)
SCALEDREAMER = Protocol(
    name="scaledreamer",
    source="ScaleDreamer, evaluation/CLIP/evaluation_amortized.py",
    measure="retrieval",
    pictures=Pictures(azimuths=tuple(360.0 * i / 119 for i in range(120))),
    model=VIT_L_14,
    resize="bilinear",
    formula="cosine and top-1 of each picture, mean over a prompt's pictures, then over prompts",
    replaced=True,
    failures="left out",
    fixed_views=False,
    alpha="dropped",
    quirks=(
        "pictures are resized bilinearly after the left square is cut out",
        "prompts without pictures leave the averages and stay candidates",
        "the first of 120 views is repeated as the last",
        "the script draws the method's own test views; meshes are drawn here as in prd-paper",
    ),
)
DIFFSPLAT = Protocol(
    name="diffsplat",
    source="DiffSplat (arXiv 2501.16764): ViT-B/32 cosine and R-precision of each view",
    measure="retrieval",
    pictures=Pictures(elevation=10.0),
    model=VIT_B_32,
    formula="cosine and R-precision of each view, elevation 10",
    quirks=("its ImageReward is left out: the package was not tried",),
)
T3BENCH_QUALITY = Protocol(
    name="t3bench-quality",
    source="T3Bench, run_eval_quality.py and render/meshrender.py",
    measure="quality",
    pictures=Pictures(
        azimuths=(),
        distance=2.2,
        normalisation="mean",
        extent=1.0,
        background=0.0,
        sphere=True,
        fovys=(60.0, 45.0, 36.0, 30.0, 24.0),
    ),
    formula="largest score over 5 fields of view, 3 means over neighbours on the icosphere, best vertex, 20 s + 50",
    candidates="none",
    failures="black",
    quirks=("the source scores with ImageReward; here any scorer, and its name stands beside the number",),
)
VIEWS = Protocol(
    name="views",
    source="ours; defined in docs/evaluation.md",
    measure="views",
    pictures=Pictures(),
    template="{view} view of {}",
    model=VIT_B_32,
    formula="for each view the probability of its own words among the words of all views; the least of the views",
    weight=100.0,
    candidates="none",
)
INCEPTION = ("features are those of the picture side of --clip: the source's are Inception's, and its numbers others",)
RENDER_FID = Protocol(
    name="render-fid",
    source="LATTE3D (arXiv 2403.15385), Render-FID; resize of clean-fid (arXiv 2104.11222)",
    measure="fid",
    pictures=Pictures(),
    formula="Frechet distance of features of all pictures and of a folder of reference pictures",
    candidates="none",
    failures="left out",
    quirks=INCEPTION,
)
KID = Protocol(
    name="kid",
    source="Demystifying MMD GANs (arXiv 1801.01401); resize of clean-fid (arXiv 2104.11222)",
    measure="kid",
    pictures=Pictures(),
    formula="unbiased MMD^2, kernel (x.y / d + 1)^3, 100 subsets of at most 1000 pictures",
    candidates="none",
    failures="left out",
    quirks=INCEPTION,
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        *(PRD_PAPER, PRD_CODE, RPROB, SCALEDREAMER, DIFFSPLAT, T3BENCH_QUALITY, VIEWS),
        *(RENDER_FID, KID, GEOMETRY),
    )
}


def find_protocol(name: str, key: str = "protocol") -> Protocol:
    """Return a protocol by name; ConfigError, which begins with `key`, names all of them for another."""
    if name not in PROTOCOLS:
        raise ConfigError(f"{key}={name!r}: must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
