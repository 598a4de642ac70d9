"""What a boot partition must hold so that a device sets itself up: one function for each mechanism. Pure.

Three are in use (raspberrypi/rpi-imager `doc/os_customisation_formats.md`): cloud-init (Raspberry Pi OS
Trixie, Debian, Ubuntu), `firstrun.sh` (Raspberry Pi OS Bookworm) and `rpi-preseed.toml`. Each configures
network, name and access, and leaves Covey's own part to one systemd unit, which runs `covey/setup.sh` from
the partition at every boot until it has done its work. So a power cut during the first boot costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

FOLDER = "covey"
"""Covey's own folder on the boot partition."""
MOUNT = "/boot/firmware"
"""Where the boot partition is on the running device, in Bookworm and later."""
SETUP_UNIT = "covey-setup.service"
_UNIT = f"""\
[Unit]
Description=Set up Covey from the boot partition
RequiresMountsFor={MOUNT}
ConditionPathExists={MOUNT}/{FOLDER}/setup.sh
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStart=/bin/sh {MOUNT}/{FOLDER}/setup.sh
Restart=on-failure
RestartSec=30
StandardOutput=journal+console

[Install]
WantedBy=multi-user.target
"""
# Renamed when it is whole: after a power cut there is either the unit or none.
INSTALL_UNIT = f"""\
unit=/etc/systemd/system/{SETUP_UNIT}
if [ ! -s "$unit" ]; then
    printf %s {shlex.quote(_UNIT)} > "$unit.new" && sync && mv "$unit.new" "$unit" && sync
    systemctl enable {SETUP_UNIT}
fi
"""
_START_UNIT = f"systemctl daemon-reload; systemctl start --no-block {SETUP_UNIT}\n"
_RUN = "systemd.run"
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_SSH_KEY = re.compile(
    r"(ssh-[a-z0-9-]+|ecdsa-[a-z0-9-]+|sk-[a-z0-9@.-]+) [A-Za-z0-9+/=]+( [^\x00-\x1f\x7f]*)?"
)
_CUSTOM = "/usr/lib/raspberrypi-sys-mods/imager_custom"


class ProvisionError(ValueError):
    """A device cannot be set up like this; the message says what to do."""


class Mechanism(StrEnum):
    """Who sets a device up at its first boot."""

    CLOUD_INIT = "cloud-init"
    FIRSTRUN = "firstrun"
    PRESEED = "preseed"


@dataclass(frozen=True)
class Wifi:
    """A wireless network.

    Attributes:
        ssid: its name, 1 to 32 bytes of UTF-8.
        key: the WPA pre-shared key of 64 hexadecimal digits; None for an open network.
        country: ISO 3166-1 code, which decides what channels may be used.
    """

    ssid: str
    key: str | None = field(default=None, repr=False)
    country: str | None = None

    @classmethod
    def parse(cls, text: str, password: str | None) -> Wifi:
        """Reads `SSID` or `SSID:COUNTRY`; the passphrase itself does not get onto the card.

        Raises:
            ProvisionError: a part is not possible.
        """
        name, colon, country = text.rpartition(":")
        if not (colon and re.fullmatch(r"[A-Za-z]{2}", country)):
            name, country = text, ""
        if not 1 <= len(name.encode()) <= 32 or any(ord(letter) < 32 for letter in name):
            raise ProvisionError("the name of a wireless network has 1 to 32 bytes")
        if password and not 8 <= len(password.encode()) <= 63:
            raise ProvisionError("the password of a wireless network has 8 to 63 characters")
        return cls(name, wpa_key(name, password) if password else None, country.upper() or None)


@dataclass(frozen=True)
class Provision:
    """What one device gets.

    Attributes:
        hostname: its name in the network.
        instance: a new random identifier of this card: cloud-init sets a device up once for each.
        user: the account that SSH keys are for.
        ssh_keys: public keys, each a line of an `authorized_keys` file; without any, nobody can log in.
        wifi: its wireless network; None when it has a cable.
    """

    hostname: str
    instance: str
    user: str = "covey"
    ssh_keys: tuple[str, ...] = ()
    wifi: Wifi | None = None

    def __post_init__(self) -> None:
        """Refuses what would end up as something else in a script.

        Raises:
            ProvisionError: it names the part.
        """
        if not _HOSTNAME.fullmatch(self.hostname):
            raise ProvisionError(
                f"{self.hostname!r} is no host name: lower case letters, digits and hyphens, at most 63"
            )
        if not _USER.fullmatch(self.user) or self.user == "root":
            raise ProvisionError(f"{self.user!r} is no user name")
        for key in self.ssh_keys:
            if not _SSH_KEY.fullmatch(key):
                raise ProvisionError("that is no public SSH key: give the file that ends in .pub")


