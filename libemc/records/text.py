"""Records as text, and text as records: the layout that people read and diff, and the one line that says what is wrong.

A key to a line, a list of numbers to a line, and a line for each item of a list of objects or of points, so that a
particle file has one particle to a line. Numbers are written as Python's `repr`, the shortest text that reads back
bit for bit. The order of keys is the order of the model's fields, so equal records are equal bytes.
"""

from __future__ import annotations

import difflib
import json
from os import PathLike
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from libemc.errors import InputError
from libemc.records.migration import migrate
from libemc.records.models import KINDS, LEFT_OUT, OPTIONAL, Record

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound=Record)

PROBLEMS = {
    "missing": ("is missing", "add it, or let the program that writes it make it again"),
    "finite_number": ("is NaN or infinite", "write a finite number, or null where the key may be null"),
}


class _Envelope(Record):
    """The keys that say how to read the rest."""

    model_config = ConfigDict(extra="ignore")

    schema_: int


def dumps(record: Record) -> str:
    """A record's text, with a newline at its end.

    Raises:
        ValueError, TypeError: a free-form value holds NaN, or something that JSON has no word for (a bug).
    """
    content = record.model_dump(by_alias=True, warnings=False)  # the store reads back what it writes
    for key in record.left_out_when_empty & {key for key, value in content.items() if not value}:
        del content[key]
    for section, keys in LEFT_OUT.items():
        for key in keys if content.get(section) else ():
            if content[section].get(key, 0) is None:
                del content[section][key]
    for particle in content.get("particles", ()) if record.kind == "particles" else ():
        for key in OPTIONAL:
            if particle[key] is None:
                del particle[key]
    return _layout(content, "") + "\n"


def _layout(value: Any, indent: str) -> str:
    """Text of one value, its later lines indented; the rule is the module's docstring."""
    if isinstance(value, dict) and any(isinstance(item, (dict, list, tuple)) for item in value.values()):
        inner = indent + " "
        items = (f"{_ENCODE(key)}: {_layout(item, inner)}" for key, item in value.items())
        return "{" + f",\n{inner}".join(items) + "}"
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (dict, list, tuple)) for item in value):
        return "[\n" + ",\n".join(map(_ENCODE, value)) + "\n" + indent + "]"
    return _ENCODE(value)


_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def loads(text: bytes, where: str | PathLike[str], expected: type[R]) -> R:
    """The record that a file's text says, migrated where its schema is an older one.

    Args:
        text: the whole file.
        where: its path, for the message.
        expected: the kind wanted; `Record` for any.

    Raises:
        InputError: not JSON, another kind, a newer schema, an unknown or missing key, a wrong length, a NaN.
    """
    envelope = parse(_Envelope, text, where)
    model = KINDS.get(envelope.kind)
    if model is None or not issubclass(model, expected):
        wanted = " or ".join(repr(kind) for kind, known in KINDS.items() if issubclass(known, expected))
        raise InputError(f"key kind is {envelope.kind!r}, not {wanted}", where, "give a record of that kind")
    newest = model.model_fields["schema_"].default
    if envelope.schema_ > newest:
        what = f"key schema is {envelope.schema_}, newer than this emc reads ({newest})"
        raise InputError(what, where, "install the emc that wrote it, or a newer one")
    if envelope.schema_ < newest:
        try:
            text = json.dumps(migrate(envelope.kind, json.loads(text), newest)).encode()
        except (AttributeError, KeyError, TypeError) as error:
            what = f"is not a {envelope.kind} record of schema {envelope.schema_} ({error!r})"
            raise InputError(what, where, "restore the file from a copy") from None
    return parse(model, text, where)


def parse(model: type[M], text: bytes | str, where: str | PathLike[str]) -> M:
    """A model, a whole record or one section, from a user's JSON.

    Raises:
        InputError: one line with the file, the key and the remedy.
    """
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as failure:
        what, remedy = _explain(failure, model)
    raise InputError(what, where, remedy)


def _explain(failure: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """What is wrong first, by its key, and what to do about it."""
    first = failure.errors(include_url=False)[0]
    kind, context, message = first["type"], first.get("ctx", {}), first["msg"]
    more = f" (and {failure.error_count() - 1} more like it)" if failure.error_count() > 1 else ""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    subject = f"key {key}" if key else "the content"
    if "remedy" in context:
        return f"{subject}.{message}" if key else f"key {message}", context["remedy"]
    if kind == "json_invalid":
        return f"not valid JSON: {context['error']}", "correct that place, or restore the file from a copy"
    if kind == "extra_forbidden":
        schema = model.model_json_schema()
        known = {name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", ())}
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"{subject} is unknown{more}", f"did you mean {close[0]}?" if close else "remove it"
    problem, remedy = PROBLEMS.get(kind, (f"is wrong: {message[0].lower()}{message[1:]}", "correct it"))
    return f"{subject} {problem}{more}", remedy
