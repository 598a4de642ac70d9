"""The specification of the API, made from its schemas: what it says holds for the text that travels. Pure."""

from __future__ import annotations

from typing import Any


def as_text(schema: Any) -> Any:
    """A JSON schema with the lengths of base64 texts, where pydantic declares those of the bytes in them.

    Padding may be left out, so that n bytes are between ceil(4 n / 3) and 4 ceil(n / 3) characters.

    Args:
        schema: of one type, or a document that holds many; it is left as it is.

    Example:
        as_text({"type": "string", "format": "base64url", "minLength": 64})["minLength"] == 86
    """
    if isinstance(schema, list):
        return [as_text(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    said = {key: as_text(item) for key, item in schema.items()}
    if said.get("format") == "base64url":
        if "minLength" in said:
            said["minLength"] = (4 * said["minLength"] + 2) // 3
        if "maxLength" in said:
            said["maxLength"] = (said["maxLength"] + 2) // 3 * 4
    return said
