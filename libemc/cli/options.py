"""Options that programs share: each is declared here, once, with one meaning, one help text and one default.

A program that wants `--mask` calls `options.mask(parser)`. Where a default belongs to the program and not to the
option, the function takes it as an argument; help and type can't be changed. The parser walk in the tests fails on an
option that two programs declare by themselves. Add an option here as soon as a second program wants it; never change
what one means.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from libemc.errors import InputError

STANDARD = ("threads", "device", "memory", "overwrite", "resume", "seed", "verbose", "quiet", "dry-run")
"""The standard options besides --help and --version, in the order in which --help shows them."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and ends each option's help with its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        says_nothing = action.default is None or action.default is argparse.SUPPRESS or action.const is not None
        if text is None or says_nothing or not action.option_strings or isinstance(action.default, bool):
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are `InputError`s of one line."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
        )
        # argparse takes "-5,0,0" and "-50,auto" for options unless they look like negative numbers
        self._negative_number_matcher = re.compile(r"^-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed.

        Raises:
            InputError: always.
        """
        raise InputError(message, remedy=f"see {self.prog} --help")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a whole command line.

        Raises:
            InputError: for an option that doesn't exist (naming the one that is spelt most like it), or a wrong value.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for word in argv:
            option = word.split("=", 1)[0]
            if word == "--":
                break
            if re.match(r"--?[A-Za-z]", option) and option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
                raise InputError(f"there is no option {option}", remedy=hint)
        return self.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------- types


def _number(text: str, kind: Callable[[str], Any], name: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not {name}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not finite")
    return value


def number(text: str) -> float:
    """A finite number."""
    return float(_number(text, float, "a number"))


def positive(text: str) -> float:
    """A finite number above zero."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not above zero")
    return value


def not_negative(text: str) -> float:
    """A finite number, zero or above."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is below zero")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, both included."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not from 0 to 1")
    return value


def share(text: str) -> float:
    """A number above 0, up to 1."""
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"'{text}' leaves nothing")
    return value


def some_of(names: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type: some of these names, with commas between them."""
    known = tuple(names)

    def chosen(text: str) -> tuple[str, ...]:
        parts = tuple(dict.fromkeys(text.split(",")))
        for part in parts:
            if part not in known:
                raise argparse.ArgumentTypeError(f"'{part}' is none of {', '.join(known)}")
        return parts

    return chosen


def integer(text: str) -> int:
    """A whole number."""
    return int(_number(text, int, "a whole number"))


def count(text: str) -> int:
    """A whole number, 1 or more."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return value


def seed_number(text: str) -> int:
    """A whole number from 0 to 2^32 - 1, which every generator takes."""
    value = integer(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not from 0 to 4294967295")
    return value


def memory_size(text: str) -> int:
    """Bytes from `4G`, `500M`, `1.5GB`, `2GiB` or a plain number; the units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of memory such as 4G or 500M")
    return size


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers with commas between them."""
    return tuple(number(part) for part in text.split(","))


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(integer(part) for part in text.split(","))


def number_or_auto(text: str) -> float | str:
    """A number, or auto."""
    return text if text == "auto" else number(text)


def numbers_or_auto(text: str) -> tuple[float | str, ...]:
    """Numbers, or auto, with commas between them; what is said twice counts once."""
    return tuple(dict.fromkeys(number_or_auto(part) for part in text.split(",")))


def count_or_auto(text: str) -> int | None:
    """A whole number, 1 or more, or None for auto."""
    return None if text == "auto" else count(text)


def box_size(text: str) -> int:
    """A box of at least 8 pixels."""
    value = integer(text)
    if value < 8:
        raise argparse.ArgumentTypeError(f"'{text}' is not 8 pixels or more")
    return value


def label_name(text: str) -> str:
    """A name that is also a good file name: letters, digits and `_ . + -`, beginning with a letter or digit."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a name of letters, digits and _ . + -")
    return text


def region_bounds(text: str) -> tuple[float, ...]:
    """Six numbers x0,x1,y0,y1,z0,z1 with each pair rising."""
    values = numbers(text)
    if len(values) != 6 or any(low >= high for low, high in zip(values[::2], values[1::2], strict=True)):
        raise argparse.ArgumentTypeError(f"'{text}' is not x0,x1,y0,y1,z0,z1 with x0 < x1, y0 < y1, z0 < z1")
    return values


def three_angles(text: str) -> tuple[float, float, float]:
    """rot,tilt,psi, degrees."""
    values = numbers(text)
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"'{text}' is not rot,tilt,psi")
    return values[0], values[1], values[2]


