"""What the device's owner sets in `edge.toml`: a closed set of tables, checked before anything starts. Pure.

A table or key that is not known is an error: a limit that is misspelt must not be a limit that does not hold.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.fields import Slug

MAX_CONFIGURATION_BYTES = 65_536
MAX_DATA_TABLES = 16


class InvalidConfiguration(ValueError):
    """A configuration that cannot be used; the message names the key, and says what is wrong with it."""


class Section(BaseModel):
    """Base of every table in `edge.toml`: immutable, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    @classmethod
    def of(cls, table: dict[str, Any], where: str) -> Self:
        """Checks a table.

        Args:
            table: as TOML gives it.
            where: its name in the file, for the message.

        Raises:
            InvalidConfiguration: a key is unknown, missing or has a value that it cannot have.
        """
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            key = ".".join(str(part) for part in (*([where] if where else []), *first["loc"]))
            raise InvalidConfiguration(f"{key}: {first['msg']}") from None


class DataTable(Section):
    """One `[[data]]` table: where examples come from.

    All other keys are the source's own, which checks them.

    Attributes:
        source: name of the plug-in that reads the data.
        model: the model that these examples are for; None for all.
        name: tells tables with the same source apart; the source's name by default.
    """

    model_config = ConfigDict(extra="allow")

    source: Slug
    model: Slug | None = None
    name: Slug | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the source."""
        return dict(self.model_extra or {})


class EdgeConfiguration(Section):
    """The whole of `edge.toml`; every table may be left out."""

    data: Annotated[tuple[DataTable, ...], Field(strict=False, max_length=MAX_DATA_TABLES)] = ()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parses the file.

        Raises:
            InvalidConfiguration: it is too long, no TOML, or holds something that it must not.
        """
        import tomllib  # only a device that has such a file pays for it

        if len(data) > MAX_CONFIGURATION_BYTES:
            raise InvalidConfiguration(f"edge.toml has at most {MAX_CONFIGURATION_BYTES} bytes")
        try:
            tables = tomllib.loads(data.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidConfiguration(f"edge.toml is no TOML: {error}") from error
        return cls.of(tables, "")
