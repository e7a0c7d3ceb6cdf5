"""Scenes as .glb files, read again with struct and json by the chapters of the specification."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libemc.io import gltf
from tests.by_hand import pose

VERTICES = np.array([[0, 0, 0], [10, 0, 0], [0, 20, 0], [0, 0, 30]], np.float32)
TRIANGLES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.uint32)
NORMALS = np.array([[-1, -1, -1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
ONE = gltf.Surface(VERTICES, NORMALS, TRIANGLES)
TWO = gltf.Surface(2 * VERTICES[:3], NORMALS[:3], TRIANGLES[:1])
RED, GREY = (1.0, 0.0, 0.0), (0.5, 0.5, 0.5)
TURN, PLACE = pose(20, 65, -40), np.array([100.0, -200.0, 300.0])


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    content = json.loads(data[20 : 20 + size])
    binary, kind = struct.unpack_from("<I4s", data, 20 + size)
    assert kind == b"BIN\0" and binary % 4 == 0 and 28 + size + binary == len(data)
    return content, data[28 + size :]


def numbers(content: dict[str, Any], data: bytes, accessor: int) -> np.ndarray:
    entry = content["accessors"][accessor]
    view = content["bufferViews"][entry["bufferView"]]
    assert view["byteOffset"] % 4 == 0
    dtype = {5126: "<f4", 5125: "<u4"}[entry["componentType"]]
    wide = {"SCALAR": 1, "VEC3": 3}[entry["type"]]
    raw = data[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    values = np.frombuffer(raw, dtype).reshape(-1, wide)
    assert len(values) == entry["count"]
    return values


def test_a_scene_as_it_is_read(tmp_path: Path) -> None:
    """Every instance is where x + R·u puts its vertices, each surface is stored once; sRGB's 0.5 is 0.214 of the light."""
    path = tmp_path / "a.glb"
    instances = [
        gltf.Instance("p1", 0, RED, TURN, PLACE),
        gltf.Instance("p2", 1, GREY, np.eye(3), -PLACE),
        gltf.Instance("p3", 0, GREY, TURN.T, 2 * PLACE),
        gltf.Instance("p4", 0, RED, np.eye(3), np.zeros(3)),
    ]
    gltf.write_glb(path, [ONE, TWO], instances, "a test")
    content, data = read(path)
    assert content["asset"] == {"version": "2.0", "generator": "a test"}
    assert content["buffers"] == [{"byteLength": len(data)}]
    assert [node["name"] for node in content["nodes"]] == ["p1", "p2", "p3", "p4"]
    assert content["scenes"][content["scene"]]["nodes"] == [0, 1, 2, 3]
    assert len(content["meshes"]) == 3 and len(content["materials"]) == 2 and len(content["accessors"]) == 6
    for node, wanted in zip(content["nodes"], instances, strict=True):
        (part,) = content["meshes"][node["mesh"]]["primitives"]
        surface = (ONE, TWO)[wanted.surface]
        vertices = numbers(content, data, part["attributes"]["POSITION"])
        np.testing.assert_array_equal(vertices, surface.vertices)
        np.testing.assert_array_equal(numbers(content, data, part["attributes"]["NORMAL"]), surface.normals)
        np.testing.assert_array_equal(numbers(content, data, part["indices"]).reshape(-1, 3), surface.triangles)
        matrix = np.array(node["matrix"]).reshape(4, 4).T  # column-major
        seen = (matrix @ np.column_stack([vertices, np.ones(len(vertices))]).T).T[:, :3]
        np.testing.assert_allclose(seen, surface.vertices @ wanted.rotation.T + wanted.position, atol=1e-9)
        assert matrix[3].tolist() == [0, 0, 0, 1]
        colour = content["materials"][part["material"]]["pbrMetallicRoughness"]["baseColorFactor"]
        np.testing.assert_allclose(
            colour, [1, 0, 0, 1] if wanted.colour == RED else [0.21404, 0.21404, 0.21404, 1], atol=1e-5
        )
    bounds = content["accessors"][content["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    assert bounds["min"] == [0, 0, 0] and bounds["max"] == [10, 20, 30]


def test_nothing_to_draw(tmp_path: Path) -> None:
    empty = gltf.Surface(VERTICES, NORMALS, TRIANGLES[:0])
    with pytest.raises(ValueError, match="nothing to draw"):
        gltf.write_glb(tmp_path / "a.glb", [ONE], [], "a test")
    with pytest.raises(ValueError, match="nothing to draw"):
        gltf.write_glb(tmp_path / "a.glb", [empty], [gltf.Instance("p", 0, RED, TURN, PLACE)], "a test")
    assert not list(tmp_path.iterdir())
