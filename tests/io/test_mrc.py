"""MRC: every mode and byte order read, headers checked before belief, writers that leave all or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from libemc.errors import InputError
from libemc.io import mrc
from libemc.io.files import write_text


def asymmetric(shape: tuple[int, ...]) -> np.ndarray:
    """Values that tell every axis and direction apart, within int8."""
    z, y, x = np.indices(shape)
    return (x + 5 * y + 20 * z - 30).astype(np.float32)


def raw_file(
    path: Path, data: np.ndarray, mode: int, order: str = "<", pixel_size: float = 2.5, **fields: object
) -> Path:
    """An MRC file byte by byte, with any header field set by hand."""
    header = np.zeros((), mrcfile.dtypes.HEADER_DTYPE.newbyteorder(order))
    for axis, size in zip("zyx", data.shape, strict=True):
        header["n" + axis] = header["m" + axis] = size
        header["cella"][axis] = size * pixel_size
    header["mode"], header["map"] = mode, b"MAP "
    header["machst"] = (0x44, 0x44, 0, 0) if order == "<" else (0x11, 0x11, 0, 0)
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    extended = fields.pop("extended", b"")
    header["nsymbt"] = len(extended)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.tobytes() + extended + data.astype(data.dtype.newbyteorder(order)).tobytes())
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("stamp", [True, False])
@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_every_mode_and_byte_order(tmp_path: Path, order: str, stamp: bool, mode: int, dtype: str) -> None:
    data = asymmetric((2, 3, 4)) + (30 if mode == 6 else 0)
    fields = {} if stamp else {"machst": (0, 0, 0, 0)}
    path = raw_file(tmp_path / "a.mrc", data.astype(dtype), mode, order, extended=b"x" * 96, **fields)
    images = mrc.open_stack(path)
    assert isinstance(images.array, np.memmap) and images.array.dtype == np.dtype(dtype).newbyteorder(order)
    assert images.shape == (2, 3, 4) and images.pixel_size == 2.5
    np.testing.assert_array_equal(images.array, data)
    volume, pixel_size = mrc.read_volume(path)
    assert volume.dtype == np.float32 and pixel_size == 2.5
    np.testing.assert_array_equal(volume, data)


def test_bytes_are_signed_unless_imod_says_not(tmp_path: Path) -> None:
    data = np.array([[[200, 3]]], np.uint8)

    def extra(flags: int) -> bytes:
        return bytes(40) + np.array([mrc.IMOD_STAMP, flags], "<i4").tobytes() + bytes(36)

    cases = {bytes(84): -56, extra(0): 200, extra(1): -56}
    for number, (fields, value) in enumerate(cases.items()):
        path = raw_file(tmp_path / f"{number}.mrc", data, 0, extra2=np.void(fields))
        assert int(mrc.open_stack(path).array[0, 0, 0]) == value


def test_pixel_size_missing_given_or_unequal(tmp_path: Path) -> None:
    data = asymmetric((2, 3, 4))
    none = raw_file(tmp_path / "none.mrc", data, 2, pixel_size=0.0)
    assert mrc.open_stack(none).pixel_size is None
    assert mrc.open_stack(none, 3.0).pixel_size == 3.0
    with pytest.raises(InputError, match="no pixel size"):
        mrc.read_volume(none)
    assert mrc.read_volume(none, 3.0)[1] == 3.0
    unequal = raw_file(tmp_path / "unequal.mrc", data, 2, cella=(4.0, 6.0, 2.0))
    with pytest.raises(InputError, match="unequal"):
        mrc.open_stack(unequal)
    assert mrc.open_stack(unequal, 1.0).pixel_size == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 4, 3)])
def test_volumes_and_stacks_come_back(tmp_path: Path, dtype: type, shape: tuple[int, int, int]) -> None:
    data = asymmetric(shape)  # small integers: exact in float16
    mrc.write_volume(tmp_path / "v.mrc", data, 1.37, dtype, origin=(1.0, 2.0, 3.0))
    mrc.write_stack(tmp_path / "s.mrcs", data, 1.37, dtype)
    for name, stack in (("v.mrc", False), ("s.mrcs", True)):
        images = mrc.open_stack(tmp_path / name)
        assert (images.is_stack, images.pixel_size, images.array.dtype) == (stack, 1.37, np.dtype(dtype))
        np.testing.assert_array_equal(images.array, data)
        assert mrcfile.validate(tmp_path / name)  # the independent judge of the format
        with mrcfile.open(tmp_path / name) as file:
            assert (file.is_image_stack(), file.is_volume()) == (stack, not stack)
            np.testing.assert_allclose(file.voxel_size.tolist(), 1.37, rtol=1e-6)  # float32
            header = file.header
            found = [float(header[key]) for key in ("dmin", "dmax", "dmean", "rms")]
            np.testing.assert_allclose(found, [data.min(), data.max(), data.mean(), data.std()], rtol=1e-6)  # float32
    with mrcfile.open(tmp_path / "v.mrc") as file:
        assert file.header.origin.tolist() == (1.0, 2.0, 3.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.mrcs", "v.mrc"]


def test_streaming_writes_the_same_bytes(tmp_path: Path) -> None:
    data = asymmetric((3, 7, 4))
    mrc.write_volume(tmp_path / "whole.mrc", data, 2.0)
    with mrc.VolumeWriter(tmp_path / "rows.mrc", data.shape, 2.0) as writer:
        for y0, y1 in ((4, 7), (0, 1), (1, 4)):
            writer.write_rows(y0, data[:, y0:y1])
    assert (tmp_path / "rows.mrc").read_bytes() == (tmp_path / "whole.mrc").read_bytes()
    mrc.write_stack(tmp_path / "whole.mrcs", data, 2.0, np.float16)
    with mrc.StackWriter(tmp_path / "parts.mrcs", 2.0, np.float16) as stack:
        stack.append(data[0])
        stack.append(data[1:])
    assert (tmp_path / "parts.mrcs").read_bytes() == (tmp_path / "whole.mrcs").read_bytes()


def test_misuse_leaves_nothing(tmp_path: Path) -> None:
    data = asymmetric((2, 3, 4))
    target = tmp_path / "a.mrc"

    def rows_missing() -> None:
        with mrc.VolumeWriter(target, data.shape, 1.0) as writer:
            writer.write_rows(0, data[:, :2])

    def rows_twice() -> None:
        with mrc.VolumeWriter(target, data.shape, 1.0) as writer:
            writer.write_rows(0, data)
            writer.write_rows(1, data[:, 1:])

    def rows_beyond() -> None:
        with mrc.VolumeWriter(target, data.shape, 1.0) as writer:
            writer.write_rows(2, data)

    def nothing() -> None:
        with mrc.StackWriter(target, 1.0):
            pass

    def two_shapes() -> None:
        with mrc.StackWriter(target, 1.0) as writer:
            writer.append(data)
            writer.append(data[:, :2])

    bad = data.copy()
    bad[0, 0, 0] = np.nan
    for misuse in (
        rows_missing,
        rows_twice,
        rows_beyond,
        nothing,
        two_shapes,
        lambda: mrc.write_volume(target, bad, 1.0),
        lambda: mrc.write_volume(target, data * 1e6, 1.0, np.float16),
        lambda: mrc.write_volume(target, data, 0.0),
        lambda: mrc.write_volume(target, data, 1.0, np.int16),
    ):
        with pytest.raises(ValueError):
            misuse()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "replace"])
def test_full_disk_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "a.mrc"
    mrc.write_volume(target, asymmetric((2, 3, 4)), 1.0)
    before = target.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as caught:
        mrc.write_volume(target, asymmetric((3, 3, 4)), 1.0)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_interrupted_text_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.tlt", "1\n")
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        mrc.write_volume(tmp_path / "none" / "a.mrc", asymmetric((2, 3, 4)), 1.0)
    assert caught.value.filename == str(tmp_path / "none" / "a.mrc")


def test_real_files(shared_data: Path) -> None:
    # headers of SerialEM (with its extended header), of a file without map string and stamp, and of the simulator
    expected = {
        "real/serialem/test_000.mrc": ((2, 1024, 1024), "int16", 7.88),
        "real/haadf/HAADF.mrc": ((77, 256, 256), "int16", 1.0),
        "sim/conf_01.mrc": ((41, 800, 800), "int8", 3.0),
        "maps/splice_3A.mrc": ((120, 120, 120), "float16", 3.0),
        "real/microtubule/beta-tubulin.mrc": ((20, 20, 20), "float32", 5.144),
    }
    for name, (shape, dtype, pixel_size) in expected.items():
        images = mrc.open_stack(shared_data / name)
        assert (images.shape, images.array.dtype.name, images.pixel_size) == (shape, dtype, pixel_size)
    with mrcfile.open(shared_data / "real/serialem/test_000.mrc", permissive=True) as file:
        np.testing.assert_array_equal(file.data[1], mrc.open_stack(shared_data / "real/serialem/test_000.mrc").array[1])
