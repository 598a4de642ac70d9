"""Cryptographic pseudo-random streams: HKDF-SHA256 keys and a seekable ChaCha20 keystream.

One primitive serves every secret draw in Covey: pairwise masks, self-masks and privacy noise. Keys are
separated by purpose (RFC 5869, section 3.2), so that no two uses ever share a keystream.
"""

from __future__ import annotations

import hmac

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray

KEY_BYTES = 32
_BLOCK_BYTES = 64
_MAX_BYTES = _BLOCK_BYTES * 2**32  # the block counter of RFC 8439 has 32 bits
_NO_SALT = bytes(32)

SLICE_WORDS = 65_536
"""Words that are drawn at a time: three buffers of 256 KiB stay in a core's cache, and the cost of a call is
spread over enough of them."""

# Encrypting zeros gives the keystream; these are never written to.
_ZEROS = memoryview(bytes(4 * SLICE_WORDS))


def derive_key(secret: bytes, *, purpose: str, context: bytes = b"") -> bytes:
    """Derives a 32-byte key from `secret` with HKDF-SHA256 (RFC 5869).

    Args:
        secret: input keying material, at least 16 bytes of entropy.
        purpose: what the key is for; it separates domains.
        context: public bytes that the key is bound to (round id, the two peers).

    Raises:
        ValueError: `secret` is shorter than 16 bytes.
    """
    if len(secret) < 16:
        raise ValueError(f"a secret needs at least 16 bytes, got {len(secret)}")
    label = purpose.encode()
    info = b"covey/v1/" + len(label).to_bytes(2, "big") + label + context
    # Extract and one block of expand, as a key is one hash long: half the time of a general HKDF object.
    pseudo_random_key = hmac.digest(_NO_SALT, secret, "sha256")
    return hmac.digest(pseudo_random_key, info + b"\x01", "sha256")


class Keystream:
    """The ChaCha20 keystream (RFC 8439, section 2.4) of a single-use key, readable from any word on.

    The nonce is zero: every key comes from `derive_key` for one purpose and is used for one stream only.

    Guarantee: any slice equals the same slice of the whole stream, so both sides work chunk by chunk.
    Assumes: the key is uniformly random and used for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a keystream key has {KEY_BYTES} bytes, got {len(key)}")
        self._key = key

    def read(self, start: int, count: int) -> bytes:
        """Returns bytes `start` to `start + count` of the stream."""
        self._check(start, count)
        encryptor, skip = self._seek(start)
        output = bytearray(skip + count)
        encryptor.update_into(bytes(skip + count), output)
        return bytes(output[skip:]) if skip else bytes(output)

    def words(self, start: int, count: int) -> NDArray[np.uint32]:
        """Returns words `start` to `start + count` of the stream, uint32, shape (count,), little-endian."""
        return np.frombuffer(self.read(4 * start, 4 * count), dtype="<u4")

    def reader(self, start: int, count: int) -> KeystreamReader:
        """A reader of words `start` to `start + count` in their order, which allocates nothing."""
        self._check(4 * start, 4 * count)
        encryptor, skip = self._seek(4 * start)
        encryptor.update(bytes(skip))
        return KeystreamReader(encryptor)

    def _check(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > _MAX_BYTES:
            raise ValueError(f"keystream slice [{start}, {start + count}) is outside 256 GiB")

    def _seek(self, start: int) -> tuple[CipherContext, int]:
        block, skip = divmod(start, _BLOCK_BYTES)
        nonce = block.to_bytes(4, "little") + bytes(12)
        return Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor(), skip


class KeystreamReader:
    """Reads a keystream word by word into a buffer of the caller; made by `Keystream.reader`."""

    __slots__ = ("_encryptor",)

    def __init__(self, encryptor: CipherContext) -> None:
        self._encryptor = encryptor

    def fill(self, buffer: memoryview) -> None:
        """Overwrites `buffer`, at most 4 * SLICE_WORDS bytes, with the next words, little-endian."""
        self._encryptor.update_into(_ZEROS[: len(buffer)], buffer)
