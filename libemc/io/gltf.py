"""glTF 2.0 binary files (.glb): surfaces, each drawn many times.

A file is a header, a chunk of JSON and a chunk of numbers (Khronos glTF 2.0 specification, chapter 4). Lengths are written as
they are, in Å: glTF's unit is the metre, but viewers of molecules take numbers for Å.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libemc.io.files import StrPath
from libemc.replacement import write_bytes

MAGIC, VERSION = b"glTF", 2
FLOAT, UNSIGNED = 5126, 5125
"""Component types."""
VERTICES, INDICES = 34962, 34963
"""What a buffer view is for."""
ROUGHNESS = 0.7

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """Vertices (V, 3) and normals (V, 3) float32, triangles (T, 3) uint32, counter-clockwise seen from outside."""

    vertices: NDArray[np.float32]
    normals: NDArray[np.float32]
    triangles: NDArray[np.uint32]


@dataclass(frozen=True)
class Instance:
    """A surface somewhere.

    Attributes:
        name: of the node.
        surface: which one.
        colour: red, green, blue, 0 to 1.
        rotation: (3, 3), applied first; position: (3,).
    """

    name: str
    surface: int
    colour: Colour
    rotation: NDArray[np.float64]
    position: NDArray[np.float64]


class _Buffer:
    """The chunk of numbers, and what the JSON says of its parts."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, values: NDArray[Any], kind: str, component: int, target: int, bounds: bool = False) -> int:
        """Append numbers (32 bits each); gives the number of the accessor."""
        raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(raw), "target": target})
        self.data += raw
        count = values.size if kind == "SCALAR" else len(values)
        accessor = {"bufferView": len(self.views) - 1, "componentType": component, "count": count, "type": kind}
        if bounds:
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self.accessors.append(accessor)
        return len(self.accessors) - 1


def linear(colour: Colour) -> Colour:
    """A colour as screens have it (sRGB) as glTF wants it: in proportion to light (IEC 61966-2-1)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return r, g, b


def write_glb(path: StrPath, surfaces: Sequence[Surface], instances: Sequence[Instance], made_by: str) -> None:
    """Write a scene of a node for each instance, whole or not at all.

    A surface is stored once, however often it is drawn; a mesh and a material stand for each colour of it.

    Args:
        made_by: what the file says of its origin.

    Raises:
        ValueError: there is no instance, or a surface has no triangles.
    """
    if not instances or not all(len(s.triangles) for s in surfaces):
        raise ValueError(f"{path}: nothing to draw")
    buffer = _Buffer()
    stored = [
        {
            "attributes": {
                "POSITION": buffer.add(s.vertices.astype(np.float32), "VEC3", FLOAT, VERTICES, bounds=True),
                "NORMAL": buffer.add(s.normals.astype(np.float32), "VEC3", FLOAT, VERTICES),
            },
            "indices": buffer.add(s.triangles.astype(np.uint32), "SCALAR", UNSIGNED, INDICES),
        }
        for s in surfaces
    ]
    colours = list(dict.fromkeys(i.colour for i in instances))
    kinds = list(dict.fromkeys((i.surface, i.colour) for i in instances))
    materials = [
        {
            "pbrMetallicRoughness": {
                "baseColorFactor": [*linear(c), 1.0],
                "metallicFactor": 0.0,
                "roughnessFactor": ROUGHNESS,
            }
        }
        for c in colours
    ]
    meshes = [{"primitives": [{**stored[s], "material": colours.index(c)}]} for s, c in kinds]
    nodes = [
        {"name": i.name, "mesh": kinds.index((i.surface, i.colour)), "matrix": _matrix(i.rotation, i.position)}
        for i in instances
    ]
    content = {
        "asset": {"version": "2.0", "generator": made_by},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": nodes,
        "meshes": meshes,
        "materials": materials,
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": len(buffer.data)}],
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    chunks = [(b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", bytes(buffer.data))]
    body = b"".join(struct.pack("<I4s", len(data), kind) + data for kind, data in chunks)
    write_bytes(path, struct.pack("<4sII", MAGIC, VERSION, 12 + len(body)) + body)


def _matrix(rotation: NDArray[np.float64], position: NDArray[np.float64]) -> list[float]:
    """The 4×4 matrix of a node, column by column."""
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = rotation, position
    return [float(v) for v in whole.T.ravel()]
