"""What other programs show of a tilt series: ChimeraX's script, markers, a mesh, and ArtiaX's particle list."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libemc import __version__
from libemc.cli import Run
from libemc.io import gltf, mrc
from libemc.io.star import write_star
from libemc.mapbacks.plan import Placement, Wanted
from libemc.methods import mapback
from libemc.methods.mapback import Model
from libemc.methods.reconstruct import Grid
from libemc.numerics.rotations import euler_from_matrix

SHADES = 16
"""Different colours of a scale in a mesh."""
SECTION_CONTRAST = (0.5, 99.5)
"""Percentiles of the section that ChimeraX shows black and white."""
MARGIN = 1.1
"""Of a particle's radius, within which a marker gives its colour."""
MARKER = 2.0
"""Voxels: radius of a marker."""


def write_list(path: Path, this: Placement) -> None:
    """A particle list in RELION's terms. Its pixels are those of the volume, counted from 0, as ArtiaX takes them."""
    grid, own = this.grid, this.placed.poses.from_corner(this.grid)
    pixels = (own.xyz / grid.pixel_size).numpy()
    columns: dict[str, Any] = {"rlnTomoName": [this.name] * len(pixels), "rlnTomoParticleName": this.placed.ids}
    columns |= {f"rlnCoordinate{axis}": pixels[:, k] for k, axis in enumerate("XYZ")}
    if not any((*grid.centre, *grid.angles)):
        centred = this.placed.poses.xyz.numpy()
        columns |= {f"rlnCenteredCoordinate{axis}Angst": centred[:, k] for k, axis in enumerate("XYZ")}
    angles = euler_from_matrix(own.rotation)
    columns |= {f"rlnAngle{key}": a.numpy() for key, a in zip(("Rot", "Tilt", "Psi"), angles, strict=True)}
    columns["rlnClassNumber"] = this.placed.classes
    if np.isfinite(this.placed.score).all():
        columns["rlnAutopickFigureOfMerit"] = this.placed.score
    write_star(path, {"particles": pd.DataFrame(columns)})


def write_mesh(
    path: Path, this: Placement, wanted: Wanted, ready: Mapping[int, Model], rgb: NDArray[np.float64], run: Run
) -> None:
    """A surface for each map, drawn at every pose, in Å from the volume's first voxel."""
    place = {number: k for k, number in enumerate(ready)}
    meshes = [mapback.surface(placing) for placing in ready.values()]
    surfaces = [gltf.Surface(mesh.vertices, mesh.normals, mesh.triangles) for mesh in meshes]
    own = this.placed.poses.from_corner(this.grid)
    rotation, xyz = own.rotation.numpy(), own.xyz.numpy()
    which = [0 if wanted.single else place[k] for k in this.placed.classes.tolist()]
    instances = [
        gltf.Instance(*values) for values in zip(this.placed.ids, which, _shades(rgb), rotation, xyz, strict=True)
    ]
    gltf.write_glb(path, surfaces, instances, f"{run.name} {__version__}")


def _shades(rgb: NDArray[np.float64]) -> list[gltf.Colour]:
    """The colours, no more than `SHADES` different ones for each of red, green and blue."""
    return [(r, g, b) for r, g, b in (np.round(rgb * (SHADES - 1)) / (SHADES - 1)).tolist()]


def markers(this: Placement, rgb: NDArray[np.float64]) -> str:
    """A marker in each particle's colour, in ChimeraX's and Chimera's format of markers."""
    xyz, radius = this.placed.poses.from_corner(this.grid).xyz.tolist(), MARKER * this.grid.pixel_size
    rows = [
        f'<marker id="{i}" x="{x:.3f}" y="{y:.3f}" z="{z:.3f}" r="{r:.3f}" g="{g:.3f}" b="{b:.3f}" radius="{radius:.1f}"/>'
        for i, ((x, y, z), (r, g, b)) in enumerate(zip(xyz, rgb.tolist(), strict=True), start=1)
    ]
    return "\n".join([f'<marker_set name="{this.name} particles">', *rows, "</marker_set>", ""])


def script(this: Placement, wanted: Wanted, ready: Mapping[int, Model], rgb: NDArray[np.float64]) -> str:
    """ChimeraX's commands that show all of it, and as comments ArtiaX's.

    Coordinates are Å from the first voxel of the volumes, whatever a header says of an origin.
    """
    volumes = {f"{this.name}{group}.mrc": number for group, number in wanted.groups(this.placed).items()}
    rows = [
        f"# {this.name}: particles placed back. Open this file in an empty session of ChimeraX.",
        f"# x, y, z are in Å from the first voxel of {this.name}'s volumes, and so are the mesh and the markers.",
    ]
    shown = None
    if this.tomogram is not None:
        shown = os.path.relpath(this.tomogram[0], wanted.folder)
        rows += _tomogram_commands(this.tomogram, shown, this.grid)
    first = 1 + (shown is not None)
    numbers = range(first, first + len(volumes))
    for k, (file, number) in zip(numbers, volumes.items(), strict=True):
        colour = "#" + "".join(f"{round(255 * c):02x}" for c in rgb[wanted.members(this.placed, number)][0])
        style = f"step 1 style surface level {ready[number].level:.6g} color {colour}"
        rows += [f'open "{file}"', f"volume #{k} origin 0,0,0 {style}"]
    after = numbers.stop
    if wanted.painted:
        reach = MARGIN * max(placing.radius for placing in ready.values())
        rows += [f'open "{this.name}.cmm"']
        rows += [f"color zone #{k} near #{after} distance {reach:.1f} sharpEdges true" for k in numbers]
        rows += [f"hide #{after} models"]
    if wanted.mesh:
        rows += [f'open "{this.name}.glb"', *(f"hide #{k} models" for k in numbers)]
    same = this.tomogram is not None and this.tomogram[1] == this.grid
    average = os.path.relpath(wanted.maps[min(volumes.values())], wanted.folder)
    rows += [
        "lighting soft",
        "view",
        "",
        "# With ArtiaX, in an empty session in place of the above: the particles as a list, which can be edited.",
        "# artiax start",
        f'# artiax open tomo "{shown if same else next(iter(volumes))}"',
        f'# open "{this.name}.star" format relion',
        f"# artiax particles #1.2.1 originScaleFactor {this.grid.pixel_size:.6g}",
        f'# open "{average}"',
        "# artiax attach #2 toParticleList #1.2.1",
    ]
    return "\n".join(rows) + "\n"


def _tomogram_commands(tomogram: tuple[Path, Grid], shown: str, grid: Grid) -> list[str]:
    """The middle section of a tomogram in grey, in the frame of a volume whose axes are the same."""
    file, there = tomogram
    middle = there.shape[0] // 2
    section = np.asarray(mrc.open_stack(file).array[middle], dtype=np.float64)
    low, high = np.percentile(section, SECTION_CONTRAST)
    corner = (
        c - d + (n // 2) * grid.pixel_size - (m // 2) * there.pixel_size
        for c, d, n, m in zip(there.centre, grid.centre, grid.shape[::-1], there.shape[::-1], strict=True)
    )
    where = "0,0,0" if there == grid else ",".join(f"{c:.6g}" for c in corner)
    style = f"step 1 style image color white level {low:.6g},0 level {high:.6g},1 plane z,{middle}"
    return [f'open "{shown}"', f"volume #1 origin {where} {style}"]
