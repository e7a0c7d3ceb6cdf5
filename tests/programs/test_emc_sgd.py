"""emc_sgd on sets made by the forward model: the model and the poses, symmetry, classes, what is refused, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

import emc_average
import emc_sgd
from libemc import project as projects
from libemc import records
from libemc.io import mrc
from libemc.methods.initial_model.reference import sphere
from libemc.methods.overlay import overlay
from libemc.numerics.rotations import random_rotations, rotation_distance
from libemc.numerics.symmetry import symmetrise
from tests.methods.subtilt_data import blobs, particle_set

BOX, PIXEL, COUNT = 24, 8.0, 40
WIDE = sphere(BOX, BOX * PIXEL, 0.75 * BOX * PIXEL)
QUICK = ("--resolution", 32, "--seeds", 1, "--quiet")
TRUTH: dict[str, torch.Tensor] = {}


def write_set(density: torch.Tensor, count: int, noise: float) -> None:
    """The set `ribo` in the present folder, its orientations thrown away; `TRUTH` keeps them."""
    truth = particle_set(density, count, PIXEL, noise)
    TRUTH.update(rotation=truth.rotation, xyz=truth.xyz)
    lost = truth.moved(random_rotations(count, torch.Generator().manual_seed(5)), truth.xyz, truth.score)
    file = lost.to_file().model_copy(update={"stack": "particles/ribo/TS_01.mrcs"})
    Path("particles/ribo").mkdir(parents=True)
    mrc.write_stack(file.stack or "", np.asarray(truth.stack, np.float32), PIXEL, "float16")
    head = records.ParticleSet(set="ribo", box=BOX, pixel_size=PIXEL)
    records.save_particles("particles/ribo", head, {"TS_01": file})


def ran(*argv: object) -> int:
    return emc_sgd.program.main([str(word) for word in argv])


def run_record(folder: str) -> dict:
    return json.loads(Path(folder, "run.json").read_text())


def test_a_model_from_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    density = blobs(BOX, seed=8, count=8)
    write_set(density, COUNT, 2.0)
    before = Path("particles/ribo/TS_01.json").read_text()
    assert ran("ribo", "--resolution", 32, "--seeds", 2, "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    found = torch.from_numpy(mrcfile.read("sgd_00/class1.mrc").copy())
    with mrcfile.open("sgd_00/class1.mrc") as file:
        assert found.shape == (BOX,) * 3 and float(file.voxel_size.x) == PIXEL
    frame = overlay(found * WIDE, density * WIDE, BOX * PIXEL / 32, 4.0)
    assert frame.correlation > 0.9
    head, (own,) = projects.open_particles("sgd_00")
    error = rotation_distance(own.rotation, TRUTH["rotation"] @ frame.rotation)
    assert float(error.median()) < 4 and int((error < 12).sum()) >= 0.9 * COUNT
    place = TRUTH["xyz"] + TRUTH["rotation"] @ frame.shift * PIXEL
    assert float((own.xyz - place).norm(dim=1).median()) < 5
    assert all(p.class_ == 1 and p.score is not None for p in own.file.particles) and head.symmetry == "c1"
    assert Path("particles/ribo/TS_01.json").read_text() == before

    run = run_record("sgd_00")
    assert run["stopped_at"] is None and [s["seed"] for s in run["state"]["seeds"]] == [0, 1]
    evidence = {s["seed"]: s["evidence"] for s in run["state"]["seeds"]}
    assert run["state"]["chosen"] == max(evidence, key=evidence.get)
    (diagonal, other), (again, _) = run["state"]["agreement"]
    assert diagonal == 1 and other == again > 0.9
    assert lines[0].startswith("seed 0: log-likelihood ") and lines[2].startswith(
        "sgd_00/class1.mrc: 40 particles, c1, "
    )
    for name in ("class1.png", "course.png", "seed0.png", "seed0_movie.png", "seed1_class1.mrc"):
        assert Path("sgd_00", name).stat().st_size > 1000
    # the run can be averaged at its poses: the same map, but for the filter
    assert emc_average.program.main(["sgd_00", "--quiet"]) == 0
    average = torch.from_numpy(mrcfile.read("avg_00/average.mrc").copy())
    assert overlay(average * WIDE, found * WIDE, BOX * PIXEL / 32, 2.0).correlation > 0.97


def test_axes_are_found_and_applied(project: Path) -> None:
    """C4: the model's axis along z, the set's symmetry with it, poses right modulo the group."""
    density = symmetrise(blobs(BOX, seed=8, count=6), "c4")
    write_set(density, COUNT, 1.5)
    assert ran("ribo", "--symmetry", "c4", *QUICK) == 0
    found = torch.from_numpy(mrcfile.read("sgd_00/class1.mrc").copy())
    turned = symmetrise(found, "c4") * WIDE
    assert float((turned - found * WIDE).norm() / turned.norm()) < 0.1
    frame = overlay(found * WIDE, density * WIDE, BOX * PIXEL / 32, 4.0)
    assert frame.correlation > 0.9
    head, (own,) = projects.open_particles("sgd_00")
    error = rotation_distance(own.rotation @ frame.rotation.T, TRUTH["rotation"], "c4")
    assert head.symmetry == "c4" and float(error.median()) < 6
    state = run_record("sgd_00")["state"]
    assert state["group"] == "c4" and [g["group"] for g in state["symmetry"][0]["groups"]] == ["c4"]


def test_the_same_seed_gives_the_same_and_a_stopped_run_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(blobs(BOX, seed=8, count=8), 16, 1.0)
    options = ("ribo", "--resolution", 45, "--quiet")
    assert ran(*options, "--seeds", 2, "--path", "straight") == 0
    original, calls = emc_sgd.descend, []

    def stops(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr(emc_sgd, "descend", stops)
    assert ran(*options, "--seeds", 2, "--path", "sgd") == 130
    assert run_record("sgd")["stopped_at"] == "seeds" and len(run_record("sgd")["state"]["seeds"]) == 1
    monkeypatch.setattr(emc_sgd, "descend", original)
    capsys.readouterr()
    assert ran("ribo", "--resolution", 50, "--quiet", "--seeds", 2, "--path", "sgd", "--resume") == 2
    assert "was begun with resolution = 45.0, not 50.0" in capsys.readouterr().err
    assert ran(*options, "--seeds", 2, "--path", "sgd", "--resume") == 0
    for name in ("class1.mrc", "seed0_class1.mrc", "seed1_class1.mrc"):
        assert Path("sgd", name).read_bytes() == Path("straight", name).read_bytes()
    one, other = run_record("sgd")["state"], run_record("straight")["state"]
    assert one == other
    Path("particles/ribo/particles.json").write_text(Path("particles/ribo/particles.json").read_text() + "\n")
    assert ran(*options, "--seeds", 2, "--path", "sgd", "--resume") == 2
    assert "has changed since sgd was begun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--symmetry", "c4", "--find-symmetry", "auto"), "exclude each other"),
        (("--find-symmetry", "c4"), "give --symmetry c4"),
        (("--find-symmetry", "auto", "--classes", "2"), "takes one class"),
        (("--symmetry", "c0"), "unknown symmetry"),
        (("--diameter", "300"), "wider than the box of 192"),
        (("--resolution", "12"), "out of range"),
        (("--resolution", "150"), "out of range"),
        (("--classes", "9"), "too few for 9 classes"),
        (("--resume",), "--path"),
    ],
)
def test_what_is_refused(project: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str) -> None:
    write_set(blobs(BOX), 6, 1.0)
    before = sorted(project.rglob("*"))
    assert ran("ribo", *argv) == 2
    assert says in capsys.readouterr().err
    assert sorted(path for path in project.rglob("*") if ".emc" not in path.parts) == [
        path for path in before if ".emc" not in path.parts
    ]


def test_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(blobs(BOX), 6, 1.0)
    before = sorted(project.rglob("*"))
    assert ran("ribo", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("make 1 models of 6 particles in a box of 24 at 8 Å")
    assert sorted(project.rglob("*")) == before
