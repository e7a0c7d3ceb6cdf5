"""The records told to the world: in a directory, a JSON Schema of each kind and its example as the models write them.

`python -m libemc.records.schema info/` writes both. The schemas are made from the models alone; an example is read,
checked, migrated if need be, and written in the present layout, so only its values are ever edited by hand. A test
fails when the repository's files are not what this gives.
"""

from __future__ import annotations

import json
import sys
from os import PathLike
from pathlib import Path

from libemc.records.models import KINDS
from libemc.records.store import load
from libemc.records.text import dumps

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def generated(directory: str | PathLike[str]) -> dict[Path, str]:
    """What the schemas and the examples of a directory should say.

    Args:
        directory: where `example_<kind>.json` is for every kind.

    Returns:
        Each file's path and text.
    """
    texts = {}
    for kind, model in KINDS.items():
        schema = json.dumps({"$schema": DIALECT, **model.model_json_schema()}, indent=1, ensure_ascii=False)
        texts[Path(directory, f"{kind}.schema.json")] = schema + "\n"
        example = Path(directory, f"example_{kind}.json")
        texts[example] = dumps(load(example, model))
    return texts


if __name__ == "__main__":
    for path, text in generated(sys.argv[1]).items():
        path.write_text(text, encoding="utf-8")
