"""A simulator's `_truth.json`: the alignment, CTF and picks that a simulated tilt series was made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libemc.errors import InputError
from libemc.io.files import StrPath, read_json
from libemc.io.geometry import Alignment, Array, Ctf, Picks, euler_from_matrix
from libemc.io.jsonfile import pair, per_tilt


@dataclass(frozen=True, eq=False)
class Truth:
    """What a simulated tilt series was made of.

    Attributes:
        pixel_size: Å.
        nominal: the angles that its .rawtlt says, degrees, (T,).
        order: 0 for the first exposure, (T,).
        dose: e/Å² per tilt.
        alignment: the true geometry; blank tilts have `use` False.
        ctf: the true CTF in the middle of the specimen.
        picks: the true particles.
        classes: which kind each particle is, (N,).
        voltage, cs, amplitude_contrast: kV, mm, fraction.
        thickness: Å.
    """

    pixel_size: float
    nominal: Array
    order: NDArray[np.int64]
    dose: float
    alignment: Alignment
    ctf: Ctf
    picks: Picks
    classes: NDArray[np.int64]
    voltage: float
    cs: float
    amplitude_contrast: float
    thickness: float


def is_truth(data: object) -> bool:
    """Whether a JSON object is such a truth, by its keys."""
    return isinstance(data, dict) and {"shift_A", "poses", "pos_A", "apix"} <= data.keys()


def read_truth(path: StrPath) -> Truth:
    """Read a simulator's truth.

    `astig` is U - V: U and V are defocus ± astig/2 (the simulated images correlate best with the map's projections
    at that astigmatism). `phase_shift`, of a phase plate, is one number in degrees, or one per tilt, or not there;
    `beam_tilt` is two numbers in mrad, or not there.
    Poses are matrices, particle to specimen.

    Raises:
        InputError: not such a file, or lists of unequal length.
    """
    data = read_json(path)
    if not is_truth(data):
        raise InputError("is not a simulator's truth", path, "it must have apix, shift_A, pos_A and poses")
    try:
        tilt = per_tilt(data, "tilt", path, None)
        count = len(tilt)
        shift = np.array(data["shift_A"], dtype=np.float64).reshape(count, 2)
        poses = np.array(data["poses"], dtype=np.float64).reshape(-1, 3, 3)
        defocus = per_tilt(data, "defocus", path, count)
        half = per_tilt(data, "astig", path, count, 0.0) / 2
        use = np.ones(count, bool)
        use[np.array(data.get("bad", []), dtype=np.int64)] = False
        rot, theta, psi = euler_from_matrix(poses)
        return Truth(
            pixel_size=float(data["apix"]),
            nominal=per_tilt(data, "nominal", path, count),
            order=per_tilt(data, "acq", path, count).astype(np.int64),
            dose=float(data["dose"]),
            alignment=Alignment(
                tilt=tilt,
                axis=per_tilt(data, "axis", path, count),
                xtilt=per_tilt(data, "xtilt", path, count, 0.0),
                shift_x=shift[:, 0],
                shift_y=shift[:, 1],
                magnification=per_tilt(data, "magnification", path, count, 1.0),
                use=use,
            ),
            ctf=Ctf(
                defocus_u=defocus + half,
                defocus_v=defocus - half,
                angle=per_tilt(data, "astig_ang", path, count, 0.0),
                phase_shift=per_tilt(data, "phase_shift", path, count, 0.0),
                handedness=int(data["defocus_handedness"]),
                beam_tilt=pair(data, "beam_tilt", path),
            ),
            picks=Picks(np.array(data["pos_A"], dtype=np.float64), rot=rot, tilt=theta, psi=psi),
            classes=np.array(data.get("cls", np.zeros(len(poses))), dtype=np.int64),
            voltage=float(data["kv"]),
            cs=float(data["cs"]),
            amplitude_contrast=float(data["ac"]),
            thickness=float(data["thick"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"is not a complete truth ({error})", path, "write it again with the simulator") from None