def wpa_key(ssid: str, password: str) -> str:
    """The pre-shared key of a passphrase (IEEE 802.11i-2004, H.4): PBKDF2-HMAC-SHA1, 4096 rounds."""
    return hashlib.pbkdf2_hmac("sha1", password.encode(), ssid.encode(), 4096, 32).hex()


def choose_mechanism(names: Collection[str]) -> Mechanism:
    """The mechanism of an image, by the file names at the top of its boot partition.

    Raises:
        ProvisionError: it has none that is known.
    """
    lower = {name.lower() for name in names}
    if any(name.startswith("rpi-preseed") for name in lower):
        return Mechanism.PRESEED
    if lower & {"user-data", "meta-data"}:
        return Mechanism.CLOUD_INIT
    if {"cmdline.txt", "config.txt"} <= lower:
        return Mechanism.FIRSTRUN
    raise ProvisionError(
        "the boot partition has neither user-data (cloud-init), rpi-preseed.toml, nor cmdline.txt with "
        "config.txt: is this an image for a Raspberry Pi? --mechanism names one in spite of that"
    )


def boot_files(mechanism: Mechanism, provision: Provision, cmdline: str) -> Mapping[str, bytes]:
    """The files at the top of the boot partition, by name.

    Args:
        mechanism: whose files.
        provision: what the device gets.
        cmdline: what cmdline.txt holds now; doing it again replaces what was appended before.
    """
    words = [w for w in cmdline.split() if not w.startswith(("ds=nocloud", f"{_RUN}", "systemd.unit=kernel"))]
    match mechanism:
        case Mechanism.CLOUD_INIT:
            files = _cloud_init(provision)
            words.append(f"ds=nocloud;i={provision.instance}")
        case Mechanism.FIRSTRUN:
            files = {"firstrun.sh": _firstrun(provision, configure=True)}
            words += _run_once("firstrun.sh")
        case Mechanism.PRESEED:
            # It has no place for a command, so the unit comes by systemd's own, as with firstrun.sh.
            files = {
                "rpi-preseed.toml": _preseed(provision),
                "covey-run.sh": _firstrun(provision, configure=False),
            }
            words += _run_once("covey-run.sh")
    return {name: text.encode() for name, text in files.items()} | {
        "cmdline.txt": (" ".join(words) + "\n").encode()
    }


def _run_once(name: str) -> list[str]:
    return [
        f"{_RUN}={MOUNT}/{name}",
        f"{_RUN}_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
    ]


def _cloud_init(provision: Provision) -> dict[str, str]:
    # JSON is YAML: nothing that a user types can mean something else.
    user: dict[str, object] = {
        "hostname": provision.hostname,
        "manage_etc_hosts": True,
        "ssh_pwauth": False,
        # At every boot, where runcmd and write_files run once and forget what a power cut interrupted.
        "bootcmd": [["sh", "-c", INSTALL_UNIT + _START_UNIT]],
    }
    if provision.ssh_keys:
        # In place of `users`: it extends the system's own first account, with its groups.
        user["user"] = {
            "name": provision.user,
            "shell": "/bin/bash",
            "lock_passwd": True,
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "ssh_authorized_keys": list(provision.ssh_keys),
        }
        user["runcmd"] = [["systemctl", "enable", "--now", "ssh"]]
    # An optional interface is not waited for: right beside another, but alone it stalls the boot.
    wired: dict[str, object] = {"match": {"name": "e*"}, "dhcp4": True}
    network: dict[str, object] = {"version": 2, "ethernets": {"wired": wired}}
    if provision.wifi is not None:
        wired["optional"] = True
        access: dict[str, object] = (
            {"auth": {"key-management": "none"}}
            if provision.wifi.key is None
            else {"password": provision.wifi.key}
        )
        radio: dict[str, object] = {"dhcp4": True, "access-points": {provision.wifi.ssid: access}}
        if provision.wifi.country:
            radio["regulatory-domain"] = provision.wifi.country
        network["wifis"] = {"wlan0": radio}
    return {
        "user-data": f"#cloud-config\n{json.dumps(user, indent=1)}\n",
        "meta-data": json.dumps({"instance-id": provision.instance}) + "\n",
        "network-config": json.dumps(network, indent=1) + "\n",
    }


