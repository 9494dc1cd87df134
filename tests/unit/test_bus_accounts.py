"""The server's configuration admits no text that could become more than a key or a path, and what the callout answers is confined to one name."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from libs.bus.accounts import callout_keys, callout_seeds, permissions, server_config
from libs.bus.callout import answer
from libs.bus.nkeys import nkey, public_of
from libs.tokens import new_seed, public_key, raw_signature

SEED, WORKER = new_seed(), new_seed()
KEY = public_key(WORKER)
CALLOUT = callout_keys(SEED)


def config(**changed: Any) -> str:
    settings = {"port": 4222, "store_dir": Path("/data"), "services": {"builds": public_key(new_seed())}, "callout": CALLOUT}
    return server_config(**settings | changed)


def test_there_is_no_secret_in_it() -> None:
    assert "password" not in config()
    assert not any(seed in config() for seed in (SEED, *callout_seeds(SEED)))


@pytest.mark.parametrize("key", ["", "x", 'x" }', "a" * 44, KEY + "=", KEY[:-1] + "!"], ids=["empty", "short", "quotes", "long", "padded", "sign"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        config(services={"builds": key})
    with pytest.raises(ValueError, match="key"):
        config(callout=CALLOUT._replace(issuer=key))


def test_a_path_that_would_end_its_quotes_is_refused() -> None:
    with pytest.raises(ValueError, match="not a safe path"):
        config(store_dir=Path('/data"'))


def test_a_key_is_one_user_s() -> None:
    with pytest.raises(ValueError, match="one key"):
        config(services={"builds": KEY, "gateway": KEY})
    with pytest.raises(ValueError, match="one key"):
        config(services={"builds": CALLOUT.system})


@pytest.mark.parametrize("name", ["", "a.b", "w 1", "w1\n", "*", ">", "w}", "ü", "a" * 65])
def test_a_name_that_could_stand_for_more_is_given_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="not a safe worker's name"):
        permissions(name)


def test_an_nkey_tells_its_key_and_nothing_else_does() -> None:
    assert public_of(nkey(KEY)) == KEY
    for text in ("", nkey(KEY)[:-1], nkey(KEY, "account"), "U" + "A" * 55, nkey(KEY).lower()):
        with pytest.raises(ValueError):
            public_of(text)


def question(*, nonce: str = "n0nce_of-the_server", signed: str | None = None, name: str = "w1", seed: str = WORKER, key: str = KEY) -> bytes:
    signature = base64.urlsafe_b64encode(raw_signature(seed, (nonce if signed is None else signed).encode())).rstrip(b"=").decode()
    said = {"nkey": nkey(key), "sig": signature, "name": name}
    nats = {"server_id": {"id": "N1"}, "user_nkey": nkey(key), "client_info": {"nonce": nonce, "host": "h"}, "connect_opts": said}
    return b"." + base64.urlsafe_b64encode(json.dumps({"iat": 5000, "nats": nats}).encode()) + b"."


def claims(text: str) -> Any:
    return json.loads(base64.urlsafe_b64decode(text.split(".")[1] + "=="))


def test_a_worker_is_admitted_to_its_own_subjects_for_a_while_by_the_servers_clock() -> None:
    text, admitted = answer(question(), {"w1": KEY}.get, callout_seeds(SEED).issuer, 600.0)
    user = claims(claims(text.decode())["nats"]["jwt"])
    assert admitted == "w1" and claims(text.decode())["aud"] == "N1"
    assert (user["aud"], user["name"], user["exp"]) == ("WORKERS", f"w1.{KEY}", 5600)
    assert user["iss"] == nkey(CALLOUT.issuer, "account")
    assert user["nats"]["pub"]["allow"] == ["reports.w1.>", "logs.w1.>", "presence.w1"]
    assert user["nats"]["sub"]["allow"] == ["control.w1", "execute_build_package.w1", "_INBOX_w1.>"]


@pytest.mark.parametrize(
    "asked",
    [
        question(name="w2"),
        question(name=""),
        question(seed=new_seed()),
        question(key=public_key(new_seed())),
        question(nonce=""),
        question(signed="another_nonce"),
    ],
    ids=["another's name", "no name", "another's signature", "another's key", "no nonce", "another nonce"],
)
def test_whoever_does_not_sign_the_nonce_by_the_name_s_key_is_nobody(asked: bytes) -> None:
    text, admitted = answer(asked, {"w1": KEY}.get, callout_seeds(SEED).issuer, 600.0)
    assert admitted == "" and claims(text.decode())["nats"] == {"type": "authorization_response", "version": 2, "error": "denied"}
