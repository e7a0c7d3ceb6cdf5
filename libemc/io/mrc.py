"""MRC images: memory-mapped stacks and volumes in, atomic float32 or float16 files out.

The header layout and the modes are `mrcfile`'s; this room adds either byte order without a machine stamp, checks before
any pixel is touched, and writers that stream into a file of bounded memory.
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from mrcfile.constants import IMAGE_STACK_SPACEGROUP, MAP_ID, VOLUME_SPACEGROUP
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import machine_stamp_from_byte_order
from numpy.typing import ArrayLike, DTypeLike, NDArray

from libemc.errors import InputError
from libemc.io.files import StrPath, read_bytes
from libemc.replacement import Replacement

HEADER_BYTES = HEADER_DTYPE.itemsize
MODES: dict[int, str] = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
OTHER_MODES = (3, 4, 101)
"""Modes that exist and are not images of real numbers: complex integers, complex floats, packed 4 bits."""
WRITTEN = {np.dtype("f4"): 2, np.dtype("f2"): 12}
FORMAT_VERSION = 20141
"""MRC2014, update 1."""
LARGEST_SIDE = 1 << 22
"""No axis of an image file is longer; larger numbers mean the file is something else or of the other byte order."""
ANISOTROPY = 0.01
"""Relative difference of pixel sizes between axes that is still taken for rounding."""
IMOD_STAMP = 1146047817
"""IMOD's manual, "MRC file format": bytes 153-156 say that the flags in the next four are IMOD's."""
IMOD_SIGNED_BYTES = 1
MAGIC: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("is compressed by gzip", "unpack it with gunzip"),
    b"BZh": ("is compressed by bzip2", "unpack it with bunzip2"),
    b"II*\0": ("is a TIFF, not an MRC file", "convert it with IMOD's tif2mrc"),
    b"MM\0*": ("is a TIFF, not an MRC file", "convert it with IMOD's tif2mrc"),
    b"\x89HDF": ("is an HDF5, not an MRC file", "convert it with EMAN2's e2proc3d.py or e2proc2d.py"),
}


@dataclass(frozen=True, eq=False)
class MrcImages:
    """An MRC file, mapped and not read.

    Attributes:
        path: the file.
        array: (z, y, x) or (tilt, y, x), read-only memory map of the stored type.
        pixel_size: Å, or None where neither the header nor the caller says.
        is_stack: whether the header calls it a stack of images; many programs say so of volumes too.
    """

    path: Path
    array: NDArray[Any]
    pixel_size: float | None
    is_stack: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the array."""
        z, y, x = self.array.shape
        return z, y, x


def _header(path: StrPath) -> Any:
    """The header in its own byte order, checked for sense."""
    raw = read_bytes(path, HEADER_BYTES)
    for magic, (what, remedy) in MAGIC.items():
        if raw.startswith(magic):
            raise InputError(what, path, remedy)
    if len(raw) < HEADER_BYTES:
        raise InputError(f"is not an MRC file: {len(raw)} bytes are less than a header", path, "copy it again")
    orders = (">", "<") if raw[212] == 0x11 else ("<", ">")
    for order in orders:
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        sides = all(0 < int(header[axis]) <= LARGEST_SIDE for axis in ("nx", "ny", "nz"))
        if sides and int(header["mode"]) in (*MODES, *OTHER_MODES) and int(header["nsymbt"]) >= 0:
            return header
    raise InputError("is not an MRC file", path, "give an MRC image file (.mrc, .mrcs, .st, .rec)")


def _stored_type(header: Any, path: StrPath) -> np.dtype[Any]:
    mode = int(header["mode"])
    if mode not in MODES:
        raise InputError(f"has MRC mode {mode}, which is not read", path, "convert it with IMOD's newstack -mode 2")
    dtype = np.dtype(MODES[mode]).newbyteorder(header.dtype["nx"].byteorder)
    stamp, flags = np.frombuffer(bytes(header["extra2"])[40:48], header.dtype["nx"])
    if mode == 0 and stamp == IMOD_STAMP and not flags & IMOD_SIGNED_BYTES:
        return np.dtype("u1")
    return dtype


def _pixel_size(header: Any, path: StrPath, axes: str) -> float | None:
    """Å per pixel by the header, None if it has none; InputError if the axes differ."""
    with np.errstate(all="ignore"):
        ratios = [header["cella"][axis] / np.float32(max(int(header["m" + axis]), 0.5)) for axis in axes]
    sizes = [float(str(np.float32(ratio))) for ratio in ratios]  # the shortest number that the header's float can mean
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return None
    if max(sizes) > (1 + ANISOTROPY) * min(sizes):
        text = " x ".join(f"{size:.4g}" for size in sizes)
        raise InputError(f"has pixels of unequal sides, {text} Å", path, "give the pixel size yourself")
    return sizes[0]


