"""glTF 2.0: one binary file (.glb), or one of JSON with its data inside (.gltf); +Y up, front +Z."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prd.meshes.axes import Y_UP
from prd.meshes.draco import draco_encoded
from prd.meshes.normals import tangents

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

PictureFormat = Literal["png", "webp"]
Compression = Literal["draco"]

VERTICES, INDICES = 34962, 34963  # targets of a buffer view: ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER
COMPONENT = {np.dtype("<u2"): 5123, np.dtype("<u4"): 5125, np.dtype("<f4"): 5126}
SHORT_INDICES = 0xFFFF  # vertices whose indices fit in 16 bits; the largest value restarts a strip
SMOOTH = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}  # linear, mipmaps, clamped to the edge
WEBP = "EXT_texture_webp"
LOD = "MSFT_lod"
DRACO = "KHR_draco_mesh_compression"
REQUIRED = {WEBP, DRACO}  # there is no other picture, no other geometry


def glb(
    meshes: Sequence[Mesh],
    extras: dict[str, Any],
    scale: float = 1.0,
    picture: PictureFormat = "png",
    compress: Compression | None = None,
) -> bytes:
    """Return meshes as glTF binary: one, or one object in several levels of detail, the finest first.

    extras    of the asset: what made it
    scale     metres per scene unit
    picture   of the texture, lossless either way; "webp" needs a reader of EXT_texture_webp
    compress  "draco": the geometry, which needs DracoPy, and a reader of KHR_draco_mesh_compression
    """
    writer = Writer(extras, compress)
    writer.add_levels(meshes, scale, picture)
    text = json.dumps(writer.finished(), separators=(",", ":")).encode()  # ASCII: a character is a byte
    chunks = (b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", bytes(writer.data))
    body = b"".join(struct.pack("<I", len(data)) + kind + data for kind, data in chunks)
    return b"glTF" + struct.pack("<II", 2, 12 + len(body)) + body


def gltf(
    meshes: Sequence[Mesh],
    extras: dict[str, Any],
    scale: float = 1.0,
    picture: PictureFormat = "png",
    compress: Compression | None = None,
) -> bytes:
    """Return meshes as glTF in JSON, its buffer in base64 inside; arguments as for `glb`."""
    writer = Writer(extras, compress)
    writer.add_levels(meshes, scale, picture)
    tree = writer.finished()
    tree["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(writer.data).decode()
    return json.dumps(tree, indent=1).encode()


class Writer:
    """The tree of a glTF file and the data that it refers to."""

    def __init__(self, extras: dict[str, Any], compress: Compression | None = None) -> None:
        self.compress = compress
        self.data = bytearray()
        asset = {"version": "2.0", "generator": extras["generator"], "extras": extras}
        self.tree: dict[str, Any] = {"asset": asset, "scene": 0, "scenes": [{"nodes": [0]}]}
        self.extensions: set[str] = set()

    def finished(self) -> dict[str, Any]:
        """Return the tree, whose only buffer is `data`."""
        if self.extensions:
            self.tree["extensionsUsed"] = sorted(self.extensions)
        if needed := sorted(self.extensions & REQUIRED):
            self.tree["extensionsRequired"] = needed
        return {**self.tree, "buffers": [{"byteLength": len(self.data)}]}

    def add_levels(self, meshes: Sequence[Mesh], scale: float, picture: PictureFormat) -> None:
        """Add one object in several levels of detail: only the finest is in the scene, the others hang on its node."""
        for level, mesh in enumerate(meshes):
            name = "mesh" if len(meshes) == 1 else f"lod{level}"
            shape = self._add("meshes", {"name": name, "primitives": [self._primitive(mesh, scale, picture)]})
            self._add("nodes", {"name": name, "mesh": shape})
        if len(meshes) > 1:
            self.extensions.add(LOD)
            finest = self.tree["nodes"][0]
            finest["extensions"] = {LOD: {"ids": list(range(1, len(meshes)))}}
            finest["extras"] = {"MSFT_screencoverage": [0.25**level / 2 for level in range(len(meshes) - 1)] + [0.0]}

    def _add(self, kind: str, entry: dict[str, Any]) -> int:
        entries: list[dict[str, Any]] = self.tree.setdefault(kind, [])
        entries.append(entry)
        return len(entries) - 1

    def _primitive(self, mesh: Mesh, scale: float, picture: PictureFormat) -> dict[str, Any]:
        arrays: dict[str, NDArray[Any]] = {
            "POSITION": (mesh.vertices[:, Y_UP] * np.float32(scale)).astype("<f4"),
            "NORMAL": mesh.vertex_normals[:, Y_UP].astype("<f4"),
        }
        surface: dict[str, Any] = {  # without: a metal, which is black
            "metallicFactor": mesh.metallic,
            "roughnessFactor": mesh.roughness,
        }
        look = {"name": "surface", "pbrMetallicRoughness": surface}
        if mesh.uv is not None and mesh.texture is not None:
            arrays["TEXCOORD_0"] = (mesh.uv * [1, -1] + [0, 1]).astype("<f4")  # v down
            surface["baseColorTexture"] = {"index": self._texture(mesh.texture, picture)}
            if mesh.normal_map is not None:
                along = tangents(mesh.vertices, mesh.faces, mesh.vertex_normals, mesh.uv)[:, Y_UP]
                arrays["TANGENT"] = np.pad(along, ((0, 0), (0, 1)), constant_values=1).astype("<f4")
                look["normalTexture"] = {"index": self._texture(mesh.normal_map, picture)}
        else:
            arrays["COLOR_0"] = linear_colors(mesh.vertex_colors)
        return {**self._geometry(arrays, mesh.faces), "material": self._add("materials", look), "mode": 4}

    def _geometry(self, arrays: dict[str, NDArray[Any]], faces: NDArray[np.int64]) -> dict[str, Any]:
        """Add attributes and indices, compressed if that was asked for."""
        extensions, count = {}, len(faces)
        if self.compress == "draco":
            data, ids, arrays, count = draco_encoded(arrays, faces)
            extensions = {"extensions": {DRACO: {"bufferView": self._view(data, None), "attributes": ids}}}
            self.extensions.add(DRACO)
        attributes = {name: self._accessor(values, name) for name, values in arrays.items()}
        kind = "<u2" if len(arrays["POSITION"]) <= SHORT_INDICES else "<u4"
        indices = np.zeros(3 * count, kind) if self.compress else faces.reshape(-1).astype(kind)
        return {"attributes": attributes, "indices": self._accessor(indices, "indices"), **extensions}

    def _accessor(self, values: NDArray[Any], name: str) -> int:
        """Add an attribute, or indices; where the geometry is compressed, only what a reader will find."""
        accessor: dict[str, Any] = {
            "componentType": COMPONENT[values.dtype],
            "count": len(values),
            "type": f"VEC{values.shape[1]}" if values.ndim == 2 else "SCALAR",
        }
        if not self.compress:
            target = INDICES if name == "indices" else VERTICES
            accessor = {"bufferView": self._view(values.tobytes(), target), **accessor}
        if name == "COLOR_0":
            accessor["normalized"] = True
        if name == "POSITION":
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        return self._add("accessors", accessor)

    def _view(self, data: bytes, target: int | None) -> int:
        """Add data, padded to the four bytes on which every kind of value may begin."""
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)}
        self.data += data + bytes(-len(data) % 4)
        return self._add("bufferViews", view if target is None else {**view, "target": target})

    def _texture(self, texture: NDArray[np.uint8], picture: PictureFormat) -> int:
        """Add a picture, stored as it is: by glTF's definition a base colour is sRGB, and a normal map is not."""
        view = self._view(encoded(texture, picture), None)
        image = self._add("images", {"bufferView": view, "mimeType": f"image/{picture}"})
        if "samplers" not in self.tree:
            self._add("samplers", SMOOTH)
        if picture == "png":
            return self._add("textures", {"sampler": 0, "source": image})
        self.extensions.add(WEBP)
        return self._add("textures", {"sampler": 0, "extensions": {WEBP: {"source": image}}})


def encoded(texture: NDArray[np.uint8], picture: PictureFormat) -> bytes:
    """Return a picture as the bytes of a file, without loss."""
    data = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if picture == "webp" else {}
    Image.fromarray(texture).save(data, format=picture, **options)
    return data.getvalue()


def linear_colors(srgb: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return display values [V, 3] in [0, 1] as linear light [V, 4] of 16 bits, opaque: 8 bytes, aligned."""
    rgba = np.ones((len(srgb), 4))
    rgba[:, :3] = srgb_to_linear(srgb.clip(0, 1))
    return np.round(rgba * 65535).astype("<u2")


def srgb_to_linear(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Display values in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).astype(np.float32)
