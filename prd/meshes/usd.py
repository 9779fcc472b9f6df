"""USDZ, for augmented reality: one USD file and its picture, in metres, +Y up, front +Z (needs usd-core)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prd.meshes.axes import Y_UP
from prd.meshes.gltf import encoded, srgb_to_linear
from prd.meshes.printing import zipped
from prd.meshes.simplify import is_proper, merge_positions

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

ALIGNED = 64  # bytes: where the data of each file in the archive begins (usdz specification)
PICTURE = "texture.png"
NORMAL = "normal.png"


def usdz(mesh: Mesh, extras: dict[str, Any], scale: float) -> bytes:
    """Return a mesh as USDZ; extras: what made it, in the layer's custom data; scale: metres per scene unit."""
    with tempfile.TemporaryDirectory() as folder:  # a crate file is written to a disk alone
        layer, stage = Path(folder) / "mesh.usdc", _stage(mesh, extras, scale)  # a layer lives no longer than its stage
        stage.GetRootLayer().Export(str(layer))
        files = {layer.name: layer.read_bytes()}
    if mesh.texture is not None:
        files[PICTURE] = encoded(mesh.texture, "png")
    if mesh.normal_map is not None:
        files[NORMAL] = encoded(mesh.normal_map, "png")
    return zipped(files, ALIGNED)


def _stage(mesh: Mesh, extras: dict[str, Any], scale: float) -> Any:
    """Return a stage that holds the mesh under /object, with texture or colours in a preview surface."""
    from pxr import Sdf, Usd, UsdGeom, UsdShade, Vt

    stage = Usd.Stage.CreateInMemory()
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    root = UsdGeom.Xform.Define(stage, "/object")
    stage.SetDefaultPrim(root.GetPrim())
    layer = stage.GetRootLayer()
    layer.customLayerData = {name: value for name, value in extras.items() if value is not None}
    positions, first, merged = merge_positions(mesh.vertices)
    corners = merged[mesh.faces]
    proper = is_proper(corners)
    sources = mesh.faces[proper].reshape(-1)  # of each corner, in the mesh
    shape = UsdGeom.Mesh.Define(stage, "/object/mesh")
    points = positions[:, Y_UP] * np.float32(scale)
    shape.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(points)))
    shape.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(corners[proper].reshape(-1).astype(np.int32)))
    shape.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(int(proper.sum()), 3, np.int32)))
    shape.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(np.stack([points.min(axis=0), points.max(axis=0)])))
    shape.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    shape.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(mesh.vertex_normals[first][:, Y_UP])))
    shape.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    primvars = UsdGeom.PrimvarsAPI(shape)
    if mesh.uv is not None:
        uv = primvars.CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.faceVarying)
        uv.Set(Vt.Vec2fArray.FromNumpy(np.ascontiguousarray(mesh.uv[sources])))
    else:
        colors = srgb_to_linear(mesh.vertex_colors[first].clip(0, 1))
        shape.CreateDisplayColorPrimvar(UsdGeom.Tokens.vertex).Set(Vt.Vec3fArray.FromNumpy(colors))
    material = _material(stage, mesh)
    UsdShade.MaterialBindingAPI.Apply(shape.GetPrim()).Bind(material)
    return stage


def _material(stage: Any, mesh: Mesh) -> Any:
    """Return a preview surface whose colour is read from the picture, or from the vertices."""
    from pxr import Gf, Sdf, UsdShade

    types, textured = Sdf.ValueTypeNames, mesh.texture is not None

    def shader(name: str, kind: str) -> Any:
        made = UsdShade.Shader.Define(stage, f"/object/surface/{name}")
        made.CreateIdAttr(kind)
        return made

    material = UsdShade.Material.Define(stage, "/object/surface")
    surface = shader("preview", "UsdPreviewSurface")
    surface.CreateInput("metallic", types.Float).Set(mesh.metallic)
    surface.CreateInput("roughness", types.Float).Set(mesh.roughness)
    reader = shader("reader", "UsdPrimvarReader_float2" if textured else "UsdPrimvarReader_float3")
    reader.CreateInput("varname", types.String).Set("st" if textured else "displayColor")
    read = reader.CreateOutput("result", types.Float2 if textured else types.Float3)

    def picture(name: str, file: str, space: str) -> Any:
        made = shader(name, "UsdUVTexture")
        made.CreateInput("file", types.Asset).Set(Sdf.AssetPath(file))
        made.CreateInput("sourceColorSpace", types.Token).Set(space)
        for side in ("wrapS", "wrapT"):
            made.CreateInput(side, types.Token).Set("clamp")
        made.CreateInput("st", types.Float2).ConnectToSource(read)
        return made

    color = picture("picture", PICTURE, "sRGB").CreateOutput("rgb", types.Float3) if textured else read
    surface.CreateInput("diffuseColor", types.Color3f).ConnectToSource(color)
    if mesh.normal_map is not None:
        bumps = picture("bumps", NORMAL, "raw")
        bumps.CreateInput("scale", types.Float4).Set(Gf.Vec4f(2, 2, 2, 1))  # bytes to -1..1
        bumps.CreateInput("bias", types.Float4).Set(Gf.Vec4f(-1, -1, -1, 0))
        normal = bumps.CreateOutput("rgb", types.Float3)
        surface.CreateInput("normal", types.Normal3f).ConnectToSource(normal)
    material.CreateSurfaceOutput().ConnectToSource(surface.CreateOutput("surface", types.Token))
    return material
