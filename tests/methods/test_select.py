"""Selecting points, against brute force and by hand; joining the particles of several sets, and splitting one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libemc.errors import InputError
from libemc.methods import select
from libemc.methods.select import Criteria, Points
from libemc.records import ParticleFile, Picks, dumps
from tests.methods.subtilt_data import particle_file


def points(xyz: np.ndarray, score: list[float] | np.ndarray | None = None, **columns: object) -> Points:
    n = len(xyz)
    given = {"z": np.full(n, np.nan), "margin": np.full(n, np.nan), "use": np.ones(n, bool)}
    given |= {"classes": np.zeros(n, np.int64), "tilts": np.full(n, 5), "ids": [f"p{i:03d}" for i in range(n)]}
    scores = np.full(n, np.nan) if score is None else np.array(score, float)
    return Points(name="TS_01", xyz=np.asarray(xyz, float), score=scores, **(given | columns))


def chosen(p: Points, **asked: object) -> list[int]:
    return np.flatnonzero(list(select.select(p, Criteria(**asked)).values())[-1]).tolist()


# ------------------------------------------------------------------------------------------------------------- of points


@given(st.integers(0, 10**6), st.integers(0, 60), st.floats(0.3, 6.0))
def test_duplicates_go_as_by_brute_force(seed: int, count: int, distance: float) -> None:
    """Points in a box of 10 Å, scores with many ties and some missing: all pairs in a loop, the best first."""
    rng = np.random.default_rng(seed)
    xyz, ids = rng.uniform(0, 10, (count, 3)), [f"p{i:03d}" for i in rng.permutation(count)]
    score = np.where(rng.random(count) < 0.2, np.nan, rng.integers(0, 5, count))
    worth = [(np.inf if np.isnan(s) else -s, name) for s, name in zip(score, ids, strict=True)]
    kept: list[int] = []
    for i in sorted(range(count), key=lambda i: worth[i]):
        if all(np.linalg.norm(xyz[i] - xyz[j]) >= distance for j in kept):
            kept.append(i)
    assert chosen(points(xyz, score, ids=ids), distance=distance) == sorted(kept)


def test_of_a_row_every_other_stays() -> None:
    """The second goes because of the first, so the third stays; points at just the distance are no duplicates."""
    row = np.array([[0.0, 0, 0], [8, 0, 0], [16, 0, 0], [26, 0, 0], [26, 0, 9.5]])
    assert chosen(points(row, [5, 4, 3, 2, 1]), distance=10.0) == [0, 2, 3]
    assert chosen(points(row, [1, 2, 3, 4, 5]), distance=10.0) == [0, 2, 4]


@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 4), st.one_of(st.none(), st.integers(4, 9)))
def test_neighbours_are_counted_as_by_brute_force(seed: int, count: int, least: int, most: int | None) -> None:
    xyz = np.random.default_rng(seed).uniform(0, 10, (count, 3))
    apart = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    others = [int((apart[i] <= 3.0).sum()) - 1 for i in range(count)]
    wanted = [i for i, n in enumerate(others) if n >= least and (most is None or n <= most)]
    assert chosen(points(xyz), neighbours=(least, most, 3.0)) == wanted


def test_limits() -> None:
    """Score limits are excluded, a region's included, the least number of tilts too; NaN passes no limit."""
    xyz = np.array([[-5.0, 0, 0], [0, 0, 0], [5, 0, 0], [0, 6, 0], [0, 0, -7]])
    p = points(
        xyz, [1, 2, np.nan, 4, 5], z=np.array([9, 8, 7, 6, np.nan]), margin=np.arange(5.0),
        classes=np.array([0, 1, 2, 1, 3]), tilts=np.array([3, 4, 5, 6, 7]),
    )  # fmt: skip
    assert chosen(p) == [0, 1, 2, 3, 4]
    assert chosen(p, score_above=2.0) == [3, 4]
    assert chosen(p, score_below=4.0) == [0, 1]
    assert chosen(p, score_above=1.0, score_below=5.0) == [1, 3]
    assert chosen(p, z_above=6.0) == [0, 1, 2]
    assert chosen(p, margin_above=2.5) == [3, 4]
    assert chosen(p, class_numbers=(1, 3)) == [1, 3, 4]
    assert chosen(p, drop_class=(1, 3)) == [0, 2] and chosen(p, drop_class=(7,)) == [0, 1, 2, 3, 4]
    assert chosen(p, min_tilts=5) == [2, 3, 4]
    assert chosen(p, region=(-5.0, 4.9, -1.0, 6.0, -6.9, 0.0)) == [0, 1, 3]
    assert chosen(p, best=2) == [3, 4]
    assert chosen(p, best=9) == [0, 1, 2, 3, 4]
    assert chosen(p, class_numbers=(0, 1), best_fraction=0.7) == [1, 3]


