"""One download by a device's own parts, as a process that can be measured and killed.

    python benchmarks/download_device.py STATE URL SHA256 SIZE

STATE is an enrolled device's directory. `mqtts://` pulls chunks as `covey-edge run` does; `https://` asks for
a range from the first missing chunk on. Either stores chunk by chunk and checks the digest of the whole. It
prints `start`, then `chunk N` for each chunk that came, then a line of JSON.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from edge_client.adapters import memory as process_memory

PAUSE_SECONDS = 0.5
TIMEOUT_SECONDS = 30.0


def pull(state: Path, url: str, blob: BlobRef, blobs: Blobs, came: Callable[[int], None]) -> None:
    """By the chunk protocol over MQTT."""
    inbox = Inbox()
    device = load_credentials(state).bundle.device_id
    link = MqttLink(LinkSettings(device, BrokerAddress.parse(url), tls_files(state)), sink=inbox.from_link)
    reception = Reception.begin(blob, blobs.find(blob).chunks)
    asked_at = 0.0
    link.start()
    while not reception.complete:
        item = inbox.get(0.25)
        need = None
        if isinstance(item, LinkUp) or (asked_at and time.monotonic() > asked_at + ASK_AGAIN_SECONDS):
            reception, need = reception.ask(again=True)
        elif isinstance(item, Inbound):
            message, body = decode_to_device(item.frame)
            if isinstance(message, BlobChunk) and message.index in reception.missing:
                blobs.store_chunk(blob, message.index, body)
                came(message.index)
                reception, need = reception.store(message.index).ask()
            item.acknowledge()
        if need is not None:
            asked_at = time.monotonic()
            link.send("msg", encode(need))
    assert blobs.find(blob).complete
    link.stop()


def get(state: Path, url: str, blob: BlobRef, blobs: Blobs, came: Callable[[int], None]) -> None:
    """By HTTP, with a range."""
    place, context = urlsplit(url), tls_files(state).context()
    while not (found := blobs.find(blob)).complete:
        have = set(found.chunks)
        index = next(i for i in range(chunk_count(blob.size)) if i not in have)
        connection = http.client.HTTPSConnection(
            place.hostname or "", place.port, context=context, timeout=TIMEOUT_SECONDS
        )
        try:
            connection.request("GET", f"/{blob.sha256}", headers={"Range": f"bytes={index * CHUNK_BYTES}-"})
            answer = connection.getresponse()
            if answer.status not in (200, 206):
                raise http.client.HTTPException(f"status {answer.status}")
            while index < chunk_count(blob.size):
                length = chunk_length(blob.size, index)
                body = answer.read(length)
                if len(body) < length:
                    raise http.client.IncompleteRead(body)
                blobs.store_chunk(blob, index, body)
                came(index)
                index += 1
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            print("again", error, file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)
        finally:
            connection.close()


def memory(name: str) -> float:
    """A figure of this process, 10^6 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024 / 1e6


def run(state: Path, url: str, blob: BlobRef) -> None:
    """Downloads, and says how it went."""
    blobs = Blobs(state)
    blobs.prepare()
    fetched = 0

    def came(index: int) -> None:
        nonlocal fetched
        fetched += chunk_length(blob.size, index)
        print("chunk", index, flush=True)

    print("start", flush=True)
    before, begin, cpu = memory("VmRSS"), time.monotonic(), time.process_time()
    (pull if url.startswith("mqtts://") else get)(state, url, blob, blobs, came)
    figures = {
        "seconds": time.monotonic() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "memory_mb": memory("VmHWM") - before,
        "fetched": fetched,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    # In the order of `covey-edge run`, so that memory is what it is there.
    process_memory.settle()
    from edge_client.adapters.blobs import Blobs
    from edge_client.adapters.credentials import load_credentials, tls_files
    from edge_client.adapters.mqtt import Inbound, LinkSettings, LinkUp, MqttLink
    from edge_client.inbox import Inbox
    from edge_client.library import ASK_AGAIN_SECONDS
    from protocol.broker_address import BrokerAddress
    from protocol.codec import chunk_count, chunk_length, decode_to_device, encode
    from protocol.fields import BlobRef
    from protocol.messages import CHUNK_BYTES, BlobChunk
    from protocol.transfer import Reception

    run(Path(sys.argv[1]), sys.argv[2], BlobRef(sha256=sys.argv[3], size=int(sys.argv[4])))
