"""The part of the reference that is made from the code when the site is built: an MkDocs hook.

Nothing of it is kept in the repository, so that it cannot say what the code no longer does.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any, cast, get_args, get_origin
from unittest.mock import Mock

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from aggregator import cli, state
from aggregator.web.api import create_app
from aggregator.web.context import Context
from edge_client import cli as edge_cli
from edge_client import configuration, policy
from edge_client.adapters import sources
from protocol import enrolment, messages, plan, topics, transcript
from protocol.client_release import ClientBundle, ClientRelease
from protocol.conditions import Conditions
from protocol.version_assignment import VersionAssignment

_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n        .*)*)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those that MkDocs found."""
    for name, page in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def pages() -> dict[str, str]:
    """The generated pages of the reference, Markdown by name."""
    return {
        "covey": _commands(),
        "covey-edge": "# `covey-edge`\n\n" + "\n".join(_edge_commands()),
        "configuration": _configuration(),
        "topics": f"# MQTT topics\n\n```text\n{inspect.getdoc(topics)}\n```\n",
        "messages": _messages(),
        "http": _http(),
    }


# --- command lines ---------------------------------------------------------------------------------------


def _commands() -> str:
    command = typer.main.get_command(cli.app)
    with command.make_context("covey", [], resilient_parsing=True) as context:
        return get_docs_for_click(obj=command, ctx=context, name="covey")


def _edge_commands() -> Iterator[str]:
    top = edge_cli.parser()
    yield f"{top.description or ''}\n"
    (commands,) = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in commands.choices.items():
        yield f"## `covey-edge {name}`\n\n```text\n{_plain_help(parser)}```\n"


def _plain_help(parser: argparse.ArgumentParser) -> str:
    # The width of the terminal that builds the site is no part of the reference.
    raw = argparse.RawDescriptionHelpFormatter
    parser.formatter_class = lambda prog: raw(prog, width=100)  # type: ignore[assignment]
    return parser.format_help()


# --- schemas ---------------------------------------------------------------------------------------------


def _configuration() -> str:
    parts = [
        "# Configuration\n",
        "## The aggregator: `aggregator.json` in its state directory\n",
        _fields(state.Settings),
        *_nested(state.Settings, _json_key),
        "## The device: `edge.toml`\n",
        f"{_summary(configuration.EdgeConfiguration)}\n",
        *_nested(configuration.EdgeConfiguration, _toml_table),
        *(_model(_keys(source), 3, f'`[[data]]` with `source = "{source}"`') for source in sources.BUILTIN),
        "## The device's owner: `policy.json`\n",
        _fields(policy.DevicePolicy),
    ]
    return "\n".join(parts)


def _nested(schema: type[BaseModel], title: Callable[[str, bool], str], prefix: str = "") -> Iterator[str]:
    """A section for each setting that holds settings, and for those in it, by their place in the file."""
    for name, field in schema.model_fields.items():
        for inner in _schemas_of(field.annotation):
            place = prefix + name
            yield _model(inner, 3, title(place, get_origin(field.annotation) is tuple))
            yield from _nested(inner, title, f"{place}.")


def _json_key(place: str, repeated: bool) -> str:
    return f"list `{place}`" if repeated else f"`{place}`"


def _toml_table(place: str, repeated: bool) -> str:
    return f"`[[{place}]]`" if repeated else f"`[{place}]`"


def _schemas_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _schemas_of(part)


def _keys(source: str) -> type[BaseModel]:
    """The keys of a built-in source: the one kind of table that its module defines."""
    module = import_module(sources.BUILTIN[source][0])
    (found,) = _defined(module, configuration.Section)
    return found


def _messages() -> str:
    parts = [
        "# Messages\n",
        inspect.getdoc(messages) or "",
        "\nBytes travel as Base64 inside JSON, columns in the body. Unknown fields are refused everywhere.\n",
    ]
    for title, union in (("From a device", messages.FromDevice), ("To a device", messages.ToDevice)):
        parts.append(f"\n## {title}\n")
        parts += [_model(schema, 3) for schema in get_args(union)]
    for title, module in (
        ("Parts of messages", messages),
        ("The plan of a round", plan),
        ("Records of the transcript", transcript),
        ("Enrolment", enrolment),
    ):
        parts.append(f"\n## {title}\n")
        known = {*get_args(messages.FromDevice), *get_args(messages.ToDevice)}
        parts += _models(module, level=3, but=known)
    parts.append("\n## Versions and conditions\n")
    parts += [_model(schema, 3) for schema in (VersionAssignment, ClientRelease, ClientBundle, Conditions)]
    return "\n".join(parts)