def test_what_went_before_does_not_count_any_more() -> None:
    """A better duplicate of another class drops nothing, unused points neither, and are nobody's neighbours."""
    xyz = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    p = points(xyz, [9, 1, 8, 2], classes=np.array([1, 0, 0, 0]), use=np.array([True, True, False, True]))
    assert chosen(p, class_numbers=(0,), distance=1.5) == [1, 3]
    assert chosen(p, neighbours=(1, None, 1.0)) == [0, 1]
    steps = select.select(p, Criteria(class_numbers=(0,), distance=2.5, best=1))
    assert {name: mask.tolist() for name, mask in steps.items()} == {
        "use": [True, True, False, True], "class_numbers": [False, True, False, True],
        "distance": [False, False, False, True], "best": [False, False, False, True],
    }  # fmt: skip


@pytest.mark.parametrize("asked", [{"score_above": 1.0}, {"best": 2}, {"best_fraction": 0.5}, {"z_above": 1.0}])
def test_what_has_no_value_can_not_be_selected_by_it(asked: dict) -> None:
    (name,) = asked
    with pytest.raises(InputError, match=f"TS_01: there is no .* leave --{name.replace('_', '-')} out"):
        select.select(points(np.zeros((3, 3))), Criteria(**asked))
    assert not any(select.select(points(np.zeros((0, 3))), Criteria(**asked))["use"])


def test_points_of_records() -> None:
    """Every field of particles and picks ends in its column; tilts are those that are used and see the particle."""
    file = particle_file(4, 8, 2.0)
    ps = [
        p.model_copy(update={"score": 0.1 * i, "z": None, "class_": i, "use": i != 1})
        for i, p in enumerate(file.particles)
    ]
    p = Points.of_particles(file.model_copy(update={"particles": tuple(ps)}))
    assert p.ids == [each.id for each in ps] and p.classes.tolist() == [0, 1, 2, 3] and p.use.tolist() == [1, 0, 1, 1]
    assert p.xyz.tolist() == [list(each.xyz) for each in ps] and p.score.tolist() == [0.1 * i for i in range(4)]
    assert np.isnan(p.z).all() and p.tilts.tolist() == [
        11,
        11,
        12,
        11,
    ]  # the third does not see the tilt that is not used
    picks = Picks(xyz=((1.0, 2, 3), (4, 5, 6)), score=(0.5, None), z=(7.0, 8.0), margin=(None, 0.1))
    p = Points.of_picks("TS_01", picks)
    assert p.xyz.tolist() == [[1, 2, 3], [4, 5, 6]] and p.z.tolist() == [7, 8]
    assert np.isnan(p.score).tolist() == [False, True] and np.isnan(p.margin).tolist() == [True, False]


@given(
    st.lists(st.tuples(st.integers(1, 2), st.sampled_from("abc")), max_size=60), st.integers(2, 7), st.integers(0, 99)
)
def test_parts_are_even(keys: list, parts: int, seed: int) -> None:
    """In all, in each half, and in each half of each tilt series the parts differ by one at most."""
    part = select.deal(keys, parts, np.random.default_rng(seed))
    for group in ({None}, {1}, {2}, *({key} for key in set(keys))):
        mine = [p for p, key in zip(part, keys, strict=True) if group & {None, key, key[0]}]
        counts = [mine.count(number) for number in range(parts)]
        assert sum(counts) == len(mine) and max(counts) - min(counts) <= 1


# ---------------------------------------------------------------------------------------------------------- of particles


def placed(file: ParticleFile, keep: list[int], **changes: object) -> ParticleFile:
    """Some of the particles, each cut at a place of its own."""
    ps = [file.particles[i].model_copy(update={"centre": (float(i), 0.0, 0.0), **changes}) for i in keep]
    return file.model_copy(update={"particles": tuple(ps)})


