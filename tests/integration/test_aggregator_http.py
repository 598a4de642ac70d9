"""The API on a real socket: TLS, large uploads, live events, and the commands that go through it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")

from aggregator import cli
from aggregator import main as covey
from aggregator.access.roles import Role
from aggregator.adapters import keyfiles
from aggregator.client import ApiError, Client, Unreachable
from aggregator.fleet import server_certificate
from aggregator.state import StateDirectory, lock
from aggregator.web.context import Vitals
from aggregator.web.listen import CannotListen, ListenAddress
from aggregator.web.local import LocalEndpoint
from aggregator.web.server import ApiServer
from aggregator.web.serving import serving
from protocol.errors import BadSignature
from protocol.identity import verify_certificate
from tests.aggregator_devices import model_files
from tests.aggregator_process import ServiceProcess
from tests.api_bench import Api, api, csr
from tests.edge_broker import wait_for

NOBODY_LISTENS = "mqtt://127.0.0.1:1"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        yield found


@pytest.fixture
def server(bench: Api) -> Iterator[ApiServer]:
    with ApiServer(bench.app, ListenAddress.parse("127.0.0.1:0")) as found:
        yield found


def test_an_upload_of_two_gigabytes_is_refused_before_it_is_sent(bench: Api, server: ApiServer) -> None:
    head = (
        "POST /api/v1/versions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Authorization: Bearer {bench.tokens[Role.OPERATOR]}\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(f"{head}Content-Length: {2 * 2**30}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(65536).splitlines()[0]
    # The same without saying so: chunk after chunk, until the service has had enough.
    sent = 0
    part = b"10000\r\n" + bytes(2**16) + b"\r\n"
    begin = b'--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        answer = b""
        connection.setblocking(False)
        rest = b"%x\r\n%s\r\n" % (len(begin), begin)
        while not answer and sent < 2 * 2**30:
            readable, _, _ = select.select([connection], [connection], [], 60)
            if readable:
                answer = connection.recv(65536)
                break
            with contextlib.suppress(BlockingIOError, ConnectionError):  # what it said can still be read
                rest = rest or part
                count = connection.send(rest)
                rest, sent = rest[count:], sent + count
    assert sent < 300 * 2**20
    assert b" 413 " in answer.splitlines()[0]
    with Client(server.url, bench.tokens[Role.OPERATOR]) as client:
        assert client.versions() == ()


def test_events_arrive_live_and_resume(bench: Api, server: ApiServer) -> None:
    heard = []

    def listen() -> None:
        with Client(server.url, bench.tokens[Role.VIEWER]) as client:
            for event in client.events():
                heard.append(event)
                if event.data.get("device") == "barn-2":
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    with Client(server.url, bench.tokens[Role.OPERATOR]) as client:
        deadline = time.monotonic() + 120
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        for name in ("barn-1", "barn-2"):
            client.enrol(csr(name))
        thread.join(60)
        assert [(e.kind, e.data.get("device")) for e in heard] == [
            ("hello", None),
            ("device", "barn-1"),
            ("device", "barn-2"),
        ]
        resumed = client.events(after=heard[1].event_id)
        assert [next(resumed).kind, next(resumed).data["device"]] == ["hello", "barn-2"]
        assert next(client.events(after="before-1")).kind == "reset"
    with Client(server.url, "covey_nonsense") as stranger, pytest.raises(ApiError, match="not a token"):
        next(stranger.events())


def test_beyond_loopback_there_is_tls_from_the_fleets_ca(bench: Api, tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="unencrypted"):
        ListenAddress.parse("http://0.0.0.0:0")
    assert ListenAddress.parse("0.0.0.0:8443").tls and ListenAddress.parse("[::]:8443").tls
    assert not ListenAddress.parse("localhost:8443").tls
    for bad in ("8443", "host:", "ftp://127.0.0.1:1", "127.0.0.1:99999", ":1"):
        with pytest.raises(CannotListen):
            ListenAddress.parse(bad)
    operator, directory = bench.context.operator, tmp_path / "api"
    ca = ssl.DER_cert_to_PEM_cert(operator.authority.ca)
    # The bench lives in another year; certificates are for this one.
    bench.clock.now = time.time() - bench.clock.moment().unix

    def serve(names: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
        return serving(
            directory,
            operator,
            lambda: keyfiles.load(tmp_path / "keys"),
            bench.context.feed,
            ListenAddress.parse("https://127.0.0.1:0"),
            vitals=lambda: Vitals(broker=True, loop=True),
            names=names,
        )

    token = bench.token(Role.VIEWER)
    with serve() as server:
        with Client(server.url, token, ca=ca) as client:
            assert client.whoami().role is Role.VIEWER
        with Client(server.url, token) as client, pytest.raises(Unreachable, match="certificate"):
            client.whoami()
        wrong = server.url.replace("127.0.0.1", "localhost")
        with Client(wrong, token, ca=ca) as client:
            assert client.whoami().fleet == "orchard"
        with pytest.raises(Unreachable, match="unencrypted"):
            Client("http://aggregator.example:8443", token)
        endpoint = LocalEndpoint.read(directory)
        assert endpoint is not None and endpoint.url == server.url
        assert (directory / "local.json").stat().st_mode & 0o777 == 0o600
        assert endpoint.token not in repr(endpoint)
        with Client(endpoint.url, endpoint.token, ca=ca) as local:
            assert local.whoami().role is Role.ADMIN
    assert LocalEndpoint.read(directory) is None
    first = (directory / "server.pem").read_bytes()
    assert (directory / "server-key.pem").stat().st_mode & 0o777 == 0o600
    # Nobody takes it for a device's.
    with pytest.raises(BadSignature):
        verify_certificate(
            ssl.PEM_cert_to_DER_cert(first.decode()), operator.authority.ca, now=int(time.time())
        )
    # It stays as it is without the CA's key, until it has to hold another name.
    (tmp_path / "keys" / "ca-key.pem").rename(tmp_path / "elsewhere")
    with serve():
        assert (directory / "server.pem").read_bytes() == first
    with pytest.raises(Exception, match="CA's key is kept elsewhere"), serve(("covey.example",)):
        pass
    (tmp_path / "elsewhere").rename(tmp_path / "keys" / "ca-key.pem")
    with serve(("covey.example",)):
        now = time.time()
        renewed = (directory / "server.pem").read_bytes()
        assert server_certificate.serves(renewed, operator.authority.ca, ["covey.example"], now=now)


def test_a_place_that_is_taken_is_named(server: ApiServer, bench: Api) -> None:
    with pytest.raises(CannotListen, match="--listen"):
        ApiServer(bench.app, ListenAddress.parse(f"127.0.0.1:{server.port}"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs `covey ...` with a configuration of its own; returns (exit code, output, errors)."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, state: Path | None = None, stdin: str = "") -> tuple[int, str, str]:
        if state is None:
            monkeypatch.delenv("COVEY_STATE", raising=False)
        else:
            monkeypatch.setenv("COVEY_STATE", str(state))
        monkeypatch.setattr(sys, "argv", ["covey", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


def test_what_a_killed_service_leaves_leads_no_command_to_another_port(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    state, found = tmp_path / "agg", tmp_path / "agg" / "api" / "local.json"
    covey.init(state, fleet="orchard", broker=NOBODY_LISTENS)
    with ServiceProcess(state, NOBODY_LISTENS) as service:
        wait_for(lambda: LocalEndpoint.read(state / "api"), what="the service")
        first = LocalEndpoint.read(state / "api")
        assert first is not None
        service.end(signal.SIGKILL)
    assert found.exists() and LocalEndpoint.read(state / "api") is None
    # Its port is somebody else's now, who must hear of no token; another service has not come up yet.
    heard: list[bytes] = []
    with strangers(first, heard), lock(StateDirectory(state)):
        assert run("device", "list", state=state)[0] == 0
        with Client(first.url, first.token) as client, pytest.raises(Unreachable, match="is no aggregator"):
            client.whoami()
    assert len(heard) == 1, "only who was told to went there"
    with Client(first.url, first.token) as client, pytest.raises(Unreachable, match="covey aggregator run"):
        client.whoami()
    with ServiceProcess(state, NOBODY_LISTENS) as service:
        wait_for(lambda: LocalEndpoint.read(state / "api"), what="the next service")
        second = LocalEndpoint.read(state / "api")
        assert second is not None and second.token != first.token
        with covey.connect(state) as client:
            assert client.url == second.url and client.whoami().role is Role.ADMIN
        assert service.end(signal.SIGTERM) == 0
    assert not found.exists()


@contextmanager
def strangers(where: LocalEndpoint, heard: list[bytes]) -> Iterator[None]:
    """Something else that answers at that port."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.requestline.encode())
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            pass

    port = httpx.URL(where.url).port
    assert port is not None
    with ThreadingHTTPServer(("127.0.0.1", port), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def test_the_commands_find_the_service_here_and_log_in_from_elsewhere(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    state, config = tmp_path / "agg", tmp_path / "config"
    covey.init(state, fleet="orchard", broker=NOBODY_LISTENS)
    assert (state / "admin-token").stat().st_mode & 0o777 == 0o600
    model = tmp_path / "toy"
    model.mkdir()
    for name, data in zip(("manifest.json", "model.tflite", "weights.bin"), model_files(50), strict=True):
        (model / name).write_bytes(data)
    with ServiceProcess(state, NOBODY_LISTENS) as service:
        wait_for(lambda: LocalEndpoint.read(state / "api"), what="the service")
        endpoint = LocalEndpoint.read(state / "api")
        assert endpoint is not None, service.log
        # Here: by the state directory, over the socket.
        code, out, err = run("model", "publish", str(model), "--output", "json", state=state)
        assert code == 0, err
        assert json.loads(out)[0]["version"] == 1
        code, token, err = run("token", "create", "--role", "viewer", state=state)
        assert code == 0 and re.fullmatch(r"covey_[0-9a-f]{12}_[0-9a-f]{64}\n", token) and "30d" in err

        # Elsewhere: nothing but the address and a token.
        assert run("device", "list")[0] == 1
        assert run("login", endpoint.url, stdin="covey_wrong")[0] == 4
        code, out, err = run("login", endpoint.url, stdin=token)
        assert code == 0 and "viewer" in out, err
        profile = config / "covey" / "profile.json"
        assert profile.stat().st_mode & 0o777 == 0o600
        code, out, _ = run("model", "list")
        assert (code, "toy" in out) == (0, True)
        code, out, err = run("device", "exclude", "barn-1")
        assert (code, out) == (4, "") and "needs the role operator, yours is viewer" in err
        admin = (state / "admin-token").read_text()
        assert run("login", endpoint.url, stdin=admin)[0] == 0
        assert run("device", "exclude", "barn-1")[0] == 1
        code, out, _ = run("audit-log", "--output", "json")
        rows = [(row["action"], row["outcome"], row["who"].split(":")[0]) for row in json.loads(out)]
        assert rows == [
            ("exclude-device", "not-found", "token"),
            ("exclude-device", "forbidden", "token"),
            ("create-token", "done", "local"),
            ("publish-version", "done", "local"),
        ]
        secret = token.strip().split("_")[2]
        assert secret not in service.log and endpoint.token not in service.log
        service.end(signal.SIGTERM)
        assert run("whoami")[0] == 5
        assert run("logout")[0] == 0
        assert not profile.exists()
        # With no service, the same commands work on the directory itself.
        code, out, _ = run("model", "list", "--json", state=state)
        assert (code, json.loads(out)[0]["model"]) == (0, "toy")


def test_ten_thousand_devices_on_one_page(bench: Api, server: ApiServer) -> None:
    from dataclasses import replace

    with Client(server.url, bench.tokens[Role.OPERATOR]) as client:
        client.enrol(csr("first"))
    device = bench.context.operator.device("first")
    with bench.context.operator.repository.write() as writer:
        for number in range(9_999):
            writer.add_device(replace(device, device_id=f"device-{number:05}", models={"watch": 3}))
    headers = {"Authorization": f"Bearer {bench.tokens[Role.VIEWER]}"}
    response = httpx.get(f"{server.url}/api/v1/devices?limit=10000", headers=headers, timeout=120)
    content = response.json()
    assert (len(content["items"]), content["next"]) == (10_000, None)
    with Client(server.url, bench.tokens[Role.VIEWER]) as client:
        assert sum(1 for _ in client.devices()) == 10_000