# -------------------------------------------------------------------------------------------------------- declarations


def _add(parser: argparse._ActionsContainer, *flags: str, **settings: Any) -> None:
    """Add an argument and mark it as declared in this file, which the parser walk asks for."""
    parser.add_argument(*flags, **settings).declared_once = True  # type: ignore[attr-defined]


def add_standard(parser: argparse.ArgumentParser, names: Sequence[str], version: str) -> None:
    """Add --help, --version and the standard options in `names` (out of `STANDARD`) as one group.

    Raises:
        ValueError: for a name that is no standard option.
    """
    unknown = set(names) - set(STANDARD)
    if unknown:
        raise ValueError(f"no such standard option: {', '.join(sorted(unknown))}")
    group = parser.add_argument_group("standard options")
    _add(group, "--help", "-h", action="help", help="show this help and end")
    _add(group, "--version", action="version", version=f"%(prog)s {version}", help="show the version and end")
    if "threads" in names:
        _add(group, "--threads", type=count, metavar="N", help="threads to use (default: all this process may use)")
    if "device" in names:
        _add(group, "--device", metavar="D", default="cpu", help="where to compute: cpu, cuda or cuda:N")
    if "memory" in names:
        _add(group, "--memory", type=memory_size, metavar="SIZE",
             help="memory to stay within, for example 4G (default: half of what is free)")  # fmt: skip
    if "overwrite" in names:
        _add(group, "--overwrite", action="store_true", help="replace files that this program did not write")
    if "resume" in names:
        _add(group, "--resume", action="store_true", help="go on from where an earlier run stopped")
    if "seed" in names:
        _add(group, "--seed", type=seed_number, default=0, metavar="N", help="seed of everything that is random")
    if "verbose" in names:
        _add(group, "--verbose", action="store_true", help="say more on stderr")
    if "quiet" in names:
        _add(group, "--quiet", action="store_true", help="say nothing but warnings and errors on stderr")
    if "dry-run" in names:
        _add(group, "--dry-run", action="store_true",
             help="check everything, say what would be done and what it needs, and do nothing")  # fmt: skip


def tiltseries_names(parser: argparse.ArgumentParser) -> None:
    """`NAME...` or `--all`: the tilt series to work on; `Run.tiltseries` finds their records."""
    _add(parser, "names", nargs="*", metavar="NAME", help="tilt series: names or record files")
    _add(parser, "--all", action="store_true", help="every tilt series of the project")


