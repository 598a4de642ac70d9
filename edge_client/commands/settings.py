"""`config`, `policy` and `fields`: what the owner set; and the examples that they named."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from edge_client import cli

if TYPE_CHECKING:
    from edge_client.configuration import EdgeConfiguration
    from edge_client.fields import FieldSource
    from edge_client.sources import DataSource


def configuration_of(options: argparse.Namespace) -> EdgeConfiguration:
    """What the owner wrote into edge.toml, or the file that --config names.

    Raises:
        CommandFailed: there is no such file.
        InvalidConfiguration: it does not hold together.
    """
    from edge_client.adapters.credentials import CONFIGURATION, load_configuration

    if options.config is not None and not options.config.is_file():
        raise cli.CommandFailed(f"there is no configuration file {options.config}")
    return load_configuration(options.config or options.state / CONFIGURATION)


def example_source(options: argparse.Namespace) -> DataSource:
    """Where this device's examples come from: edge.toml, else --data, which a unit always sets.

    Raises:
        CommandFailed: neither says it.
        InvalidConfiguration: edge.toml does not hold together.
    """
    from edge_client.adapters.credentials import CONFIGURATION

    configuration = configuration_of(options)
    if configuration.data:
        from edge_client.adapters.sources import open_sources

        return open_sources(configuration.data, options.state)
    if options.data is None:
        path = options.config or options.state / CONFIGURATION
        raise cli.CommandFailed(
            f"say where the examples come from: --data DIR, or a [[data]] table in {path}"
        )
    from edge_client.adapters.data import NpzDirectory

    return NpzDirectory(options.data)


def config(options: argparse.Namespace) -> None:
    """Shows the configuration that counts."""
    configuration = configuration_of(options)
    if options.json:
        cli.say(cli.as_json(configuration.model_dump(mode="json")))
    else:
        cli.say(configuration.to_toml().rstrip())


def policy(options: argparse.Namespace) -> None:
    """Shows the owner's policy, after taking over a new one."""
    from edge_client.adapters.credentials import POLICY, load_policy
    from edge_client.device_setup import set_policy

    if options.file is not None:
        if not options.file.is_file():
            raise cli.CommandFailed(f"there is no policy file {options.file}")
        set_policy(options.state, load_policy(options.file))
    cli.say(load_policy(options.state / POLICY).to_bytes().decode().rstrip())


def fields(options: argparse.Namespace) -> None:
    """Shows the fields and their numbers, after declaring or withdrawing one."""
    from edge_client import fields_report
    from edge_client.adapters.readings import FieldReader, load_fields, save_fields

    if options.action != "list" and options.name is None:
        raise cli.CommandFailed(f"covey-edge fields {options.action} needs the NAME of a field", 2)
    declared = load_fields(options.state)
    if options.action == "set":
        declared = declared.declare(options.name, _source(options))
    elif options.action == "remove":
        declared = declared.withdraw(options.name)
    if options.action != "list":
        save_fields(options.state, declared)
    answer = fields_report.fields(declared, FieldReader(options.state, options.data).read)
    cli.say(cli.as_json(answer) if options.json else fields_report.fields_text(answer))


def _source(options: argparse.Namespace) -> FieldSource:
    """The source that `fields set` describes."""
    from edge_client.fields import field_source

    given: dict[str, Any]
    if options.value is not None:
        given = {"kind": "constant", "value": options.value}
    elif options.file is not None:
        given = {"kind": "file", "path": str(options.file.absolute()), "scale": options.scale}
    elif options.recordings:
        given = {"kind": "recordings", "scale": options.scale}
    else:
        raise cli.CommandFailed("say where the number comes from: --value, --file or --recordings", 2)
    if options.summary is not None:
        given["summary"] = options.summary
    return field_source(given)
