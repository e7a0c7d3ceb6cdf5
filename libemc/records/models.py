"""The four kinds of record as typed, frozen models: a tilt series, its particles, a particle set, a run.

What a record may hold is said here and nowhere else: the JSON Schemas in `info/` are generated from these classes
(their descriptions are the strings beneath the fields), and every file is checked against them when it is read and
when it is written. Add a field with a default; renaming or removing one needs a step in `migration.py` and a new
`schema` integer. Lengths and defocus are in Å, angles in degrees, dose in e/Å², voltage in kV, Cs in mm. A per-tilt
list has one entry for every image of the stack, excluded ones too, in the order of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _finite(value: Any) -> Any:
    """A free-form value unchanged, or an error where a number in it is NaN or infinite (JSON has neither)."""
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "is NaN or infinite")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _finite(item)
    return value


def _check_lengths(values: Iterable[tuple[str, Any]], count: int, what: str, remedy: str) -> None:
    """Raise where one of the named lists has not `count` entries; whatever is not a list is passed over."""
    for name, value in values:
        if isinstance(value, tuple) and len(value) != count:
            message = f"{name} has {len(value)} entries, but there are {count} {what}"
            raise PydanticCustomError("length", message, {"remedy": remedy})


Free = Annotated[dict[str, Any], AfterValidator(_finite)]
Pair = tuple[float, float]
Vector = tuple[float, float, float]
Numbers = tuple[float, ...]
Scores = tuple[float | None, ...]
Shape = tuple[PositiveInt, PositiveInt, PositiveInt]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """What all models share: frozen, no unknown keys, no NaN, and a trailing underscore for Python's own words."""

    model_config = ConfigDict(
        frozen=True,
        defer_build=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        alias_generator=lambda name: name.removesuffix("_"),
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class HistoryEntry(Section):
    """One run of one program: what was asked, on what, where, how long it took and how it ended."""

    id: Name
    """Unique to this run of the program; writing the entry again replaces it."""
    program: str
    version: str
    commit: str | None = None
    """Commit of the source tree, where it ran from one."""
    argv: tuple[str, ...]
    start: str
    """ISO 8601 with time zone."""
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    """Bytes."""
    host: str | None = None
    device: str | None = None
    seed: int | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    state: Literal["running", "done", "failed", "interrupted"] = "running"
    """`running` in an old file: the program was killed."""


class Record(Section):
    """A file of its own: a kind, the integer of its format, and the history of what changed it."""

    left_out_when_empty: ClassVar[frozenset[str]] = frozenset()

    kind: str
    schema_: int = 1
    if TYPE_CHECKING:  # each kind declares it where it belongs in the order of its keys
        history: tuple[HistoryEntry, ...] = ()


class Source(Section):
    """The raw stack, and the microscope."""

    stack: Name
    """Path from the project directory."""
    shape: Shape
    """Tilts, rows, columns."""
    pixel_size: PositiveFloat
    header_pixel_size: PositiveFloat | None = None
    """What the stack's header says instead, where import was told not to believe it."""
    voltage: PositiveFloat
    cs: float
    amplitude_contrast: float
    tilt_axis: float | None = None
    """Nominal angle from +y to the tilt axis, counter-clockwise; null when not known."""
    contrast: Literal["dark", "bright"] = "dark"
    """Whether the specimen is darker or brighter than its surroundings in the raw images."""
    origin: str | None = None
    """The file that the stack was imported from."""


class Tilts(Section):
    """What the microscope recorded for each image, and which images are used."""

    nominal: Numbers
    """Stage tilt, per tilt."""
    order: tuple[int, ...] | None = None
    """Place in the order of exposure, from 0, per tilt."""
    dose: Numbers | None = None
    """Of that exposure, per tilt."""
    dose_before: Numbers | None = None
    """What the specimen had received before that exposure, per tilt."""
    use: tuple[bool, ...]
    reason: tuple[str | None, ...] | None = None
    """Why a tilt is not used, per tilt."""


class Landmarks(Section):
    """The points of the specimen that the alignment is fitted to."""

    xyz: tuple[Vector, ...]
    """Å from the tomogram's centre."""
    kind: tuple[Literal["bead", "feature"], ...]
    """A gold bead, or anything else that stands out."""
    diameter: Scores
    """Of the beads; null for the others."""
    residual: Scores
    """Root mean square distance from the prediction over the tilts, per landmark."""

    @model_validator(mode="after")
    def _lengths(self) -> Landmarks:
        _check_lengths(self, len(self.xyz), "points (xyz)", "write one entry for each point")
        return self


class Deformation(Section):
    """Smooth local motion: added to the image position after the geometry and the magnification.

    A displacement at each node of a regular grid over the image; natural cubic splines between the nodes.
    """

    rows: PositiveInt
    columns: PositiveInt
    """Nodes along y and x; the outermost lie on the field's edges."""
    field: tuple[PositiveFloat, PositiveFloat]
    """Å along x and y that the nodes span, around the image centre."""
    dx: tuple[Numbers, ...]
    """Å, per tilt: rows * columns values, x fastest."""
    dy: tuple[Numbers, ...]

    @model_validator(mode="after")
    def _lengths(self) -> Deformation:
        for values in (*self.dx, *self.dy):
            _check_lengths((("a tilt", values),), self.rows * self.columns, "nodes", "write one value for each node")
        return self


class Alignment(Section):
    """The tilt geometry: q = Rz(axis) Ry(tilt) Rx(xtilt) r, image position magnification (q_xy + shift) + deformation."""

    axis: Numbers
    tilt: Numbers
    xtilt: Numbers
    shift_x: Numbers
    """Å from the image centre (pixel n//2), per tilt."""
    shift_y: Numbers
    magnification: Numbers | None = None
    """Scale about the image centre, per tilt; null means 1."""
    hand_open: bool = False
    """The axis was found from the images alone: it may be its opposite, and the specimen its mirror image."""
    residual: Scores | None = None
    """Root mean square distance of the landmarks from their predictions, per tilt."""
    error: Scores | None = None
    """Expected root mean square error of a point's image position over the field, per tilt; null: not known."""
    thickness: float | None = None
    """Å along z that the specimen fills."""
    landmarks: Landmarks | None = None
    deformation: Deformation | None = None
    """Null means none."""
    freedom: Free | None = None
    """What was fitted, how freely, and what cross-validation said of it."""
    loss: Scores | None = None
    """The alignment's objective, in the program's own steps."""


class Ctf(Section):
    """Defocus (underfocus positive, U ≥ V, angle from +x to U counter-clockwise) and phase shift of each tilt."""

    defocus_u: Numbers
    defocus_v: Numbers
    angle: Numbers
    phase_shift: Numbers
    score: Scores | None = None
    """Correlation of rings and fit, per tilt."""
    resolution: Scores | None = None
    """To which the fitted rings are seen, per tilt."""
    error: Scores | None = None
    """Standard error of the mean of U and V, per tilt."""
    astigmatism_error: float | None = None
    """Standard error of U - V."""
    phase_error: Scores | None = None
    """Standard error of the phase shift, per tilt."""
    measured: tuple[bool, ...] | None = None
    """Whether a tilt's own rings tell its defocus; otherwise it has the series' value."""
    thickness: float | None = None
    """Of the specimen, from the rings."""
    defocus_handedness: Literal[-1, 1] = -1
    """The sign of q_z in a point's defocus."""
    handedness_score: float | None = None
    """How sure that is, from 0, undecided, to 1."""
    beam_tilt: Pair | None = None
    """mrad along x and y, of the whole tilt series; absent: none."""


class Tomogram(Section):
    """A reconstruction."""

    file: Name
    """Path from the project directory."""
    pixel_size: PositiveFloat
    shape: Shape
    """z, y, x in voxels."""
    corrections: tuple[str, ...] = ()
    half: Literal[1, 2] | None = None
    """Which half of the data; null means all of it."""
    centre: Vector = (0.0, 0.0, 0.0)
    """Where the volume's centre lies in the tomogram."""
    angles: Vector = (0.0, 0.0, 0.0)
    """How the volume is turned about its centre: rot, tilt and psi of its axes."""


class Picks(Section):
    """Points, with or without an orientation, of one label."""

    xyz: tuple[Vector, ...]
    """From the tomogram's centre."""
    rot: Numbers | None = None
    tilt: Numbers | None = None
    psi: Numbers | None = None
    score: Scores | None = None
    z: Scores | None = None
    """The score in standard deviations of what no particle scores."""
    margin: Scores | None = None
    """How much better than the next best label's the score is."""
    source: str | None = None
    """The program or the file that they come from."""
    parameters: Free | None = None
    """What the program says about the list as a whole, its threshold for example."""

    @model_validator(mode="after")
    def _lengths(self) -> Picks:
        _check_lengths(self, len(self.xyz), "points (xyz)", "write one entry for each point")
        return self


OF_THE_SERIES = ("loss", "beam_tilt")
"""Lists of a section that are not per tilt."""


class Replaced(Section):
    """Sections that a program has put others in the place of."""

    program: str
    run: str
    """The folder of its run."""
    alignment: Alignment | None = None
    ctf: Ctf | None = None


class TiltSeriesRecord(Record):
    """`info/<name>_info.json`: one tilt series, a section for each concern. A missing section is not done yet."""

    left_out_when_empty = frozenset({"alignment", "ctf", "tomograms", "picks", "replaced"})

    kind: Literal["tiltseries"] = "tiltseries"
    schema_: Literal[1] = 1
    name: Name
    source: Source
    tilts: Tilts
    alignment: Alignment | None = None
    ctf: Ctf | None = None
    tomograms: tuple[Tomogram, ...] = ()
    picks: dict[str, Picks] = {}
    """Lists of points by label."""
    replaced: tuple[Replaced, ...] = ()
    """Alignments and CTFs before they were refined from particles, the oldest first."""
    history: tuple[HistoryEntry, ...] = ()

    @model_validator(mode="after")
    def _lengths(self) -> TiltSeriesRecord:
        count = self.source.shape[0]
        for name, section in (("tilts", self.tilts), ("alignment", self.alignment), ("ctf", self.ctf)):
            lists = ((f"{name}.{key}", value) for key, value in section or () if key not in OF_THE_SERIES)
            _check_lengths(lists, count, "images in source.shape", "write one entry for each image of the stack")
        if self.alignment is not None and self.alignment.deformation is not None:
            lists = ((f"alignment.deformation.{key}", getattr(self.alignment.deformation, key)) for key in ("dx", "dy"))
            _check_lengths(lists, count, "images in source.shape", "write one entry for each image of the stack")
        return self


class Optics(Section):
    """The microscope, as the CTF needs it."""

    voltage: PositiveFloat
    cs: float
    amplitude_contrast: float
    beam_tilt: Pair | None = None
    """mrad along x and y; absent: none."""


class ParticleTilts(Section):
    """The tilt geometry and the CTF of each tilt as they were when the particles were last written."""

    axis: Numbers
    tilt: Numbers
    xtilt: Numbers
    magnification: Numbers
    dose: Numbers
    dose_before: Numbers
    use: tuple[bool, ...]
    astigmatism: Numbers
    """(U-V)/2, per tilt."""
    astigmatism_angle: Numbers
    phase_shift: Numbers
    shift_x: Numbers | None = None
    """Of the alignment, where it has changed since the patches were cut; absent: as in `raw`."""
    shift_y: Numbers | None = None


class Subtilt(Section):
    """One particle's corrections tilt by tilt."""

    dx: Numbers
    """Å beside where xyz lies in the patch, before the magnification."""
    dy: Numbers
    drot: Numbers
    """Degrees: with the next two the rotation vector, along the image's x, y and z, of a turn of what the image shows."""
    dtilt: Numbers
    dpsi: Numbers
    ddefocus: Numbers
    """Å beside the defocus of the particle's place."""
    weight: Numbers
    """Of the image in fits and averages; 0: left out."""
    score: Scores
    """How well it fits, in spreads of its tilt's images from what is usual there."""


class RawImages(Section):
    """The raw stack and the geometry that the patches were cut with: what cutting the same ones again takes."""

    stack: Name
    """Path from the project directory."""
    digest: Name
    """SHA-256 of the middle row of every image as it is stored: whether the stack is still the same."""
    shape: Shape
    """Tilts, rows, columns."""
    pixel_size: PositiveFloat
    binning: PositiveInt
    contrast: Literal["dark", "bright"]
    mean: Numbers
    """What a patch is filled with beyond the edge of its image, per tilt."""
    noise: Numbers
    """Standard deviation of the background, by which patches are divided, per tilt."""
    axis: Numbers
    """The alignment at extraction, by which a particle's `centre` is in the middle of its patches."""
    tilt: Numbers
    xtilt: Numbers
    shift_x: Numbers
    shift_y: Numbers
    magnification: Numbers | None = None
    deformation: Deformation | None = None

    @model_validator(mode="after")
    def _lengths(self) -> RawImages:
        lists = [(key, value) for key, value in self if key != "shape"]
        if self.deformation is not None:
            lists += [(f"deformation.{key}", getattr(self.deformation, key)) for key in ("dx", "dy")]
        _check_lengths(lists, self.shape[0], "images in shape", "write one entry for each image of the raw stack")
        return self


PER_TILT = ("defocus", "astigmatism", "astigmatism_angle", "phase_shift", "visible")
"""A particle's own lists with one entry per tilt."""
OPTIONAL = ("classes", "z", "image", "astigmatism", "astigmatism_angle", "phase_shift", "subtilt")
"""What a particle's line leaves out while it is null."""
LEFT_OUT = {"ctf": ("beam_tilt",), "optics": ("beam_tilt",), "tilts": ("shift_x", "shift_y")}
"""What these sections leave out while it is null."""


class Particle(Section):
    """One particle: where it is, how it is turned, which half set it is in."""

    id: Name
    """For life: tilt series, a dot, a number."""
    xyz: Vector
    """From the tomogram's centre."""
    centre: Vector
    """Where the stack's patches are centred: xyz at extraction."""
    rot: float
    tilt: float
    psi: float
    half: Literal[1, 2]
    """By id; never changes."""
    class_: int = 0
    classes: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    """Probability of class 1, 2, ..., where it was refined in classes."""
    score: float | None = None
    weight: Annotated[float, Field(ge=0)] | None = None
    """In averages; absent: 1; 0: left out, for the reason given."""
    z: float | None = None
    """The z-value of its pick; absent where the pick has none."""
    use: bool = True
    reason: str | None = None
    """Why it is not used, or has no weight."""
    parent: str | None = None
    """The id in the parent set, where it is another."""
    image: NonNegativeInt | None = None
    """Place of its images in the stack, from 0; absent: its place in this file."""
    defocus: Numbers | None = None
    """(U+V)/2 at `centre`, per tilt; null when not known."""
    astigmatism: Numbers | None = None
    """(U-V)/2, per tilt; absent: the tilt's, as for the two that follow."""
    astigmatism_angle: Numbers | None = None
    phase_shift: Numbers | None = None
    visible: tuple[Annotated[int, Field(ge=0, le=1)], ...]
    """1 where the tilt shows it, per tilt."""
    subtilt: Subtilt | None = None
    """Absent until refined."""


class ParticleFile(Record):
    """`particles/<set>/<name>.json`: the particles of one tilt series, one to a line, and what they all share."""

    left_out_when_empty = frozenset({"raw"})

    kind: Literal["particles"] = "particles"
    schema_: Literal[1] = 1
    set: Name
    name: Name
    """The tilt series."""
    box: PositiveInt
    """Pixels."""
    pixel_size: PositiveFloat
    symmetry: str = "c1"
    stack: str | None = None
    """Path from the project directory of the extracted patches."""
    stack_order: Literal["particle*tilts+tilt"] = "particle*tilts+tilt"
    """Image number of a particle (its `image`, else its place in this file, from 0) and a tilt."""
    raw: RawImages | None = None
    """What patches are cut from where there is no stack; absent: they come from elsewhere."""
    ctf_premultiplied: bool = False
    contrast: Literal["white"] = "white"
    parent: str | None = None
    """The set or run that these come from."""
    label: str | None = None
    """The picks' label."""
    optics: Optics
    tilts: ParticleTilts
    defocus_handedness: Literal[-1, 1] = -1
    history: tuple[HistoryEntry, ...] = ()
    particles: tuple[Particle, ...]

    @model_validator(mode="after")
    def _lengths(self) -> ParticleFile:
        count, remedy = len(self.tilts.tilt), "write one entry for each tilt"
        _check_lengths(((f"tilts.{key}", value) for key, value in self.tilts), count, "tilts", remedy)
        if self.raw is not None:
            _check_lengths([("raw.mean", self.raw.mean)], count, "tilts", remedy)
        ids: set[str] = set()
        for index, particle in enumerate(self.particles):
            own = ((key, getattr(particle, key)) for key in PER_TILT)
            refined = ((f"subtilt.{key}", value) for key, value in particle.subtilt or ())
            for key, value in (*own, *refined):
                if value is not None and len(value) != count:
                    _check_lengths([(f"particles[{index}].{key}", value)], count, "tilts", remedy)
            if particle.id in ids:
                context = {"remedy": "give every particle an id of its own"}
                raise PydanticCustomError("duplicate", f"particles[{index}].id repeats {particle.id!r}", context)
            ids.add(particle.id)
        return self


class ParticleSet(Record):
    """`particles/<set>/particles.json`: what the set is, and the particle file of each tilt series in it."""

    kind: Literal["set"] = "set"
    schema_: Literal[1] = 1
    set: Name
    label: str | None = None
    box: PositiveInt
    pixel_size: PositiveFloat
    symmetry: str = "c1"
    files: dict[str, str] = {}
    """Tilt series to the path, from the project directory, of its particle file."""
    count: NonNegativeInt = 0
    parent: str | None = None
    history: tuple[HistoryEntry, ...] = ()


class Fingerprint(Section):
    """An input as it was when a run began."""

    path: str
    size: int
    """Bytes."""
    mtime: float
    """Seconds since 1970."""
    digest: str | None = None
    """SHA-256 of small files."""


class Run(Record):
    """`<run>/run.json`: everything that a run was given, how far it is, and what it needs to go on."""

    kind: Literal["run"] = "run"
    schema_: Literal[1] = 1
    program: str
    options: Free
    inputs: tuple[Fingerprint, ...] = ()
    seed: int | None = None
    state: Free = {}
    """The program's own: its iterations with their figures."""
    stopped_at: str | None = None
    """The step that `--resume` begins with; null when the run is complete."""
    history: tuple[HistoryEntry, ...] = ()


KINDS: dict[str, type[Record]] = {
    "tiltseries": TiltSeriesRecord,
    "particles": ParticleFile,
    "set": ParticleSet,
    "run": Run,
}
