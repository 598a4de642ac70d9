"""What pages load besides themselves: a few files of this package, which browsers may keep for ever."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from aggregator.web.problems import ApiProblem

_HERE = Path(__file__).parent
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_FILES = {path.name: path for place in ("vendor", "static") for path in (_HERE / place).glob("*.*")}
FILES = {name: path for name, path in _FILES.items() if path.suffix in _TYPES}

router = APIRouter(include_in_schema=False)


@cache
def _content(name: str) -> tuple[bytes, str]:
    data = FILES[name].read_bytes()
    return data, hashlib.sha256(data).hexdigest()[:16]


def address_of_asset(name: str) -> str:
    """Where a page finds a file; another content has another address."""
    return f"/assets/{name}?v={_content(name)[1]}"


@router.get("/assets/{name}", name="load-asset")
def load_asset(name: str, v: Annotated[str, Query(max_length=16)] = "") -> Response:
    """One file."""
    if name not in FILES:
        raise ApiProblem("not-found", "no page needs this file")
    data, version = _content(name)
    kept = "public, max-age=31536000, immutable" if v == version else "no-cache"
    return Response(data, media_type=_TYPES[FILES[name].suffix], headers={"Cache-Control": kept})
