"""setup.sh in a root of its own: what it leaves, and that a power cut before any step costs nothing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.flash.payload import SETUP, Client, payload
from protocol.enrolment import EnrolmentTicket

STUBBED = ("systemctl", "useradd", "chown", "id", "setpriv", "sync")
"""What would change this machine; the rest of setup.sh's programs are the real ones."""
REAL = (
    "basename", "chmod", "cp", "dirname", "grep", "ln", "mkdir", "mv", "readlink", "rm", "sha256sum", "shred",
    "tar",
)  # fmt: skip
COMPILE = """\
#!/bin/sh
for last; do :; done
echo compiled >"$last-bytecode"
"""
EDGE = """\
#!/bin/sh
[ "$1" = --help ] && exit 0
state=$3
case "$1" in
init) echo request-of-$5 > "$state/device.csr" ;;
enroll)
    ticket=$(cat)
    case $ticket in
    */away#*) echo "nobody answers" >&2; exit 1 ;;
    */used#*) echo request-of-used > "$state/device.csr"; echo "the ticket is used up" >&2; exit 6 ;;
    esac
    echo bundle > "$state/.enrolment" && mv "$state/.enrolment" "$state/enrolment.json"
    echo enrolled >> "$state/enrolments" ;;
esac
"""


@dataclass(frozen=True)
class Root:
    """A device's file system, and the boot partition that it was given."""

    folder: Path

    @property
    def boot(self) -> Path:
        return self.folder / "boot/covey"

    @property
    def state(self) -> Path:
        return self.folder / "var/lib/covey"

    @property
    def opt(self) -> Path:
        return self.folder / "opt/covey"

    def calls(self) -> str:
        log = self.folder / "calls"
        return log.read_text() if log.exists() else ""

    def setup(self, kill_before: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs setup.sh; SIGKILL ends it before its N-th program runs."""
        (self.folder / "count").write_text("")
        return subprocess.run(
            ["sh", self.boot / "setup.sh"],
            env={
                "PATH": f"{self.folder}/programs:/usr/bin:/bin:/usr/sbin",
                "COVEY_ROOT": str(self.folder),
                "KILL_BEFORE": str(kill_before),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def steps(self) -> int:
        return len((self.folder / "count").read_text())


def bundle(folder: Path, version: str = "0.1.0", codename: str = "bookworm") -> Path:
    path = folder / f"covey-{version}-{codename}-arm64.tar.xz"
    tree = folder / f"tree-{version}"
    for name, text in {
        "bin/covey-edge": EDGE,
        "bin/covey-compile": COMPILE,
        "systemd/covey-edge.service": "[Unit]\n",
        "bundle.json": "{}",
    }.items():
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    with tarfile.open(path, "w:xz") as archive:
        archive.add(tree, arcname=".")
    return path


def ticket(name: str = "barn-1") -> EnrolmentTicket:
    return EnrolmentTicket(
        url="https://hub.example", name=name, token=f"{'0' * 12}_{'1' * 64}", trust_sha256="2" * 64
    )


def device(folder: Path, archive: Path, ticket: EnrolmentTicket | None) -> Root:
    root = Root(folder)
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/os-release").write_text("ID=debian\nVERSION_CODENAME=bookworm\n")
    files = payload(Client((archive,), "mqtts://hub.example"), "barn-1", ticket)
    for name, content in files.items():
        path = folder / "boot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    programs = folder / "programs"
    programs.mkdir()
    count = folder / "count"
    gate = f'#!/bin/sh\nprintf . >> "{count}"\n'
    gate += f'[ "$(wc -c < "{count}")" = "$KILL_BEFORE" ] && kill -9 $PPID && exit 1\n'
    for name in REAL:
        (programs / name).write_text(f'{gate}exec {shutil.which(name)} "$@"\n')
    for name in STUBBED:
        (programs / name).write_text(f'{gate}echo "{name} $*" >> "{folder}/calls"\n')
    # What runs as the client's own user runs as the user of this test.
    (programs / "setpriv").write_text(f'{gate}shift 3\nexec "$@"\n')
    for path in programs.iterdir():
        path.chmod(0o755)
    return root


def assert_set_up(root: Root, archive: Path) -> None:
    for link in ("current", "good"):
        assert (root.opt / link).readlink() == Path("versions/0.1.0")
    assert [path.name for path in (root.opt / "versions").iterdir()] == ["0.1.0"]
    assert (root.opt / "current/bin/covey-edge").read_text() == EDGE
    assert (root.opt / "current/site-bytecode").read_text() == "compiled\n"
    assert (root.folder / "etc/systemd/system/covey-edge.service").read_text() == "[Unit]\n"
    assert "COVEY_BROKER=mqtts://hub.example:8883" in (root.folder / "etc/covey/edge.env").read_text()
    assert (root.state / "enrolment.json").read_text() == "bundle\n"
    assert "systemctl enable --quiet covey-edge.service covey-update" in root.calls()
    assert list(root.boot.iterdir()) == [], "the card keeps no ticket, and nothing that runs again"


def test_a_first_boot_installs_enrols_and_takes_the_ticket_away(tmp_path: Path) -> None:
    archive = bundle(tmp_path)
    root = device(tmp_path / "root", archive, ticket())
    done = root.setup()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_set_up(root, archive)
    assert "systemctl restart --no-block covey-edge.service" in root.calls()
    assert (root.folder / "etc/covey/enrolment.json").read_text() == "bundle\n"


@pytest.mark.chaos
def test_a_power_cut_before_any_step_leaves_a_device_that_goes_on(tmp_path: Path) -> None:
    archive = bundle(tmp_path)
    probe = device(tmp_path / "probe", archive, ticket())
    assert probe.setup().returncode == 0
    steps = probe.steps()
    assert steps > 30
    for step in range(1, steps + 1):
        root = device(tmp_path / f"root-{step}", archive, ticket())
        cut = root.setup(kill_before=step)
        if cut.returncode == 0:
            # The process that died was a subshell's, whose failure the script allows for.
            assert not (root.boot / "setup.sh").exists()
        elif (root.boot / "setup.sh").exists():
            again = root.setup()
            assert again.returncode == 0, (step, again.stdout, again.stderr)
        assert_set_up(root, archive)
        shutil.rmtree(root.folder)


def test_without_a_ticket_it_waits_with_a_request_of_its_own(tmp_path: Path) -> None:
    root = device(tmp_path / "root", bundle(tmp_path), ticket=None)
    done = root.setup()
    assert done.returncode == 0, done.stderr
    assert (root.state / "device.csr").read_text() == "request-of-barn-1\n"
    assert "waiting to be enrolled: covey flash --ssh" in done.stdout
    assert "restart" not in root.calls()


def test_a_ticket_that_does_not_work_stays_and_is_tried_again(tmp_path: Path) -> None:
    root = device(tmp_path / "root", bundle(tmp_path), ticket("away"))
    done = root.setup()
    assert done.returncode == 1 and "nobody answers" in done.stderr
    assert (root.boot / "enrolment.ticket").exists() and (root.boot / "setup.sh").exists()
    (root.boot / "enrolment.ticket").write_text(ticket().to_text())
    assert root.setup().returncode == 0
    assert (root.state / "enrolment.json").exists()


def test_a_ticket_that_lets_nobody_in_gives_way_to_the_operator(tmp_path: Path) -> None:
    root = device(tmp_path / "root", bundle(tmp_path), ticket("used"))
    done = root.setup()
    assert done.returncode == 0, done.stderr
    assert "the ticket was refused; make another one" in done.stdout
    assert not (root.boot / "enrolment.ticket").exists() and "restart" not in root.calls()
    assert (root.state / "device.csr").exists()


def test_a_damaged_bundle_is_not_unpacked(tmp_path: Path) -> None:
    archive = bundle(tmp_path)
    root = device(tmp_path / "root", archive, ticket())
    content = bytearray((root.boot / archive.name).read_bytes())
    content[len(content) // 2] ^= 1
    (root.boot / archive.name).write_bytes(content)
    done = root.setup()
    assert done.returncode != 0 and "damaged" in done.stderr
    assert not (root.opt / "current").exists()


def test_a_client_that_does_not_run_here_is_not_made_current(tmp_path: Path) -> None:
    archive = bundle(tmp_path)
    with tarfile.open(archive, "w:xz") as changed:
        (tmp_path / "tree-0.1.0/bin/covey-edge").write_text("#!/bin/sh\nexit 1\n")
        changed.add(tmp_path / "tree-0.1.0", arcname=".")
    root = device(tmp_path / "root", archive, ticket())
    done = root.setup()
    assert done.returncode != 0 and "does not run here" in done.stderr
    assert not (root.opt / "current").exists() and not (root.opt / "versions/0.1.0").exists()


def test_a_card_for_another_system_says_which_bundle_it_needs(tmp_path: Path) -> None:
    root = device(tmp_path / "root", bundle(tmp_path, codename="trixie"), ticket())
    done = root.setup()
    assert done.returncode != 0 and "bookworm-arm64.tar.xz" in done.stderr


def test_root_does_not_follow_a_link_of_the_clients(tmp_path: Path) -> None:
    """The state directory is the client's: its enrolment may be a link to what only root may read."""
    root = device(tmp_path / "root", bundle(tmp_path), ticket())
    (tmp_path / "shadow").write_text("root's secret\n")
    root.state.mkdir(parents=True)
    (root.state / "enrolment.json").symlink_to(tmp_path / "shadow")
    # The client's user may not read what the link leads to.
    (root.folder / "programs/setpriv").write_text(
        '#!/bin/sh\nshift 3\nfor last; do :; done\n[ -L "$last" ] && exit 1\nexec "$@"\n'
    )
    done = root.setup()
    copy = root.folder / "etc/covey/enrolment.json"
    assert done.returncode != 0 and not copy.exists()
    assert "secret" not in "".join(path.read_text() for path in copy.parent.iterdir())


def test_an_old_card_does_not_take_an_update_back(tmp_path: Path) -> None:
    root = device(tmp_path / "root", bundle(tmp_path), ticket())
    assert root.setup().returncode == 0
    newer = root.opt / "versions/0.2.0"
    shutil.copytree(root.opt / "versions/0.1.0", newer)
    (root.opt / "next").symlink_to("versions/0.2.0")
    (root.opt / "next").rename(root.opt / "current")
    shutil.copy(SETUP, root.boot)
    for name, content in payload(Client((bundle(tmp_path),), "mqtts://hub.example"), "barn-1", None).items():
        (root.folder / "boot" / name).write_bytes(content)
    assert root.setup().returncode == 0
    assert (root.opt / "current").readlink() == Path("versions/0.2.0")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_the_unit_is_hardened() -> None:
    unit = SETUP.parents[1] / "systemd/covey-edge.service"
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", unit], capture_output=True, text=True, check=False
    ).stdout
    level = float(shown.rsplit("Overall exposure level", 1)[1].split(":")[1].split()[0])
    assert level <= 1.5, shown


def test_digests_on_the_card_are_those_of_its_bundles(tmp_path: Path) -> None:
    archive = bundle(tmp_path)
    line = payload(Client((archive,), None), "a", ticket("a"))["covey/bundles.sha256"].decode()
    assert line == f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n"
