"""What emc_fsc writes, and emc_average: the curves of two maps, their resolution by direction and place, the finished map."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.io import mrc, star
from libemc.io.files import read_table, write_text
from libemc.methods import sharpen
from libemc.methods.average import last_shell
from libemc.methods.directional import Directions, believable, directional_resolution, wiener_gain
from libemc.methods.local_resolution import LocalResolution, local_filter, local_resolution
from libemc.methods.postprocess import Resolution, independent_fraction
from libemc.view import plots, resolution

Paths = dict[str, Path]


@dataclass(frozen=True)
class Finish:
    """What is asked for beyond the curves.

    Attributes:
        directions, local: the resolution by direction, by place.
        filter: by the FSC of all directions (spherical), of each (anisotropic), of each place (local), or None.
        b_factors: Å², negative sharpens; "auto" for a fit; a finished map for each.
        structure_factor: a map or a table whose radial power the map gets.
        mtf: a table of the detector's MTF, or None.
        mtf_pixel_size: Å, of the images for which that table holds; None: the map's.
    """

    directions: bool = False
    local: bool = False
    filter: str | None = None
    b_factors: tuple[float | str, ...] = ()
    structure_factor: Path | None = None
    mtf: Path | None = None
    mtf_pixel_size: float | None = None

    @property
    def sharpens(self) -> bool:
        """Whether the map's amplitudes are changed beyond its filter."""
        return bool(self.b_factors) or self.structure_factor is not None or self.mtf is not None

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.directions or self.local or self.filter or self.sharpens)

    def check(self) -> None:
        """Raise InputError where two of them contradict each other."""
        if self.b_factors and self.structure_factor:
            raise InputError("both give the map its contrast", "--bfactor, --structure-factor", "give one of them")

    def maps(self) -> dict[str, float | str | None]:
        """Names of the finished maps, with the B factor of each: filtered.mrc, or several as filtered_b-50.mrc."""
        if len(self.b_factors) > 1:
            words = ("auto" if b == "auto" else f"b{b}".removesuffix(".0") for b in self.b_factors)
            return {f"filtered_{word}.mrc": b for word, b in zip(words, self.b_factors, strict=True)}
        wanted = self.filter is not None or self.sharpens
        return {"filtered.mrc": next(iter(self.b_factors), None)} if wanted else {}

    def files(self) -> list[str]:
        """Names of what will be written for it."""
        names = ["fsc_3d.mrc", "directions.txt", "directions.png"] * (self.directions or self.filter == "anisotropic")
        names += ["local_resolution.mrc", "local_resolution.png"] * (self.local or self.filter == "local")
        names += ["guinier.png"] * ("auto" in self.b_factors)
        return [*names, *self.maps()]


def curve_line(found: Resolution) -> str:
    """The main curve first: its name and its resolutions."""
    names = [found.main, *(name for name in found.crossings if name != found.main)]
    wanted = ("0.143", "0.5") if found.criterion == "0.143" else ("0.5", "0.143")
    return "; ".join(
        f"{name} " + " ".join(f"{found.crossings[name][label]:.2f} Å at {label}" for label in wanted) for name in names
    )


