"""Single candidates: scores and poses in boxes, what a volume shows of them, neighbours, and their shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from libemc.methods.match import candidates as each
from libemc.methods.match.candidates import FACES, Candidates, Eye, Residual
from libemc.methods.match.correlate import Correlator, Part, search
from libemc.methods.match.specimen import RINGS, TiltSensitivity, whiten_volume
from libemc.methods.match.templates import decoy, prepare
from libemc.methods.reconstruct import Grid, reconstruct
from libemc.numerics.peaks import find_peaks
from libemc.numerics.rotations import matrix_from_rotvec, random_rotations, rotation_distance
from libemc.numerics.so3 import rotation_grid
from tests.by_hand import pose
from tests.methods.match.blob_specimen import (
    BAND,
    BOX,
    PIXEL_SIZE,
    TURN,
    BlobSeries,
    Even,
    balanced,
    density,
    in_volume,
    matrix,
    plain,
    wanted,
)

EVEN = Even(BAND)
SHAPE = (44, 52, 48)
OTHER = pose(-100.0, 40.0, 15.0)
STEP = 15.0


def eye_of(template) -> Eye:
    return Eye(template, EVEN.weights(template))


def residual_of(volume: np.ndarray, template) -> Residual:
    return Residual(volume, eye_of(template), eye_of(each.widened(template)))


def somewhere(*voxel: float) -> torch.Tensor:
    return torch.tensor(voxel, dtype=torch.float64)


def box_at(volume: np.ndarray, voxel, box: int) -> torch.Tensor:
    return torch.from_numpy(volume[tuple(slice(c - box // 2, c - box // 2 + box) for c in reversed(voxel))].copy())


def test_values_are_the_transform_of_a_box() -> None:
    template = plain()
    box = np.random.default_rng(0).normal(size=(BOX, BOX, BOX)).astype(np.float32)
    found = eye_of(template).values(torch.from_numpy(box))
    full = np.fft.fftn(np.fft.ifftshift(box.astype(float)))
    x, y, z = template.ball[0].numpy().astype(int)
    np.testing.assert_allclose(found.numpy(), full[z, y, x], atol=1e-3)


def test_score_of_a_box_is_that_of_the_search() -> None:
    """And of the direct sum over voxels, with the map as it is turned."""
    template = plain()
    volume = EVEN.shown(in_volume(SHAPE, [(22, 27, 20)], [TURN], BOX, balanced), noise=0.3)
    turns = torch.stack([matrix(TURN), matrix(OTHER)])
    norms = EVEN.norms(template, turns)
    for voxel in ((22, 27, 20), (25, 24, 21)):
        x, y, z = voxel
        part = Part((z, y, x), (z + 1, y + 1, x + 1))
        values = eye_of(template).values(box_at(volume, voxel, BOX))
        for turn, rotation, norm in zip((TURN, OTHER), turns, norms, strict=True):
            own = float(eye_of(template).scores(values[None], rotation[None], FACES[:1])[0])
            searched = float(search(Correlator(volume, part, BOX), template, rotation[None], norm[None]).best)
            direct = float((box_at(volume, voxel, BOX) * balanced(BOX, turn)).sum() / norm)
            assert own == pytest.approx(searched, rel=2e-3, abs=5e-3)
            assert own == pytest.approx(direct, rel=0.01, abs=0.05)


def test_the_best_of_all_rotations_and_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number by number as a loop over each finds it, in pieces that don't divide the count."""
    monkeypatch.setattr(each, "ROTATIONS_AT_ONCE", 7)
    template, generator = plain(), torch.Generator().manual_seed(0)
    eye, rotations, shifts = eye_of(template), random_rotations(17, generator), FACES * 0.5
    values = torch.stack([eye.values(torch.randn(BOX, BOX, BOX, generator=generator)) for _ in range(3)])
    best, which, where = eye.scores(values, rotations, shifts)
    for i in range(3):
        table = torch.tensor(
            [[float(eye.scores(values[i : i + 1], r[None], s[None])[0]) for s in shifts] for r in rotations]
        )
        assert float(best[i]) == pytest.approx(float(table.max()), abs=1e-4)
        assert (int(which[i]), int(where[i])) == divmod(int(table.argmax()), len(shifts))


