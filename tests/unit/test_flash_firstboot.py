"""What lies on a boot partition, read by those who read it on a device: YAML, TOML and the shell."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from deploy.flash.firstboot import (
    Mechanism,
    Provision,
    ProvisionError,
    Wifi,
    boot_files,
    choose_mechanism,
    wpa_key,
)

yaml = pytest.importorskip("yaml")

KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8 it\'s "me" $(touch /tmp/no)'
INSTANCE = "6e3b2c8e-4a43-4a8d-bb4f-5d4a6f8f3a11"
CMDLINE = "console=tty1 root=PARTUUID=c0fe7001-02 rootwait\n"
SSID = 'Bob\'s "barn": \\ no$HOME'
WIFI = Wifi.parse(f"{SSID}:se", "correct horse")
PROVISION = Provision("barn-1", INSTANCE, "admin", (KEY,), WIFI)


def test_the_wireless_key_is_the_standards_own_and_the_passphrase_is_nowhere() -> None:
    # IEEE 802.11i-2004, H.4.3, test vectors 1 and 2.
    assert wpa_key("IEEE", "password") == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert (
        wpa_key("ThisIsASSID", "ThisIsAPassword")
        == "0dc0d6eb90555ed6419756b9a15ec3e3209b63df707dd508d14581f8982721af"
    )
    for mechanism in Mechanism:
        written = b"".join(boot_files(mechanism, PROVISION, CMDLINE).values())
        assert b"correct horse" not in written
    assert WIFI.key is not None and WIFI.key not in repr(PROVISION)


def test_what_the_partition_holds_chooses_the_mechanism() -> None:
    assert choose_mechanism({"config.txt", "cmdline.txt", "user-data", "meta-data"}) is Mechanism.CLOUD_INIT
    assert choose_mechanism({"CONFIG.TXT", "cmdline.txt", "issue.txt"}) is Mechanism.FIRSTRUN
    assert choose_mechanism({"config.txt", "cmdline.txt", "rpi-preseed.toml"}) is Mechanism.PRESEED
    with pytest.raises(ProvisionError, match="--mechanism"):
        choose_mechanism({"EFI"})


def test_cloud_init_reads_back_what_was_meant() -> None:
    files = boot_files(Mechanism.CLOUD_INIT, PROVISION, CMDLINE)
    assert files["user-data"].startswith(b"#cloud-config\n")
    user = yaml.safe_load(files["user-data"])
    assert user["hostname"] == "barn-1"
    assert user["user"]["ssh_authorized_keys"] == [KEY]
    assert user["user"]["lock_passwd"] is True and user["ssh_pwauth"] is False
    network = yaml.safe_load(files["network-config"])
    radio = network["wifis"]["wlan0"]
    assert radio["access-points"] == {SSID: {"password": WIFI.key}}
    assert radio["regulatory-domain"] == "SE"
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": INSTANCE}
    assert files["cmdline.txt"].decode() == f"{CMDLINE.strip()} ds=nocloud;i={INSTANCE}\n"


def test_the_only_interface_is_never_optional() -> None:
    cable = yaml.safe_load(
        boot_files(Mechanism.CLOUD_INIT, Provision("a", INSTANCE), CMDLINE)["network-config"]
    )
    assert "optional" not in cable["ethernets"]["wired"] and "wifis" not in cable
    both = yaml.safe_load(boot_files(Mechanism.CLOUD_INIT, PROVISION, CMDLINE)["network-config"])
    assert both["ethernets"]["wired"]["optional"] is True
    assert "optional" not in both["wifis"]["wlan0"]


def test_preseed_reads_back_what_was_meant() -> None:
    files = boot_files(Mechanism.PRESEED, PROVISION, CMDLINE)
    config = tomllib.loads(files["rpi-preseed.toml"].decode())
    assert config["config_version"] == "1.0"
    assert config["system"] == {"hostname": "barn-1"}
    assert config["ssh"]["authorized_keys"] == [KEY]
    assert config["wlan"] == {
        "ssid": SSID, "password": WIFI.key, "password_encrypted": True, "hidden": False, "country": "SE",
    }  # fmt: skip
    assert b"systemd.run=/boot/firmware/covey-run.sh" in files["cmdline.txt"]


@pytest.mark.parametrize("mechanism", Mechanism)
def test_provisioning_again_replaces_what_was_there(mechanism: Mechanism) -> None:
    once = boot_files(mechanism, PROVISION, CMDLINE)
    for first in Mechanism:
        before = boot_files(first, PROVISION, CMDLINE)["cmdline.txt"].decode()
        assert boot_files(mechanism, PROVISION, before)["cmdline.txt"] == once["cmdline.txt"]
    assert once["cmdline.txt"].count(b"\n") == 1


def test_a_script_configures_a_system_and_takes_itself_away(tmp_path: Path) -> None:
    """The whole of firstrun.sh in a root of its own, with the programs that it calls replaced by a log."""
    log = run_firstrun(tmp_path, boot_files(Mechanism.FIRSTRUN, PROVISION, CMDLINE))
    assert (tmp_path / "etc/hostname").read_text() == "barn-1\n"
    assert (tmp_path / "home/admin/.ssh/authorized_keys").read_text() == f"{KEY}\n"
    profile = (tmp_path / "etc/NetworkManager/system-connections/covey.nmconnection").read_text()
    octets = ";".join(str(byte) for byte in SSID.encode()) + ";"
    assert f"ssid={octets}\n" in profile and f"psk={WIFI.key}\n" in profile
    assert "ExecStart=/bin/sh" in (tmp_path / "etc/systemd/system/covey-setup.service").read_text()
    assert "systemctl enable covey-setup.service" in log
    assert (tmp_path / "boot/firmware/cmdline.txt").read_text() == CMDLINE
    assert not (tmp_path / "boot/firmware/firstrun.sh").exists()


def run_firstrun(root: Path, files: object) -> str:
    assert isinstance(files, dict)
    for folder in ("etc/systemd/system", "boot/firmware", "home/admin", "programs", "etc/sudoers.d"):
        (root / folder).mkdir(parents=True)
    (root / "etc/hosts").write_text("127.0.1.1 raspberrypi\n")
    for name, content in files.items():
        (root / "boot/firmware" / name).write_bytes(content)
    for name in ("systemctl", "raspi-config", "usermod", "groupmod", "chown", "sync"):
        program = root / "programs" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {root}/log\n')
        program.chmod(0o755)
    getent = root / "programs/getent"
    getent.write_text(f"#!/bin/sh\necho admin:x:1000:1000::{root}/home/admin:/bin/bash\n")
    getent.chmod(0o755)
    text = (root / "boot/firmware/firstrun.sh").read_text()
    for folder in ("/etc/", "/boot/", "/var/lib/"):
        text = text.replace(f" {folder}", f" {root}{folder}").replace(f"={folder}", f"={root}{folder}")
    script = root / "script.sh"
    script.write_text(text)
    done = subprocess.run(
        ["sh", script],
        env={"PATH": f"{root}/programs:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (root / "log").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"hostname": "Barn"},
        {"hostname": "barn;reboot"},
        {"hostname": "a" * 64},
        {"hostname": "barn-"},
        {"user": "root"},
        {"user": "a b"},
        {"ssh_keys": ("-----BEGIN OPENSSH PRIVATE KEY-----",)},
        {"ssh_keys": ("ssh-ed25519 AAAA me\nssh-rsa BBBB you",)},
    ],
)
def test_what_would_mean_something_else_in_a_script_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProvisionError):
        Provision(**{"hostname": "barn-1", "instance": INSTANCE, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "password"),
    [("x" * 33, None), ("", None), ("a\nb", None), ("barn", "short"), ("barn", "x" * 64)],
)
def test_networks_that_cannot_be_are_refused(text: str, password: str | None) -> None:
    with pytest.raises(ProvisionError):
        Wifi.parse(text, password)


def test_a_colon_may_be_part_of_a_name() -> None:
    assert Wifi.parse("a:b:SE", None) == Wifi("a:b", None, "SE")
    assert Wifi.parse("a:bcd", None) == Wifi("a:bcd", None, None)
