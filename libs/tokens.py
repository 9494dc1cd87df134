"""Who vouches for what: Ed25519 keys, signed messages, and the JWTs that services show one another.

Keys travel as base64url text without padding: a private key as its 32-byte seed, a public one as its 32 bytes.
"""

import base64
import hmac
import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TypeVar

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from proto.messages import Signed

T = TypeVar("T", bound=msgspec.Struct)


class BadToken(Exception):
    """A token that is not ours, not whole, not for this, or too old. Callers give no detail to whoever showed it."""


class BadSignature(Exception):
    """A message that its sender did not sign."""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """gateway → artifacts: act on one artifact of a team for `actor` (see: its names; get: its bytes; change: its lifetime), or read one build's logs
    (`artifact` is then the build's id), or see what a team stores (`artifact` is ""). gateway → client → artifacts, and no more than that: `tar`,
    upload it as a tar; `send`, chunks that its upload misses; `fetch`, its chunks. `exp` in unix seconds."""

    team: str
    artifact: str
    action: Literal["put", "get", "see", "change", "log", "tar", "send", "fetch"]
    exp: int
    actor: str = ""


class BuildToken(msgspec.Struct, frozen=True, kw_only=True):
    """scheduler → worker → artifacts: read these inputs (name → tree digest) and write these outputs (`step/name`) of one attempt. `key` is the
    worker's public key (as `cnf` of RFC 7800): every request that shows the token must be signed by it."""

    team: str
    build: str
    stage: str
    attempt: int
    worker: str
    key: str
    inputs: dict[str, str]
    outputs: list[str]
    exp: int


def key_text(raw: bytes) -> str:
    """A key's 32 bytes as text."""
    return _text(raw)


def key_bytes(text: str) -> bytes:
    """A key's 32 bytes. Raises ValueError."""
    try:
        raw = _raw(text)
    except ValueError:
        raw = b""
    if len(raw) != 32 or _text(raw) != text:
        raise ValueError("not a key")
    return raw


def signature_bytes(text: str) -> bytes:
    """A signature of `signature_text`. Raises ValueError."""
    return _raw(text)


def signature_text(raw: bytes) -> str:
    """A signature as text."""
    return _text(raw)


def new_seed() -> str:
    """A new private key."""
    return _text(secrets.token_bytes(32))


def seed_for(seed: str, purpose: str) -> str:
    """Another private key, made of one: who knows the first knows it, and nobody else."""
    return _text(hmac.digest(_raw(seed), purpose.encode(), "sha256"))


def public_key(seed: str) -> str:
    return _text(bytes(SigningKey(_raw(seed)).verify_key))


@lru_cache(maxsize=256)
def _signing(seed: str) -> SigningKey:
    return SigningKey(_raw(seed))


@lru_cache(maxsize=4096)
def _verifying(public: str) -> VerifyKey:
    return VerifyKey(_raw(public))


@lru_cache(maxsize=256)
def _jwt_private(seed: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_raw(seed))


@lru_cache(maxsize=256)
def _jwt_public(public: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(_raw(public))


def sign_token(seed: str, claims: Mapping[str, object], seconds: float, now: float) -> str:
    """A JWT (EdDSA) good for `seconds` from `now` (unix seconds)."""
    return jwt.encode({**claims, "exp": int(now + seconds)}, _jwt_private(seed), algorithm="EdDSA")


def read_token(public: str, token: str, now: float, claims: type[T]) -> T:
    """The claims of a token signed by `public`'s owner. The algorithm is pinned, so `none` and HS256 are no tokens. Raises BadToken."""
    try:
        payload = jwt.decode(token, _jwt_public(public), algorithms=["EdDSA"], options={"verify_exp": False, "require": ["exp"]})
        found = msgspec.convert(payload, claims)
    except (jwt.PyJWTError, msgspec.ValidationError, ValueError) as error:
        raise BadToken from error
    if payload["exp"] <= now:
        raise BadToken
    return found


def raw_signature(seed: str, message: bytes) -> bytes:
    """The bare signature (64 bytes) of a message in another's format: one that cannot be taken for a message of ours, which holds a zero byte."""
    if b"\0" in message:
        raise ValueError("this might be signed for another purpose")
    return _signing(seed).sign(message).signature


def is_signed(public: str, message: bytes, signature: bytes) -> bool:
    """Whether `public`'s owner made this bare signature."""
    try:
        _verifying(public).verify(message, signature)
    except (BadSignatureError, ValueError, TypeError):
        return False
    return True


def sign(seed: str, context: str, body: bytes) -> Signed:
    """Sign `body` for one purpose: `context` keeps a message from passing for another."""
    return Signed(body, _signing(seed).sign(context.encode() + b"\0" + body).signature)


def verify(public: str, context: str, signed: Signed) -> bytes:
    """The body, if `public`'s owner signed it for this context. Raises BadSignature."""
    try:
        _verifying(public).verify(context.encode() + b"\0" + signed.body, signed.signature)
    except (BadSignatureError, ValueError, TypeError) as error:
        raise BadSignature from error
    return signed.body


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
