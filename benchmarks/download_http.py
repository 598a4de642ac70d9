"""Serves a registry's artefacts over HTTP/1.1 with ranges and client certificates, to be measured.

    python benchmarks/download_http.py BLOBS PORT CA CERTIFICATE KEY

As good as it would get inside the service: its web server (uvicorn), and files sent by Starlette.
"""

from __future__ import annotations

import ssl
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles

if __name__ == "__main__":
    blobs, port, ca, certificate, key = sys.argv[1:]
    app = Starlette()
    app.mount("/", StaticFiles(directory=blobs))
    uvicorn.run(
        app,
        host="0.0.0.0",  # noqa: S104 (a benchmark's own network)
        port=int(port),
        log_level="error",
        lifespan="off",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ssl_ca_certs=ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
