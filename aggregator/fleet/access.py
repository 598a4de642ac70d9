"""Who may do what at the broker, as mosquitto's dynamic security plugin takes it. Pure.

The plugin denies whatever no role allows, to whomever it does not know. So a device that is revoked is simply
not there any more: deleting its client ends its connection at once, and leaves it nothing to come back to.
mosquitto 2.0 has no `%u` in the plugin's topics, hence a role for each device.

Two ways lead into the broker: the file that it is started with (`document`), and commands on a topic while it
runs. `reconcile` finds the commands that turn what the broker has into what it should have.
Source: mosquitto 2.0, `plugins/dynamic-security/README.md`, and the plugin's sources where that is silent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from aggregator.fleet.broker import AGGREGATOR
from protocol import topics

CONTROL = "$CONTROL/dynamic-security/v1"
"""Where the plugin takes commands; only the aggregator may publish there."""
RESPONSES = f"{CONTROL}/response"
"""Where it answers them."""

Command = Mapping[str, Any]


class Kind(StrEnum):
    """What a rule is about, by the plugin's names."""

    PUBLISH = "publishClientSend"
    RECEIVE = "publishClientReceive"
    SUBSCRIBE = "subscribePattern"


DEFAULTS = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")
"""What the plugin has a default for, where no rule matches: each is to be denied."""


@dataclass(frozen=True, order=True)
class Rule:
    """One thing that a role allows; there are no rules that forbid.

    Attributes:
        topic: a topic filter; of SUBSCRIBE, what it covers may be subscribed to.
    """

    kind: Kind
    topic: str


Role = frozenset[Rule]


