"""Files for printers: STL and 3MF, in millimetres, +Z up, front -Y, standing on the bed."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray

from prd.meshes.axes import NOTES, Up, turned
from prd.meshes.simplify import weld
from prd.meshes.texture import to_bytes

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

MM_PER_UNIT = 50.0  # where no height is asked for: the scene's cube [-1, 1]^3 is 100 mm wide
CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
COLORS = "http://schemas.microsoft.com/3dmanufacturing/material/2015/02"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # of a zip archive: the same mesh gives the same bytes
PADDING = 0x1986  # an extra field that readers pass over
TYPES = (
    f'<?xml version="1.0" encoding="UTF-8"?>\n<Types xmlns="{PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="model" ContentType="application/vnd.ms-package.3dmanufacturing-3dmodel+xml"/></Types>\n'
)
RELATIONS = (
    f'<?xml version="1.0" encoding="UTF-8"?>\n<Relationships xmlns="{PACKAGE}/relationships"><Relationship '
    'Target="/3D/3dmodel.model" Id="rel0" Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"/>'
    "</Relationships>\n"
)


def stl(mesh: Mesh, scale: float, up: Up = "z") -> bytes:
    """Return a mesh as binary STL: welded, its lowest corner at the origin.

    scale  millimetres per scene unit
    up     as in `prd.meshes.axes.turned`
    """
    vertices, faces, _ = weld(mesh.vertices, mesh.faces)
    corners = _on_bed(turned(vertices, up), scale)[faces]  # [F, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    records = np.zeros(len(faces), np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")]))
    records["normal"], records["corners"] = normals, corners
    return NOTES[up].encode().ljust(80) + len(faces).to_bytes(4, "little") + records.tobytes()


def threemf(mesh: Mesh, extras: dict[str, Any], scale: float) -> bytes:
    """Return a mesh as 3MF: welded, its lowest corner at the origin, with a colour per vertex.

    extras  what made it: becomes the title, the application and the terms of the licence
    scale   millimetres per scene unit
    """
    parts = {"[Content_Types].xml": TYPES, "_rels/.rels": RELATIONS, "3D/3dmodel.model": _model(mesh, extras, scale)}
    return zipped({name: text.encode() for name, text in parts.items()})


def zipped(files: dict[str, bytes], stored_at: int | None = None) -> bytes:
    """Return a zip archive, the same bytes for the same files: deflated, or stored where an alignment is given.

    stored_at  bytes of which the data of each file begins at a multiple
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, FIRST_DAY)
            entry.create_system = 0  # the same on every system
            if stored_at is None:
                entry.compress_type = zipfile.ZIP_DEFLATED
            else:
                padding = (
                    -(archive.tell() + 30 + len(name) + 4) % stored_at
                )  # after the header, the name and two shorts
                entry.extra = struct.pack("<HH", PADDING, padding) + bytes(padding)
            out.writestr(entry, data)
    return archive.getvalue()


def _model(mesh: Mesh, extras: dict[str, Any], scale: float) -> str:
    """Return the XML of the model (3MF core specification 1.3; colours: its materials extension)."""
    vertices, faces, first = weld(mesh.vertices, mesh.faces)
    rgb, color_of = np.unique(to_bytes(mesh.vertex_colors[first].clip(0, 1)), axis=0, return_inverse=True)
    named = {"Title": extras.get("prompt"), "Application": extras["generator"], "LicenseTerms": extras.get("licence")}
    points = _on_bed(turned(vertices, "z"), scale)
    rows = np.hstack([faces, color_of.reshape(-1)[faces]]).tolist()
    lines: Iterable[str] = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<model unit="millimeter" xml:lang="en-US" xmlns={quoteattr(CORE)} xmlns:m={quoteattr(COLORS)}>',
        *(
            f"<metadata name={quoteattr(name)}>{escape(_plain(text))}</metadata>"
            for name, text in named.items()
            if text
        ),
        "<resources>",
        '<m:colorgroup id="1">',
        *(f'<m:color color="#{r:02X}{g:02X}{b:02X}"/>' for r, g, b in rgb.tolist()),
        "</m:colorgroup>",
        '<object id="2" type="model" pid="1" pindex="0"><mesh><vertices>',
        *(f'<vertex x="{x:.9g}" y="{y:.9g}" z="{z:.9g}"/>' for x, y, z in points.tolist()),
        "</vertices><triangles>",
        *(f'<triangle v1="{a}" v2="{b}" v3="{c}" pid="1" p1="{p}" p2="{q}" p3="{r}"/>' for a, b, c, p, q, r in rows),
        "</triangles></mesh></object>",
        "</resources>",
        '<build><item objectid="2"/></build>',
        "</model>\n",
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return a text without the control characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _on_bed(points: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Return points [V, 3] in millimetres, moved so that their lowest corner is the origin."""
    return ((points.astype(np.float64) - points.min(axis=0)) * scale).astype(np.float32)
