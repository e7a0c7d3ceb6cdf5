"""The schemas and examples in `info/` are what the models say, and another validator understands them the same way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from libemc.errors import InputError
from libemc.records.models import KINDS
from libemc.records.schema import generated
from libemc.records.text import loads

INFO = Path(__file__).resolve().parents[2] / "info"


def test_files_in_info_are_what_the_models_give() -> None:
    stale = [path.name for path, text in generated(INFO).items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python -m libemc.records.schema info/"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index in a content."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *places(item, (*path, key)))]


@pytest.mark.parametrize("kind", KINDS)
def test_jsonschema_and_the_models_agree(kind: str) -> None:
    """An independent validator accepts the example, and refuses each damaged one if and only if the models do."""
    validator = jsonschema.Draft202012Validator(json.loads((INFO / f"{kind}.schema.json").read_text()))
    example = json.loads((INFO / f"example_{kind}.json").read_text())
    assert validator.is_valid(example)
    refused = 0
    for path in places(example):
        for damage in ("text", None, {"unknown": 1}, -0.5):
            content = copy.deepcopy(example)
            part = content
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = damage
            try:
                loads(json.dumps(content).encode(), "x", KINDS[kind])
                understood = True
            except InputError as error:
                understood = "entries, but" in str(error)  # a schema cannot compare lengths
            refused += not understood
            assert validator.is_valid(content) == understood, (path, damage)
    assert refused > len(example)  # most damage is seen


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_keys_are_refused_everywhere_but_in_free_values(kind: str) -> None:
    schema = json.loads((INFO / f"{kind}.schema.json").read_text())
    parts = [schema, *schema.get("$defs", {}).values()]
    assert all(part["additionalProperties"] is False for part in parts if "properties" in part)
