"""The leaf operations under every slice: read a Fourier volume at rotated points, and add values into one.

Compiled with numba on the CPU (vectors of one row of the kernel at a time, cache lines fetched ahead of use), the same
operations in portable torch elsewhere; the tests compare the two. May be changed here: how it is computed. Not here: what.

Interpolation kernel: w(t) = (1 - v)² (c0 + c1 v + c2 v²), v = (t/1.5)², |t| < 1.5, in each of x, y, z (27 points). The
c are those that put the least energy into real-space replicas for objects within |x| < DESIGN_EXTENT of the padded box:
the smallest generalised eigenvalue of alias against signal energy (the idea of Slepian's prolate functions, on a basis
with a continuous first derivative, so that gradients by rotation exist everywhere).

The volume is *half and haloed*: index [z + h, y + h, x + HALO] for integer coordinates -h <= z, y <= h and
-HALO <= x <= h + 1, so that no tap wraps. Points are given as one list k (3, K) and a matrix for each image, already
multiplied by the padding factor: p = kᵀ·matrix, with k_z = 0 for slices. A point with x < 0 is read and written at its
Friedel mate. A point whose taps the volume doesn't hold (a magnification may move it out) reads zero, and adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import scipy.linalg
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

REACH = 1.5  # half width of the interpolation kernel, in voxels of the padded transform
DESIGN_EXTENT = 0.3  # |x| / padded box up to which replicas are kept low; a full box padded 1.5 times reaches 1/3
HALO = 2  # columns at x < 0: the kernel reaches 1.5
APART = 6.0  # voxels: points whose radii differ by this share no tap (3 in y and z; 4 in x, where rows are padded)
LEAST_SHARE = 256  # coefficients that a thread is worth starting for
LEAST_WORK = 100_000  # coefficients of all images together below which one thread does it
BLOCK = 16  # coefficients located (and fetched ahead) together
LEAST_WEIGHT = float(np.finfo(np.float32).tiny)  # nothing has been added where there is no more than this
SWEEP = 512  # coefficients that all images go through before the next: in ring order, one shell stays in cache


def half_size(radius: float, padding: float) -> int:
    """Half extent h of a haloed volume that holds every tap of points within `radius` (unpadded Fourier pixels)."""
    return int(np.ceil(radius * padding)) + 2


def volume_shape(half: int) -> tuple[int, int, int]:
    """Shape (z, y, x) of a haloed half volume."""
    return 2 * half + 1, 2 * half + 1, half + 2 + HALO


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros for a volume that is read or written at scattered places.

    On the CPU numpy allocates them: it asks the system for huge pages, without which half the time goes into page tables.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=str(dtype).removeprefix("torch.")))


# ------------------------------------------------------------------------------------------------ the kernel itself
def _transform(profile: Callable[[np.ndarray], np.ndarray], u: np.ndarray) -> np.ndarray:
    """Fourier transform at u (cycles per voxel) of an even function on |t| < REACH, by Gauss-Legendre quadrature."""
    node, weight = np.polynomial.legendre.leggauss(48)
    t = REACH * (node + 1) / 2
    return (np.cos(2 * np.pi * u[..., None] * t) * (profile(t) * weight * REACH)).sum(-1)


def _basis(i: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: (1 - (t / REACH) ** 2) ** 2 * (t / REACH) ** (2 * i)


@lru_cache(maxsize=1)
def kernel_coefficients() -> tuple[float, float, float]:
    """(c0, c1, c2) of the interpolation kernel, scaled to unit integral."""
    u = np.linspace(0, DESIGN_EXTENT, 60)
    signal = np.array([_transform(_basis(i), u) for i in range(3)])
    alias = np.zeros((3, 3))
    for replica in range(1, 12):
        for side in (replica, -replica):
            t = np.array([_transform(_basis(i), u + side) for i in range(3)])
            alias += t @ t.T
    _, vectors = scipy.linalg.eigh(alias, signal @ signal.T)
    c = vectors[:, 0]
    integral = sum(c[i] * _transform(_basis(i), np.zeros(1))[0] for i in range(3))
    return tuple(float(x) for x in c / integral)  # type: ignore[return-value]


def kernel_envelope(u: np.ndarray) -> np.ndarray:
    """What the kernel multiplies real space with, at u = x / padded box: its Fourier transform."""
    c = kernel_coefficients()
    return np.asarray(sum(c[i] * _transform(_basis(i), np.asarray(u, float)) for i in range(3)))


# ------------------------------------------------------------------------------------------------ compiled for the CPU
@intrinsic
def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:  # pragma: no cover - compiled
    """Ask for the cache line of array[index]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte = ir.IntType(8).as_pointer()
        i32 = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]), "llvm.prefetch.p0"
        )
        pointer = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(function, [pointer, ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(array, index), codegen


def _lanes(builder: Any, scalars: list[Any], count: int, element: Any) -> Any:
    """A vector register from scalars, zero in the lanes beyond them."""
    vector = ir.Constant(ir.VectorType(element, count), [0.0] * count)
    for lane, scalar in enumerate(scalars):
        vector = builder.insert_element(vector, scalar, ir.Constant(ir.IntType(32), lane))
    return vector


def _splat(builder: Any, scalar: Any, count: int, element: Any) -> Any:
    one = builder.insert_element(
        ir.Constant(ir.VectorType(element, count), ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    mask = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(one, ir.Constant(ir.VectorType(element, count), ir.Undefined), mask)


def _row_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, count: int) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_data_type(array_type.dtype)
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, count).as_pointer()), element


@intrinsic
def _row_sum(typingctx: Any, array: Any, start: Any, row: Any, plane: Any, y: Any, z: Any) -> Any:  # pragma: no cover
    """Sum over 3×3 rows of z[j]·y[i]·array[start + j·plane + i·row + (0..7)]: a tuple of the first six lanes."""
    scalar = array.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type = signature.args[0]
        element = context.get_data_type(array_type.dtype)
        total = ir.Constant(ir.VectorType(element, 8), [0.0] * 8)
        fast = ("fast",)
        for j in range(3):
            zj = builder.extract_value(args[5], j)
            for i in range(3):
                weight = builder.fmul(zj, builder.extract_value(args[4], i), flags=fast)
                offset = builder.add(
                    args[1],
                    builder.add(
                        builder.mul(args[3], ir.Constant(args[3].type, j)),
                        builder.mul(args[2], ir.Constant(args[2].type, i)),
                    ),
                )
                pointer, _ = _row_pointer(context, builder, array_type, args[0], offset, 8)
                values = builder.load(pointer, align=4)
                total = builder.fadd(
                    total, builder.fmul(values, _splat(builder, weight, 8, element), flags=fast), flags=fast
                )
        lanes = [builder.extract_element(total, ir.Constant(ir.IntType(32), k)) for k in range(6)]
        return context.make_tuple(builder, signature.return_type, lanes)

    return types.containers.UniTuple(scalar, 6)(array, start, row, plane, y, z), codegen


@intrinsic
def _rows_add(
    typingctx: Any, array: Any, start: Any, row: Any, plane: Any, x: Any, y: Any, z: Any, v: Any
) -> Any:  # pragma: no cover - compiled
    """array[start + j·plane + i·row + c·n + l] += z[j]·y[i]·x[c]·v[l], with n = len(v) channels: the adjoint of a read."""
    channels = len(v)
    lanes = 8 if channels == 2 else 16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        array_type = signature.args[0]
        element = context.get_data_type(array_type.dtype)
        fast = ("fast",)
        xs = [builder.extract_value(args[4], c) for c in range(3)]
        vs = [builder.extract_value(args[7], k) for k in range(channels)]
        left = _lanes(builder, [xs[c] for c in range(3) for _ in range(channels)], lanes, element)
        right = _lanes(builder, [vs[k] for _ in range(3) for k in range(channels)], lanes, element)
        update = builder.fmul(left, right, flags=fast)
        for j in range(3):
            zj = builder.extract_value(args[6], j)
            for i in range(3):
                weight = builder.fmul(zj, builder.extract_value(args[5], i), flags=fast)
                offset = builder.add(
                    args[1],
                    builder.add(
                        builder.mul(args[3], ir.Constant(args[3].type, j)),
                        builder.mul(args[2], ir.Constant(args[2].type, i)),
                    ),
                )
                pointer, _ = _row_pointer(context, builder, array_type, args[0], offset, lanes)
                old = builder.load(pointer, align=4)
                product = builder.fmul(update, _splat(builder, weight, lanes, element), flags=fast)
                builder.store(builder.fadd(old, product, flags=fast), pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, start, row, plane, x, y, z, v), codegen


_jit = numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")


@_jit
def _tap(t, c):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    v = t * t * c[3]
    q = c[4] - v
    return q * q * (c[0] + v * (c[1] + v * c[2]))


@_jit
def _tap_slope(t, c):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    v = t * t * c[3]
    q = c[4] - v
    p = c[0] + v * (c[1] + v * c[2])
    return (c[4] + c[4]) * t * c[3] * q * (q * (c[1] + (c[2] + c[2]) * v) - (c[4] + c[4]) * p)


@_jit
def _locate(volume, channels, half, points, rows, first, last, base, frac):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """First tap (voxel index), fractions and mate sign of the points first:last; fetches the taps. Sign 0: not within."""
    row = half + 4
    plane = row * (2 * half + 1)
    one = rows.dtype.type(1)
    centre = rows.dtype.type(0.5)
    for k in range(first, last):
        kx, ky, kz = points[0, k], points[1, k], points[2, k]
        px = kx * rows[0, 0] + ky * rows[1, 0] + kz * rows[2, 0]
        sign = -one if px < 0 else one
        px = px * sign
        py = (kx * rows[0, 1] + ky * rows[1, 1] + kz * rows[2, 1]) * sign
        pz = (kx * rows[0, 2] + ky * rows[1, 2] + kz * rows[2, 2]) * sign
        fx, fy, fz = np.floor(px + centre), np.floor(py + centre), np.floor(pz + centre)
        j = k - first
        if not (fx < half and abs(fy) < half and abs(fz) < half):
            frac[3, j] = 0
            base[j] = 0
            continue
        frac[0, j] = px - fx
        frac[1, j] = py - fy
        frac[2, j] = pz - fz
        frac[3, j] = sign
        base[j] = (np.int64(fz) + half - 1) * plane + (np.int64(fy) + half - 1) * row + np.int64(fx) + 1
        for r in range(9):
            _prefetch(volume, channels * (base[j] + (r // 3) * plane + (r % 3) * row))


@_jit
def _gather(volume, half, points, rows, c, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """out[b, k] = volume at points[:, k]ᵀ·rows[b]; volume (flat) and out are interleaved (re, im)."""
    count = points.shape[1]
    row = half + 4
    plane = row * (2 * half + 1)
    base = np.empty(BLOCK, np.int64)
    frac = np.empty((4, BLOCK), rows.dtype)
    one = rows.dtype.type(1)
    for sweep in range(0, count, SWEEP):
        for b in range(rows.shape[0]):
            for first in range(sweep, min(count, sweep + SWEEP), BLOCK):
                last = min(count, first + BLOCK)
                _locate(volume, 2, half, points, rows[b], first, last, base, frac)
                for j in range(last - first):
                    if frac[3, j] == 0:
                        out[b, 2 * (first + j) : 2 * (first + j) + 2] = 0
                        continue
                    tx, ty, tz = frac[0, j], frac[1, j], frac[2, j]
                    y = (_tap(ty + one, c), _tap(ty, c), _tap(ty - one, c))
                    z = (_tap(tz + one, c), _tap(tz, c), _tap(tz - one, c))
                    s = _row_sum(volume, 2 * base[j], 2 * row, 2 * plane, y, z)
                    x0, x1, x2 = _tap(tx + one, c), _tap(tx, c), _tap(tx - one, c)
                    k = 2 * (first + j)
                    out[b, k] = x0 * s[0] + x1 * s[2] + x2 * s[4]
                    out[b, k + 1] = frac[3, j] * (x0 * s[1] + x1 * s[3] + x2 * s[5])


@_jit
def _value_and_slope(volume, base, row, plane, at, c):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """(re, im) of S, S_x, S_y, S_z from the taps at `base`, `at` the fractions and the mate sign."""
    one = at.dtype.type(1)
    tx, ty, tz, sign = at[0], at[1], at[2], at[3]
    y = (_tap(ty + one, c), _tap(ty, c), _tap(ty - one, c))
    z = (_tap(tz + one, c), _tap(tz, c), _tap(tz - one, c))
    dy = (_tap_slope(ty + one, c), _tap_slope(ty, c), _tap_slope(ty - one, c))
    dz = (_tap_slope(tz + one, c), _tap_slope(tz, c), _tap_slope(tz - one, c))
    x0, x1, x2 = _tap(tx + one, c), _tap(tx, c), _tap(tx - one, c)
    u0, u1, u2 = _tap_slope(tx + one, c), _tap_slope(tx, c), _tap_slope(tx - one, c)
    s = _row_sum(volume, 2 * base, 2 * row, 2 * plane, y, z)
    sy = _row_sum(volume, 2 * base, 2 * row, 2 * plane, dy, z)
    sz = _row_sum(volume, 2 * base, 2 * row, 2 * plane, y, dz)
    # at the mate the point moves the other way (sign), and the value is conjugated (sign again)
    return (
        x0 * s[0] + x1 * s[2] + x2 * s[4],
        sign * (x0 * s[1] + x1 * s[3] + x2 * s[5]),
        sign * (u0 * s[0] + u1 * s[2] + u2 * s[4]),
        u0 * s[1] + u1 * s[3] + u2 * s[5],
        sign * (x0 * sy[0] + x1 * sy[2] + x2 * sy[4]),
        x0 * sy[1] + x1 * sy[3] + x2 * sy[5],
        sign * (x0 * sz[0] + x1 * sz[2] + x2 * sz[4]),
        x0 * sz[1] + x1 * sz[3] + x2 * sz[5],
    )


@_jit
def _gather_slope(volume, half, points, rows, c, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """As `_gather`, with the derivatives by the coordinates of the point: out[b, k] = (re, im) of S, S_x, S_y, S_z."""
    count = points.shape[1]
    row = half + 4
    plane = row * (2 * half + 1)
    base = np.empty(BLOCK, np.int64)
    frac = np.empty((4, BLOCK), rows.dtype)
    for sweep in range(0, count, SWEEP):
        for b in range(rows.shape[0]):
            for first in range(sweep, min(count, sweep + SWEEP), BLOCK):
                last = min(count, first + BLOCK)
                _locate(volume, 2, half, points, rows[b], first, last, base, frac)
                for j in range(last - first):
                    if frac[3, j] == 0:
                        out[b, 8 * (first + j) : 8 * (first + j) + 8] = 0
                        continue
                    value = _value_and_slope(volume, base[j], row, plane, frac[:, j], c)
                    k = 8 * (first + j)
                    for i in range(8):
                        out[b, k + i] = value[i]


@_jit
def _fit(volume, half, points, rows, c, wave_x, wave_y, values, weights, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Adds to out[b] the sums of `fit_sums`; volume and values interleaved (re, im), waves (B, 2·n) likewise.

    wave_x[b] holds the phase factors of k_x = 0, 1, ..., wave_y[b] those of k_y = -n/2, ..., n/2.
    """
    count = points.shape[1]
    row = half + 4
    plane = row * (2 * half + 1)
    base = np.empty(BLOCK, np.int64)
    frac = np.empty((4, BLOCK), rows.dtype)
    re, im = np.empty((6, BLOCK), rows.dtype), np.empty((6, BLOCK), rows.dtype)  # the slice, then its five derivatives
    wre, wim = np.empty((6, BLOCK), rows.dtype), np.empty((6, BLOCK), rows.dtype)
    dre, dim = np.empty(BLOCK, rows.dtype), np.empty(BLOCK, rows.dtype)
    middle = wave_y.shape[1] // 4
    for sweep in range(0, count, SWEEP):
        for b in range(rows.shape[0]):
            m = rows[b]
            for first in range(sweep, min(count, sweep + SWEEP), BLOCK):
                last = min(count, first + BLOCK)
                _locate(volume, 2, half, points, m, first, last, base, frac)
                size = last - first
                for j in range(size):
                    if frac[3, j] == 0:
                        dre[j], dim[j] = 0, 0
                        for i in range(6):
                            re[i, j], im[i, j], wre[i, j], wim[i, j] = 0, 0, 0, 0
                        continue
                    value = _value_and_slope(volume, base[j], row, plane, frac[:, j], c)
                    vr, vi, xr, xi, yr, yi, zr, zi = value
                    # the same in the frame of the image: M·gradient
                    ar, ai = m[0, 0] * xr + m[0, 1] * yr + m[0, 2] * zr, m[0, 0] * xi + m[0, 1] * yi + m[0, 2] * zi
                    br, bi = m[1, 0] * xr + m[1, 1] * yr + m[1, 2] * zr, m[1, 0] * xi + m[1, 1] * yi + m[1, 2] * zi
                    gr, gi = m[2, 0] * xr + m[2, 1] * yr + m[2, 2] * zr, m[2, 0] * xi + m[2, 1] * yi + m[2, 2] * zi
                    k = first + j
                    kx, ky = points[0, k], points[1, k]
                    re[0, j], im[0, j] = vr, vi
                    re[1, j], im[1, j] = -gr * ky, -gi * ky
                    re[2, j], im[2, j] = gr * kx, gi * kx
                    re[3, j], im[3, j] = ar * ky - br * kx, ai * ky - bi * kx
                    re[4, j], im[4, j] = vi * kx, -vr * kx
                    re[5, j], im[5, j] = vi * ky, -vr * ky
                    w = weights[b, k]
                    for i in range(6):
                        wre[i, j], wim[i, j] = w * re[i, j], w * im[i, j]
                    px, py = 2 * np.int64(kx), 2 * (np.int64(ky) + middle)
                    pr = wave_x[b, px] * wave_y[b, py] - wave_x[b, px + 1] * wave_y[b, py + 1]
                    pi = wave_x[b, px] * wave_y[b, py + 1] + wave_x[b, px + 1] * wave_y[b, py]
                    qr, qi = values[b, 2 * k], values[b, 2 * k + 1]
                    dre[j], dim[j] = qr * pr - qi * pi, qr * pi + qi * pr
                place = 6
                for i in range(6):
                    total = rows.dtype.type(0)
                    for j in range(size):
                        total += dre[j] * re[i, j] + dim[j] * im[i, j]
                    out[b, i] += total
                    for h in range(i + 1):
                        total = rows.dtype.type(0)
                        for j in range(size):
                            total += wre[i, j] * re[h, j] + wim[i, j] * im[h, j]
                        out[b, place] += total
                        place += 1


@_jit
def _scatter(volume, half, points, rows, c, values, begin, end):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Add complex values into a flat interleaved (re, im) volume: the adjoint of `_gather`."""
    row = half + 4
    plane = row * (2 * half + 1)
    base = np.empty(BLOCK, np.int64)
    frac = np.empty((4, BLOCK), rows.dtype)
    one = rows.dtype.type(1)
    for sweep in range(begin, end, SWEEP):
        for b in range(rows.shape[0]):
            for first in range(sweep, min(end, sweep + SWEEP), BLOCK):
                last = min(end, first + BLOCK)
                _locate(volume, 2, half, points, rows[b], first, last, base, frac)
                for j in range(last - first):
                    if frac[3, j] == 0:
                        continue
                    tx, ty, tz = frac[0, j], frac[1, j], frac[2, j]
                    x = (_tap(tx + one, c), _tap(tx, c), _tap(tx - one, c))
                    y = (_tap(ty + one, c), _tap(ty, c), _tap(ty - one, c))
                    z = (_tap(tz + one, c), _tap(tz, c), _tap(tz - one, c))
                    k = 2 * (first + j)
                    v = (values[b, k], frac[3, j] * values[b, k + 1])
                    _rows_add(volume, 2 * base[j], 2 * row, 2 * plane, x, y, z, v)


@_jit
def _scatter_weighted(volume, half, points, rows, c, values, weights, begin, end):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add values and weights into a flat interleaved (re, im, weight, 0) volume."""
    row = half + 4
    plane = row * (2 * half + 1)
    base = np.empty(BLOCK, np.int64)
    frac = np.empty((4, BLOCK), rows.dtype)
    one = rows.dtype.type(1)
    zero = rows.dtype.type(0)
    for sweep in range(begin, end, SWEEP):
        for b in range(rows.shape[0]):
            for first in range(sweep, min(end, sweep + SWEEP), BLOCK):
                last = min(end, first + BLOCK)
                _locate(volume, 4, half, points, rows[b], first, last, base, frac)
                for j in range(last - first):
                    if frac[3, j] == 0:
                        continue
                    tx, ty, tz = frac[0, j], frac[1, j], frac[2, j]
                    x = (_tap(tx + one, c), _tap(tx, c), _tap(tx - one, c))
                    y = (_tap(ty + one, c), _tap(ty, c), _tap(ty - one, c))
                    z = (_tap(tz + one, c), _tap(tz, c), _tap(tz - one, c))
                    k = first + j
                    v = (values[b, 2 * k], frac[3, j] * values[b, 2 * k + 1], weights[b, k], zero)
                    _rows_add(volume, 4 * base[j], 4 * row, 4 * plane, x, y, z, v)


@_jit
def _shell_sums(volume, half, shells, sums, counts):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Add up the weights of a flat (re, im, weight, 0) volume by shell, Friedel mates included; `shells` by z² + y² + x²."""
    row = half + 4
    end = len(shells)
    for z in range(-half, half + 1):
        for y in range(-half, half + 1):
            base = ((z + half) * (2 * half + 1) + y + half) * row + HALO
            mate = ((half - z) * (2 * half + 1) + half - y) * row + HALO
            for x in range(half + 2):
                r2 = z * z + y * y + x * x
                if r2 >= end:
                    break
                weight = volume[4 * (base + x) + 2]
                if x < 2:
                    weight += volume[4 * (mate - x) + 2]
                sums[shells[r2]] += weight
                counts[shells[r2]] += 1


@_jit
def _quotient(volume, half, constants, n, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Values over weights of a flat (re, im, weight, 0) volume into a flat (re, im) rfft layout of n³.

    `constants` are added to the weights, by z² + y² + x²; beyond them the answer is left zero.
    """
    row = half + 4
    reach = min(half, (n - 1) // 2)
    end = len(constants)
    for z in range(-reach, reach + 1):
        for y in range(-reach, reach + 1):
            base = ((z + half) * (2 * half + 1) + y + half) * row + HALO
            mate = ((half - z) * (2 * half + 1) + half - y) * row + HALO
            to = ((z % n) * n + y % n) * (n // 2 + 1)
            for x in range(reach + 1):
                r2 = z * z + y * y + x * x
                if r2 >= end:
                    break
                re, im, weight = volume[4 * (base + x)], volume[4 * (base + x) + 1], volume[4 * (base + x) + 2]
                if x < 2:
                    re += volume[4 * (mate - x)]
                    im -= volume[4 * (mate - x) + 1]
                    weight += volume[4 * (mate - x) + 2]
                weight += constants[r2]
                if weight > LEAST_WEIGHT:
                    out[2 * (to + x)] = re / weight
                    out[2 * (to + x) + 1] = im / weight


# ------------------------------------------------------------------------------------------------ portable torch
def _torch_taps(
    half: int, points: Tensor, matrices: Tensor, slope: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Where and how much: first tap (B, K), mate sign (B, K), tap weights and their slopes, each (3, B, K) per axis."""
    p = points.T @ matrices
    sign = torch.where(p[..., 0] < 0, -1.0, 1.0).to(p.dtype)
    p = p * sign[..., None]
    nearest = torch.floor(p + 0.5)
    within = (nearest.abs() < half).all(-1)
    nearest = torch.where(within[..., None], nearest, torch.zeros((), dtype=p.dtype, device=p.device))
    t = p - nearest
    c0, c1, c2 = kernel_coefficients()
    taps, slopes = [], []
    for axis in range(3):
        s = torch.stack([t[..., axis] + 1, t[..., axis], t[..., axis] - 1])
        v = (s / REACH) ** 2
        q, poly = 1 - v, c0 + v * (c1 + v * c2)
        taps.append(q * q * poly)
        if slope:
            slopes.append(2 * s / REACH**2 * q * (q * (c1 + 2 * c2 * v) - 2 * poly))
    taps[2] = torch.where(within, taps[2], 0.0)  # each product has a weight or a slope in z
    slopes = [*slopes[:2], torch.where(within, slopes[2], 0.0)] if slope else []
    n = nearest.long()
    row = half + 4
    base = (n[..., 2] + half - 1) * row * (2 * half + 1) + (n[..., 1] + half - 1) * row + n[..., 0] + 1
    return base, sign, taps, slopes


def _torch_offsets(half: int) -> list[tuple[int, int, int, int]]:
    row = half + 4
    return [(z, y, x, (z * (2 * half + 1) + y) * row + x) for z in range(3) for y in range(3) for x in range(3)]


def torch_gather(volume: Tensor, half: int, points: Tensor, matrices: Tensor, slope: bool) -> Tensor:
    """`gather` in portable torch operations (any device); the oracle of the compiled one."""
    base, sign, (wx, wy, wz), slopes = _torch_taps(half, points, matrices, slope)
    flat = volume.reshape(-1)
    value = torch.zeros(base.shape, dtype=volume.dtype, device=volume.device)
    derivative = [torch.zeros_like(value) for _ in range(3 if slope else 0)]
    for z, y, x, offset in _torch_offsets(half):
        v = flat[base + offset]
        value = value + v * (wz[z] * wy[y] * wx[x])
        if slope:
            ux, uy, uz = slopes
            derivative[0] = derivative[0] + v * (wz[z] * wy[y] * ux[x])
            derivative[1] = derivative[1] + v * (wz[z] * uy[y] * wx[x])
            derivative[2] = derivative[2] + v * (uz[z] * wy[y] * wx[x])
    value = torch.complex(value.real, value.imag * sign)
    if not slope:
        return value
    # at the mate the point moves the other way, and the value is conjugated
    derivative = [torch.complex(d.real * sign, d.imag) for d in derivative]
    return torch.stack([value, *derivative], dim=-1)


def torch_fit_sums(
    volume: Tensor, half: int, points: Tensor, matrices: Tensor, values: Tensor, weights: Tensor, turns: Tensor
) -> Tensor:
    """`fit_sums` in portable torch operations (any device); the oracle of the compiled one."""
    read = torch_gather(volume, half, points, matrices, slope=True)
    value, gradient = read[..., 0], torch.einsum("bij,bkj->bki", matrices.to(volume.dtype), read[..., 1:])
    kx, ky = points[0], points[1]
    a, b, g = gradient.unbind(-1)
    columns = [value, -g * ky, g * kx, a * ky - b * kx, value * (-1j * kx), value * (-1j * ky)]
    j = torch.stack(columns, dim=1).to(torch.complex128)  # (B, 6, K)
    angle = 2 * torch.pi * (turns.double() @ torch.stack([kx, ky]).double())
    data = values.to(torch.complex128) * torch.polar(torch.ones_like(angle), angle)
    cross = (data[:, None].conj() * j).real.sum(-1)
    normal = ((j * weights[:, None].double()) @ j.conj().transpose(1, 2)).real
    lower = torch.tril_indices(6, 6, device=volume.device)
    return torch.cat([cross, normal[:, lower[0], lower[1]]], dim=1)


def torch_scatter(volume: Tensor, half: int, points: Tensor, matrices: Tensor, values: Tensor) -> None:
    """`scatter` in portable torch: adds (B, K) complex values, or (B, K, 4) real (re, im, weight, 0) ones, in place."""
    base, sign, (wx, wy, wz), _ = _torch_taps(half, points, matrices, slope=False)
    if values.is_complex():
        channels = torch.stack([values.real, values.imag * sign], dim=-1)
        flat = torch.view_as_real(volume).reshape(-1, 2)
    else:
        channels = torch.stack([values[..., 0], values[..., 1] * sign, values[..., 2], values[..., 3]], dim=-1)
        flat = volume.reshape(-1, 4)
    for z, y, x, offset in _torch_offsets(half):
        w = (wz[z] * wy[y] * wx[x])[..., None]
        flat.index_add_(0, (base + offset).reshape(-1), (channels * w).reshape(-1, channels.shape[-1]))


def folded(volume: Tensor) -> tuple[Tensor, Tensor]:
    """Values (complex) and weights (real) of a (..., 4) volume with Friedel mates added, from x = 0: (2h+1, 2h+1, h+2)."""
    value = torch.view_as_complex(volume[..., :2].contiguous())
    weight = volume[..., 2]
    numerator, total = value[:, :, HALO:].clone(), weight[:, :, HALO:].clone()
    # a slice's mate reaches x = 0 and x = 1 only: from x = 0 and from the halo column x = -1
    numerator[:, :, :2] += value[:, :, [HALO, HALO - 1]].flip(0, 1).conj()
    total[:, :, :2] += weight[:, :, [HALO, HALO - 1]].flip(0, 1)
    return numerator, total


def _torch_radii(half: int, scale: float, device: torch.device) -> Tensor:
    """|k| over `scale` in the layout of `folded`, float64."""
    line = torch.arange(-half, half + 1, device=device, dtype=torch.float64)
    x = torch.arange(0, half + 2, device=device, dtype=torch.float64)
    return (line[:, None, None] ** 2 + line[None, :, None] ** 2 + x**2).sqrt() / scale


def torch_shell_means(volume: Tensor, half: int, scale: float, last: int) -> Tensor:
    """`shell_means` in portable torch."""
    shell = _torch_radii(half, scale, volume.device).round().long().clamp_max(last + 1).reshape(-1)
    weights = folded(volume)[1].reshape(-1).double()
    sums = torch.zeros(last + 2, dtype=torch.float64, device=volume.device).index_add_(0, shell, weights)
    counts = torch.bincount(shell, minlength=last + 2).double()
    return (sums / counts.clamp_min(1))[:-1]


def torch_quotient(volume: Tensor, half: int, scale: float, radius: float, constants: Tensor, n: int) -> Tensor:
    """`quotient` in portable torch."""
    numerator, total = folded(volume)
    radii = _torch_radii(half, scale, volume.device)
    denominator = total + constants[radii.round().long().clamp_max(len(constants) - 1)].to(total.dtype)
    inside = (radii < radius) & (denominator > LEAST_WEIGHT)
    zero = torch.zeros((), dtype=numerator.dtype, device=volume.device)
    ratio = torch.where(inside, numerator / denominator.clamp_min(LEAST_WEIGHT), zero)
    reach = min(half, (n - 1) // 2)
    line = torch.arange(-reach, reach + 1, device=volume.device) % n
    out = torch.zeros((n, n, n // 2 + 1), dtype=numerator.dtype, device=volume.device)
    middle = slice(half - reach, half + reach + 1)
    out[line[:, None], line[None, :], : reach + 1] = ratio[middle, middle, : reach + 1]
    return out


# ------------------------------------------------------------------------------------------------ one front door
def _constants(dtype: torch.dtype) -> np.ndarray:
    c = [*kernel_coefficients(), 1 / REACH**2, 1.0]
    return np.array(c, dtype=np.float32 if dtype == torch.float32 else np.float64)


def _in_threads(work: Callable[[Any], object], parts: Sequence[Any]) -> None:
    """Call work on every part, each in a thread of its own."""
    if len(parts) <= 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()


def _shares(count: int, threads: int) -> list[slice]:
    """About equal pieces of a list, one for each thread, none empty."""
    edges = np.linspace(0, count, threads + 1).astype(int)
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def _ring_phases(points: np.ndarray[Any, Any], scale: float, threads: int) -> list[list[tuple[int, int]]]:
    """Ranges of a list of points that threads may add into one volume at the same time: two phases of them.

    Points whose distances from the origin differ by `APART` voxels share no tap. So a list that goes outward ring by ring
    is cut into bands with gaps of that width between them: first all bands at once, then all gaps. A list in another
    order, or too short, stays whole.
    """
    count = points.shape[1]
    radius = np.sqrt((points.astype(np.float64) ** 2).sum(axis=0)) * scale
    outermost = np.maximum.accumulate(radius)
    innermost = np.minimum.accumulate(radius[::-1])[::-1]
    for bands in range(min(threads, count // LEAST_SHARE), 1, -1):
        cuts = [round(count * i / bands) for i in range(1, bands)]
        # a gap ends where all that follows is APART from all that stands before it
        ends = [int(np.searchsorted(innermost, outermost[cut - 1] + APART)) for cut in cuts]
        starts = [0, *ends]
        stops = [*cuts, count]
        filled = all(start < stop for start, stop in zip(starts, stops, strict=True))
        # the bands between two gaps keep those apart in their turn
        if filled and all(
            innermost[cut] - outermost[end - 1] >= APART for end, cut in zip(ends, cuts[1:], strict=False)
        ):
            return [list(zip(starts, stops, strict=True)), list(zip(cuts, ends, strict=True))]
    return [[(0, count)]]


def gather(volume: Tensor, half: int, points: Tensor, matrices: Tensor, slope: bool = False) -> Tensor:
    """Read a haloed half volume at pointsᵀ·matrix of each image.

    Args:
        volume: haloed half volume, complex, shape `volume_shape(half)`.
        points: (3, K) real; matrices: (B, 3, 3) real, of the precision of `volume`.
        slope: also return the derivatives by the three coordinates of the point.

    Returns:
        (B, K) complex, or (B, K, 4) with `slope`: the value and its derivatives by x, y, z.
    """
    if volume.device.type != "cpu":
        return torch_gather(volume, half, points, matrices, slope)
    images, count = matrices.shape[0], points.shape[1]
    out = torch.empty((images, count, 4) if slope else (images, count), dtype=volume.dtype)
    v = torch.view_as_real(volume.contiguous()).reshape(-1).numpy()
    o = torch.view_as_real(out).reshape(images, (8 if slope else 2) * count).numpy()
    k, r = points.contiguous().numpy(), matrices.contiguous().numpy()
    c = _constants(matrices.dtype)
    kernel = _gather_slope if slope else _gather
    threads = torch.get_num_threads() if images * count >= LEAST_WORK else 1
    _in_threads(lambda part: kernel(v, half, k, r[part], c, o[part]), _shares(images, threads))
    return out


def fit_sums(
    volume: Tensor, half: int, points: Tensor, matrices: Tensor, values: Tensor, weights: Tensor, turns: Tensor
) -> Tensor:
    """Sums over each image that a least-squares fit of its slice needs, without the Jacobian ever being stored.

    The six columns of J are the slice S and its derivatives by the image's own five parameters: a turn about the image's
    x, y, z (radians, of what is seen), and a shift of what is seen along x, y, in units of box / 2π.

    Args:
        volume, points, matrices: as of `gather`, with integer k.
        values: (B, K) complex data d; weights: (B, K) real w.
        turns: (B, 2) how far the data are brought back before they are compared, over the box: d·exp(2πi k·turns).

    Returns:
        (B, 27) float64: Re Σ d*·J_i for i = 0 ... 5, then Re Σ w J_i·J_h* for i = 0 ... 5, h <= i.
    """
    if volume.device.type != "cpu":
        return torch_fit_sums(volume, half, points, matrices, values, weights, turns)
    images, count = matrices.shape[0], points.shape[1]
    reach = int(points[:2].abs().max()) if count else 0
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)

    def waves(turn: Tensor, k: Tensor) -> np.ndarray[Any, Any]:
        angle = 2 * torch.pi * turn.double()[:, None] * k
        return torch.stack([angle.cos(), angle.sin()], dim=-1).reshape(images, -1).to(matrices.dtype).numpy()

    wave_x, wave_y = waves(turns[:, 0], line[reach:]), waves(turns[:, 1], line)
    out = np.zeros((images, 27))
    v = torch.view_as_real(volume.contiguous()).reshape(-1).numpy()
    d = torch.view_as_real(values.contiguous()).reshape(images, 2 * count).numpy()
    w, c = weights.contiguous().numpy(), _constants(matrices.dtype)
    k, r = points.contiguous().numpy(), matrices.contiguous().numpy()
    threads = torch.get_num_threads() if images * count >= LEAST_WORK else 1
    _in_threads(lambda p: _fit(v, half, k, r[p], c, wave_x[p], wave_y[p], d[p], w[p], out[p]), _shares(images, threads))
    return torch.from_numpy(out)


def _add_in_rings(
    add: Callable[[int, int], object], points: np.ndarray[Any, Any], matrices: np.ndarray[Any, Any]
) -> None:
    """Call add(first, last) for ranges of the points, in as many threads as torch has, without two at one voxel."""
    if not len(matrices):
        return
    scale = float(np.linalg.norm(matrices.astype(np.float64), axis=2).min())
    work = points.shape[1] * len(matrices)
    threads = torch.get_num_threads() if work >= LEAST_WORK else 1
    for phase in _ring_phases(points, scale, threads):
        _in_threads(lambda part: add(*part), phase)


def scatter(volume: Tensor, half: int, points: Tensor, matrices: Tensor, values: Tensor) -> None:
    """Add (B, K) complex values into a haloed half volume *in place*: the adjoint of `gather`."""
    if volume.device.type != "cpu":
        torch_scatter(volume, half, points, matrices, values)
        return
    k, r = points.contiguous().numpy(), matrices.contiguous().numpy()
    v = torch.view_as_real(values.contiguous()).reshape(len(matrices), 2 * points.shape[1]).numpy()
    c, flat = _constants(matrices.dtype), torch.view_as_real(volume).reshape(-1).numpy()
    _add_in_rings(lambda first, last: _scatter(flat, half, k, r, c, v, first, last), k, r)


def scatter_weighted(
    volume: Tensor, half: int, points: Tensor, matrices: Tensor, values: Tensor, weights: Tensor
) -> None:
    """Add values (B, K) complex and weights (B, K) real into a (*volume_shape(half), 4) real volume *in place*."""
    if volume.device.type != "cpu":
        stacked = torch.stack([values.real, values.imag, weights, torch.zeros_like(weights)], dim=-1)
        torch_scatter(volume, half, points, matrices, stacked)
        return
    k, r = points.contiguous().numpy(), matrices.contiguous().numpy()
    v = torch.view_as_real(values.contiguous()).reshape(len(matrices), 2 * points.shape[1]).numpy()
    w, c, flat = weights.contiguous().numpy(), _constants(matrices.dtype), volume.reshape(-1).numpy()
    _add_in_rings(lambda first, last: _scatter_weighted(flat, half, k, r, c, v, w, first, last), k, r)


def _radii(half: int, scale: float) -> np.ndarray[Any, Any]:
    """Distance from the origin in units of `scale`, by its square in voxels, for all voxels of a haloed half volume."""
    return np.sqrt(np.arange(3 * (half + 2) ** 2, dtype=np.float64)) / scale


def shell_means(volume: Tensor, half: int, scale: float, last: int) -> Tensor:
    """Mean weight of a (*volume_shape(half), 4) volume in shells of `scale` voxels, mates included: (last+1,) float64."""
    if volume.device.type != "cpu":
        return torch_shell_means(volume, half, scale, last)
    sums, counts = np.zeros(last + 1), np.zeros(last + 1, np.int64)
    shells = np.rint(_radii(half, scale)).astype(np.int32)
    _shell_sums(volume.reshape(-1).numpy(), half, shells[shells <= last], sums, counts)
    return torch.from_numpy(sums / np.maximum(counts, 1))


def quotient(volume: Tensor, half: int, scale: float, radius: float, constants: Tensor, n: int) -> Tensor:
    """Values over weights plus a constant of each shell, mates included, in the rfft layout of a cube of n voxels.

    Args:
        volume: (*volume_shape(half), 4) real.
        scale: voxels of the volume that a shell is wide; radius: in shells, from which on the answer is zero.
        constants: (S,) float64; beyond the last shell its constant holds.

    Returns:
        (n, n, n//2+1) complex.
    """
    if volume.device.type != "cpu":
        return torch_quotient(volume, half, scale, radius, constants, n)
    out = zeros((n, n, n // 2 + 1, 2), volume.dtype)
    radii = _radii(half, scale)
    shells = np.rint(radii[radii < radius]).astype(np.int64).clip(max=len(constants) - 1)
    by_radius = constants.to(volume.dtype).numpy()[shells]
    _quotient(volume.reshape(-1).numpy(), half, by_radius, n, out.reshape(-1).numpy())
    return torch.view_as_complex(out)
