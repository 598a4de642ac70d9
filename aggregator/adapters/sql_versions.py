"""The part of the SQL repository that holds published versions."""

from __future__ import annotations

from sqlalchemy import func, select

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_statements import Reading, Writing
from aggregator.records import Stage, Version


class VersionReader(Reading):
    """What can be read of it; see `aggregator.repository.Reader`."""

    def version(self, model: str, version: int) -> Version | None:
        """One version."""
        row = self._one(
            select(s.versions).where(s.versions.c.model == model, s.versions.c.version == version)
        )
        return None if row is None else Version(**row._asdict())

    def newest_version(self, model: str, *stages: Stage) -> Version | None:
        """The version with the highest number."""
        query = select(s.versions).where(s.versions.c.model == model)
        if stages:
            query = query.where(s.versions.c.stage.in_(stages))
        row = self._one(query.order_by(s.versions.c.version.desc()).limit(1))
        return None if row is None else Version(**row._asdict())

    def newest_versions(self) -> tuple[Version, ...]:
        """The newest version of every model."""
        newest = select(s.versions.c.model, func.max(s.versions.c.version).label("version"))
        latest = newest.group_by(s.versions.c.model).subquery()
        query = select(s.versions).join(
            latest, (latest.c.model == s.versions.c.model) & (latest.c.version == s.versions.c.version)
        )
        return tuple(Version(**row._asdict()) for row in self._all(query.order_by(s.versions.c.model)))

    def versions(self, model: str | None = None) -> tuple[Version, ...]:
        """Versions, by model and number."""
        query = select(s.versions).order_by(s.versions.c.model, s.versions.c.version)
        if model is not None:
            query = query.where(s.versions.c.model == model)
        return tuple(Version(**row._asdict()) for row in self._all(query))


class VersionWriter(Writing, VersionReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def add_version(self, version: Version) -> None:
        """Adds a version."""
        self._insert(s.versions, **vars(version))