def test_a_shift_is_where_the_particle_lies() -> None:
    """A particle one voxel along +y is found by the shift (0, 1, 0)."""
    template = plain()
    box = torch.from_numpy(EVEN.shown(balanced(BOX, TURN, (0, 1, 0)).numpy()))
    _, _, where = eye_of(template).scores(eye_of(template).values(box)[None], matrix(TURN)[None], FACES)
    assert FACES[where[0]].tolist() == [0, 1, 0]


def test_amplitude_of_a_particle_without_noise() -> None:
    """Twice the particle has the score at which its amplitude is 2."""
    template = plain()
    volume = EVEN.shown(2 * in_volume(SHAPE, [(22, 27, 20)], [TURN], BOX, balanced))
    eye = eye_of(template)
    values = eye.values(box_at(volume, (22, 27, 20), BOX))
    score = float(eye.scores(values[None], matrix(TURN)[None], FACES[:1])[0])
    assert eye.amplitude(score, matrix(TURN)) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_a_pose_off_the_grid_is_found(seed: int) -> None:
    """From half a step and up to half a voxel off: to a third of a voxel, and about the last grid's step."""
    generator = torch.Generator().manual_seed(seed)
    at = (torch.rand(3, generator=generator).double() - 0.5).tolist()
    axis = torch.randn(3, generator=generator).double()
    start = matrix_from_rotvec(STEP / 2 * axis / axis.norm()) @ matrix(TURN)
    box = torch.from_numpy(EVEN.shown(density(24, TURN, tuple(at)).numpy(), noise=0.03))
    template = wanted()
    eye = eye_of(template)
    half = (24 - template.box) // 2
    values = eye.values(box[(slice(half, 24 - half),) * 3])
    rotation, shift, score = eye.refined(values, start, STEP)
    assert float((shift - torch.tensor(at)).norm()) < 0.33
    assert float(rotation_distance(rotation, matrix(TURN))) < 2
    assert score >= float(eye.scores(values[None], start[None], FACES)[0])


def left(residual: Residual, volume: np.ndarray) -> float:
    """Part of a volume's energy that is in a residual still."""
    return float((residual.volume**2).sum() / (volume**2).sum())


@pytest.mark.parametrize("place", [(22.0, 27.0, 20.0), (22.4, 26.8, 19.7)])
def test_a_prediction_is_what_the_volume_shows(place) -> None:
    """Nothing is left of a particle without noise, between voxels too."""
    volume = EVEN.shown(in_volume(SHAPE, [place], [TURN], BOX, balanced))
    residual = residual_of(volume, plain())
    residual.add(somewhere(*place), matrix(TURN), -1.0)
    assert left(residual, volume) < 0.005
    residual.add(somewhere(*place), matrix(TURN), 1.0)
    np.testing.assert_allclose(residual.volume.numpy(), volume, atol=1e-4 * np.abs(volume).max())


def test_at_the_border_what_is_within_is_taken_out() -> None:
    """As in the middle of a larger volume, and nothing comes round to the other side."""
    volume = EVEN.shown(in_volume((60, 60, 60), [(30, 30, 30)], [TURN], BOX, balanced))
    cut = np.ascontiguousarray(volume[26:, :34, 28:])
    residual = residual_of(cut, plain())
    residual.add(somewhere(2, 30, 4), matrix(TURN), -1.0)
    assert left(residual, cut) < 0.005
    far = residual_of(cut, plain())
    far.add(somewhere(-200, 30, 4), matrix(TURN), -1.0)
    np.testing.assert_array_equal(far.volume.numpy(), cut)
    assert far.values(somewhere(-200, 30, 4)).abs().max() == 0


