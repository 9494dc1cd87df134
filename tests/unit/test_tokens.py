"""Tokens and signed messages: what is not ours, not for this, or too old is refused without detail."""

import jwt
import pytest

from libs.tokens import (
    BadSignature,
    BadToken,
    Grant,
    is_signed,
    key_bytes,
    new_seed,
    public_key,
    raw_signature,
    read_token,
    seed_for,
    sign,
    sign_token,
    verify,
)
from proto.messages import Signed

SEED = new_seed()
CLAIMS = {"team": "main", "artifact": "a", "action": "put"}
NOW = 1_800_000_000.0


def test_a_token_tells_its_claims_until_it_expires():
    token = sign_token(SEED, CLAIMS, 60, NOW)
    assert read_token(public_key(SEED), token, NOW + 59, Grant) == Grant(**CLAIMS, exp=int(NOW) + 60)
    # FAULTS 82
    with pytest.raises(BadToken):
        read_token(public_key(SEED), token, NOW + 60, Grant)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x.y.z",
        sign_token(new_seed(), CLAIMS, 60, NOW),
        sign_token(SEED, {"team": "main"}, 60, NOW),
        sign_token(SEED, {**CLAIMS, "action": "everything"}, 60, NOW),
        # FAULTS 83
        jwt.encode({**CLAIMS, "exp": int(NOW) + 60}, "", algorithm="none"),
        jwt.encode({**CLAIMS, "exp": int(NOW) + 60}, public_key(SEED), algorithm="HS256"),
    ],
)
def test_what_is_no_token_of_ours_is_refused(token):
    with pytest.raises(BadToken):
        read_token(public_key(SEED), token, NOW, Grant)


def test_what_is_signed_in_another_s_format_cannot_pass_for_a_message_of_ours():
    assert is_signed(public_key(SEED), b"nonce", raw_signature(SEED, b"nonce"))
    assert not is_signed(public_key(SEED), b"other", raw_signature(SEED, b"nonce"))
    with pytest.raises(ValueError):
        raw_signature(SEED, b"presence\0a heartbeat")


def test_a_seed_that_is_made_of_another_is_its_purpose_s_own():
    assert seed_for(SEED, "a") == seed_for(SEED, "a") != seed_for(SEED, "b") != SEED
    assert len(key_bytes(seed_for(SEED, "a"))) == 32


def test_a_signed_message_is_good_for_its_context_only():
    # FAULTS 87, 88
    signed = sign(SEED, "execute_build_package.w1", b"body")
    assert verify(public_key(SEED), "execute_build_package.w1", signed) == b"body"
    for context, message in (
        ("execute_build_package.w2", signed),
        ("execute_build_package.w1", Signed(b"other", signed.signature)),
        ("execute_build_package.w1", Signed(b"body", b"short")),
    ):
        with pytest.raises(BadSignature):
            verify(public_key(SEED), context, message)
