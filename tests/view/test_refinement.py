"""The page of a refinement run: well-formed, alone, with all its pictures and numbers."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from libemc.numerics.rotations import euler_from_matrix, random_rotations
from libemc.view import plots, refinement
from libemc.view.refinement import Iteration, RunPage

COUNT, BOX, PIXEL = 90, 24, 4.5
VOID = {"meta", "img"}


def an_iteration(number: int, odd: int = 0) -> Iteration:
    """Better than the one before; its slices differ in shape where the box is odd in one direction."""
    k = np.arange(BOX // 2 + 1) / (BOX * PIXEL)
    rng = np.random.default_rng(number)
    volume = rng.normal(size=(BOX, BOX + odd, BOX))
    return Iteration(
        "global" if number < 2 else "local", 40.0 - number, 30.125 - number, k, np.exp(-((k * (40 - 5 * number)) ** 2)),
        10.0 / (number + 1), 5.0 / (number + 1), plots.central_slices(volume),
    )  # fmt: skip


def a_page(**more) -> RunPage:
    g, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    reason = [None] * COUNT
    reason[3], reason[50], reason[51] = "low score", "low score", "at the <edge>"
    page = RunPage(
        title="spt_03 & friends", facts={"reference": "initial <3>.mrc", "symmetry": "c1"}, pixel_size=PIXEL,
        iterations=[an_iteration(k) for k in range(4)], rotation=random_rotations(COUNT, g).numpy(),
        last_shift=rng.normal(0, 0.3, (COUNT, 3)), shift=rng.normal(0, 5, (COUNT, 3)), score=rng.normal(10, 2, COUNT),
        half=1 + np.arange(COUNT) % 2, series=[f"TS_{k % 3}" for k in range(COUNT)], reason=reason,
    )  # fmt: skip
    return replace(page, **more)


class Reader(HTMLParser):
    """Every element is closed by its own end tag; cells and pictures are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.pictures: list[bytes] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action", "data", "poster")]
        if tag == "img":
            head, data = given["src"].split(",")
            assert head == "data:image/png;base64" and given["alt"]
            self.pictures.append(base64.b64decode(data, validate=True))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open
    return reader


def written(tmp_path: Path, page: RunPage) -> Reader:
    path = tmp_path / "index.html"
    refinement.write_page(path, page)
    assert [f.name for f in tmp_path.iterdir()] == ["index.html"]
    return read(path)


def drawn(path: Path) -> np.ndarray:
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 200 and picture.std() > 0.05
    return picture


