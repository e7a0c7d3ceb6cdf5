"""Tubulin found in a real tomogram of a microtubule: the lattice that the picks are on.

    python benchmarks/microtubule.py DATA PICTURE.png                       # DATA/real/microtubule
    python benchmarks/microtubule.py DATA PICTURE.png --picks picks.json    # picks that are there already

The tomogram is converted to MRC, with protein dark, and searched with emc_tempmatch for the monomer. A cylinder whose
axis is a parabola and whose section is an ellipse along z is fitted to the picks alone, without regard to what is
known. The picks on its wall are unrolled to angle θ and place s along the axis. Printed are

- for n protofilaments, the power |Σ exp(i·n·(θ - twist·s))|² over the number of picks, with the best twist of each n:
  1 is chance, the number of picks is a perfect comb. It depends on what the ellipse is taken for. That θ is the angle
  about the axis is right for a round microtubule whose picks are off along the radius; the other reading, a circle
  stretched along z, is printed too. At the sides protofilaments lie one above the other, in the missing wedge, and
  cannot be told apart;
- the monomers' repeat, and the start of the helix through neighbours in adjacent protofilaments (negative:
  left-handed), from the power |Σ exp(i·(2π·s/repeat - start·θ))|²; and the repeat again, of each protofilament for
  itself, with its phase free;
- the distance of each pick to the next along its protofilament;
- how many picks are near a site of the lattice that these powers give, and how many sites in the volume have a pick.

`by chance` is the same analysis of as many picks thrown on the wall. Then all is printed again for as many maxima of
the smoothed volume, found without a template: what they show too is no merit of the template. Lengths in Å, angles in
radians but where said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates, maximum_filter
from scipy.optimize import least_squares
from scipy.spatial import cKDTree

from libemc.io import mrc
from libemc.view.alignment import BLUE, RED

Array = NDArray[np.float64]

COUNTS = range(11, 17)  # protofilaments
STARTS = range(-8, 9)  # of the helix
RADIUS = 110.0  # where the search for the axis begins: what is known of microtubules
WALL = 25.0  # picks that are so near the cylinder are on it
SKEW = np.tan(np.deg2rad(np.linspace(-3, 3, 61)))  # of the protofilaments to the axis
REPEATS = np.linspace(35, 50, 301)
NEAR = 10.0  # of a site
THROWS = 20
BLOB, AROUND, APART = 12.0, 50.0, 30.0  # deviations of the Gaussians whose difference smooths; least distance of maxima
SEARCH = ["--wedge=-67,56", "--resolution", "28", "--step", "30", "--distance", "30", "--expected-false", "600"]
"""Monomers lie side by side and hardly stand out of noise one by one: many false ones are let in, and the lattice tells."""
TOLD_APART = 55  # degrees from top and bottom: farther on, neighbours lie one above the other, in the missing wedge


@dataclass(frozen=True)
class Cylinder:
    """A bent elliptical cylinder: its axis goes through `centre`, which is nearest to the volume's.

    Attributes:
        along, across, up: unit vectors (x, y, z), right-handed in the order across, along, up.
        centre: (x, y, z).
        bend: of the axis towards `across` and `up`, 1/Å.
        axes: semi-axes towards `across` and `up`.
    """

    along: Array
    across: Array
    up: Array
    centre: Array
    bend: Array
    axes: Array

    @classmethod
    def of(cls, p: Array) -> Cylinder:
        """From angle in the plane (from +y to +x), inclination, 2 offsets, 2 bends and 2 semi-axes."""
        along = np.array([np.sin(p[0]) * np.cos(p[1]), np.cos(p[0]) * np.cos(p[1]), np.sin(p[1])])
        across = np.cross(along, (0.0, 0.0, 1.0))
        across /= np.linalg.norm(across)
        up = np.cross(across, along)
        return cls(along, across, up, p[2] * across + p[3] * up, p[4:6] / 1e6, p[6:8])

    def unroll(self, xyz: Array) -> tuple[Array, Array, Array]:
        """Angle from `across`, counter-clockwise about `along`; place along the axis; height over the wall."""
        r = xyz - self.centre
        s = r @ self.along
        u, v = (r @ d - bend * s**2 for d, bend in ((self.across, self.bend[0]), (self.up, self.bend[1])))
        rho = np.hypot(u / self.axes[0], v / self.axes[1])
        return -np.arctan2(v, u), s, (rho - 1) * np.hypot(u, v) / np.maximum(rho, 1e-6)

    def roll(self, angle: Array, s: Array, height: Array | float = 0.0) -> Array:
        """The points (..., 3) that are unrolled to these."""
        radius = self.radius(angle) + height
        sides = (radius * np.cos(angle) + self.bend[0] * s**2, -radius * np.sin(angle) + self.bend[1] * s**2)
        parts = ((s, self.along), (sides[0], self.across), (sides[1], self.up))
        return np.asarray(self.centre + sum(np.asarray(a)[..., None] * d for a, d in parts))

    def radius(self, angle: Array) -> Array:
        """Of the wall."""
        return np.asarray(1 / np.hypot(np.cos(angle) / self.axes[0], np.sin(angle) / self.axes[1]))

    def unstretched(self, angle: Array) -> Array:
        """The angle in the circle that the ellipse would be without its stretch."""
        return np.arctan2(np.sin(angle) / self.axes[1], np.cos(angle) / self.axes[0])


def fitted(xyz: Array) -> Cylinder:
    """The cylinder that picks are on: the best of straight ones in the plane, then all parameters on what is near."""
    best, start = -1, np.zeros(8)
    offsets, levels = np.arange(-600, 601, 20.0), np.arange(-200, 201, 20.0)
    for angle in np.deg2rad(np.arange(-90, 90, 2.5)):
        u = xyz @ np.array([np.cos(angle), -np.sin(angle), 0.0])
        for level in levels:
            radius = np.hypot(u[:, None] - offsets, (xyz[:, 2] - level)[:, None])
            held = (np.abs(radius - RADIUS) < WALL).sum(axis=0)
            if held.max() > best:
                best = held.max()
                start = np.array([angle, 0.0, offsets[held.argmax()], level, 0.0, 0.0, RADIUS, RADIUS])
    scale = np.array([0.01, 0.01, 10, 10, 10, 10, 10, 10])
    for reach in (2.0, 1.5, 1.0, 1.0, 1.0, 1.0):
        own = xyz[np.abs(Cylinder.of(start).unroll(xyz)[2]) < reach * WALL]
        start = least_squares(
            lambda p, own=own: Cylinder.of(p).unroll(own)[2] / NEAR, start, loss="soft_l1", x_scale=scale
        ).x
    return Cylinder.of(start)


def power(phase: Array) -> Array:
    """Of phases (K, ...) radians: |Σ exp(i·phase)|² / K."""
    return np.abs(np.exp(1j * phase).sum(axis=0)) ** 2 / len(phase)


def comb(angle: Array, s: Array, radius: float) -> Array:
    """Power of each of `COUNTS` protofilaments at each skew."""
    return np.array([power(n * (angle[:, None] - SKEW / radius * s[:, None])) for n in COUNTS])


@dataclass(frozen=True)
class Lattice:
    """A surface lattice: count·(θ - twist·s) = phases[0] and 2π·s/repeat - start·θ = phases[1], modulo 2π.

    Attributes:
        powers: of each of `COUNTS`, with its own twist.
        line: power of repeat and start together.
    """

    count: int
    twist: float
    start: int
    repeat: float
    phases: Array
    powers: Array
    line: float

    @classmethod
    def of(cls, angle: Array, s: Array, radius: float) -> Lattice:
        """The strongest one."""
        combs = comb(angle, s, radius)
        count, twist = COUNTS[combs.max(axis=1).argmax()], SKEW[combs.max(axis=0).argmax()] / radius
        lines = np.array([power(2 * np.pi * s[:, None] / REPEATS - m * angle[:, None]) for m in STARTS])
        which, where = np.unravel_index(lines.argmax(), lines.shape)
        start, repeat = STARTS[int(which)], float(REPEATS[where])
        sums = [np.exp(1j * p).sum() for p in cls.angles(angle, s, count, float(twist), start, repeat)]
        return cls(count, float(twist), start, repeat, np.angle(sums), combs.max(axis=1), float(lines.max()))

    @staticmethod
    def angles(angle: Array, s: Array, count: int, twist: float, start: int, repeat: float) -> tuple[Array, Array]:
        """Both phases of points."""
        return count * (angle - twist * s), 2 * np.pi * s / repeat - start * angle

    def protofilament(self, angle: Array, s: Array) -> NDArray[np.int64]:
        """The number, from 0, of the nearest protofilament."""
        turns = (self.count * (angle - self.twist * s) - self.phases[0]) / (2 * np.pi)
        return np.round(turns).astype(int) % self.count

    def site(self, angle: Array, s: Array, radius: Array) -> tuple[Array, Array]:
        """From points to their nearest site: Å around and along."""
        own = self.angles(angle, s, self.count, self.twist, self.start, self.repeat)
        first, second = (np.angle(np.exp(1j * (p - at))) for p, at in zip(own, self.phases, strict=True))
        matrix = np.array([[self.count, -self.count * self.twist], [-self.start, 2 * np.pi / self.repeat]])
        cells = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        phases = np.stack([np.stack([first + 2 * np.pi * i, second + 2 * np.pi * j]) for i, j in cells])
        moves = np.linalg.solve(matrix, phases)
        around, along = moves[:, 0] * radius, moves[:, 1]
        best = np.hypot(around, along).argmin(axis=0)[None]
        return np.take_along_axis(around, best, 0)[0], np.take_along_axis(along, best, 0)[0]

    def sites(self, reach: float) -> tuple[Array, Array]:
        """Angle and place of all sites to `reach` Å from the middle."""
        p = np.arange(self.count)[:, None]
        q = np.arange(-int(reach / self.repeat) - 10, int(reach / self.repeat) + 11)[None]
        matrix = np.array([[self.count, -self.count * self.twist], [-self.start, 2 * np.pi / self.repeat]])
        phases = np.stack(np.broadcast_arrays(self.phases[0] + 2 * np.pi * p, self.phases[1] + 2 * np.pi * q))
        angle, s = np.linalg.solve(matrix, phases.reshape(2, -1))
        inside = np.abs(s) <= reach
        return angle[inside], s[inside]


def along_protofilaments(number: NDArray[np.int64], s: Array) -> tuple[Array, Array, Array]:
    """Of picks of numbered protofilaments: distance to the nearest, all distances to 200 Å, power of each repeat.

    The power is the mean over the protofilaments of each one's own, weighted with its picks.
    """
    nearest, distances, powers = [], [], np.zeros(len(REPEATS))
    for own in (np.sort(s[number == k]) for k in np.unique(number)):
        apart = np.abs(own[:, None] - own)
        distances.append(apart[np.triu_indices(len(own), 1)])
        powers += power(2 * np.pi * own[:, None] / REPEATS) * len(own) / len(s)
        if len(own) > 1:
            nearest.append((apart + np.diag(np.full(len(own), np.inf))).min(axis=1))
    pairs = np.concatenate(distances)
    return np.concatenate(nearest), pairs[pairs < 200], powers


def near(cylinder: Cylinder, angle: Array, s: Array, height: Array) -> tuple[Lattice, Array]:
    """The lattice of picks on the wall, and how far each is from its site."""
    lattice = Lattice.of(angle, s, float(cylinder.axes.mean()))
    around, along = lattice.site(angle, s, cylinder.radius(angle))
    return lattice, np.sqrt(around**2 + along**2 + height**2)


def read_tiff(path: Path) -> tuple[NDArray[np.float32], float]:
    """An ImageJ stack (z, y, x) and its voxel size, from its description, where it is in nm."""
    with Image.open(path) as image:
        lines = image.tag_v2[270].splitlines()  # type: ignore[attr-defined]
        words = dict(line.split("=", 1) for line in lines if "=" in line)
        if words["unit"] != "nm":
            raise ValueError(f"{path} is in {words['unit']}, not in nm")
        sections = []
        for k in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(k)
            sections.append(np.array(image, np.float32))
    return np.stack(sections), 10 * float(words["spacing"])


def matched(volume: NDArray[np.float32], voxel: float, template: Path, output: Path) -> None:
    """The picks of emc_tempmatch in a volume whose protein is bright."""
    tomogram = output.with_name("microtubule.mrc")
    mrc.write_volume(tomogram, -volume, voxel)
    words = ["emc_tempmatch", "--volume", tomogram, "--template", template, "--output", output, *SEARCH]
    subprocess.run([str(w) for w in words], cwd=output.parent, check=True)


def read_picks(path: Path) -> tuple[Array, Array]:
    """Positions (N, 3) and z-values of the one list of picks in a file."""
    (picks,) = json.loads(path.read_text())["picks"].values()
    return np.array(picks["xyz"], float).reshape(-1, 3), np.array(picks["z"], float)


def maxima(volume: NDArray[np.float32], voxel: float, count: int) -> Array:
    """Positions (count, 3) of the highest maxima of a smoothed volume, to the voxel."""
    smooth = gaussian_filter(volume, BLOB / voxel) - gaussian_filter(volume, AROUND / voxel)
    reach = int(APART / voxel)
    line = np.arange(-reach, reach + 1) * voxel
    ball = line[:, None, None] ** 2 + line[:, None] ** 2 + line**2 <= APART**2
    index = np.argwhere(smooth == maximum_filter(smooth, footprint=ball))
    best = index[np.argsort(-smooth[tuple(index.T)], kind="stable")[:count]]
    return np.asarray((best - np.array(volume.shape) // 2)[:, ::-1] * voxel, np.float64)


def sampled(volume: NDArray[np.float32], voxel: float, xyz: Array) -> Array:
    """The volume at points (..., 3); NaN outside."""
    index = xyz[..., ::-1] / voxel + np.array(volume.shape) // 2
    return np.asarray(map_coordinates(volume, np.moveaxis(index, -1, 0), order=1, cval=np.nan))


def readings(cylinder: Cylinder, angle: Array, s: Array) -> list[tuple[str, int, Array, float]]:
    """The number of protofilaments as picks on the wall tell it: of each reading name, picks, powers, best skew (°)."""
    told = np.abs(np.cos(angle)) < np.sin(np.deg2rad(TOLD_APART))
    found = []
    for text, own in (
        (f"within {TOLD_APART}° of top and bottom", (angle[told], s[told])),
        ("all picks on the wall", (angle, s)),
        ("all, if the ellipse is a stretched circle", (cylinder.unstretched(angle), s)),
    ):
        powers = comb(*own, float(cylinder.axes.mean()))
        skew = float(np.rad2deg(np.arctan(SKEW[powers.max(axis=0).argmax()])))
        found.append((text, len(own[0]), powers.max(axis=1), skew))
    return found


def draw(
    path: Path, volume: NDArray[np.float32], voxel: float, cylinder: Cylinder, lattice: Lattice, picks: Array, z: Array
) -> None:
    """The microtubule from above and across with its picks, the wall unrolled, the spacings and the powers."""
    angle, s, height = cylinder.unroll(picks)
    on = np.abs(height) < WALL
    figure = Figure(figsize=(16, 10), layout="constrained")
    grid = figure.add_gridspec(3, 4, width_ratios=(1, 1, 1.5, 1.4))
    low, high = np.percentile(volume, (2, 99.8))
    half = np.array(volume.shape[::-1]) // 2 * voxel / 10  # nm
    edges = (-half[0], volume.shape[2] * voxel / 10 - half[0], -half[1], volume.shape[1] * voxel / 10 - half[1])
    top = cylinder.centre[2] + cylinder.axes[1]
    for column, (level, text) in enumerate(((top, "top of the wall"), (float(cylinder.centre[2]), "middle"))):
        axes = figure.add_subplot(grid[:, column])
        k = round(level / voxel) + volume.shape[0] // 2
        axes.imshow(
            volume[max(k - 2, 0) : k + 3].mean(0), cmap="gray", vmin=low, vmax=high, origin="lower", extent=edges
        )
        inside = on & (np.abs(picks[:, 2] - level) < 2.5 * voxel)
        axes.scatter(
            *picks[inside, :2].T / 10, s=14, facecolors="none", edgecolors=colours(z[inside], z), linewidths=0.8
        )
        axes.set(
            title=f"{text}, z = {level / 10:.1f} nm", xlabel="x (nm)", ylabel="y (nm)", xlim=edges[:2], ylim=edges[2:]
        )
    axes = figure.add_subplot(grid[:, 2])
    sites = lattice.sites(float(np.abs(s[on]).max()))
    axes.plot(np.rad2deg(wrapped(sites[0])), sites[1] / 10, "+", color="#bbbbbb", markersize=7, zorder=0)
    axes.scatter(np.rad2deg(angle[on]), s[on] / 10, s=12, c=colours(z[on], z))
    axes.set(xlabel="angle about the axis (°)", ylabel="along the axis (nm)", title="unrolled: picks and lattice (+)")
    axes.set(xlim=(-180, 180), xticks=range(-180, 181, 60))

    axes = figure.add_subplot(grid[0, 3])
    line, places = np.arange(-180, 181, 5.0), np.arange(s[on].min(), s[on].max(), 10.0)
    v, u = np.meshgrid(line, line, indexing="ij")
    frame = cylinder.centre + u[..., None] * cylinder.across + v[..., None] * cylinder.up
    bend = cylinder.bend[0] * cylinder.across + cylinder.bend[1] * cylinder.up
    stack = np.stack([sampled(volume, voxel, frame + t * cylinder.along + t**2 * bend) for t in places])
    count = np.isfinite(stack).sum(axis=0)
    mean = np.where(count > 0, np.nansum(stack, axis=0) / np.maximum(count, 1), np.nan)
    axes.imshow(mean, cmap="gray", origin="lower", extent=(-18, 18, -18, 18))
    r = picks[on] - cylinder.centre - s[on, None] * cylinder.along - s[on, None] ** 2 * bend
    axes.plot(r @ cylinder.across / 10, r @ cylinder.up / 10, ".", color=RED, markersize=2)
    axes.set(title="mean along the axis, with the picks", xlabel="nm")

    _, pairs, _ = along_protofilaments(lattice.protofilament(angle[on], s[on]), s[on])
    axes = figure.add_subplot(grid[1, 3])
    axes.hist(pairs / 10, np.arange(0, 20.01, 0.25), color=BLUE)
    for k in range(1, int(200 / lattice.repeat) + 1):
        axes.axvline(k * lattice.repeat / 10, color=RED, linewidth=0.7, linestyle=":")
    axes.set(xlabel="distance between picks of a protofilament (nm)", ylabel="pairs", xlim=(0, 20))
    axes = figure.add_subplot(grid[2, 3])
    for k, (text, _, powers, _) in enumerate(readings(cylinder, angle[on], s[on])):
        axes.bar(np.array(COUNTS) + 0.27 * (k - 1), powers, 0.25, color=(BLUE, "#92c5de", "#bbbbbb")[k], label=text)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.axhline(1, color=RED, linewidth=0.7)
    axes.set(xlabel="protofilaments", ylabel="power", title=f"of {int(on.sum())} picks on the wall; 1: chance")
    figure.savefig(path, dpi=90)


def colours(some: Array, every: Array) -> Array:
    """Of z-values, among all of them."""
    low, high = np.percentile(every, (5, 95))
    return np.asarray(colormaps["cool"]((some - low) / max(high - low, 1e-6)))


def wrapped(angle: Array) -> Array:
    """Into -π to π."""
    return np.angle(np.exp(1j * angle))


def report(volume: NDArray[np.float32], voxel: float, picks: Array) -> tuple[Cylinder, Lattice]:
    """Fit and print."""
    cylinder = fitted(picks)
    angle, s, height = cylinder.unroll(picks)
    on = np.abs(height) < WALL
    plane = np.rad2deg(np.arctan2(cylinder.along[0], cylinder.along[1]))
    climb = np.rad2deg(np.arcsin(cylinder.along[2]))
    sag = cylinder.bend * (s[on].max() - s[on].min()) ** 2 / 4
    print(f"{len(picks)} picks, {int(on.sum())} on the wall")
    print(
        f"axis at {plane:.1f}° in the plane (from y to x), {climb:.1f}° out of it, bent by {np.hypot(*sag):.0f} Å; "
        f"radii {cylinder.axes[0] / 10:.2f} nm in the plane, {cylinder.axes[1] / 10:.2f} nm along z"
    )
    angle, s, height = angle[on], s[on], height[on]
    lattice, away = near(cylinder, angle, s, height)
    rng = np.random.default_rng(0)
    thrown, by_chance = [], []
    for _ in range(THROWS):
        other, off = near(cylinder, rng.uniform(-np.pi, np.pi, len(s)), rng.uniform(s.min(), s.max(), len(s)), height)
        thrown.append((other.powers.max(), other.line))
        by_chance.append(float((off < NEAR).mean()))
    print(f"power of n protofilaments by chance: the best has {np.mean(thrown, axis=0)[0]:.1f}")
    for text, count, powers, skew in readings(cylinder, angle, s):
        row = ", ".join(f"{n}: {p:.1f}" for n, p in zip(COUNTS, powers, strict=True))
        print(f"  {text} ({count} picks): {row}; skew of the best {skew:.1f}°")
    print(
        f"repeat {lattice.repeat / 10:.3f} nm with the {lattice.start:+d}-start helix, power {lattice.line:.1f} "
        f"(by chance {np.mean(thrown, axis=0)[1]:.1f})"
    )
    number = lattice.protofilament(angle, s)
    nearest, _, powers = along_protofilaments(number, s)
    print(f"  each protofilament for itself: {REPEATS[powers.argmax()] / 10:.3f} nm, power {powers.max():.1f}")
    print(
        f"along a protofilament: median distance to the nearest {np.median(nearest) / 10:.2f} nm, "
        f"{100 * np.mean(np.abs(nearest - lattice.repeat) < 5):.0f} % within 0.5 nm of the repeat"
    )
    print(f"picks per protofilament: {' '.join(map(str, np.bincount(number, minlength=lattice.count)))}")
    print(
        f"picks on the wall within {NEAR / 10:g} nm of a site: {100 * (away < NEAR).mean():.0f} % "
        f"(by chance {100 * np.mean(by_chance):.0f} %); of all picks {100 * (away < NEAR).sum() / len(picks):.0f} %"
    )
    sites = cylinder.roll(*lattice.sites(1500.0))
    held = np.isfinite(sampled(volume, voxel, sites))
    found = cKDTree(picks).query(sites[held])[0] < NEAR
    print(f"sites in the volume: {int(held.sum())}, with a pick within {NEAR / 10:g} nm: {100 * found.mean():.0f} %")
    return cylinder, lattice


def main() -> None:
    """Search, analyse, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--picks", type=Path, help="JSON of picks, instead of emc_tempmatch")
    args = parser.parse_args()
    folder = args.data.resolve() / "real" / "microtubule"
    volume, voxel = read_tiff(folder / "13pf_MT.tif")
    with tempfile.TemporaryDirectory() as temporary:
        output = args.picks or Path(temporary) / "tubulin.json"
        if args.picks is None:
            matched(volume, voxel, folder / "beta-tubulin.mrc", output)
        picks, z = read_picks(output)
    draw(args.picture, volume, voxel, *report(volume, voxel, picks), picks, z)
    print("without a template, the highest maxima of the smoothed volume:")
    report(volume, voxel, maxima(volume, voxel, len(picks)))


if __name__ == "__main__":
    main()
