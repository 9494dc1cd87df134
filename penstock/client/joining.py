"""How a worker joins: it makes its key, registers once by a token, and keeps both in a file of its own."""

import base64
from pathlib import Path

import msgspec
from nacl.signing import SigningKey

from penstock.client.discreet import Discreet
from penstock.client.http import Http
from penstock.client.private import write_private

CONTEXT = "penstock-register"


class Membership(Discreet, frozen=True, kw_only=True):
    """What a worker keeps, readable by its owner alone. `key` is the seed of its Ed25519 key. Until it is registered, `nats_url` is empty."""

    name: str
    key: str
    url: str
    nats_url: str = ""
    server_public_key: str = ""
    gateway_public_key: str = ""


class _Challenge(msgspec.Struct, frozen=True):
    server: str
    nonce: str


class _Registered(msgspec.Struct, frozen=True):
    worker: str
    server_public_key: str
    gateway_public_key: str
    nats_url: str


def new_membership(name: str, url: str) -> Membership:
    """With a key that nobody else has."""
    return Membership(name=name, key=_text(bytes(SigningKey.generate())), url=url.rstrip("/"))


def read_membership(path: Path) -> Membership | None:
    """None when there is no file. Raises OSError, msgspec.MsgspecError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Membership)
    except FileNotFoundError:
        return None


def write_membership(path: Path, membership: Membership) -> None:
    """Replace the file in one step, and for good. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, msgspec.json.format(msgspec.json.encode(membership), indent=2) + b"\n")


async def join(membership: Membership, token: str, patience: float = 10.0) -> Membership:
    """Register; it may be done again with the same token, name and key. Raises PenstockError."""
    key = SigningKey(_raw(membership.key))
    public = _text(bytes(key.verify_key))
    async with Http(membership.url, "", patience) as http:
        challenge = await http.send("POST", "/api/v1/workers/challenge", _Challenge)
        said = "\0".join((CONTEXT, challenge.server, challenge.nonce, membership.name, public))
        body = {
            "token": token,
            "name": membership.name,
            "key": public,
            "nonce": challenge.nonce,
            "signature": _text(key.sign(said.encode()).signature),
        }
        registered = await http.send("POST", "/api/v1/workers/register", _Registered, body)
    return msgspec.structs.replace(
        membership,
        nats_url=registered.nats_url,
        server_public_key=registered.server_public_key,
        gateway_public_key=registered.gateway_public_key,
    )


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