def _models(module: Any, *, level: int, but: Iterable[type] = ()) -> list[str]:
    """The public schemas that a module defines."""
    return [_model(found, level) for found in _defined(module, BaseModel) if found not in set(but)]


def _defined(module: Any, base: type[BaseModel]) -> list[type[BaseModel]]:
    return [
        found
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and issubclass(found, base)
        and found.__module__ == module.__name__
        and not name.startswith("_")
    ]


def _model(schema: type[BaseModel], level: int, title: str = "") -> str:
    title = title or f"`{schema.__name__}`"
    return f"{'#' * level} {title}\n\n{_summary(schema)}\n\n{_fields(schema)}"


def _summary(schema: type[BaseModel]) -> str:
    return (inspect.getdoc(schema) or "").split("\n\nAttributes:")[0]


def _fields(schema: type[BaseModel]) -> str:
    shapes = schema.model_json_schema()
    told = _told(schema)
    required = set(shapes.get("required", ()))
    kinds = shapes.get("$defs", {})
    rows = [
        (
            f"`{name}`",
            _shape(shape, kinds),
            "required" if name in required else _default(shape),
            told.get(name, ""),
        )
        for name, shape in shapes.get("properties", {}).items()
    ]
    return _table(("field", "value", "default", "meaning"), rows) if rows else "No fields.\n"


def _told(schema: type[BaseModel]) -> dict[str, str]:
    """What the class says of its fields: in its docstring's `Attributes`, or below each."""
    told: dict[str, str] = {}
    for found in reversed(schema.__mro__):
        if not issubclass(found, BaseModel) or found is BaseModel:
            continue
        text = (inspect.getdoc(found) or "").partition("Attributes:\n")[2]
        told |= {name: " ".join(said.split()) for name, said in _ATTRIBUTE.findall(text)}
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]).body
        for field, after in pairwise(body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    told[name] = " ".join(said.split())
    return told


def _default(shape: dict[str, Any]) -> str:
    if "default" not in shape:
        return ""
    # Settings that are left out have the defaults in their own table.
    return "`{}`" if isinstance(shape["default"], dict) else f"`{json.dumps(shape['default'])}`"


def _shape(shape: dict[str, Any], kinds: dict[str, Any]) -> str:
    """A JSON schema in a few words; `kinds` has those that it refers to."""
    if "$ref" in shape:
        name = shape["$ref"].rsplit("/", 1)[1]
        return _shape(kinds[name], kinds) if "enum" in kinds[name] else f"`{name}`"
    for key in ("anyOf", "oneOf"):
        if key in shape:
            return " or ".join(dict.fromkeys(_shape(each, kinds) for each in shape[key]))
    if "const" in shape:
        return f"`{shape['const']}`"
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])
    kind = str(shape.get("type", "any"))
    if kind == "array":
        kind = f"list of {_shape(shape.get('items', {}), kinds)}"
    if isinstance(shape.get("additionalProperties"), dict):
        kind = f"names, each with {_shape(shape['additionalProperties'], kinds)}"
    if shape.get("format") in ("binary", "base64", "base64url"):
        kind = "bytes"
    words = {
        "minimum": "at least {}", "exclusiveMinimum": "over {}", "maximum": "at most {}",
        "exclusiveMaximum": "under {}", "minLength": "from {} long", "maxLength": "to {} long",
        "minItems": "from {} items", "maxItems": "to {} items", "pattern": "`{}`",
    }  # fmt: skip
    limits = [said.format(shape[key]) for key, said in words.items() if key in shape]
    return ", ".join([kind, *limits])


# --- HTTP ------------------------------------------------------------------------------------------------


def _http() -> str:
    # Routes describe themselves; only requests need the aggregator behind them.
    document = create_app(Mock(spec=Context, limits=None, metrics=None)).openapi()
    rows = [
        (f"`{method.upper()} {path}`", operation.get("summary", ""), _first(operation.get("description")))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        "# HTTP endpoints\n\nWhat a service says at `/api/v1/openapi.json`, in short; roles and errors are "
        "in [the API](api.md).\n\n" + _table(("endpoint", "what", "more"), rows)
    )


def _first(text: str | None) -> str:
    return (text or "").split("\n\n")[0]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        # A bar ends a cell even inside code.
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line("---" for _ in head), *map(line, rows), ""])
