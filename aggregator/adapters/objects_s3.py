"""Artefacts in a bucket of S3 or of whatever speaks its protocol.

    BUCKET/PREFIX/blobs/<sha256>                  one artefact, named by what it holds
    BUCKET/PREFIX/models/<model>/<version>.json   the signed manifest of one version

An object appears whole or not at all, and the server checks the digest that is sent along. What is read is
checked and kept in a directory of this machine, so that a device that downloads in chunks costs one request,
and goes on when the bucket cannot be reached.

Credentials come from where AWS tools look for them: the environment, `~/.aws`, the machine's role.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from aggregator.adapters.objects import DirectoryStore
from aggregator.registry.artefacts import MissingArtefact, StoreUnavailable
from models.manifest import ModelManifest
from protocol.fields import MAX_BLOB_BYTES, BlobRef
from protocol.identity import SignedDocument

CACHE_BYTES = 2**30
CONNECT_SECONDS = 5
READ_SECONDS = 20
ATTEMPTS = 2
_ADDRESS = re.compile(r"^s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9._-]+)*)/?$")

T = TypeVar("T")


def check_address(address: str) -> str:
    """Checks an address such as `s3://bucket/prefix`; returns it as `bucket/prefix`.

    Raises:
        ValueError: it is none. The message does not quote it: it may hold a key.
    """
    match = _ADDRESS.match(address)
    if match is None or {".", ".."} & set(match[2].split("/")):
        raise ValueError("an object store is s3://BUCKET or s3://BUCKET/PREFIX, without keys in it")
    return match[1] + match[2]


class S3Store:
    """An artefact store in a bucket. It connects when it is first needed."""

    def __init__(self, address: str, cache: Path, *, endpoint: str | None = None) -> None:
        """Uses a bucket that is there.

        Args:
            address: such as `s3://bucket/prefix`.
            cache: a directory for copies of what was read; made when it is not there.
            endpoint: URL of the server; Amazon's, or that of AWS_ENDPOINT_URL, when None.

        Raises:
            ValueError: the address is none.
            StoreUnavailable: the driver is not installed.
        """
        self._root = check_address(address)
        self._cache = DirectoryStore(cache)
        try:
            import s3fs
        except ImportError as error:
            raise StoreUnavailable("an S3 store needs a driver: pip install 'covey[s3]'") from error
        self._files: Any = s3fs.S3FileSystem(
            endpoint_url=endpoint,
            config_kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"total_max_attempts": ATTEMPTS},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._files.retries = ATTEMPTS

    def put(self, data: bytes) -> BlobRef:
        """Stores an artefact durably."""
        blob = BlobRef.of(data)
        if self._size(self._key(blob)) != blob.size:
            self._write(self._key(blob), data)
        self._keep(data)
        return blob

    def read(self, blob: BlobRef) -> bytes:
        """Reads a whole artefact and checks it."""
        try:
            return self._cache.read(blob)
        except MissingArtefact:
            return self._fetch(blob)

    def read_range(self, blob: BlobRef, start: int, length: int) -> bytes:
        """Reads a part of an artefact."""
        try:
            return self._cache.read_range(blob, start, length)
        except MissingArtefact:
            return self._fetch(blob)[start : start + length]

    def remove(self, blob: BlobRef) -> None:
        """Removes an artefact; nothing happens when it is not there."""
        if self._size(self._key(blob)) is not None:
            self._ask(lambda: self._files.rm_file(self._key(blob)), blob)
        self._cache.remove(blob)

    def held(self) -> frozenset[str]:
        """SHA-256 of every object that is there; a request for every thousand."""
        try:
            keys: list[str] = self._ask(lambda: self._files.ls(f"{self._root}/blobs", detail=False), None)
        except MissingArtefact:
            return frozenset()  # nothing was ever stored
        return frozenset(key.rpartition("/")[2] for key in keys)

    def put_manifest(self, manifest: ModelManifest, document: SignedDocument) -> None:
        """Stores the signed manifest of a version durably."""
        key = f"{self._root}/models/{manifest.name}/{manifest.version}.json"
        self._write(key, document.model_dump_json().encode())

    def _key(self, blob: BlobRef) -> str:
        return f"{self._root}/blobs/{blob.sha256}"

    def _fetch(self, blob: BlobRef) -> bytes:
        data: bytes = self._ask(lambda: self._files.cat_file(self._key(blob)), blob)
        if len(data) != blob.size or hashlib.sha256(data).hexdigest() != blob.sha256:
            raise MissingArtefact(f"the object {self._key(blob)} is damaged: restore it from a backup")
        self._keep(data)
        return data

    def _keep(self, data: bytes) -> None:
        self._cache.put(data)
        self._cache.shrink(CACHE_BYTES)

    def _size(self, key: str) -> int | None:
        try:
            size: int = self._ask(lambda: self._files.info(key)["size"], None)
        except MissingArtefact:
            return None
        return size

    def _write(self, key: str, data: bytes) -> None:
        # One request, however large: the object is there whole or not at all.
        self._ask(
            lambda: self._files.pipe_file(key, data, chunksize=MAX_BLOB_BYTES, ChecksumAlgorithm="SHA256"),
            None,
        )

    def _ask(self, request: Callable[[], T], blob: BlobRef | None) -> T:
        """Makes a request.

        Raises:
            MissingArtefact: the bucket is there, the object is not.
            StoreUnavailable: anything else went wrong.
        """
        try:
            return request()
        except FileNotFoundError as error:
            if not self._has_bucket():
                bucket = self._root.partition("/")[0]
                raise StoreUnavailable(
                    f"the bucket {bucket} does not exist: make it, or name another"
                ) from error
            name = blob.sha256[:12] if blob is not None else "asked for"
            raise MissingArtefact(f"the artefact {name} is not in the object store") from error
        except Exception as error:  # s3fs lets through what its own libraries raise
            raise StoreUnavailable(f"the object store cannot be used: {_brief(error)}") from error

    def _has_bucket(self) -> bool:
        try:
            self._files.info(self._root.partition("/")[0])
        except FileNotFoundError:
            return False
        except Exception as error:
            raise StoreUnavailable(f"the object store cannot be used: {_brief(error)}") from error
        return True


def _brief(error: Exception) -> str:
    """The cause, such as EndpointConnectionError; its text would name the server to whoever asks."""
    return type(error).__name__
