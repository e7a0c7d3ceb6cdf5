"""What every test shares: a thread a worker, types checked at run time, independent test data, a project directory.

The settings at the top come before torch, numba and libemc.numerics are imported for the first time: the number of
threads can't be changed later, and the import hook sees only what is imported after it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # pytest-xdist's workers share the cores
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
from beartype.claw import beartype_packages  # noqa: E402
from hypothesis import settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# Numba compiles the plain function, so modules with compiled functions are left out; their callers are checked.
_CHECKED = [
    f"libemc.numerics.{file.stem}"
    for file in sorted((ROOT / "libemc" / "numerics").glob("[a-z]*.py"))
    if not re.search(r"^\s*(import|from) numba\b", file.read_text(encoding="utf-8"), re.MULTILINE)
]
beartype_packages(_CHECKED)

# Tests are never timed, and the same on every run.
settings.register_profile("emc", deadline=None, derandomize=True)
settings.load_profile("emc")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of independent test data that lies beside a checkout; tests skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"independent test data not present ({SHARED_DATA.name}/ beside the checkout)")
    return SHARED_DATA


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project directory, and the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