def test_of_a_particle_in_two_sets_the_last_counts() -> None:
    file = particle_file(6, 8, 2.0)
    later = placed(file, [3, 1, 5], score=0.7, rot=11.0)
    joined = select.join({"a": placed(file, [0, 1, 2, 3]), "b": later})
    assert [p.id[-1] for p in joined.file.particles] == ["0", "1", "2", "3", "5"]
    assert [p.score for p in joined.file.particles] == [None, 0.7, None, 0.7, 0.7]
    assert [p.image for p in joined.file.particles] == [0, 1, 2, 0, 2] and joined.source.tolist() == [0, 1, 0, 1, 1]
    assert (joined.repeated, joined.renamed) == (2, 0)
    assert [p.half for p in joined.file.particles] == [file.particles[i].half for i in (0, 1, 2, 3, 5)]
    some = joined.at(np.array([4, 0]))
    assert [p.id[-1] for p in some.file.particles] == ["5", "0"] and some.source.tolist() == [1, 0]


def test_different_particles_of_one_id_get_new_ones() -> None:
    """Those that came first keep theirs; half and images stay, and the old id is the parent."""
    file = particle_file(4, 8, 2.0)
    other = placed(file, [0, 1])
    other = other.model_copy(
        update={"particles": tuple(p.model_copy(update={"centre": (0.0, 5.0, 0.0)}) for p in other.particles)}
    )
    joined = select.join({"a": placed(file, [0, 2, 3]), "b": other})
    assert [p.id for p in joined.file.particles] == [f"TS_01.{i:06d}" for i in (0, 2, 3, 4, 1)]
    assert [p.parent for p in joined.file.particles] == [None, None, None, "TS_01.000000", None]
    assert joined.file.particles[3].half == file.particles[0].half and joined.file.particles[3].image == 0
    assert (joined.repeated, joined.renamed) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"box": 10}, "box"), ({"defocus_handedness": 1}, "defocus handedness"), ({"ctf_premultiplied": True}, "ctf premultiplied")],
)  # fmt: skip
def test_what_can_not_be_in_one_file(changes: dict, word: str) -> None:
    file = particle_file(2, 8, 2.0)
    with pytest.raises(InputError, match=f"TS_01: a and b differ in {word}; extract both in the same way"):
        select.join({"a": file, "b": file.model_copy(update=changes)})
    use = file.tilts.model_copy(update={"use": (True,) * 13})
    with pytest.raises(InputError, match="differ in tilts"):
        select.join({"a": file, "b": file.model_copy(update={"tilts": use})})


def test_a_set_in_parts() -> None:
    files = {name: particle_file(7, 8, 2.0).model_copy(update={"name": name}) for name in ("TS_01", "TS_02")}
    joined = {name: select.join({"a": file}) for name, file in files.items()}
    parts = select.split(joined, 3, seed=1)
    assert list(parts) == ["_1", "_2", "_3"]
    sizes = [sum(len(one.source) for one in part.values()) for part in parts.values()]
    assert sorted(sizes) == [4, 5, 5]
    found = Counter((name, p.id) for part in parts.values() for name, one in part.items() for p in one.file.particles)
    assert set(found.values()) == {1} and len(found) == 14
    again, other = (select.split(joined, 3, seed=seed) for seed in (1, 2))
    same = [[dumps(part["TS_01"].file) for part in each.values()] for each in (parts, again, other)]
    assert same[0] == same[1] != same[2]
    ps = tuple(p.model_copy(update={"class_": i // 5}) for i, p in enumerate(joined["TS_01"].file.particles))
    file = joined["TS_01"].file.model_copy(update={"particles": ps})
    classes = select.split({"TS_01": select.join({"a": file}), "TS_02": joined["TS_02"]}, "class", seed=0)
    counts = {suffix: {name: len(one.source) for name, one in part.items()} for suffix, part in classes.items()}
    assert counts == {"_class0": {"TS_01": 5, "TS_02": 7}, "_class1": {"TS_01": 2}}
    with pytest.raises(InputError, match="14 particles can't be split into 15 sets"):
        select.split(joined, 15, seed=0)