def set_or_run(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """`SET`: the particles to work on, by the name of a set or the folder of a run; `Run.particles` finds them."""
    _add(parser, "set_or_run", nargs=nargs, metavar="SET", help="particle set (its name) or run (its folder)")


def _option(*flags: str, **settings: Any) -> Callable[..., None]:
    """A function that adds one option; its keywords may set `default` and `required`, and nothing else.

    A `default` inside `settings` is the option's own.
    """
    own_default = settings.pop("default", None)

    def add(parser: argparse._ActionsContainer, default: Any = own_default, required: bool = False) -> None:
        _add(parser, *flags, default=default, required=required, **settings)

    add.__doc__ = f"Add {flags[0]}: {settings['help']}."
    add.__name__ = flags[0].lstrip("-").replace("-", "_")
    return add


label = _option("--label", type=label_name, metavar="L", help="name of the picks")
set_name = _option("--set", dest="set_name", type=label_name, metavar="S", help="name of the particle set to make")
symmetry = _option(
    "--symmetry", default="c1", metavar="G", help="symmetry: c1, c7, d2, t, o, i ..., or helix:RISE,TWIST (Å, degrees)"
)
mask = _option("--mask", type=Path, metavar="MAP", help="mask, a map from 0 to 1 on the same grid")
reference = _option(
    "--reference", type=Path, action="append", metavar="MAP", help="reference map, white; again for each further class"
)
classes = _option("--classes", type=count, metavar="N", default=1, help="number of classes to sort particles into")
keep = _option("--keep", type=share, metavar="X", help="share to keep, the best (default: all but what fits too badly)")
box = _option("--box", type=box_size, metavar="N", help="box size in pixels, after binning")
binning = _option("--bin", dest="binning", type=count, metavar="N", help="binning: an output pixel is N pixels wide")
path = _option("--path", type=Path, metavar="DIR", help="folder of the run (default: the next free number)")
output = _option("--output", type=Path, metavar="PATH", help="where the result goes")
filter = _option(
    "--filter",
    choices=("spherical", "anisotropic", "local"),
    help="weigh frequencies by the FSC of all directions, of each direction, or of each place",
)
bfactor = _option(
    "--bfactor", type=numbers_or_auto, metavar="B",
    help="sharpen by this B factor in Å² (negative sharpens), or auto, to fit it; or a map for each of several: -50,auto",
)  # fmt: skip
structure_factor = _option(
    "--structure-factor", type=Path, metavar="FILE",
    help="give the map the radial power of this map, or of a table of 1/Å and power",
)  # fmt: skip
lowpass = _option("--lowpass", type=positive, metavar="A", help="remove detail finer than this, in Å")
resolution = _option("--resolution", type=positive, metavar="A", help="finest detail that takes part, in Å")
find_symmetry = _option(
    "--find-symmetry",
    nargs="?",
    const="auto",
    metavar="G",
    help="bring the axes of a group into place; 'auto': of the best",
)
particles = _option("--particles", metavar="P", help="particles to take as they are there: a set, a run or a STAR file")
pixel_size = _option("--pixel-size", type=positive, metavar="A", help="pixel size in Å")
voltage = _option("--voltage", type=positive, default=300.0, metavar="KV", help="voltage in kV")
cs = _option("--cs", type=not_negative, default=2.7, metavar="MM", help="spherical aberration in mm")
amplitude_contrast = _option(
    "--amplitude-contrast", type=fraction, default=0.07, metavar="A", help="amplitude contrast, a fraction"
)
axis = _option("--axis", type=number, metavar="DEG", help="tilt axis in degrees from +y, counter-clockwise")
dose = _option("--dose", type=not_negative, metavar="E", help="dose of each tilt in e/Å²")
no_dose = _option("--no-dose", action="store_true", default=False, help="no dose weighting, though the doses are known")
thickness = _option("--thickness", type=positive, metavar="A", help="thickness in Å")
turn = _option(
    "--turn", type=three_angles, default=(0.0, 0.0, 0.0), metavar="ROT,TILT,PSI",
    help="turn the tomogram, or its part, about its middle",
)  # fmt: skip
region = _option(
    "--region", type=region_bounds, metavar="X0,X1,Y0,Y1,Z0,Z1", help="part of the tomogram, in Å from its centre"
)
contrast = _option("--contrast", choices=("dark", "bright"), default="dark", help="of the specimen in the images")
deconvolve = _option(
    "--deconvolve", nargs="?", type=positive, const=1.0, metavar="STRENGTH",
    help="correct the CTF and raise contrast as Warp and IsoNet do, with this strength (1 if none is given)",
)  # fmt: skip
snr_falloff = _option(
    "--snr-falloff", type=positive, default=1.0, metavar="F", help="of --deconvolve: more leaves less detail and noise"
)
erase_beads = _option(
    "--erase-beads", action="store_true", default=False, help="replace gold beads in the images by noise first"
)
tag = _option("--tag", type=label_name, metavar="T", help="word added to the names of the tomograms")
class_numbers = _option(
    "--class", dest="class_numbers", type=integers, metavar="K", help="class to take, or several: 1,3"
)
iterations = _option(
    "--iterations",
    type=count_or_auto,
    metavar="N",
    help="number of iterations, or auto, until nothing changes (default: auto)",
)
distance = _option("--distance", type=positive, metavar="A", help="least distance between two particles in Å")
subtomograms = _option("--subtomograms", action="store_true", default=False, help="write subtomograms too")


# ----------------------------------------------------------------------------------------------- what a process may use


def usable_threads() -> int:
    """Threads for a program that was not told: `OMP_NUM_THREADS` where set, else the cores this process may run on."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def available_memory() -> int:
    """Bytes that are free for this process: the machine's, or less where a control group (container, job) limits it."""
    match = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    amounts = [int(match[1]) * 1024] if match else []
    for folder, limit, used in (
        ("/sys/fs/cgroup/", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory/", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        allowed, taken = _read(folder + limit).strip(), _read(folder + used).strip()
        if allowed.isdigit() and taken.isdigit() and int(allowed) < 2**60:
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder + "memory.stat"), re.MULTILINE)
            amounts.append(max(int(allowed) - int(taken) + (int(cache[1]) if cache else 0), 0))
    if not amounts:
        amounts.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(amounts)


def bytes_text(size: float) -> str:
    """A size for people: `3.2 GB` (powers of 1024)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TB"


def seconds_text(seconds: float) -> str:
    """A duration for people: `4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