def coloured(picture: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture is of a colour #rrggbb."""
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return (np.abs(picture - wanted) < 0.02).all(axis=-1)


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    """Five pictures that can be read, no script, nothing from elsewhere; what users wrote is text."""
    found = written(tmp_path, a_page())
    assert len(found.pictures) == 5 and all(data.startswith(b"\x89PNG\r\n") for data in found.pictures)
    for number, data in enumerate(found.pictures):
        (tmp_path / f"{number}.png").write_bytes(data)
        drawn(tmp_path / f"{number}.png")
    assert not {"script", "link", "iframe", "edge", "3"} & set(found.names)
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not re.search(r"url\(|@import", (tmp_path / "index.html").read_text())
    assert "spt_03 & friends" in found.text and "initial <3>.mrc" in found.cells


def test_numbers_stand_in_the_tables(tmp_path: Path) -> None:
    found = written(tmp_path, a_page())
    rows = "|".join(found.cells)
    assert "1|global|40.0|30.12|10.00|5.00|" in rows and "4|local|37.0|27.12|2.50|1.25" in rows
    assert "27.12 Å" in found.text
    halves = [int(s) for s in re.search(r"87 of 90 particles; (\d+) in half 1, (\d+) in half 2", rows).groups()]
    assert halves == [44, 43]
    assert "low score|2|TS_0 1, TS_2 1" in rows and "at the <edge>|1|TS_0 1" in rows


def test_a_page_of_little(tmp_path: Path) -> None:
    """One iteration, no scores, none rejected; then no particle at all in use."""
    page = a_page(iterations=[an_iteration(0)], score=np.full(COUNT, np.nan), reason=[None] * COUNT)
    found = written(tmp_path, page)
    assert len(found.pictures) == 4 and "90 particles" in found.text and "None." in found.text
    found = written(tmp_path, replace(page, reason=["too few"] * COUNT))
    assert len(found.pictures) == 2 and f"too few|{COUNT}|" in "|".join(found.cells)


def test_the_last_curve_is_the_strong_one(tmp_path: Path) -> None:
    """Of two flat curves, at 0.3 and 0.7, the one that is drawn black and broad is that of the last iteration."""
    rows = []
    for levels in ((0.3, 0.7), (0.7, 0.3)):
        pair = [replace(an_iteration(0), fsc=np.full(BOX // 2 + 1, level)) for level in levels]
        refinement.fsc_plot(tmp_path / "f.png", a_page(iterations=pair))
        picture = drawn(tmp_path / "f.png")
        black = coloured(picture, "#000000").sum(axis=1)
        inner = slice(len(black) // 5, len(black) * 4 // 5)  # without the frame
        broad = np.nonzero(black[inner] > picture.shape[1] / 2)[0]
        assert len(broad) >= 3
        rows.append(broad.mean())
    assert rows[0] < rows[1] - 50


def test_slices_of_as_many_iterations_as_fit(tmp_path: Path) -> None:
    """Three columns are three fifths of five; of thirty there are as many as of ten. Sides may differ."""
    widths = []
    for count in (3, 5, 10, 30):
        page = a_page(iterations=[replace(an_iteration(k % 5, odd=1), resolution=20.0) for k in range(count)])
        refinement.slices_plot(tmp_path / "s.png", page)
        widths.append(drawn(tmp_path / "s.png").shape[1])
    assert widths[0] / widths[1] == pytest.approx(3 / 5, rel=0.12)
    assert widths[2] == widths[3] and widths[2] / widths[1] == pytest.approx(2, rel=0.1)
    assert refinement._some(30, 10)[0] == 0 and refinement._some(30, 10)[-1] == 29


def test_views_are_of_the_used_ones_in_our_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The angles that are drawn are rot and tilt of the rotations, as the suite's own conversion gives them."""
    page, seen = a_page(), {}
    monkeypatch.setattr(
        refinement, "angular_distribution_plot", lambda path, rot, tilt: seen.update(rot=rot, tilt=tilt)
    )
    refinement.views_plot(tmp_path / "v.png", page)
    rot, tilt, _ = euler_from_matrix(torch.from_numpy(page.rotation[page.use]))
    np.testing.assert_allclose(seen["tilt"], tilt, atol=1e-9)
    np.testing.assert_allclose((seen["rot"] - rot.numpy() + 180) % 360 - 180, 0, atol=1e-9)


def test_shifts_and_scores_show_the_used_ones(tmp_path: Path) -> None:
    """A rejected particle that went far away leaves the histogram as it was; its score is a cross."""
    page = a_page()
    far = page.shift.copy()
    far[50] = 500.0
    pictures = []
    for shift in (page.shift, far):
        refinement.shifts_plot(tmp_path / "h.png", replace(page, shift=shift))
        pictures.append(drawn(tmp_path / "h.png"))
    np.testing.assert_array_equal(*pictures)
    far[0] = 500.0
    refinement.shifts_plot(tmp_path / "h.png", replace(page, shift=far))
    assert not np.array_equal(drawn(tmp_path / "h.png"), pictures[0])
    red = []
    for reason in (page.reason, [None] * COUNT):
        refinement.scores_plot(tmp_path / "s.png", replace(page, reason=reason))
        red.append(int(coloured(drawn(tmp_path / "s.png"), refinement.RED).sum()))
    assert red[0] > 20 and red[1] == 0


def test_scores_of_many_series(tmp_path: Path) -> None:
    """More tilt series than have room for their names, one of them without a score."""
    count = 300
    rng = np.random.default_rng(0)
    series = [f"TS_{k % 60:03d}" for k in range(count)]
    score = np.where(np.arange(count) % 60 == 7, np.nan, rng.normal(size=count))
    page = a_page(
        score=score, series=series, reason=[None] * count, half=1 + rng.integers(0, 2, count),
        rotation=np.tile(np.eye(3), (count, 1, 1)), shift=np.zeros((count, 3)), last_shift=np.zeros((count, 3)),
    )  # fmt: skip
    assert len(written(tmp_path, page).pictures) == 5
    assert refinement.MOST_WIDE * plots.DPI < 3000