def test_what_the_tilts_show_is_predicted() -> None:
    """A noise-free particle, back-projected from its images: at the score that it has its prediction leaves little."""
    series = BlobSeries([(3.0, -6.0, 4.5)], [TURN], noise=0.0, shape=(96, 90), defocus=1500.0)
    grid = Grid((60, 60, 60), PIXEL_SIZE)
    sensitivity = TiltSensitivity(
        series.geometry, series.correction, series.weighting, BAND, torch.ones(len(series.tilts), RINGS), PIXEL_SIZE
    )
    kx, ky = (np.fft.fftfreq(n, PIXEL_SIZE) for n in series.shape[::-1])
    gain = BAND(torch.from_numpy(np.hypot(ky[:, None], kx))).numpy()
    images = [np.fft.fft2(series.image(j) - 50) * series.damage(j) * gain for j in range(len(series.tilts))]
    filtered = np.stack([np.fft.ifft2(image).real for image in images]).astype(np.float32)
    slabs = reconstruct(filtered, series.geometry, grid, series.correction)
    volume = np.concatenate([slab for _, slab in slabs], axis=1)
    template = plain()
    wide = each.widened(template)
    eye = Eye(template, sensitivity.weights(template))
    residual = Residual(volume, eye, Eye(wide, sensitivity.weights(wide)))
    place = somewhere(32, 26, 33)
    score = float(eye.scores(residual.values(place)[None], matrix(TURN)[None], FACES[:1])[0])
    assert score == pytest.approx(float(sensitivity.norms(template, matrix(TURN)[None])), rel=0.03)
    assert eye.amplitude(score, matrix(TURN)) == pytest.approx(1, rel=0.05)
    residual.add(place, matrix(TURN), -eye.amplitude(score, matrix(TURN)))
    box = (slice(18, 46),) * 3
    assert float((residual.volume[box] ** 2).sum() / (volume[box] ** 2).sum()) < 0.1


def test_what_a_tomogram_shows_is_predicted() -> None:
    """The same in a finished tomogram: a weak particle in white noise; its score afterwards is small."""
    template = plain()
    noise = np.random.default_rng(0).normal(size=SHAPE)
    volume = noise + in_volume(SHAPE, [(22, 27, 20)], [TURN], BOX, balanced)
    shown, sensitivity = whiten_volume(torch.from_numpy(volume).float(), (-60.0, 60.0), BAND, PIXEL_SIZE)
    white = shown.numpy()
    wide = each.widened(template)
    eye = Eye(template, sensitivity.weights(template))
    residual = Residual(white, eye, Eye(wide, sensitivity.weights(wide)))

    def score() -> float:
        return float(eye.scores(residual.values(somewhere(22, 27, 20))[None], matrix(TURN)[None], FACES[:1])[0])

    before = score()
    assert before == pytest.approx(float(sensitivity.norms(template, matrix(TURN)[None])), rel=0.25)
    residual.add(somewhere(22, 27, 20), matrix(TURN), -eye.amplitude(before, matrix(TURN)))
    assert abs(score()) < 0.1 * before


# -------------------------------------------------------------------------------------------------------- neighbours


STEP_OF_SEARCH = 24.0
HEIGHT = 10.0  # of the particles, in noise of variance 1


@pytest.fixture(scope="module")
def neighbours() -> tuple[np.ndarray, Candidates, list, list]:
    """Two particles that touch, and one by itself; all local maxima of a search, however near to each other."""
    places = [(18.0, 20.0, 20.0), (29.0, 24.0, 22.0), (20.0, 39.0, 21.0)]
    turns = [TURN, OTHER, pose(80.0, 100.0, 50.0)]
    volume = EVEN.shown(HEIGHT * in_volume(SHAPE, places, turns, 24), noise=1.0, seed=1)
    template, rotations = wanted(), rotation_grid(STEP_OF_SEARCH)
    part = Part((0, 0, 0), (SHAPE[0], SHAPE[1], SHAPE[2]))
    found = search(Correlator(volume, part, template.box), template, rotations, EVEN.norms(template, rotations))
    sites, heights = find_peaks(found.best, 7.0, 4.0)
    x, y, z = sites.round().long().unbind(1)
    assert found.which is not None
    return volume, Candidates(sites, rotations[found.which[z, y, x].long()], heights), places, turns


def pursued(
    volume: np.ndarray, some: Candidates, least: float, apart: float
) -> tuple[Residual, Candidates, torch.Tensor]:
    residual = residual_of(volume, wanted())
    asked = torch.full((len(some),), least)
    return residual, *each.pursue(residual, some, asked, rotation_grid(STEP_OF_SEARCH), STEP_OF_SEARCH, apart)


