"""The commands `covey device ...` and those of `covey model ...` that need a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator import cli_enrolment_output as enrolment_output
from aggregator import cli_lifecycle
from aggregator import cli_output as output
from aggregator.adapters.keyfiles import private_key
from aggregator.cli_enrolment import ticket_app
from aggregator.cli_options import Form, Json, Output, SignKey, Where, service
from aggregator.registry.publishing import FILES, SIGNATURE_FILE
from protocol.identity import SignedDocument
from protocol.plan import MODEL_KIND

device_app = typer.Typer(no_args_is_help=True, help="The devices of the fleet.")
device_app.add_typer(ticket_app, name="token")
cli_lifecycle.register(device_app)
model_app = typer.Typer(no_args_is_help=True, help="The models and their versions.")


@device_app.command("enroll")
def device_enroll(
    csr: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The device's signing request (DER).")
    ],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the enrolment bundle.")],
    name: Annotated[
        str | None,
        typer.Option(help="Id of the device.", show_default="the one that the request asks for"),
    ] = None,
    state: Where = None,
) -> None:
    """Enrols a device: issues its certificate, and writes the bundle that the device needs.

    The bundle holds no secret, but it names whom the device will obey: bring it there by a way you trust.

    Example: covey device enroll --csr barn-1.csr --out barn-1.json
    """
    with service(state) as client:
        bundle = client.enrol(csr.read_bytes(), name=name)
    out.write_bytes(bundle.to_bytes())
    output.line(f"enrolled {bundle.device_id} in {bundle.fleet}; give {out} to the device")


@device_app.command("list")
def device_list(
    label: Annotated[str | None, typer.Option(help="Only those with this label.", show_default=False)] = None,
    online: Annotated[
        bool | None, typer.Option("--online/--offline", help="Only those.", show_default=False)
    ] = None,
    answers_with: Annotated[
        str | None, typer.Option(help="Only those: MODEL:VERSION.", show_default=False)
    ] = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Lists the devices, how they came in, and which of them are online.

    Example: covey device list --label site=north --online --output json
    """
    with service(state) as client:
        found = tuple(client.devices(label=label, online=online, answers_with=answers_with))
    output.devices(found, json=json or form is Form.JSON)


@device_app.command("show")
def device_show(
    device: Annotated[str, typer.Argument(help="Id of the device.")],
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows a device: when and by which ticket it came in, its certificates, and what it last said.

    Example: covey device show barn-1
    """
    with service(state) as client:
        found, certificates = client.device(device), client.certificates(device)
    enrolment_output.device(found, certificates, json=json or form is Form.JSON)


@device_app.command("label")
def device_label(
    device: Annotated[str, typer.Argument(help="Id of the device.")],
    labels: Annotated[list[str] | None, typer.Argument(help="All labels that it is to have.")] = None,
    state: Where = None,
) -> None:
    """Gives a device its labels, in place of those that it has; without any, it has none.

    Example: covey device label barn-1 site=north barn
    """
    with service(state) as client:
        found = client.label(device, tuple(labels or ()))
    output.line(f"{device} has the labels {', '.join(found.labels) or '(none)'}")


@device_app.command("exclude")
def device_exclude(
    device: Annotated[str, typer.Argument(help="Id of the device.")],
    reason: Annotated[str, typer.Option(help="Why; shown in the list.")] = "by the operator",
    state: Where = None,
) -> None:
    """Keeps a device out of future rounds.

    Example: covey device exclude barn-1 --reason "sensor is broken"
    """
    with service(state) as client:
        client.exclude(device, reason)
    output.line(f"{device} is excluded; `covey device include {device}` lets it in again")


@device_app.command("include")
def device_include(
    device: Annotated[str, typer.Argument(help="Id of the device.")], state: Where = None
) -> None:
    """Lets an excluded device take part again.

    Example: covey device include barn-1
    """
    with service(state) as client:
        client.exclude(device, None)
    output.line(f"{device} may be selected again")


# --- models


_Folder = Annotated[
    Path,
    typer.Argument(exists=True, file_okay=False, help="Holds manifest.json, model.tflite and weights.bin."),
]


@model_app.command("sign")
def model_sign(
    directory: _Folder,
    sign_key: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Your Ed25519 key (PEM).", show_default=False)
    ],
) -> None:
    """Signs a model where your key is, for a fleet that takes signed models only.

    The signature is written into the folder, and goes along with `covey model publish` or the console's form.
    It is of this manifest: sign again after an export.

    Example: covey model sign models/zoo/watch --sign-key publisher.pem
    """
    path = directory / SIGNATURE_FILE
    path.write_bytes(_signature((directory / FILES[0]).read_bytes(), sign_key))
    output.line(str(path))


def _signature(manifest: bytes, sign_key: Path) -> bytes:
    return SignedDocument.create(private_key(sign_key), MODEL_KIND, manifest).model_dump_json().encode()


@model_app.command("publish")
def model_publish(
    directory: _Folder,
    sign_key: SignKey = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Publishes a model as its next version: checks its files, signs its manifest.

    A running service announces it to the devices within a second. A signature of `covey model sign` in the
    folder goes along.

    Example: covey model publish models/zoo/watch
    """
    manifest, graph, weights = ((directory / name).read_bytes() for name in FILES)
    signed, signature = directory / SIGNATURE_FILE, None
    if sign_key is not None:
        signature = _signature(manifest, sign_key)
    elif signed.exists():
        signature = signed.read_bytes()
    with service(state) as client:
        version = client.publish(manifest, graph, weights, signature)
    output.versions([version], json=json or form is Form.JSON)


@model_app.command("list")
def model_list(
    model: Annotated[str | None, typer.Option(help="Only this model.", show_default=False)] = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Lists published versions.

    Example: covey model list --model watch
    """
    with service(state) as client:
        output.versions(client.versions(model), json=json or form is Form.JSON)
