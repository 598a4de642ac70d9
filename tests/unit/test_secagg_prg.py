"""The streams against the published vectors of the RFCs that they claim."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import BadSignature
from protocol.secagg.key_agreement import _LOW_ORDER, agree, check_public_key, public_key
from protocol.secagg.prg import Keystream, derive_key


def test_chacha20_keystream_of_rfc_8439_appendix_a1() -> None:
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert Keystream(bytes(32)).read(0, 128) == expected


def test_hkdf_of_rfc_5869_is_the_one_in_use() -> None:
    """RFC 5869, A.3 (no salt, no info) fixes the primitive; `derive_key` only chooses its info."""
    derived = HKDF(algorithm=hashes.SHA256(), length=42, salt=None, info=b"").derive(b"\x0b" * 22)
    assert derived.hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )
    own = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"covey/v1/\x00\x03abcxyz").derive(
        b"k" * 32
    )
    assert derive_key(b"k" * 32, purpose="abc", context=b"xyz") == own


def test_purpose_and_context_cannot_run_into_each_other() -> None:
    assert derive_key(b"k" * 32, purpose="ab", context=b"c") != derive_key(b"k" * 32, purpose="abc")


def test_any_slice_is_the_slice_of_the_whole() -> None:
    stream = Keystream(derive_key(b"k" * 32, purpose="test"))
    whole = stream.read(0, 1000)
    for start, count in ((0, 0), (1, 63), (64, 64), (63, 2), (129, 871), (999, 1)):
        assert stream.read(start, count) == whole[start : start + count]
    np.testing.assert_array_equal(stream.words(7, 13), np.frombuffer(whole, "<u4")[7:20])


def test_a_stream_ends_before_its_counter_wraps() -> None:
    with pytest.raises(ValueError, match="256 GiB"):
        Keystream(bytes(32)).read(64 * 2**32 - 1, 2)


def test_x25519_of_rfc_7748_section_6_1() -> None:
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_key(alice).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    expected = derive_key(shared, purpose="p", context=b"c")
    assert agree(alice, public_key(bob), purpose="p", context=b"c") == expected
    assert agree(bob, public_key(alice), purpose="p", context=b"c") == expected


def test_low_order_keys_are_refused() -> None:
    with pytest.raises(BadSignature, match="low order"):
        agree(b"\x01" * 32, bytes(32), purpose="p", context=b"")


# The points of small order, and the bytes that mean one of them without being reduced (RFC 7748, section 5).
@pytest.mark.parametrize("point", [*sorted(_LOW_ORDER), 2**255 - 19, 2**255 - 18, 2**255, 2**255 + 1])
def test_a_key_that_agrees_with_nobody_is_refused_before_anybody_tries(point: int) -> None:
    public = point.to_bytes(32, "little")
    with pytest.raises(BadSignature, match="low order"):
        agree(b"\x01" * 32, public, purpose="p", context=b"")
    with pytest.raises(BadSignature, match=r"X25519"):
        check_public_key(public)


def test_one_key_has_one_encoding() -> None:
    """The unused top bit changes nothing for `agree`, but a recovered key would not match what was shown."""
    public = public_key(b"\x01" * 32)
    check_public_key(public)
    with pytest.raises(BadSignature, match="canonical"):
        check_public_key(public[:31] + bytes([public[31] | 0x80]))