@dataclass(frozen=True)
class Access:
    """Roles and clients of a broker, wanted or found.

    Attributes:
        roles: name -> what it allows.
        clients: user name -> names of its roles.
        allowed_by_default: those of `DEFAULTS` that need no rule.
        odd: roles and clients that cannot be said by this class, such as a role with a rule that forbids or
            a client that is disabled: they are made anew.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    clients: Mapping[str, frozenset[str]] = field(default_factory=dict)
    allowed_by_default: frozenset[str] = frozenset()
    odd: frozenset[str] = frozenset()


AGGREGATOR_ROLE, DEVICE_ROLE = "aggregator", "device"
_AGGREGATOR: Role = frozenset(
    {
        Rule(Kind.SUBSCRIBE, topics.UPLINKS),
        Rule(Kind.RECEIVE, topics.UPLINKS),
        Rule(Kind.PUBLISH, topics.downlinks("+")),
        Rule(Kind.PUBLISH, topics.MODELS),
        # To clear what a device that is gone for good has left there.
        *(Rule(Kind.PUBLISH, topics.up("+", channel)) for channel in topics.UP_CHANNELS),
        Rule(Kind.PUBLISH, CONTROL),
        Rule(Kind.SUBSCRIBE, RESPONSES),
        Rule(Kind.RECEIVE, RESPONSES),
    }
)
_DEVICE: Role = frozenset({Rule(Kind.SUBSCRIBE, topics.MODELS), Rule(Kind.RECEIVE, topics.MODELS)})


def own_role(device_id: str) -> str:
    """Name of the role that only this device has; no device id holds a colon."""
    return f"{DEVICE_ROLE}:{device_id}"


def _own(device_id: str) -> Role:
    return frozenset(
        {
            *(Rule(Kind.PUBLISH, topics.up(device_id, channel)) for channel in topics.UP_CHANNELS),
            Rule(Kind.SUBSCRIBE, topics.downlinks(device_id)),
            Rule(Kind.RECEIVE, topics.downlinks(device_id)),
        }
    )


def wanted(devices: Iterable[str]) -> Access:
    """What a broker should have.

    Args:
        devices: ids of those that may connect.
    """
    names = sorted(devices)
    roles = {AGGREGATOR_ROLE: _AGGREGATOR, DEVICE_ROLE: _DEVICE} | {
        own_role(name): _own(name) for name in names
    }
    clients = {AGGREGATOR: frozenset({AGGREGATOR_ROLE})}
    clients |= {name: frozenset({DEVICE_ROLE, own_role(name)}) for name in names}
    return Access(roles, clients)


def reconcile(found: Access, want: Access) -> tuple[Command, ...]:
    """The commands that turn one into the other, in the order in which they are to be given.

    Who must go, goes first. Changing the rules of a role, or the roles of a client, ends the connections
    concerned; they come back to what is right.
    """
    commands: list[Command] = []
    if found.allowed_by_default:
        acls = [{"acltype": kind, "allow": False} for kind in DEFAULTS]
        commands.append({"command": "setDefaultACLAccess", "acls": acls})
    stale = {name for name in found.odd if name in want.clients} | (set(found.clients) - set(want.clients))
    commands += [{"command": "deleteClient", "username": name} for name in sorted(stale)]
    commands += [
        {"command": "deleteRole", "rolename": name} for name in sorted(set(found.roles) - set(want.roles))
    ]
    for name, role in want.roles.items():
        if name not in found.roles:
            commands.append({"command": "createRole", "rolename": name, "acls": _acls(role)})
        elif found.roles[name] != role or name in found.odd:
            commands.append({"command": "modifyRole", "rolename": name, "acls": _acls(role)})
    for name, roles in want.clients.items():
        if name in stale or name not in found.clients:
            commands.append({"command": "createClient", "username": name, "roles": _roles(roles)})
        elif found.clients[name] != roles:
            commands.append({"command": "modifyClient", "username": name, "roles": _roles(roles)})
    return tuple(commands)


def send_away(devices: Iterable[str]) -> tuple[Command, ...]:
    """The commands that end the connections of devices, which may come back: they get the roles they have."""
    return tuple(
        {"command": "modifyClient", "username": name, "roles": _roles({DEVICE_ROLE, own_role(name)})}
        for name in sorted(devices)
    )


def document(access: Access) -> bytes:
    """The file that the plugin reads when the broker starts."""
    content = {
        "defaultACLAccess": {kind: kind in access.allowed_by_default for kind in DEFAULTS},
        "clients": [
            {"username": name, "roles": _roles(roles), "groups": []} for name, roles in access.clients.items()
        ],
        "groups": [],
        "roles": [{"rolename": name, "acls": _acls(role)} for name, role in access.roles.items()],
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def found(
    clients: Iterable[Mapping[str, Any]],
    roles: Iterable[Mapping[str, Any]],
    defaults: Iterable[Mapping[str, Any]],
) -> Access:
    """What a broker has, from its answers.

    Args:
        clients: of `listClients`, verbose.
        roles: of `listRoles`, verbose.
        defaults: of `getDefaultACLAccess`.

    Raises:
        KeyError, TypeError, AttributeError: they are not what the plugin answers.
    """
    odd: set[str] = set()
    known_roles: dict[str, Role] = {}
    for role in roles:
        rules = set()
        for acl in role["acls"]:
            if acl["allow"] and acl["acltype"] in list(Kind):
                rules.add(Rule(Kind(acl["acltype"]), str(acl["topic"])))
            else:
                odd.add(str(role["rolename"]))
        known_roles[str(role["rolename"])] = frozenset(rules)
    known_clients: dict[str, frozenset[str]] = {}
    for client in clients:
        if client.get("disabled") or client.get("groups") or client.get("clientid"):
            odd.add(str(client["username"]))
        known_clients[str(client["username"])] = frozenset(str(role["rolename"]) for role in client["roles"])
    allowed = frozenset(str(each["acltype"]) for each in defaults if each["allow"])
    return Access(known_roles, known_clients, allowed, frozenset(odd))


def _acls(role: Role) -> list[dict[str, Any]]:
    return [
        {"acltype": rule.kind.value, "topic": rule.topic, "priority": 0, "allow": True}
        for rule in sorted(role)
    ]


def _roles(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"rolename": name} for name in sorted(names)]
