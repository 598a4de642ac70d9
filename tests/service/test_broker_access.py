"""The broker's access: what is wanted, how the difference is found, and how it is brought about."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.doorkeeper import AGAIN_SECONDS, ANSWER_SECONDS, FILE_SECONDS, PAGE, Doorkeeper
from aggregator.fleet import access
from aggregator.fleet.access import Access, Kind, Rule
from aggregator.fleet.broker import AGGREGATOR
from aggregator.work import Outgoing

NAMES = st.frozensets(st.sampled_from([f"barn-{n}" for n in range(6)]))


class Plugin:
    """As much of the dynamic security plugin as answers the commands; started from the file."""

    def __init__(self, document: bytes) -> None:
        content = json.loads(document)
        self.clients: dict[str, dict[str, Any]] = {each["username"]: each for each in content["clients"]}
        self.roles: dict[str, dict[str, Any]] = {each["rolename"]: each for each in content["roles"]}
        self.defaults: dict[str, bool] = content["defaultACLAccess"]
        self.given: list[str] = []

    def answer(self, payload: bytes) -> bytes:
        answers = []
        for command in json.loads(payload)["commands"]:
            self.given.append(command["command"])
            answer = {"command": command["command"], "correlationData": command["correlationData"]}
            answers.append(answer | self._do(**command))
        return json.dumps({"responses": answers}).encode()

    def _do(self, command: str, correlationData: str, **given: Any) -> dict[str, Any]:
        match command:
            case "listClients" | "listRoles":
                which = self.clients if command == "listClients" else self.roles
                page = list(which.values())[given["offset"] :][: given["count"]]
                return {"data": {"totalCount": len(which), command[4:].lower(): page}}
            case "getDefaultACLAccess":
                return {"data": {"acls": [{"acltype": k, "allow": v} for k, v in self.defaults.items()]}}
            case "setDefaultACLAccess":
                self.defaults |= {acl["acltype"]: acl["allow"] for acl in given["acls"]}
            case "deleteClient":
                del self.clients[given["username"]]
            case "deleteRole":
                del self.roles[given["rolename"]]
            case "createRole":
                if given["rolename"] in self.roles:
                    return {"error": "Role already exists"}
                self.roles[given["rolename"]] = given
            case "modifyRole":
                self.roles[given["rolename"]] |= given
            case "createClient":
                if given["username"] in self.clients:
                    return {"error": "Client already exists"}
                assert all(role["rolename"] in self.roles for role in given["roles"])
                self.clients[given["username"]] = given
            case "modifyClient":
                assert all(role["rolename"] in self.roles for role in given["roles"])
                self.clients[given["username"]] |= given
            case _:
                raise AssertionError(command)
        return {}

    @property
    def has(self) -> Access:
        defaults = [{"acltype": kind, "allow": allow} for kind, allow in self.defaults.items()]
        return access.found(self.clients.values(), self.roles.values(), defaults)


def converse(keeper: Doorkeeper, plugin: Plugin, devices: frozenset[str], clock: float) -> None:
    """Lets the two talk until neither has anything to say."""
    waiting = keeper.tick(devices, clock)
    while waiting:
        waiting = [
            more
            for outgoing in waiting
            for more in keeper.heard(plugin.answer(_command(outgoing)), devices, clock)
        ]


def _command(outgoing: Outgoing) -> bytes:
    assert outgoing.topic == access.CONTROL and not outgoing.retain
    return outgoing.payload


@given(has=NAMES, wants=NAMES)
def test_whatever_the_broker_has_it_gets_what_is_wanted_and_then_nothing(
    has: frozenset[str], wants: frozenset[str]
) -> None:
    plugin, keeper = Plugin(access.document(access.wanted(has))), Doorkeeper()
    keeper.connected()
    converse(keeper, plugin, wants, 0.0)
    assert plugin.has == access.wanted(wants) and keeper.settled
    plugin.given.clear()
    converse(keeper, plugin, wants, 1.0)
    assert plugin.given == []


def test_who_must_go_goes_before_anybody_comes() -> None:
    commands = access.reconcile(access.wanted({"barn-1"}), access.wanted({"barn-2"}))
    assert [each["command"] for each in commands] == [
        "deleteClient",
        "deleteRole",
        "createRole",
        "createClient",
    ]
    assert commands[0]["username"] == "barn-1" and commands[3]["username"] == "barn-2"


def test_what_somebody_changed_by_hand_is_put_right() -> None:
    plugin = Plugin(access.document(access.wanted({"barn-1", "barn-2"})))
    plugin.defaults["publishClientReceive"] = True
    plugin.roles["device"]["acls"].append(
        {"acltype": "subscribePattern", "topic": "#", "priority": 9, "allow": True}
    )
    plugin.roles["device:barn-1"]["acls"][0]["allow"] = False
    plugin.clients["barn-1"]["roles"].append({"rolename": "aggregator"})
    plugin.clients["barn-2"]["disabled"] = True
    plugin.clients["mallory"] = {"username": "mallory", "roles": [{"rolename": "aggregator"}]}
    keeper = Doorkeeper()
    keeper.connected()
    converse(keeper, plugin, frozenset({"barn-1", "barn-2"}), 0.0)
    assert plugin.has == access.wanted({"barn-1", "barn-2"})


def test_a_device_is_given_its_own_topics_and_nobody_but_the_aggregator_speaks_to_it() -> None:
    roles = access.wanted({"barn-1", "barn-2"}).roles
    for name, role in roles.items():
        for rule in role:
            if name not in ("aggregator", "device"):
                assert rule.topic.startswith(f"covey/v1/dev/{name.removeprefix('device:')}/")
                assert rule.kind is not Kind.PUBLISH or "+" not in rule.topic
            if rule.kind is Kind.PUBLISH and ("/down/" in rule.topic or "bcast" in rule.topic):
                assert name == "aggregator"
    assert Rule(Kind.PUBLISH, access.CONTROL) in roles["aggregator"]
    # What a device that is gone for good has left retained is cleared.
    cleared = {
        rule.topic for rule in roles["aggregator"] if rule.kind is Kind.PUBLISH and "/up/" in rule.topic
    }
    assert cleared == {f"covey/v1/dev/+/up/{channel}" for channel in ("status", "msg", "chunk")}
    # No device id can be the aggregator's name, or that of another device's role.
    assert "." in AGGREGATOR and ":" in access.own_role("x")


def test_a_large_fleet_is_read_and_told_in_pages() -> None:
    many = frozenset(f"barn-{n}" for n in range(3 * PAGE))
    plugin, keeper = Plugin(access.document(access.wanted(many - {"barn-0"}))), Doorkeeper()
    keeper.connected()
    converse(keeper, plugin, many, 0.0)
    assert plugin.has == access.wanted(many)
    keeper.connected()
    fresh = Plugin(access.document(access.wanted(())))
    converse(keeper, fresh, many, 1.0)
    assert fresh.has == access.wanted(many)


def test_an_answer_that_was_lost_is_waited_for_and_then_everything_is_asked_again() -> None:
    plugin, keeper = Plugin(access.document(access.wanted(()))), Doorkeeper()
    devices = frozenset({"barn-1"})
    keeper.connected()
    assert keeper.tick(devices, 0.0)
    assert keeper.tick(devices, ANSWER_SECONDS - 1) == []
    assert keeper.tick(devices, ANSWER_SECONDS) == [] and keeper.trouble == ""
    assert keeper.tick(devices, ANSWER_SECONDS)
    assert keeper.tick(devices, 2 * ANSWER_SECONDS) == []
    assert "covey aggregator broker" in keeper.trouble
    converse(keeper, plugin, devices, 2 * ANSWER_SECONDS + AGAIN_SECONDS)
    assert keeper.trouble == "" and plugin.has == access.wanted(devices)


def test_an_error_is_looked_into_by_asking_again() -> None:
    plugin, keeper = Plugin(access.document(access.wanted(()))), Doorkeeper()
    keeper.connected()
    converse(keeper, plugin, frozenset(), 0.0)
    # Somebody else made it meanwhile.
    plugin.clients["barn-1"] = {"username": "barn-1", "roles": []}
    converse(keeper, plugin, frozenset({"barn-1"}), 1.0)
    assert not keeper.settled
    converse(keeper, plugin, frozenset({"barn-1"}), 1.0)
    assert keeper.settled and plugin.has == access.wanted({"barn-1"})


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"responses": 3}', b'{"responses": [null]}'])
def test_an_answer_that_makes_no_sense_is_no_answer(answer: bytes) -> None:
    keeper = Doorkeeper()
    keeper.connected()
    assert keeper.tick(frozenset(), 0.0)
    assert keeper.heard(answer, frozenset(), 0.0) == []
    assert not keeper.settled


def test_answers_to_somebody_else_are_left_alone() -> None:
    keeper, plugin = Doorkeeper(), Plugin(access.document(access.wanted(())))
    keeper.connected()
    (asked,) = keeper.tick(frozenset(), 0.0)
    other = b'{"responses": [{"command": "listRoles", "error": "no", "correlationData": "other"}]}'
    assert keeper.heard(other, frozenset(), 0.0) == []
    assert keeper.heard(plugin.answer(asked.payload), frozenset(), 0.0) == [] and keeper.settled


def test_the_file_forgets_who_is_gone_at_once_and_learns_of_new_ones_soon() -> None:
    written: list[bytes] = []
    keeper = Doorkeeper(written.append)
    keeper.tick(frozenset({"a"}), 0.0)
    assert written == [access.document(access.wanted({"a"}))]
    keeper.tick(frozenset({"a", "b"}), 1.0)
    assert len(written) == 1
    keeper.tick(frozenset({"b"}), 2.0)
    assert written[1:] == [access.document(access.wanted({"b"}))]
    keeper.tick(frozenset({"b", "c"}), 2.0 + FILE_SECONDS)
    assert written[2:] == [access.document(access.wanted({"b", "c"}))]


def test_a_file_that_cannot_be_written_is_trouble_and_tried_again() -> None:
    full = True

    def write(_: bytes) -> None:
        if full:
            raise OSError(28, "No space left on device")

    keeper = Doorkeeper(write)
    keeper.tick(frozenset(), 0.0)
    assert "No space left" in keeper.trouble
    full = False
    keeper.connected()
    converse(keeper, Plugin(access.document(access.wanted(()))), frozenset(), FILE_SECONDS)
    assert keeper.trouble == ""