def _firstrun(provision: Provision, *, configure: bool) -> str:
    name = "firstrun.sh" if configure else "covey-run.sh"
    lines = ["#!/bin/sh", "# Runs once, before anything else; systemd reboots when it succeeds.", "set -u"]
    if configure:
        lines += _configure(provision)
    lines += [
        INSTALL_UNIT.rstrip(),
        # Last: a power cut before this line runs everything again.
        f"sed -i 's| {_RUN}[^ ]*||g; s| systemd.unit=kernel[^ ]*||g' {MOUNT}/cmdline.txt",
        "sync",
        f"rm -f {MOUNT}/{name}",
        "exit 0",
    ]
    return "\n".join(lines) + "\n"


def _configure(provision: Provision) -> list[str]:
    host, user = provision.hostname, provision.user
    lines = [
        f"custom={_CUSTOM}",
        'if [ -x "$custom" ]; then',
        f'    "$custom" set_hostname {host}',
        "else",
        f"    echo {host} > /etc/hostname",
        f"    sed -i 's/^127\\.0\\.1\\.1.*/127.0.1.1 {host}/' /etc/hosts",
        "fi",
    ]
    if provision.ssh_keys:
        keys = " ".join(shlex.quote(key) for key in provision.ssh_keys)
        lines += [
            # The system's first account gets this name; without one, it is made.
            "first=$(getent passwd 1000 | cut -d: -f1)",
            f'if [ -z "$first" ]; then useradd -m -s /bin/bash {user}',
            f'elif [ "$first" != {user} ]; then',
            f'    usermod -l {user} "$first" && groupmod -n {user} "$first"',
            f"    usermod -m -d /home/{user} {user}",
            "fi",
            f"usermod -p '*' {user}",
            f"home=$(getent passwd {user} | cut -d: -f6)",
            f'install -d -m 700 "$home/.ssh" && printf "%s\\n" {keys} > "$home/.ssh/authorized_keys"',
            f'chmod 600 "$home/.ssh/authorized_keys" && chown -R {user}: "$home/.ssh"',
            f"echo '{user} ALL=(ALL) NOPASSWD:ALL' > /etc/sudoers.d/010_covey",
            "chmod 440 /etc/sudoers.d/010_covey",
            "mkdir -p /etc/ssh/sshd_config.d",
            "echo 'PasswordAuthentication no' > /etc/ssh/sshd_config.d/covey.conf",
            "systemctl enable ssh",
            # Otherwise Raspberry Pi OS waits at a screen for somebody to name the first account.
            "systemctl disable userconfig 2>/dev/null",
        ]
    if provision.wifi is not None:
        lines += _network_manager(provision.wifi, provision.instance)
    return lines


def _network_manager(wifi: Wifi, instance: str) -> list[str]:
    octets = ";".join(str(byte) for byte in wifi.ssid.encode()) + ";"
    security = "" if wifi.key is None else f"\n[wifi-security]\nkey-mgmt=wpa-psk\npsk={wifi.key}\n"
    profile = (
        f"[connection]\nid=covey\nuuid={instance}\ntype=wifi\n\n[wifi]\nmode=infrastructure\nssid={octets}\n"
        f"{security}\n[ipv4]\nmethod=auto\n\n[ipv6]\nmethod=auto\n"
    )
    path = "/etc/NetworkManager/system-connections/covey.nmconnection"
    lines = [
        "mkdir -p /etc/NetworkManager/system-connections",
        f"(umask 077; printf %s {shlex.quote(profile)} > {path})",
        "for block in /var/lib/systemd/rfkill/*:wlan; do",
        '    if [ -e "$block" ]; then echo 0 > "$block"; fi',
        "done",
    ]
    if wifi.country:
        lines.append(f"raspi-config nonint do_wifi_country {wifi.country} 2>/dev/null")
    return lines


def _preseed(provision: Provision) -> str:
    lines = ['config_version = "1.0"', "", "[system]", f"hostname = {_toml(provision.hostname)}"]
    if provision.ssh_keys:
        lines += [
            "",
            "[user]",
            f"name = {_toml(provision.user)}",
            'groups = ["sudo"]',
            "passwordless_sudo = true",
            "",
            "[ssh]",
            "enabled = true",
            "password_authentication = false",
            "authorized_keys = [",
            *(f"  {_toml(key)}," for key in provision.ssh_keys),
            "]",
        ]
    if provision.wifi is not None:
        lines += ["", "[wlan]", f"ssid = {_toml(provision.wifi.ssid)}"]
        if provision.wifi.key is not None:
            lines += [f"password = {_toml(provision.wifi.key)}", "password_encrypted = true"]
        lines.append("hidden = false")
        if provision.wifi.country:
            lines.append(f"country = {_toml(provision.wifi.country)}")
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    # Control characters were refused before; these two are all that a basic string must escape.
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