def test_neighbours_are_found_and_side_lobes_are_not(neighbours) -> None:
    volume, some, places, turns = neighbours
    assert len(some) > 9  # side lobes, most of them of the three
    residual, taken, heights = pursued(volume, some, 12.0, 4.0)
    assert len(taken) == len(heights) == 3
    for place, turn in zip(places, turns, strict=True):
        distance = (taken.xyz - somewhere(*place)).norm(dim=1)
        i = int(distance.argmin())
        assert float(distance[i]) < 0.7
        assert float(rotation_distance(taken.rotation[i], matrix(turn))) < 5
    # the heights are those at the search's rotations: lower than the refined scores
    assert bool((heights <= taken.score * 1.02).all()) and bool((heights > 12).all())
    # they stay taken out: what is left is the noise
    noise = EVEN.shown(np.zeros(SHAPE, np.float32), noise=1.0, seed=1)
    assert float(((residual.volume - noise) ** 2).sum()) < 0.15 * float(((volume - noise) ** 2).sum())


def test_none_is_nearer_than_that(neighbours) -> None:
    """Of two that are too near the higher one stays."""
    volume, some, places, _ = neighbours
    _, taken, _ = pursued(volume, some, 12.0, 15.0)
    assert float(torch.pdist(taken.xyz).min()) > 15
    away = torch.cdist(taken.xyz, torch.tensor(places).to(taken.xyz)).amin(0)
    assert int((away < 0.7).sum()) == 2 and float(away[2]) < 0.7


def test_nothing_is_high_enough(neighbours) -> None:
    volume, some, *_ = neighbours
    residual, taken, heights = pursued(volume, some, 1e4, 4.0)
    assert len(taken) == len(heights) == 0
    np.testing.assert_array_equal(residual.volume.numpy(), volume)


# ------------------------------------------------------------------------------------------------------------- shape


def another(n: int, rotation: np.ndarray | None = None, at: tuple[float, float, float] = (0, 0, 0)) -> torch.Tensor:
    """A map of the particle's size and mass: six other places of blobs like its own."""
    rng = np.random.default_rng(12)
    centres = rng.normal(size=(6, 3))
    centres *= (4.2 * rng.random((6, 1)) ** (1 / 3)) / np.linalg.norm(centres, axis=1, keepdims=True)
    centres = centres @ (np.eye(3) if rotation is None else rotation).T + np.asarray(at)
    line = np.arange(n) - n // 2
    out = np.zeros((n, n, n))
    for c in centres:
        gx, gy, gz = (np.exp(-((line - v) ** 2) / (2 * 0.9**2)) for v in c)
        out += gz[:, None, None] * gy[None, :, None] * gx[None, None, :]
    return torch.from_numpy(out).float()


def taken_out(volume: np.ndarray, template, places, turns) -> tuple[Residual, Candidates]:
    """A residual from which particles at these poses have been taken, with the scores that they had."""
    residual = residual_of(volume, template)
    xyz, rotation = torch.tensor(places, dtype=torch.float64), torch.stack([matrix(t) for t in turns])
    score = torch.tensor(
        [
            float(residual.eye.scores(residual.values(p)[None], r[None], FACES[:1])[0])
            for p, r in zip(xyz, rotation, strict=True)
        ]
    )
    for p, r, s in zip(xyz, rotation, score.tolist(), strict=True):
        residual.add(p, r, -residual.eye.amplitude(s, r))
    return residual, Candidates(xyz, rotation, score)


GRID_OF_PLACES = [(14 + 22 * i, 14 + 22 * j, 16) for i in range(4) for j in range(3)]
GRID_SHAPE = (32, 72, 94)