def open_stack(path: StrPath, pixel_size: float | None = None) -> MrcImages:
    """Map an MRC stack or volume without reading its pixels.

    Args:
        path: an MRC file of mode 0, 1, 2, 6 or 12 and either byte order. Mode 0 is signed (MRC2014) unless IMOD's flags
            say otherwise.
        pixel_size: Å; overrules the header.

    Raises:
        InputError: missing, empty, not an MRC file, a mode not read, axes out of order, pixels of unequal sides, or
            shorter than its header says.
    """
    header = _header(path)
    dtype = _stored_type(header, path)
    order = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if order not in ((1, 2, 3), (0, 0, 0)):
        raise InputError(f"stores its axes in the order {order}", path, "rewrite it with x fastest, then y, then z")
    shape = (int(header["nz"]), int(header["ny"]), int(header["nx"]))
    offset = HEADER_BYTES + int(header["nsymbt"])
    wanted, present = offset + math.prod(shape) * dtype.itemsize, os.path.getsize(path)
    if present < wanted:
        raise InputError(f"is cut short: {present} bytes, its header says {wanted}", path, "copy or make it again")
    array = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    if pixel_size is None:
        pixel_size = _pixel_size(header, path, "xy")
    return MrcImages(Path(path), array, pixel_size, int(header["ispg"]) == IMAGE_STACK_SPACEGROUP)


def read_volume(path: StrPath, pixel_size: float | None = None) -> tuple[NDArray[np.float32], float]:
    """A volume as float32 [z, y, x] and its pixel size in Å.

    Raises:
        InputError: as `open_stack`; or values that are not finite; or no pixel size in the header and none given.
    """
    images = open_stack(path, pixel_size)
    header = _header(path)
    if pixel_size is None and int(header["ispg"]) != IMAGE_STACK_SPACEGROUP:
        _pixel_size(header, path, "xyz")
    if images.pixel_size is None:
        raise InputError(
            "has no pixel size in its header", path, "give the pixel size, or set it with IMOD's alterheader"
        )
    volume = np.empty(images.shape, np.float32)
    for z, section in enumerate(images.array):
        volume[z] = section
        if not np.isfinite(volume[z]).all():
            raise InputError(f"has values that are not finite numbers (section {z})", path, "make it again")
    return volume, images.pixel_size


Writer = TypeVar("Writer", bound="_Writer")


class _Writer:
    """A file being written: pixels by position, the header last; the name is taken only when all went well."""

    def __init__(self, path: StrPath, pixel_size: float, dtype: DTypeLike, space_group: int) -> None:
        if not (math.isfinite(pixel_size) and pixel_size > 0):
            raise ValueError(f"pixel size {pixel_size} Å of {path}")
        self._dtype = np.dtype(dtype).newbyteorder("=")
        if self._dtype not in WRITTEN:
            raise ValueError(f"MRC files are written as float32 or float16, not {self._dtype}")
        self._pixel_size, self._space_group = float(pixel_size), space_group
        self._count, self._sum, self._squares, self._least, self._most = 0, 0.0, 0.0, math.inf, -math.inf
        self._replacement = Replacement(path)

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            stack.callback(self._replacement.discard)  # of what has taken its name nothing is left
            if kind is None:
                self._finish()
                self._replacement.commit()

    def _finish(self) -> None:
        raise NotImplementedError

    def _put(self, block: ArrayLike, offset: int) -> None:
        """Convert one contiguous block, count it in the statistics and write it `offset` bytes into the pixels."""
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(block, dtype=self._dtype.newbyteorder("<"))
        values = data.astype(np.float64).reshape(-1)
        least, most = float(values.min()), float(values.max())  # NaN where there is one
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"{self._replacement.path}: values that are not finite as {self._dtype}")
        self._count += values.size
        self._sum += float(values.sum())
        self._squares += float(values @ values)
        self._least, self._most = min(self._least, least), max(self._most, most)
        self._replacement.write(data.data, HEADER_BYTES + offset)

    def _write_header(self, shape: tuple[int, ...], origin: tuple[float, float, float]) -> None:
        header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        depth = 1 if self._space_group == IMAGE_STACK_SPACEGROUP else shape[0]
        for axis, sampling, size in zip("zyx", (depth, *shape[1:]), shape, strict=True):
            header["n" + axis], header["m" + axis] = size, sampling
            header["cella"][axis] = sampling * self._pixel_size
            header["origin"][axis] = origin["xyz".index(axis)]
        header["cellb"] = (90.0, 90.0, 90.0)
        header["mode"], header["ispg"] = WRITTEN[self._dtype], self._space_group
        header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
        mean = self._sum / self._count
        header["dmin"], header["dmax"], header["dmean"] = self._least, self._most, mean
        header["rms"] = math.sqrt(max(self._squares / self._count - mean * mean, 0.0))
        header["map"], header["nversion"] = MAP_ID, FORMAT_VERSION
        header["machst"] = machine_stamp_from_byte_order("<")
        header["nlabl"], header["label"][0] = 1, b"libemc"
        self._replacement.write(header.tobytes(), 0)


