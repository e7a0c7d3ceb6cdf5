"""Old files stay readable: every released step has a file of its time."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from libemc.errors import InputError
from libemc.records import TiltSeriesRecord, load, update
from libemc.records.migration import STEPS, migrate
from libemc.records.models import KINDS

FIXTURES = Path(__file__).parent / "fixtures"
OLD = FIXTURES / "tiltseries_schema0_info.json"


def test_every_step_has_its_old_file_and_leads_to_the_present() -> None:
    for kind, schema in STEPS:
        (file,) = FIXTURES.glob(f"{kind}_schema{schema}*.json")
        assert load(file).schema_ == KINDS[kind].model_fields["schema_"].default
    newest = {kind: model.model_fields["schema_"].default for kind, model in KINDS.items()}
    assert {kind: sum(step[0] == kind for step in STEPS) for kind in KINDS if newest[kind] > 1} == {
        kind: value for kind, value in newest.items() if value > 1
    }


def test_schema_0_of_a_tilt_series_keeps_its_values() -> None:
    record = load(OLD, TiltSeriesRecord)
    assert (record.schema_, record.source.pixel_size, record.tilts.nominal) == (1, 2.62, (-1.5, 1.5))
    assert record.ctf is not None and record.ctf.defocus_handedness == 1
    content = json.loads(OLD.read_text())
    del content["ctf"]
    assert "ctf" not in migrate("tiltseries", content, 1)


def test_migration_is_pure() -> None:
    content = json.loads(OLD.read_text())
    before = copy.deepcopy(content)
    migrate("tiltseries", content, 1)
    assert content == before


def test_update_writes_the_present_schema(tmp_path: Path) -> None:
    path = tmp_path / "old_info.json"
    shutil.copy(OLD, path)
    update(path, lambda record: record)
    content = json.loads(path.read_text())
    assert (content["schema"], content["source"]["pixel_size"]) == (1, 2.62)


@pytest.mark.parametrize("damage", [{"source": None}, {"source": {"pixel_size": 1.0}}, {"ctf": 3}])
def test_old_file_that_is_not_of_its_schema_is_the_users(tmp_path: Path, damage: dict[str, object]) -> None:
    path = tmp_path / "old_info.json"
    path.write_text(json.dumps({**json.loads(OLD.read_text()), **damage}))
    with pytest.raises(InputError, match=r"old_info\.json: "):
        load(path)
