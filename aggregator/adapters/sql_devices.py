"""Which rows of the devices' table a filter is about."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Select, or_

from aggregator.adapters import sql_schema as s
from aggregator.records import DeviceFilter


def fitting(query: Select[Any], which: DeviceFilter) -> Select[Any]:
    """The query, for the devices that fit."""
    if which.label is not None:
        # Labels hold no quotation mark, so the quoted label is found nowhere else in the list.
        query = query.where(s.devices.c.labels.contains(json.dumps(which.label), autoescape=True))
    if which.online is not None:
        query = query.where(s.devices.c.online == which.online)
    if which.client_version is not None:
        query = query.where(s.devices.c.client_version == which.client_version)
    if which.answers_with is not None:
        model, version = which.answers_with
        item = f"{json.dumps(model)}: {version}"
        models = (s.devices.c.models.contains(item + end, autoescape=True) for end in (",", "}"))
        query = query.where(or_(*models))
    if which.text is not None:
        columns = (s.devices.c.device_id, s.devices.c.labels, s.devices.c.client_version)
        query = query.where(or_(*(column.contains(which.text, autoescape=True) for column in columns)))
    if which.excluded is not None:
        query = query.where(
            s.devices.c.excluded.is_not(None) if which.excluded else s.devices.c.excluded.is_(None)
        )
    return query
