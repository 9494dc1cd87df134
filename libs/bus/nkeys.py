"""Ed25519 keys in the words of NATS: base32 of a prefix, the key and its CRC-16, and JWTs whose algorithm is called `ed25519-nkey`.

Elsewhere in Penstock a key is base64url text (libs/tokens.py); these are the same 32 bytes.
"""

import base64
import hashlib
from binascii import crc_hqx
from typing import Any, Literal

import msgspec

from libs.tokens import key_bytes, key_text, raw_signature

_PREFIXES = {"user": 20 << 3, "account": 0}
_HEADER = b'{"typ":"JWT","alg":"ed25519-nkey"}'


def nkey(public: str, kind: Literal["user", "account"] = "user") -> str:
    """A public key as NATS writes it. Raises ValueError for what is no key."""
    body = bytes([_PREFIXES[kind]]) + key_bytes(public)
    return _base32(body + crc_hqx(body, 0).to_bytes(2, "little"))


def public_of(text: str) -> str:
    """The key of a user's nkey. Raises ValueError."""
    raw = base64.b32decode(text + "=" * (-len(text) % 8))
    if len(raw) != 35 or raw[0] != _PREFIXES["user"] or crc_hqx(raw[:33], 0).to_bytes(2, "little") != raw[33:]:
        raise ValueError("not a user's nkey")
    return key_text(raw[1:33])


def jwt(seed: str, claims: dict[str, Any]) -> str:
    """A JWT as nats-server reads it."""
    digest = hashlib.sha256(msgspec.json.encode(claims)).digest()
    head = f"{_text(_HEADER)}.{_text(msgspec.json.encode({**claims, 'jti': _base32(digest)}))}"
    return f"{head}.{_text(raw_signature(seed, head.encode()))}"


def _base32(raw: bytes) -> str:
    return base64.b32encode(raw).rstrip(b"=").decode()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
