"""What the owner of a device sees of its fields: each with what a query would be answered now."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from edge_client import cli
from edge_client.fields import DeclaredFields, UnreadableField


def fields(declared: DeclaredFields, read: Callable[[str], float]) -> dict[str, Any]:
    """What queries may ask for, and what this device would answer now, ready for JSON."""
    answer = []
    for name, source in sorted(declared.fields.items()):
        value: float | None = None
        problem = ""
        try:
            found = read(name)
            if math.isfinite(found):
                value = found
            else:
                problem = "not finite: a query would be refused"
        except UnreadableField as error:
            problem = f"unreadable: {error}"
        answer.append({"field": name, "value": value, "problem": problem, "source": source.model_dump()})
    return {"fields": answer}


def fields_text(answer: dict[str, Any]) -> str:
    """`fields` for a person."""
    if not answer["fields"]:
        return "no fields are declared: this device answers no queries; see `covey-edge fields --help`"
    rows = [
        (f["field"], f["problem"] or f"{f['value']:g}", _source_text(f["source"])) for f in answer["fields"]
    ]
    return cli.table(("field", "answer now", "from"), rows)


def _source_text(source: dict[str, Any]) -> str:
    if source["kind"] == "constant":
        return "the owner"
    origin = source["path"] if source["kind"] == "file" else "the recordings"
    scale = "" if source["scale"] == 1 else f", times {source['scale']:g}"
    return f"{source['summary']} of {origin}{scale}"
