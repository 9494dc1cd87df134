"""The NATS server's configuration: who may say and hear what.

Services share the account CORE, which holds JetStream, and may use everything in it. Workers are in an account of their own, WORKERS, without
JetStream; what crosses between the two is listed here and nowhere else. A worker's name is a word of every subject it may use, so whoever reads knows
the true sender.

Two accounts, because within one a confined user can still have the *server* write where the user may not: a publish with `reply=` set to a forbidden
subject makes the stream's ack go there (FAULTS.md, finding 3). A service import answers into the importing account only, and what is left is noise:
an ack's text on a subject that another worker listens to. So workers take nothing from `control` and `packages` that is not signed.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from proto.topology import MAX_PAYLOAD, STREAMS

TO_CORE = ("reports.>", "logs.>", "presence.*")
"""What workers say. Service imports, so that JetStream's acks find their way back, and so that services never see a reply subject of a worker's."""
TO_WORKERS = ("control.*", "packages.*")
"""What services say to one worker."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PASSWORD = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PATH = re.compile(r'[^"\\\x00-\x1f]+')


def inbox_prefix(worker: str) -> str:
    """The one inbox prefix a worker may subscribe to."""
    return f"_INBOX_{worker}"


def server_config(
    *,
    port: int,
    store_dir: Path,
    services: Mapping[str, str],
    workers: Mapping[str, str],
    listen_host: str = "127.0.0.1",
    ports_file_dir: Path | None = None,
    sync_interval: str | None = None,
    log_file: Path | None = None,
) -> str:
    """The text of a configuration file; `services` and `workers` are passwords by user. The file holds them as they are: keep it 0600.

    `port` -1 lets the server choose and write it into `ports_file_dir`. `sync_interval` is how often JetStream fsyncs ("always", or e.g. "10s"; the
    server's own is two minutes: nothing depends on it, finding 1). Raises ValueError for a name, password or path that could break out of its quotes,
    and for a user named twice.
    """
    if twice := services.keys() & workers.keys():
        raise ValueError(f"both a service and a worker: {sorted(twice)}")
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
    core_users = "\n".join(f"      {{{_login(user, password)}}}" for user, password in services.items())
    worker_users = "\n".join(_worker(user, password) for user, password in workers.items())
    return f"""{_lines(top)}
jetstream {{
{_lines(storage, 2)}
}}
accounts {{
  CORE {{
    jetstream: enabled
    users: [
{core_users}
    ]
    exports: [
{_lines([f'{{service: "{s}", accounts: [WORKERS]}}' for s in TO_CORE] + [f'{{stream: "{s}", accounts: [WORKERS]}}' for s in TO_WORKERS], 6)}
    ]
  }}
  WORKERS {{
    users: [
{worker_users}
    ]
    imports: [
{_lines([_import("service", s) for s in TO_CORE] + [_import("stream", s) for s in TO_WORKERS], 6)}
    ]
  }}
}}
"""


def _worker(name: str, password: str) -> str:
    say = ", ".join(f'"{s}"' for s in (f"reports.{name}.>", f"logs.{name}.>", f"presence.{name}"))
    hear = ", ".join(f'"{s}"' for s in (f"control.{name}", f"packages.{name}", f"{inbox_prefix(name)}.>"))
    return f"      {{{_login(name, password)}, permissions: {{publish: {{allow: [{say}]}}, subscribe: {{allow: [{hear}]}}}}}}"


def _import(kind: str, subject: str) -> str:
    return f'{{{kind}: {{account: CORE, subject: "{subject}"}}}}'


def _login(user: str, password: str) -> str:
    if not _NAME.fullmatch(user):
        raise ValueError(f"not a safe user name: {user!r}")
    if not _PASSWORD.fullmatch(password):
        raise ValueError(f"not a safe password for {user!r}")
    return f'user: "{user}", password: "{password}"'


def _path(path: Path) -> str:
    if not _PATH.fullmatch(str(path)):
        raise ValueError(f"not a safe path: {path!r}")
    return f'"{path}"'


def _lines(lines: list[str], indent: int = 0) -> str:
    return "\n".join(" " * indent + line for line in lines)
