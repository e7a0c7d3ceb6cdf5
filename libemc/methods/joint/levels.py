"""What may be wrong with a tilt series and its particles, level by level, and how much of it foretells held-out images best.

A level is one kind of error with a strength (its standard deviation) and, where neighbours share it, the length over which
they do. A level is switched on where it makes images better foretold that had no part in the fit, clearly so; its strength
is the one that foretells best. So what isn't in the data stays off, and what is can't chase the noise of single images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libemc.methods.joint.evidence import GEOMETRY, LENS, Evidence
from libemc.methods.joint.solve import CLEARLY, Trial, compared, folds, foretold
from libemc.methods.joint.terms import Smooth, Term

POSE = (5.0, 10.0)
"""Degrees and Å by which poses are free to follow."""


@dataclass(frozen=True)
class Level:
    """A kind of error.

    Attributes:
        name: what it is; unit: of its strengths.
        strengths: that are tried; lengths: Å, over which neighbours share it; inf: all alike, 0: each for itself.
        lens: of the CTF, not of the geometry.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    lengths: tuple[float, ...] = (math.inf,)
    lens: bool = False


SHIFT = Level("shift of tilts", "Å", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0))
ANGLES = Level("angles of tilts", "°", (0.03, 0.1, 0.3, 1.0))
MAGNIFICATION = Level("magnification of tilts", "%", (0.03, 0.1, 0.3))
MOTION = Level("motion along the exposure", "Å", (0.1, 0.2, 0.4, 0.8, 1.6), (0.0, 150.0, 300.0, 600.0, 1200.0))
FIELD = Level("deformation of images", "Å", (0.5, 1.0, 2.0, 4.0), (300.0, 600.0, 1200.0))
OWN_SHIFT = Level("shift of single images", "Å", (0.3, 0.6, 1.2, 2.4), (0.0,))
OWN_TURN = Level("turn of single images", "°", (0.3, 1.0, 3.0), (0.0,))
DEFOCUS = Level("defocus of tilts", "Å", (50.0, 100.0, 200.0, 400.0, 800.0), lens=True)
HEIGHT = Level("defocus of particles", "Å", (50.0, 100.0, 200.0), (0.0,), lens=True)
OWN_DEFOCUS = Level("defocus of single images", "Å", (50.0, 100.0, 200.0), (0.0,), lens=True)
ASTIGMATISM = Level("astigmatism", "Å", (50.0, 100.0, 200.0, 400.0), lens=True)


@dataclass(frozen=True)
class Choice:
    """A level that is on."""

    level: Level
    strength: float
    length: float


@dataclass(frozen=True)
class Scene:
    """Where the particles of a tilt series are and how it was taken: what terms are made of.

    Attributes:
        matrices: (T, 3, 3); xyz: (N, 3) Å; walk: (T, K): path by unit steps between exposures.
    """

    matrices: Tensor
    xyz: Tensor
    walk: Tensor

    def pose(self) -> Term:
        """The particles' own turns (degrees) and shifts (Å), free."""
        n, t = len(self.xyz), len(self.matrices)
        basis = torch.zeros(1, t, 5, 6, dtype=torch.float64)
        basis[0, :, :3, :3] = POSE[0] * self.matrices
        basis[0, :, 3:, 3:] = POSE[1] * self.matrices[:, :2]
        return Term("pose", basis, None, torch.ones(t, 1, dtype=torch.float64), n, t)

    def term(self, choice: Choice) -> Term:
        """The term of a level with its strength and length."""
        n, t, level = len(self.xyz), len(self.matrices), choice.level
        common, single = torch.ones(n, 1, dtype=torch.float64), torch.ones(t, 1, dtype=torch.float64)
        basis = choice.strength * self._basis(level)
        time = self.walk if level is MOTION else single if level in (HEIGHT, ASTIGMATISM) else None
        shared = self.smooth(choice).modes if 0 < choice.length < math.inf else common
        space = None if choice.length == 0 else shared
        return Term(level.name, basis, space, time, n, t)

    def smooth(self, choice: Choice) -> Smooth:
        """What neighbours share: by their distance in space, or in the plane of an untilted image."""
        flat = torch.tensor([1.0, 1.0, 0.0 if choice.level is FIELD else 1.0], dtype=torch.float64)
        return Smooth.of(self.xyz * flat, choice.length)

    def _basis(self, level: Level) -> Tensor:
        """(N or 1, T or 1, P, c) for a strength of 1."""
        if level.lens:
            return torch.eye(3, dtype=torch.float64)[None, None, :, 1:] if level is ASTIGMATISM else _LENS
        if level in (SHIFT, FIELD, OWN_SHIFT):
            return torch.eye(5, dtype=torch.float64)[None, None, :, 3:]
        if level is OWN_TURN:
            return torch.eye(5, dtype=torch.float64)[None, None, :, :3]
        if level is MOTION:
            basis = torch.zeros(1, len(self.matrices), 5, 3, dtype=torch.float64)
            basis[0, :, 3:] = self.matrices[:, :2]
            return basis
        q = torch.einsum("tij,nj->nti", self.matrices, self.xyz)
        if level is MAGNIFICATION:
            basis = torch.zeros(*q.shape[:2], 5, 1, dtype=torch.float64)
            basis[:, :, 3:, 0] = q[..., :2] / 100
            return basis
        assert level is ANGLES
        basis = torch.zeros(*q.shape[:2], 5, 3, dtype=torch.float64)
        basis[:, :, :3] = torch.eye(3, dtype=torch.float64)
        x, y, z = (q * (math.pi / 180)).unbind(-1)
        zero = torch.zeros_like(x)
        # a turn by ω moves q by ω × q
        basis[:, :, 3] = torch.stack([zero, z, -y], dim=-1)
        basis[:, :, 4] = torch.stack([-z, zero, x], dim=-1)
        return basis


