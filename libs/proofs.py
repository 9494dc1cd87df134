"""Requests that their sender signs: a token that is bound to a key is worth nothing to whoever has not the key (RFC 7800, and DPoP in spirit).

What is signed: method, path with query, the sender's time, what the body is, the token. A body is named by its sha256; one that is made of blobs,
each verified by its own digest, by the word `stream`. So a request that is sent again can do nothing that it has not done.
"""

import hashlib
from collections.abc import Mapping

from libs.tokens import BadSignature, sign, signature_bytes, signature_text, verify
from proto.messages import Signed

STREAM = "stream"
NOTHING = hashlib.sha256(b"").hexdigest()
WINDOW = 60.0
"""Seconds that the clocks of the two may disagree, beside the request's time on its way."""

_CONTEXT = "penstock-request"
_DIGITS = 20
_TIME, _CONTENT, _SIGNATURE = "Penstock-Time", "Penstock-Content", "Penstock-Signature"


class Late(Exception):
    """It was signed by a clock that disagrees: the sender may ask what time it is, and sign again."""


def proof_headers(seed: str, token: str, method: str, path: str, content: str, now: float) -> dict[str, str]:
    """What to send along. `path` has the query; `now` is unix seconds."""
    time = str(int(now))
    signed = sign(seed, _CONTEXT, _said(method, path, time, content, token))
    return {"Authorization": f"Bearer {token}", _TIME: time, _CONTENT: content, _SIGNATURE: signature_text(signed.signature)}


def check_proof(public: str, headers: Mapping[str, str], token: str, method: str, path: str, now: float) -> str:
    """What the body must be, if `public`'s owner sent this; `headers` ignore case. Raises BadSignature, Late."""
    time, content = headers.get(_TIME, ""), headers.get(_CONTENT, "")
    try:
        signed = Signed(_said(method, path, time, content, token), signature_bytes(headers.get(_SIGNATURE, "")))
        sent = int(time[:_DIGITS])
    except ValueError as error:
        raise BadSignature from error
    verify(public, _CONTEXT, signed)
    if abs(now - sent) > WINDOW:
        raise Late
    return content


def _said(method: str, path: str, time: str, content: str, token: str) -> bytes:
    return "\0".join((method, path, time, content, token)).encode()