def json_text(content: dict[str, Any]) -> str:
    """One key to a line."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    return "{" + ",\n ".join(f"{encode(key)}: {encode(value)}" for key, value in content.items()) + "}\n"


def curve_text(found: Resolution) -> str:
    """A line for each shell: frequency, resolution, and the value of each curve."""
    lines = ["# 1/Å Å " + " ".join(found.curves)]
    for shell, frequency in enumerate(found.frequency):
        values = " ".join(f"{float(curve.values[shell]):9.6f}" for curve in found.curves.values())
        lines.append(f"{frequency:.6f} {1 / frequency if frequency else float('inf'):9.3f} {values}")
    return "\n".join(lines) + "\n"


def write_curves(found: Resolution, text: Path, picture: Path) -> None:
    """The curves as a table and as a figure."""
    table = found.table()
    title = f"{found.value:.2f} Å where the {found.main} FSC falls below {found.criterion}"
    write_text(text, curve_text(found))
    plots.fsc_plot(picture, found.frequency, table["curves"], table["thresholds"], found.value, title)


def finish(
    half1: Tensor,
    half2: Tensor,
    mask: Tensor | None,
    found: Resolution,
    wanted: Finish,
    files: Paths,
    seed: int,
    average: Tensor | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Do what is asked for beyond the curves, and write it.

    Every finished map is one map of both halves, weighted by their FSC (C_ref², see `methods.sharpen`), times its gain.

    Args:
        half1, half2: (n, n, n), unmasked.
        mask: (n, n, n) in 0 ... 1.
        found: of the same halves and mask.
        files: where each of `wanted.files()` goes.
        seed: of the random phases.
        average: (n, n, n) of both halves, Wiener filtered: what is sharpened where no filter is asked for; None: their
            mean, filtered by the FSC of all directions.

    Returns:
        what to add to the JSON, and phrases for the line of the result.

    Raises:
        InputError: a B factor can't be fitted; a table or map that is asked for does not fit.
    """
    table: dict[str, Any] = {}
    phrases: list[str] = []
    gains, more = _sharpening(0.5 * (half1 + half2), mask, found, wanted, files)
    table |= more
    if "b_factor" in more:
        phrases.append(f"B factor {more['b_factor']:.0f} Å²")
    if "b_factors" in more:
        phrases.append(f"B factors {', '.join(f'{b:.0f}' for b in more['b_factors'].values())} Å²")
    directions = local = None
    if "directions.png" in files:
        generator = torch.Generator().manual_seed(seed)
        directions = directional_resolution(half1, half2, found.pixel_size, mask, generator)
        _write_directions(directions, found, files)
        table["directions"] = directions.table()
        at = directions.crossings["0.143"]
        phrases.append(f"directions {float(at.min()):.2f} to {float(at.max()):.2f} Å")
    if "local_resolution.mrc" in files:
        everywhere = torch.ones_like(half1) if mask is None else mask
        local = local_resolution(half1, half2, found.pixel_size, everywhere, found.value)
        _write_local(local, 0.5 * (half1 + half2), files)
        table["local"] = {"window": local.window * found.pixel_size, **local.quantiles()}
        phrases.append(f"local {table['local']['best_tenth']:.2f} to {table['local']['worst_tenth']:.2f} Å")
    if gains:
        if average is not None and wanted.filter is None:
            mean = average
        else:
            mean = _filtered(0.5 * (half1 + half2), mask, found, wanted.filter, directions, local)
        for name, gain in gains.items():
            mrc.write_volume(files[name], sharpen.apply_radial(mean, gain).float().numpy(), found.pixel_size)
    return table, phrases


def _believed(found: Resolution, mask: Tensor | None) -> Tensor:
    """(n//2+1,) the main curve as far as filters may be made of it."""
    curve = found.curves[found.main]
    share = 1.0 if mask is None else independent_fraction(mask)
    values = believable(curve.values[None], curve.count[None], share)[0]
    values[0] = 1.0
    return values


def _filtered(
    mean: Tensor,
    mask: Tensor | None,
    found: Resolution,
    kind: str | None,
    directions: Directions | None,
    local: LocalResolution | None,
) -> Tensor:
    """The mean of both halves, filtered; by the FSC of all directions where a map is only to be sharpened."""
    if kind == "local" and local is not None:
        return local_filter(mean, local, least=last_shell(found.curves[found.main].values) / len(mean))
    if kind == "anisotropic" and directions is not None:
        return torch.fft.irfftn(torch.fft.rfftn(mean) * directions.gain(), s=mean.shape)
    return sharpen.apply_radial(mean, wiener_gain(_believed(found, mask)))