_LENS = torch.eye(3, dtype=torch.float64)[None, None, :, :1]


@dataclass(frozen=True)
class Case:
    """One tilt series to choose by: its scene, its evidence, and the corrections (N, T, 8) that this was measured at."""

    scene: Scene
    evidence: Evidence
    there: Tensor

    def foretold(self, choices: Sequence[Choice], lens: bool, seed: int) -> Tensor:
        """(N, T) log-likelihood of held-out images with some levels on, those of the CTF or the others."""
        part = LENS if lens else GEOMETRY
        terms = [self.scene.term(c) for c in choices if c.level.lens == lens]
        terms = terms if lens else [self.scene.pose(), *terms]
        if not terms:
            return torch.zeros(self.evidence.seen.shape, dtype=torch.float64)
        return foretold(self.evidence.part(part), self.there[..., part], terms, folds(self.evidence.seen, seed))


def choose(cases: Sequence[Case], levels: Sequence[Level], seed: int) -> tuple[list[Choice], list[Trial]]:
    """Which levels foretell held-out images clearly better, one after the other, and with which strengths.

    Those that were taken are looked at once more when all are there: what another one explains better goes.
    """
    chosen: list[Choice] = []
    trials: list[Trial] = []
    known: dict[tuple[bool, tuple[tuple[str, float, float], ...]], list[Tensor]] = {}

    def tried(choices: Sequence[Choice], lens: bool) -> list[Tensor]:
        mine = sorted((c.level.name, c.strength, c.length) for c in choices if c.level.lens == lens)
        if (lens, tuple(mine)) not in known:
            known[lens, tuple(mine)] = [case.foretold(choices, lens, seed) for case in cases]
        return known[lens, tuple(mine)]

    for round_number in range(2):
        for level in levels:
            others = [c for c in chosen if c.level is not level]
            mine = next((c for c in chosen if c.level is level), None)
            if round_number and (mine is None or len(chosen) == 1):
                continue
            best, told = _best(tried, others, level, mine)
            chosen = [*others, best] if best else others
            trials = [t for t in trials if t.name != level.name] + told
    return chosen, trials


def _best(
    tried: Callable[[Sequence[Choice], bool], list[Tensor]],
    others: Sequence[Choice],
    level: Level,
    start: Choice | None,
) -> tuple[Choice | None, list[Trial]]:
    """The best strength and length of a level beside others; None where the images are foretold as well without."""
    without = tried(others, level.lens)
    known: dict[tuple[float, float], tuple[float, float]] = {}

    def gain(strength: float, length: float) -> float:
        if (strength, length) not in known:
            with_it = tried([*others, Choice(level, strength, length)], level.lens)
            known[strength, length] = compared(with_it, without)
        return known[strength, length][0]

    strength, length = (start.strength, start.length) if start else (0.0, level.lengths[len(level.lengths) // 2])
    near = level.strengths if start is None else _beside(level.strengths, strength)
    strength = max(near, key=lambda s: gain(s, length))
    if len(level.lengths) > 1:
        length = max(
            level.lengths if start is None else _beside(level.lengths, length), key=lambda v: gain(strength, v)
        )
        strength = max(_beside(level.strengths, strength), key=lambda s: gain(s, length))
    value, error = known[strength, length]
    kept = value > CLEARLY * error
    trials = [
        Trial(level.name, s, v, *known[s, v], kept=kept and (s, v) == (strength, length)) for s, v in sorted(known)
    ]
    return (Choice(level, strength, length) if kept else None), trials


def _beside(values: tuple[float, ...], value: float) -> tuple[float, ...]:
    place = values.index(value)
    return values[max(0, place - 1) : place + 2]


def for_trials(trial: Trial) -> Trial:
    """With a length that JSON can hold."""
    return trial if math.isfinite(trial.length) else replace(trial, length=-1.0)