class VolumeWriter(_Writer):
    """Write a volume in slabs of rows, in memory bounded by one slab; use as a context manager.

    Every row must be written exactly once. On any exception nothing is left behind.

    Args:
        path: the file, replaced when the block ends.
        shape: (z, y, x).
        pixel_size: Å.
        dtype: float32 or float16.
        origin: Å, (x, y, z), written to the header and used by nothing of ours.

    Raises:
        ValueError: values that are not finite in this type, rows written twice or not at all, or a wrong shape.
        OSError: from the system, with the file's name; a full disk is found at the start.
    """

    def __init__(
        self,
        path: StrPath,
        shape: tuple[int, int, int],
        pixel_size: float,
        dtype: DTypeLike = np.float32,
        origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        super().__init__(path, pixel_size, dtype, VOLUME_SPACEGROUP)
        self._shape, self._origin = shape, origin
        self._written = np.zeros(shape[1], bool)
        try:
            self._replacement.reserve(HEADER_BYTES + math.prod(shape) * self._dtype.itemsize)
        except BaseException:
            self._replacement.discard()
            raise

    def write_rows(self, y0: int, slab: NDArray[Any]) -> None:
        """Write rows y0, y0 + 1, … of every section: slab[z, y, x], with the volume's z and x."""
        depth, rows, width = slab.shape
        here = self._written[y0 : y0 + rows]
        if (depth, width) != (self._shape[0], self._shape[2]) or y0 < 0 or len(here) != rows or here.any():
            raise ValueError(f"rows {y0}+{rows} of a slab of shape {slab.shape} in a volume of shape {self._shape}")
        for z in range(depth):
            self._put(slab[z], (z * self._shape[1] + y0) * width * self._dtype.itemsize)
        here[:] = True

    def _finish(self) -> None:
        if not self._written.all():
            raise ValueError(f"{self._replacement.path}: {int((~self._written).sum())} rows were not written")
        self._write_header(self._shape, self._origin)


class StackWriter(_Writer):
    """Write an image stack image by image; use as a context manager.

    Args:
        path: the file, replaced when the block ends.
        pixel_size: Å.
        dtype: float32 or float16.

    Raises:
        ValueError: values that are not finite in this type, images of another shape, or none at all.
        OSError: from the system, with the file's name.
    """

    def __init__(self, path: StrPath, pixel_size: float, dtype: DTypeLike = np.float32) -> None:
        super().__init__(path, pixel_size, dtype, IMAGE_STACK_SPACEGROUP)
        self._images = 0
        self._image_shape: tuple[int, ...] | None = None

    def append(self, images: NDArray[Any]) -> None:
        """Write one image (y, x) or several (n, y, x) after the others."""
        for image in images.reshape(-1, *images.shape[-2:]):
            if self._image_shape not in (None, image.shape):
                raise ValueError(f"an image of shape {image.shape} in a stack of {self._image_shape}")
            self._image_shape = image.shape
            self._put(image, self._images * image.size * self._dtype.itemsize)
            self._images += 1

    def _finish(self) -> None:
        if self._image_shape is None:
            raise ValueError(f"{self._replacement.path}: no images were written")
        self._write_header((self._images, *self._image_shape), (0.0, 0.0, 0.0))


def write_volume(
    path: StrPath,
    array: NDArray[Any],
    pixel_size: float,
    dtype: DTypeLike = np.float32,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Write a volume [z, y, x] whole or not at all; see `VolumeWriter`."""
    depth, height, width = array.shape
    with VolumeWriter(path, (depth, height, width), pixel_size, dtype, origin) as writer:
        writer.write_rows(0, array)


def write_stack(path: StrPath, array: NDArray[Any], pixel_size: float, dtype: DTypeLike = np.float32) -> None:
    """Write an image stack [n, y, x] whole or not at all; see `StackWriter`."""
    with StackWriter(path, pixel_size, dtype) as writer:
        writer.append(array)