def _sharpening(
    mean: Tensor, mask: Tensor | None, found: Resolution, wanted: Finish, files: Paths
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gain of each shell (n//2+1,) of each finished map, by its name, and what there is to say about them."""
    frequency = torch.tensor(found.frequency, dtype=torch.float64)
    gain = torch.ones_like(frequency)
    more: dict[str, Any] = {}
    if wanted.mtf is not None:
        scale = wanted.mtf_pixel_size or found.pixel_size
        at, values = _columns(wanted.mtf, "rlnResolutionInversePixel", "rlnMtfValue")
        gain = gain * _about(wanted.mtf, lambda: sharpen.mtf_gain(frequency, values, at / scale))
    fsc = _believed(found, mask)
    power = sharpen.signal_power(mean, fsc, mask) * gain**2
    if wanted.structure_factor is not None:
        aim_at, aim = _structure_factor(wanted.structure_factor)
        source = wanted.structure_factor
        gain = gain * _about(source, lambda: sharpen.structure_factor_gain(power, frequency, aim, aim_at))
        more["structure_factor"] = str(source)
    known = {b: float(b) for b in wanted.b_factors if b != "auto"}
    if "auto" in wanted.b_factors:
        fit = sharpen.guinier_fit(power, fsc, found.pixel_size, mean.shape[-1], found.value)
        title = f"B factor {fit.b_factor:.0f} ± {fit.error:.0f} Å²"
        resolution.guinier_plot(
            files["guinier.png"], fit.squared_frequency, fit.log_amplitude, fit.b_factor / 4, fit.intercept,
            (fit.coarse, fit.fine), title,
        )  # fmt: skip
        known["auto"], more["b_factor_error"] = fit.b_factor, fit.error
    if len(known) > 1:
        more["b_factors"] = {files[name].name: known[b] for name, b in wanted.maps().items() if b is not None}
    elif known:
        (more["b_factor"],) = known.values()
    gains = {
        name: gain if b is None else gain * sharpen.b_factor_gain(known[b], frequency)
        for name, b in wanted.maps().items()
    }
    return gains, more


def _about(path: Path, work: Callable[[], Tensor]) -> Tensor:
    """What `work()` gives; its InputError is about a file."""
    try:
        return work()
    except InputError as error:
        raise InputError(error.what, path, error.remedy) from None


def _columns(path: Path, *labels: str) -> list[Tensor]:
    """Two columns of numbers: of a STAR file by their labels, or of a plain table."""
    if path.suffix == ".star":
        block = star.block_with(star.read_star(path), labels[0], path)
        return [torch.from_numpy(star.numbers(block, label, path).copy()) for label in labels]
    rows = torch.tensor(read_table(path, (2, 3, 4)), dtype=torch.float64)
    return [rows[:, 0], rows[:, 1]]


def _structure_factor(path: Path) -> tuple[Tensor, Tensor]:
    """Frequencies (1/Å) and radial power: of a map, or of a table of both."""
    if path.suffix in (".mrc", ".map", ".ccp4"):
        array, pixel_size = mrc.read_volume(path)
        if len(set(array.shape)) > 1:
            raise InputError("is not a cube", path, "cut or pad it with emc_volume --box")
        power, frequency = sharpen.structure_factor_of(torch.from_numpy(array), pixel_size)
        return frequency, power
    frequency, power = _columns(path, "rlnResolution", "rlnAmplitudeSquared")
    return frequency, power


def _write_directions(directions: Directions, found: Resolution, files: Paths) -> None:
    mrc.write_volume(files["fsc_3d.mrc"], directions.centred_volume().numpy(), directions.pixel_size)
    write_text(files["directions.txt"], directions.text())
    at143 = directions.crossings["0.143"]
    title = (
        f"{float(at143.min()):.2f} to {float(at143.max()):.2f} Å in {len(at143)} cones of {directions.half_angle:g}°, "
    )
    resolution.directions_plot(
        files["directions.png"], found.frequency, directions.sphere, directions.curves, directions.axes, at143,
        {"0.143": 0.143}, title + f"sphericity {directions.sphericity:.2f}",
    )  # fmt: skip


def _write_local(local: LocalResolution, mean: Tensor, files: Paths) -> None:
    mrc.write_volume(files["local_resolution.mrc"], local.resolution.numpy(), local.pixel_size)
    q = local.quantiles()
    title = f"local resolution: {q['best_tenth']:.1f}, {q['median']:.1f} and {q['worst_tenth']:.1f} Å"
    title += f" (best tenth, median, worst tenth), window {local.window * local.pixel_size:.0f} Å"
    seen = local_filter(mean, local).float().numpy()
    resolution.local_resolution_plot(
        files["local_resolution.png"], seen, local.resolution.numpy(), local.pixel_size, title
    )
