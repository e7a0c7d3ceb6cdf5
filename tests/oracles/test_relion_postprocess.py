"""relion_postprocess as the oracle of emc_fsc: FSC curves and the B factor of the same half maps."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import emc_fsc
from libemc.io import mrc, star
from libemc.methods import sharpen
from libemc.methods.directional import wiener_gain
from libemc.numerics.grids import rfft_radius
from libemc.numerics.masks import soft_sphere

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not shutil.which("relion_postprocess"), reason="RELION is not installed (relion_postprocess)"),
]

BOX, PIXEL, B_FACTOR = 72, 2.5, -150.0


def test_fsc_and_b_factor(project: Path) -> None:
    """White density times exp(B k²/4) within a sphere, in white noise.

    RELION fits the amplitudes of the whole box with the FSC of the masked maps, so the noise of the solvent is left in
    them; the same is done here for the comparison. Within the mask the fit is nearer to the truth.
    """
    generator = torch.Generator().manual_seed(1)
    fall = torch.exp(B_FACTOR * (rfft_radius((BOX,) * 3) / PIXEL) ** 2 / 4)
    white = torch.randn((BOX,) * 3, generator=generator)
    signal = 12 * torch.fft.irfftn(torch.fft.rfftn(white) * fall, s=(BOX,) * 3).float() * soft_sphere(BOX, 18.0, 4.0)
    halves = [signal + torch.randn((BOX,) * 3, generator=generator) for _ in range(2)]
    for h, half in enumerate(halves, start=1):
        mrc.write_volume(f"half{h}.mrc", half.numpy(), PIXEL)
    mrc.write_volume("mask.mrc", soft_sphere(BOX, 20.0, 6.0).numpy(), PIXEL)
    words = "relion_postprocess --i half1.mrc --i2 half2.mrc --o pp --angpix 2.5 --mask mask.mrc --auto_bfac"
    # what is asked of it is written before it fails at its picture, for which it wants Ghostscript
    subprocess.run([*words.split(), "--autob_lowres", "10"], capture_output=True, timeout=300, check=False)
    blocks = star.read_star("pp.star")
    argv = ["half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--bfactor", "auto", "--output", "ours", "--quiet"]
    assert emc_fsc.program.main(argv) == 0
    ours = json.loads(Path("ours/fsc.json").read_text())
    theirs = blocks["fsc"]
    pairs = {"Corrected": "corrected", "UnmaskedMaps": "unmasked", "MaskedMaps": "masked"}
    for name, curve in pairs.items():
        both = theirs[f"rlnFourierShellCorrelation{name}"].to_numpy(), np.array(ours["curves"][curve])
        # its shells begin at whole numbers here and there: seen up to 0.009 in shell 1, 0.004 beyond
        assert np.abs(both[0] - both[1])[2:].max() < 0.006 and np.abs(both[0] - both[1])[1] < 0.02
    resolution = float(blocks["general"].rlnFinalResolution[0])
    b_factor = float(blocks["general"].rlnBfactorUsedForSharpening[0])
    assert ours["resolution"] == pytest.approx(resolution, abs=0.1)
    fsc = torch.tensor(ours["curves"]["corrected"], dtype=torch.float64)
    power = sharpen.radial_power(0.5 * (halves[0] + halves[1])) * wiener_gain(fsc)
    unmasked = sharpen.guinier_fit(power, fsc, PIXEL, BOX, resolution)
    assert unmasked.b_factor == pytest.approx(b_factor, rel=0.05)
    assert abs(ours["b_factor"] - B_FACTOR) < min(15.0, abs(b_factor - B_FACTOR))
