"""The NATS server's configuration: who may say and hear what.

Nobody has a password: whoever connects signs the server's nonce with a key of its own (an nkey). Services are named here, share the account CORE,
which holds JetStream, and may use everything in it. Workers are named nowhere: the server asks a scheduler about each of them (auth callout, in the
account AUTH), which confines it to its own words in the account WORKERS. What crosses between the two is listed here and nowhere else. A worker's
name is a word of every subject it may use, so whoever reads knows the true sender.

Two accounts, because within one a confined user can still have the *server* write where the user may not: a publish with `reply=` set to a forbidden
subject makes the stream's ack go there. A service import answers into the importing account only, and what is left is noise:
an ack's text on a subject that another worker listens to. So workers take nothing from `control` and `execute_build_package` that is not signed.
"""

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from libs.bus.nkeys import nkey
from libs.tokens import public_key, seed_for
from proto.topology import MAX_PAYLOAD, STREAMS

TO_CORE = ("reports.>", "logs.>", "presence.*")
"""What workers say. Service imports, so that JetStream's acks find their way back, and so that services never see a reply subject of a worker's."""
TO_WORKERS = ("control.*", "execute_build_package.*")
"""What services say to one worker."""
ANSWER_SECONDS = 2
"""How long the server waits for a client to say who it is, and for a scheduler to know it. A client that was refused tries again."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PATH = re.compile(r'[^"\\\x00-\x1f]+')


class CalloutKeys(NamedTuple):
    """What the schedulers need to admit workers: a user of AUTH to be asked as, one of SYS to end connections as, and an account's key to sign
    with. As seeds, or as the public keys that the server is told."""

    asked: str
    system: str
    issuer: str


def callout_seeds(seed: str) -> CalloutKeys:
    """All three, made of the one seed that the schedulers share."""
    return CalloutKeys(*(seed_for(seed, f"callout {purpose}") for purpose in CalloutKeys._fields))


def callout_keys(seed: str) -> CalloutKeys:
    """Their public keys."""
    return CalloutKeys(*map(public_key, callout_seeds(seed)))


def inbox_prefix(worker: str) -> str:
    """The one inbox prefix a worker may subscribe to."""
    return f"_INBOX_{worker}"


def permissions(worker: str, withheld: Container[str] = ()) -> dict[str, dict[str, list[str]]]:
    """All that a worker may say and hear, as a user's JWT has it, but for the kinds `withheld` ("reports", "logs"). Raises ValueError for a name that
    could stand for more than itself."""
    if not _NAME.fullmatch(worker):
        raise ValueError(f"not a safe worker's name: {worker!r}")
    return {
        "pub": {"allow": [*(f"{kind}.{worker}.>" for kind in ("reports", "logs") if kind not in withheld), f"presence.{worker}"]},
        "sub": {"allow": [f"control.{worker}", f"execute_build_package.{worker}", f"{inbox_prefix(worker)}.>"]},
    }


def server_config(
    *,
    port: int,
    store_dir: Path,
    services: Mapping[str, str],
    callout: CalloutKeys,
    listen_host: str = "127.0.0.1",
    ports_file_dir: Path | None = None,
    sync_interval: str | None = None,
    log_file: Path | None = None,
) -> str:
    """The text of a configuration file; `services` are public keys by name, `callout` public keys too: there is no secret in it.

    `port` -1 lets the server choose and write it into `ports_file_dir`. `sync_interval` is how often JetStream fsyncs ("always", or e.g. "10s"; the
    server's own is two minutes: nothing depends on it). Raises ValueError for what is no key, a path that could break out of its quotes,
    and for a key that two share.
    """
    core = {name: nkey(public) for name, public in services.items()}
    asked, system, issuer = nkey(callout.asked), nkey(callout.system), nkey(callout.issuer, "account")
    users = [*core.values(), asked, system]
    if len({*users}) != len(users):
        raise ValueError("two users of the bus have one key")
    top = [f'listen: "{listen_host}:{port}"', f"max_payload: {MAX_PAYLOAD}"]
    if ports_file_dir is not None:
        top.append(f"ports_file_dir: {_path(ports_file_dir)}")
    if log_file is not None:
        top.append(f"log_file: {_path(log_file)}")
    # Without max_file_store the server takes a share of the disk that is free at its start, and may refuse the streams. Twice their sum, because the
    # server wants the room for a stream once more when asked to create it although it is there, and several services ask at once.
    storage = [f"store_dir: {_path(store_dir)}", f"max_file_store: {2 * sum(s.max_bytes for s in STREAMS) + (1 << 30)}"]
    if sync_interval is not None:
        storage.append(f'sync_interval: "{sync_interval}"')
    return f"""{_lines(top)}
jetstream {{
{_lines(storage, 2)}
}}
accounts {{
  CORE {{
    jetstream: enabled
    users: [
{_lines([f"{{nkey: {key}}}  # {name}" for name, key in core.items()], 6)}
    ]
    exports: [
{_lines([f'{{service: "{s}", accounts: [WORKERS]}}' for s in TO_CORE] + [f'{{stream: "{s}", accounts: [WORKERS]}}' for s in TO_WORKERS], 6)}
    ]
  }}
  WORKERS {{
    imports: [
{_lines([_import("service", s) for s in TO_CORE] + [_import("stream", s) for s in TO_WORKERS], 6)}
    ]
  }}
  AUTH {{
    users: [{{nkey: {asked}}}]
  }}
  SYS {{
    users: [{{nkey: {system}}}]
  }}
}}
system_account: SYS
authorization {{
  timeout: {ANSWER_SECONDS}
  auth_callout {{
    issuer: {issuer}
    account: AUTH
    auth_users: [{", ".join(users)}]
  }}
}}
"""


def _import(kind: str, subject: str) -> str:
    return f'{{{kind}: {{account: CORE, subject: "{subject}"}}}}'


def _path(path: Path) -> str:
    if not _PATH.fullmatch(str(path)):
        raise ValueError(f"not a safe path: {path!r}")
    return f'"{path}"'


def _lines(lines: list[str], indent: int = 0) -> str:
    return "\n".join(" " * indent + line for line in lines)
