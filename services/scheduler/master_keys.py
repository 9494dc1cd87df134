"""The master keys under which secrets are kept: AES-256-GCM, each bound to what it is the value of. The first key encrypts, all decrypt."""

import base64
import binascii
import re
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NONCE = 12


class BadKeys(ValueError):
    """What is no list of master keys; the text says why, and holds none."""


class MissingKey(Exception):
    """The value is under a master key that is not among these; the text is its id."""


class Tampered(Exception):
    """The ciphertext is not that of this value under this key."""


class Keyring:
    """`id:key` pairs, separated by commas or white space; a key is 32 bytes in base64url."""

    def __init__(self, text: str) -> None:
        """Raises BadKeys."""
        self._keys: dict[str, AESGCM] = {}
        for number, pair in enumerate(re.split(r"[,\s]+", text.strip(", \t\r\n")), 1):
            name, colon, key = pair.partition(":")
            if not colon or not _ID.fullmatch(name):
                raise BadKeys(f"key {number} is not `id:key`, the id of letters, digits, `_`, `-`, `.`")
            if name in self._keys:
                raise BadKeys(f"key {number} has the id of an earlier one")
            self._keys[name] = AESGCM(_raw(number, key))
        self.first = next(iter(self._keys))

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def encrypt(self, value: bytes, bound_to: bytes) -> tuple[str, bytes]:
        """(the key's id, the ciphertext)."""
        nonce = secrets.token_bytes(_NONCE)
        return self.first, nonce + self._keys[self.first].encrypt(nonce, value, bound_to)

    def decrypt(self, key_id: str, ciphertext: bytes, bound_to: bytes) -> bytes:
        """Raises MissingKey, Tampered."""
        key = self._keys.get(key_id)
        if key is None:
            raise MissingKey(key_id)
        try:
            return key.decrypt(ciphertext[:_NONCE], ciphertext[_NONCE:], bound_to)
        except (InvalidTag, ValueError) as error:
            raise Tampered from error


def _raw(number: int, text: str) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 32:
        raise BadKeys(f"key {number} is not `id:key`: what follows the colon is not 32 bytes in base64url")
    return raw
