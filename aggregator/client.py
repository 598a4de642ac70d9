"""A client of the aggregator's API, for programs and for the command line.

Example:
    with Client("https://aggregator.example:8443", token, ca=Path("ca.pem")) as covey:
        campaign = covey.start_rounds(CampaignRequest("watch", rounds=3))
        for event in covey.events():
            if event.kind == "campaign" and event.data["status"] == "finished":
                break
        print(covey.rounds(campaign.campaign)[0].report.metrics["accuracy"])
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from pydantic import TypeAdapter

from aggregator.connection import ApiError as ApiError
from aggregator.connection import Connection
from aggregator.connection import Event as Event
from aggregator.connection import Unreachable as Unreachable
from aggregator.evaluations import EvaluationRequest
from aggregator.queries import QueryRequest
from aggregator.rollout_operations import RolloutRequest, Turn
from aggregator.rounds.evaluation import VersionEvaluation
from aggregator.rounds.selection import Selection
from aggregator.settings import CampaignRequest
from aggregator.web import client_schemas, rollout_schemas, schemas
from aggregator.web.enrolment_schemas import (
    EnrolmentToken,
    EnrolmentTokenRequest,
    IssuedCertificate,
    NewEnrolmentToken,
)
from protocol.enrolment import EnrolmentBundle
from protocol.identity import SignedDocument

_REQUEST: TypeAdapter[CampaignRequest] = TypeAdapter(CampaignRequest)
_QUERY: TypeAdapter[QueryRequest] = TypeAdapter(QueryRequest)
_ROLLOUT: TypeAdapter[RolloutRequest] = TypeAdapter(RolloutRequest)
_EVALUATION: TypeAdapter[EvaluationRequest] = TypeAdapter(EvaluationRequest)


class Client(Connection):
    """The operations of an aggregator, at the other end of a connection; one thread at a time."""

    # --- who

    def whoami(self) -> schemas.Whoami:
        """Who the service takes this client for."""
        return self._get("/whoami", schemas.Whoami)

    def sign_in_link(self) -> schemas.SignInLink:
        """Makes a link that signs a browser in to the console as this client, once."""
        return self._send("POST", "/sign-in-links", schemas.SignInLink)

    def create_token(self, request: schemas.TokenRequest) -> schemas.NewToken:
        """Makes a token; its secret is shown this once."""
        return self._send("POST", "/tokens", schemas.NewToken, json=request.model_dump(mode="json"))

    def tokens(self) -> tuple[schemas.Token, ...]:
        """Every token ever made."""
        return self._get("/tokens", schemas.Page[schemas.Token]).items

    def revoke_token(self, token_id: str) -> None:
        """Revokes a token."""
        self._call("DELETE", f"/tokens/{_part(token_id)}")

    def audit_log(self, *, limit: int = 100, cursor: str | None = None) -> schemas.Page[schemas.AuditEntry]:
        """What was done, newest first."""
        return self._get("/audit", schemas.Page[schemas.AuditEntry], limit=limit, cursor=cursor)

    # --- devices

    def enrol(self, csr: bytes, *, name: str | None = None) -> EnrolmentBundle:
        """Enrols a device by its signing request (PKCS#10, DER)."""
        body = {"csr": base64.b64encode(csr).decode(), "name": name}
        return self._send("POST", "/devices", EnrolmentBundle, json=body)

    def make_tickets(self, request: EnrolmentTokenRequest) -> tuple[NewEnrolmentToken, ...]:
        """Makes tickets, each of which lets one device in; they are shown this once."""
        page = schemas.Page[NewEnrolmentToken]
        return self._send("POST", "/enrolment-tokens", page, json=request.model_dump(mode="json")).items

    def enrolment_tokens(self) -> tuple[EnrolmentToken, ...]:
        """Every enrolment token ever made."""
        return self._get("/enrolment-tokens", schemas.Page[EnrolmentToken]).items

    def revoke_enrolment_token(self, token_id: str) -> EnrolmentToken:
        """Revokes a ticket; a device that came in by it stays."""
        return self._send("DELETE", f"/enrolment-tokens/{_part(token_id)}", EnrolmentToken)

    def certificates(self, device_id: str) -> tuple[IssuedCertificate, ...]:
        """The certificates that a device was given, oldest first."""
        return self._get(f"/devices/{_part(device_id)}/certificates", schemas.Page[IssuedCertificate]).items

    def devices(
        self,
        *,
        label: str | None = None,
        online: bool | None = None,
        client_version: str | None = None,
        answers_with: str | None = None,
    ) -> Iterator[schemas.Device]:
        """The devices that fit, by id, fetched a page at a time.

        Args:
            label: it carries this label.
            online: whether it is.
            client_version: of Covey on it.
            answers_with: `model:version` that it answers predictions with.
        """
        query = {
            "label": label,
            "online": online,
            "client_version": client_version,
            "answers_with": answers_with,
        }
        return self._pages("/devices", schemas.Page[schemas.Device], limit=1000, **query)

    def device(self, device_id: str) -> schemas.Device:
        """One device."""
        return self._get(f"/devices/{_part(device_id)}", schemas.Device)

    def exclude(self, device_id: str, reason: str | None) -> None:
        """Keeps a device out of future rounds, or lets it in again with None."""
        where = f"/devices/{_part(device_id)}/exclusion"
        if reason is None:
            self._call("DELETE", where)
        else:
            self._call("PUT", where, json={"reason": reason})

    def revoke_device(self, device_id: str, reason: str) -> schemas.Device:
        """Takes a device's right to be in the fleet."""
        where = f"/devices/{_part(device_id)}/revocation"
        return self._send("PUT", where, schemas.Device, json={"reason": reason})

    def retire_device(self, device_id: str) -> schemas.Device:
        """Ends a device's time in the fleet."""
        return self._send("PUT", f"/devices/{_part(device_id)}/retirement", schemas.Device)

    def move_device(self, device_id: str, labels: tuple[str, ...]) -> schemas.Device:
        """Gives a device labels: one with a value takes the place of the same with another value."""
        where = f"/devices/{_part(device_id)}/place"
        return self._send("POST", where, schemas.Device, json={"labels": labels})

    def label(self, device_id: str, labels: tuple[str, ...]) -> schemas.Device:
        """Replaces the labels of a device."""
        return self._send(
            "PUT", f"/devices/{_part(device_id)}/labels", schemas.Device, json={"labels": labels}
        )

    # --- models

    def publish(
        self, manifest: bytes, graph: bytes, weights: bytes, signature: bytes | None = None
    ) -> schemas.Version:
        """Publishes a model as its next version.

        Args:
            manifest: `manifest.json`.
            graph: `model.tflite`.
            weights: `weights.bin`.
            signature: JSON of the SignedDocument around the manifest, where publishers sign.
        """
        files = {"manifest": manifest, "graph": graph, "weights": weights}
        if signature is not None:
            files["signature"] = signature
        parts = {name: (name, data, "application/octet-stream") for name, data in files.items()}
        return self._send("POST", "/versions", schemas.Version, files=parts)

    def versions(self, model: str | None = None) -> tuple[schemas.Version, ...]:
        """Published versions."""
        return tuple(self._pages("/versions", schemas.Page[schemas.Version], limit=1000, model=model))

    def manifest(self, model: str, version: int) -> SignedDocument:
        """The signed manifest of a version."""
        return self._get(f"/models/{_part(model)}/versions/{version}/manifest", SignedDocument)

    def graph(self, model: str, version: int) -> bytes:
        """The graph of a version."""
        return self._call("GET", f"/models/{_part(model)}/versions/{version}/graph").content

    def weights(self, model: str, version: int) -> bytes:
        """The weights of a version."""
        return self._call("GET", f"/models/{_part(model)}/versions/{version}/weights").content

    # --- the client that devices run

    def publish_client(
        self, bundles: Sequence[bytes], signature: bytes | None = None
    ) -> client_schemas.Release:
        """Publishes a release of the client.

        Args:
            bundles: the files of one version, one for each system.
            signature: JSON of the SignedDocument around the release, where publishers sign.
        """
        parts = [("bundle", ("bundle", data, "application/octet-stream")) for data in bundles]
        if signature is not None:
            parts.append(("signature", ("signature", signature, "application/octet-stream")))
        return self._send("POST", "/client/releases", client_schemas.Release, files=parts)

    def client_releases(self) -> tuple[client_schemas.Release, ...]:
        """Releases of the client, newest first."""
        return self._get("/client/releases", schemas.Page[client_schemas.Release]).items

    def client_versions(self) -> tuple[client_schemas.ClientCount, ...]:
        """How many devices run each version of the client, by version and system."""
        return self._get("/client/versions", schemas.Page[client_schemas.ClientCount]).items

    # --- who has which version

    def start_rollout(self, request: RolloutRequest) -> rollout_schemas.Rollout:
        """Begins to bring a version to the fleet, or to a group, wave by wave."""
        body = _ROLLOUT.dump_python(request, mode="json")
        return self._send("POST", "/rollouts", rollout_schemas.Rollout, json=body)

    def rollout(self, rollout_id: str) -> rollout_schemas.Rollout:
        """One rollout."""
        return self._get(f"/rollouts/{_part(rollout_id)}", rollout_schemas.Rollout)

    def rollout_devices(self, rollout_id: str) -> rollout_schemas.RolloutDevices:
        """The devices that a rollout has reached, and what their order follows from."""
        return self._get(f"/rollouts/{_part(rollout_id)}/devices", rollout_schemas.RolloutDevices)

    def rollouts(self, model: str | None = None) -> tuple[rollout_schemas.Rollout, ...]:
        """Rollouts, oldest first."""
        page = schemas.Page[rollout_schemas.Rollout]
        return tuple(self._pages("/rollouts", page, limit=1000, model=model))[::-1]

    def turn_rollout(
        self, rollout_id: str, turn: Turn, reason: str = "by the operator"
    ) -> rollout_schemas.Rollout:
        """Pauses a rollout, lets it go on, ends it where it is, or takes its version back."""
        where = f"/rollouts/{_part(rollout_id)}/{turn}"
        body = None if turn == "resume" else {"reason": reason}
        return self._send("POST", where, rollout_schemas.Rollout, json=body)

    def withdraw(self, model: str, version: int) -> schemas.Version:
        """Takes a version back for good."""
        where = f"/models/{_part(model)}/versions/{version}/withdraw"
        return self._send("POST", where, schemas.Version)

    def pin(
        self, model: str, version: int, *, device: str | None = None, group: str | None = None
    ) -> rollout_schemas.Pin:
        """Gives a device, or every device with a label, a version of its own."""
        body = {"model": model, "version": version, "device": device, "group": group}
        return self._send("PUT", "/pins", rollout_schemas.Pin, json=body)

    def unpin(self, model: str, *, device: str | None = None, group: str | None = None) -> None:
        """Lets a device, or those with a label, have what the fleet has again."""
        self._call("POST", "/pins/remove", json={"model": model, "device": device, "group": group})

    def pins(self, model: str | None = None) -> tuple[rollout_schemas.Pin, ...]:
        """Devices and groups that have a version of their own."""
        return self._get("/pins", schemas.Page[rollout_schemas.Pin], model=model).items

    # --- rounds

    def start_rounds(self, request: CampaignRequest) -> schemas.Campaign:
        """Asks for rounds."""
        body = _REQUEST.dump_python(request, mode="json")
        return self._send("POST", "/campaigns", schemas.Campaign, json=body)

    def start_query(self, request: QueryRequest) -> schemas.Campaign:
        """Asks a query; the report of its round will have the answer."""
        body = _QUERY.dump_python(request, mode="json")
        return self._send("POST", "/queries", schemas.Campaign, json=body)

    def start_evaluation(self, request: EvaluationRequest) -> schemas.Campaign:
        """Asks for an evaluation of a version."""
        body = _EVALUATION.dump_python(request, mode="json")
        return self._send("POST", "/evaluations", schemas.Campaign, json=body)

    def evaluations(self, model: str, version: int | None = None) -> tuple[VersionEvaluation, ...]:
        """How versions of a model did on the devices, oldest first."""
        path = f"/models/{_part(model)}/evaluations"
        return self._get(path, schemas.Page[VersionEvaluation], version=version).items[::-1]

    def campaign(self, campaign_id: str) -> schemas.Campaign:
        """One campaign."""
        return self._get(f"/campaigns/{_part(campaign_id)}", schemas.Campaign)

    def pause_campaign(self, campaign_id: str) -> schemas.Campaign:
        """Begins no more rounds of a campaign until it is resumed."""
        return self._send("POST", f"/campaigns/{_part(campaign_id)}/pause", schemas.Campaign)

    def resume_campaign(self, campaign_id: str) -> schemas.Campaign:
        """Goes on with a paused campaign."""
        return self._send("POST", f"/campaigns/{_part(campaign_id)}/resume", schemas.Campaign)

    def cancel_campaign(self, campaign_id: str) -> schemas.Campaign:
        """Ends a campaign for good."""
        return self._send("POST", f"/campaigns/{_part(campaign_id)}/cancel", schemas.Campaign)

    def campaigns(self, *, active: bool = False) -> tuple[schemas.Campaign, ...]:
        """Campaigns, oldest first."""
        found = self._pages("/campaigns", schemas.Page[schemas.Campaign], limit=1000, active=active)
        return tuple(found)[::-1]

    def rounds(self, campaign_id: str | None = None, *, last: int = 1000) -> tuple[schemas.Round, ...]:
        """The latest rounds, oldest first.

        Args:
            campaign_id: only of this campaign.
            last: how many at most, 1 to 1000.
        """
        page = self._get("/rounds", schemas.Page[schemas.Round], campaign=campaign_id, limit=last)
        return page.items[::-1]

    def selection(self, round_id: str) -> Selection:
        """How the cohort of a round was drawn."""
        return self._get(f"/rounds/{_part(round_id)}/selection", Selection)

    def ledger(self, delta: float) -> schemas.Ledger:
        """What has been spent in privacy, at this delta."""
        return self._get("/privacy/ledger", schemas.Ledger, delta=delta)


def _part(text: str) -> str:
    # One part of a path, whatever it holds: the service says what it thinks of it.
    return quote(text, safe="")
