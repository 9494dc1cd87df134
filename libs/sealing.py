"""Sealed boxes: what only the holder of one key can open (X25519, libsodium's SealedBox). Keys are base64url text, as in libs.tokens."""

import base64

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox


class NotSealed(Exception):
    """It was not sealed to this key, or has been changed since."""


def new_sealing_key() -> str:
    """A new private key."""
    return _text(bytes(PrivateKey.generate()))


def sealing_public_key(key: str) -> str:
    return _text(bytes(PrivateKey(_raw(key)).public_key))


def seal(public: str, data: bytes) -> bytes:
    """`data` for the holder of the key alone. Raises ValueError for what is no key."""
    try:
        return SealedBox(PublicKey(_raw(public))).encrypt(data)
    except (CryptoError, TypeError) as error:
        raise ValueError("not a public key to seal to") from error


def unseal(key: str, sealed: bytes) -> bytes:
    """Raises NotSealed."""
    try:
        return SealedBox(PrivateKey(_raw(key))).decrypt(sealed)
    except (CryptoError, TypeError, ValueError) as error:
        raise NotSealed from error


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