def test_shape_passes_particles_and_nothing_else_of_their_size() -> None:
    """Half of twelve are the template's own; the others are of its size, mass and blobs."""
    template, rotations = wanted(), rotation_grid(24.0)
    turns = list(random_rotations(len(GRID_OF_PLACES), torch.Generator().manual_seed(3)).numpy())
    volume = in_volume(GRID_SHAPE, GRID_OF_PLACES[:6], turns[:6])
    volume += in_volume(GRID_SHAPE, GRID_OF_PLACES[6:], turns[6:], kind=another)
    residual, taken = taken_out(EVEN.shown(HEIGHT * volume, noise=1.0), template, GRID_OF_PLACES, turns)
    before = residual.volume.clone()
    shape = each.shape_test(residual, taken, rotations, 24.0, 1.0, 0)
    torch.testing.assert_close(residual.volume, before, rtol=0, atol=1e-3)  # each was put back and taken out again
    assert shape.telling and shape.passed[:6].all()
    assert int(shape.passed[6:].sum()) <= 1  # so many may
    assert shape.own > float(shape.ratio[:6].mean()) > 1.1 * float(shape.ratio[6:].mean())


def put(volume: np.ndarray, low: list[int], what: np.ndarray) -> None:
    """Add a box to a volume, as far as it is within."""
    inside = tuple(slice(max(0, a), a + n) for a, n in zip(low, what.shape, strict=True))
    room = volume[inside]
    begin = [max(0, -a) for a in low]
    room += what[tuple(slice(a, a + n) for a, n in zip(begin, room.shape, strict=True))]


def test_of_what_is_like_the_decoys_few_pass() -> None:
    """A template drawn as its decoys are, and a volume full of others: one in 17 such volumes has more than one."""
    first, rotations = wanted(), rotation_grid(24.0)
    template = decoy(first, 999, keep_shape=True)
    half, passed = template.box // 2, []
    for trial in range(3):
        turns = random_rotations(len(GRID_OF_PLACES), torch.Generator().manual_seed(trial))
        volume = np.zeros(GRID_SHAPE, np.float32)
        for n, ((x, y, z), turn) in enumerate(zip(GRID_OF_PLACES, turns, strict=True)):
            turned = (
                decoy(first, 5000 + 20 * trial + n, keep_shape=True).rotated(turn[None])[0].permute(2, 1, 0).numpy()
            )
            put(volume, [z - half, y - half, x - half], turned)
        shown = EVEN.shown(HEIGHT * volume, noise=1.0)
        residual, taken = taken_out(shown, template, GRID_OF_PLACES, list(turns.numpy()))
        passed.append(int(each.shape_test(residual, taken, rotations, 24.0, 1.0, 0).passed.sum()))
    assert sum(n > 1 for n in passed) <= 1, passed


def test_a_round_template_tells_nothing() -> None:
    """It is like its decoys: all pass, and it says so."""
    x = torch.arange(24) - 12
    ball = torch.exp(-(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2) / 18.0)
    template = prepare(ball, PIXEL_SIZE, PIXEL_SIZE, 4 * PIXEL_SIZE, "ball")
    volume = np.zeros(GRID_SHAPE, np.float32)
    for x0, y0, z0 in GRID_OF_PLACES[:5]:
        put(volume, [z0 - 12, y0 - 12, x0 - 12], ball.numpy())
    residual, taken = taken_out(EVEN.shown(HEIGHT * volume, noise=1.0), template, GRID_OF_PLACES[:5], [np.eye(3)] * 5)
    shape = each.shape_test(residual, taken, rotation_grid(40.0), 40.0, 1.0, 0)
    assert not shape.telling and shape.passed.all()


def test_no_candidates_at_all() -> None:
    template = wanted()
    none = Candidates(torch.zeros(0, 3).double(), torch.zeros(0, 3, 3).double(), torch.zeros(0))
    shape = each.shape_test(residual_of(np.zeros(SHAPE, np.float32), template), none, rotation_grid(40.0), 40.0, 1.0, 0)
    assert len(shape.ratio) == len(shape.passed) == 0 and math.isfinite(shape.own)


def test_a_template_in_a_wider_box_is_itself() -> None:
    template = wanted()
    wide = each.widened(template)
    assert wide.box == 2 * template.box
    half = template.box // 2
    inner = (slice(half, 3 * half),) * 3
    torch.testing.assert_close(wide.density[inner], template.density)
    assert float(wide.density.abs().sum()) == pytest.approx(float(template.density.abs().sum()))
