"""Old records made new: one pure function for each step of a kind's `schema` integer.

A step takes the content of a file (plain dictionaries and lists) of one schema and returns that of the next; it never
changes its argument. Steps are never edited once released; each has an old file in `tests/records/fixtures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Content = dict[str, Any]


def _renamed(section: Content, old: str, new: str) -> Content:
    """A copy with one key renamed in its place."""
    return {new if key == old else key: value for key, value in section.items()}


def _tiltseries_0(content: Content) -> Content:
    """Before the first release the pixel size was `source.apix`, and the defocus hand `ctf.handedness`."""
    changed = {**content, "schema": 1, "source": _renamed(content["source"], "apix", "pixel_size")}
    if "ctf" in content:
        changed["ctf"] = _renamed(content["ctf"], "handedness", "defocus_handedness")
    return changed


STEPS: dict[tuple[str, int], Callable[[Content], Content]] = {("tiltseries", 0): _tiltseries_0}


def migrate(kind: str, content: Content, schema: int = 1) -> Content:
    """The content as a newer schema says it, by as many steps as it takes.

    Args:
        kind: which steps; a kind's steps are numbered by the schema that they begin with.
        content: a file's content, with its own schema under `schema`.
        schema: the one wanted.

    Raises:
        KeyError: there is no such step, or the content is not of the schema that it claims.
    """
    while content["schema"] != schema:
        content = STEPS[kind, content["schema"]](content)
    return content
