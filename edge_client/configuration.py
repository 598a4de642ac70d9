"""What the device's owner sets in `edge.toml`: a closed set of tables, checked before anything starts. Pure.

A table or key that is not known is an error: a limit that is misspelt must not be a limit that does not hold.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.broker_address import BrokerAddress, InvalidAddress
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


_PATTERN = r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$"


def _not_empty(hours: str) -> str:
    first, _, last = hours.partition("-")
    if first == last:
        raise ValueError(f"{hours} is no time at all; to train never, stop the client")
    return hours


Hours = Annotated[str, Field(pattern=_PATTERN), AfterValidator(_not_empty)]


class ConditionLimits(Section):
    """The table `[conditions]`. What a device cannot know about itself breaks no limit.

    Attributes:
        power: `mains` for no training on battery.
        minimum_battery: charge in percent, while on battery.
        maximum_temperature: of the processor, degrees Celsius. A Raspberry Pi slows down from 80.
        maximum_load: of others, per core: load average of a minute, without this client's one thread.
        minimum_free_memory: MiB that a program could have without swapping.
        metered: whether it trains on a link that costs by the byte.
        metered_interfaces: beginnings of the names of such links.
        quiet_hours: times of the local day in which it does not train, as `08:00-18:30`, or past midnight.
        patience_seconds: how long a training that was begun waits for its conditions to come back; then it is
            given up, and its round goes on without this device.
        tell: whether the fleet's operator is told the conditions, and which of them kept the device out.
    """

    power: Literal["any", "mains"] = "any"
    minimum_battery: Annotated[int, Field(ge=0, le=100)] = 20
    maximum_temperature: Annotated[float, Field(gt=0, le=150, strict=False)] | None = 80.0
    maximum_load: Annotated[float, Field(gt=0, le=1000, strict=False)] | None = None
    minimum_free_memory: Annotated[int, Field(ge=0, le=2**20)] = 32
    metered: bool = False
    metered_interfaces: Annotated[tuple[str, ...], Field(strict=False, max_length=16)] = (
        "wwan",
        "ppp",
        "rmnet",
    )
    quiet_hours: Annotated[tuple[Hours, ...], Field(strict=False, max_length=16)] = ()
    patience_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    tell: bool = True


class BrokerSettings(Section):
    """How to reach the owner's broker.

    Attributes:
        broker: mqtts://HOST[:PORT], or mqtt:// on this machine.
        insecure: allow mqtt:// to another machine, in the clear.
        username: None for none.
        password_file: holds the password in its first line.
        ca: the certificate authority of the broker, PEM; the system's by default.
    """

    broker: Annotated[str, Field(min_length=1, max_length=300)]
    insecure: bool = False
    username: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    password_file: Annotated[str, Field(pattern=r"^/")] | None = None
    ca: Annotated[str, Field(pattern=r"^/")] | None = None

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        try:
            self.address()
        except InvalidAddress as error:
            raise ValueError(str(error)) from error
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs a username")
        return self

    def address(self) -> BrokerAddress:
        """The address, checked.

        Raises:
            InvalidAddress: it is none, or would send everything in the clear.
        """
        return BrokerAddress.parse(self.broker, insecure=self.insecure)


class PredictMqtt(BrokerSettings):
    """The `[predict.mqtt]` table: answers at the owner's own broker.

    Attributes:
        topic: requests come on `<topic>/request`, answers go out on `<topic>/answer`.
    """

    topic: Annotated[str, Field(pattern=r"^[^#+\x00]{1,200}$")]


class PredictSettings(Section):
    """The `[predict]` table: whom the client answers while it runs; nobody by default.

    Attributes:
        socket: path of a Unix socket; None for none.
        group: who may ask there; the client's own group by default.
        mqtt: None for none.
    """

    socket: Annotated[str, Field(pattern=r"^/", max_length=100)] | None = None
    group: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    mqtt: PredictMqtt | None = None


class EdgeConfiguration(Section):
    """The whole of `edge.toml`; every table may be left out."""

    data: Annotated[tuple[DataTable, ...], Field(strict=False, max_length=MAX_DATA_TABLES)] = ()
    conditions: ConditionLimits = ConditionLimits()
    predict: PredictSettings | None = None

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

    def to_toml(self) -> str:
        """Every setting as it holds, in the format of the file; what has no value is a comment."""
        tables = [("[conditions]", self.conditions.model_dump(mode="json"))]
        tables += [("[[data]]", table.model_dump(mode="json")) for table in self.data]
        if self.predict is not None:
            tables.append(("[predict]", self.predict.model_dump(mode="json", exclude={"mqtt"})))
            if self.predict.mqtt is not None:
                tables.append(("[predict.mqtt]", self.predict.mqtt.model_dump(mode="json")))
        return "\n".join(
            "\n".join((name, *(_line(key, value) for key, value in table.items()), ""))
            for name, table in tables
        )


def _line(key: str, value: object) -> str:
    # Strings, numbers, truth and lists look the same in JSON and TOML; a table in a source's keys does not.
    if isinstance(value, dict):
        inline = ", ".join(f"{json.dumps(name)} = {json.dumps(item)}" for name, item in value.items())
        return f"{key} = {{{inline}}}"
    return f"# {key} is not set" if value is None else f"{key} = {json.dumps(value)}"
