"""Draco (Google's mesh compression) for glTF's KHR_draco_mesh_compression; needs DracoPy, the extra `draco`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = {"POSITION": 14, "NORMAL": 10, "TEXCOORD_0": 12}  # per coordinate; the others are kept as they are
LEVEL = 7  # of 0..10, the smallest file
TYPES = {"POSITION": 0, "NORMAL": 1, "TEXCOORD_0": 3}  # of Draco's attributes; other ones are generic
GENERIC = ("COLOR_0", "TANGENT")  # with their place here as identifier


def draco_encoded(
    arrays: dict[str, NDArray[Any]], faces: NDArray[np.int64]
) -> tuple[bytes, dict[str, int], dict[str, NDArray[Any]], int]:
    """Return glTF's attributes and faces [F, 3] in Draco's form.

    arrays  float32 or uint16 [V, C] by the attribute's name, with a POSITION

    Returns the data, the identifier of each attribute in it, what a reader will find (of other vertices, in another
    order) and the number of faces there.
    """
    import DracoPy

    def exact(name: str) -> NDArray[np.float64] | None:
        return arrays[name].astype(np.float64) if name in arrays else None

    data = DracoPy.encode(
        np.ascontiguousarray(arrays["POSITION"], np.float32),
        faces=faces.astype(np.uint32),
        quantization_bits=BITS["POSITION"],
        compression_level=LEVEL,
        normals=exact("NORMAL"),
        normal_quantization_bits=BITS["NORMAL"],
        tex_coord=exact("TEXCOORD_0"),
        tex_coord_quantization_bits=BITS["TEXCOORD_0"],
        generic_attributes={i: np.ascontiguousarray(arrays[name]) for i, name in enumerate(GENERIC) if name in arrays},
    )
    decoded = DracoPy.decode(data)
    names = {number: name for name, number in TYPES.items()}
    ids, found = {}, {}
    for attribute in decoded.attributes:
        number = int(attribute["unique_id"])
        name = names.get(attribute["attribute_type"]) or GENERIC[number]
        ids[name], found[name] = number, np.asarray(attribute["data"]).astype(arrays[name].dtype)
    return data, ids, found, len(decoded.faces)
