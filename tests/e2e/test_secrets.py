"""A secret reaches the step that names it, and nothing else: whatever a running system keeps, shows or says is searched for it."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.controls import eventually
from tests.e2e.conftest import COMMAND, Cli, System, read_until
from tests.encodings import encodings

TELLS = """
import base64, hashlib, json, os, sys, urllib.parse
for name in sys.argv[1:]:
    value = os.environ[name]
    raw = value.encode()
    told = [raw, base64.b64encode(raw), base64.urlsafe_b64encode(b"x" + raw + b"y"), base64.b64encode(b"xx" + raw), raw.hex().encode()]
    told += [json.dumps({"it": value}).encode(), urllib.parse.quote(value, safe="").encode(), base64.encodebytes(raw), raw.hex().upper().encode()]
    for text in told:
        for stream in (1, 2):
            for at in range(0, len(text), 7):
                os.write(stream, text[at : at + 7])
            os.write(stream, b"\\n")
    print(name, "is", hashlib.sha256(raw).hexdigest(), flush=True)
"""


def value() -> str:
    return f"{secrets.token_urlsafe(12)}/+ {secrets.token_urlsafe(12)}"


def kept(cli: Cli, name: str, text: str) -> None:
    command = [*COMMAND, "secret", "set", name, "--stdin"]
    result = subprocess.run(command, input=text + "\n", env=cli.system.environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def task(cli: Cli, params: dict[str, str], after: str = "") -> Path:
    (cli.folder / "in").mkdir(exist_ok=True)
    (cli.folder / "in/tells.py").write_text(TELLS)
    return cli.task(f"python in/tells.py {' '.join(params)}; {after}", inputs=["in"], more=f'"params": {json.dumps(params)}')


def test_secrets_are_set_listed_used_and_removed(cli: Cli) -> None:
    kept(cli, "word", "first")
    (cli.folder / "key").write_text("line one\nline two\n")
    assert cli("secret", "set", "key", "--from-file", "key").returncode == 0
    kept(cli, "word", "abracadabra")
    listed = cli("secret", "ls")
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [["key", "1"], ["word", "2"]]
    assert {secret["name"] for secret in json.loads(cli("secret", "ls", "--json").stdout)} == {"key", "word"}
    script = 'test "$A" = "<abracadabra>" && test "$B" = "line one\nline two\n" && echo "both: $A" && echo "$B" && echo $((1 + 1))'
    result = cli("execute", "-c", cli.task(script, more='"params": {"A": "<((word))>", "B": "((key))"}'))
    assert (result.returncode, result.stdout) == (0, "both: <***>\n***\n2\n"), result.stderr
    refused = cli("execute", "-c", cli.task("true", more='"params": {"A": "((nothing))"}'))
    assert refused.returncode == 1
    assert "task.yml: params.A: the team has no secret `nothing`" in refused.stderr
    assert cli("secret", "rm", "word").returncode == 0
    assert cli("secret", "rm", "word").returncode == 1
    assert cli("secret", "set", "empty", "--from-file", os.devnull).returncode == 2
    assert "on a terminal" in cli("secret", "set", "word").stderr
    missing = cli("secret", "set", "word", "--from-file", "missing")
    assert (missing.returncode, missing.stderr) == (2, "Error: cannot read missing: No such file or directory\n")


def test_a_step_whose_secret_was_removed_ends_with_an_error_that_names_it(cli: Cli, interrupt: Callable[[subprocess.Popen[str]], None]) -> None:
    kept(cli, "word", "abracadabra")
    waits = cli.task("true", more='"params": {"A": "((word))"}, "image_resource": {"type": "no-worker-has-this"}')
    process = cli.start("execute", "-c", waits)
    assert process.stderr
    read_until(process.stderr, "waiting: ")
    interrupt(process)
    assert process.wait(30) == 3
    slow = json.loads(waits.read_text()) | {"run": {"path": "true"}}
    del slow["image_resource"]
    stages = [
        {"name": "first", "steps": [{"step": "run", "name": "s", "config": {"run": {"path": "sh", "args": ["-c", "echo up; exec sleep 2"]}}}]},
        {"name": "second", "needs": ["first"], "steps": [{"step": "run", "name": "s", "config": slow}]},
    ]
    build = call(cli, "POST", "builds", {"plan": {"stages": stages}})
    assert cli("secret", "rm", "word").returncode == 0
    result = cli("watch", str(build["number"]))
    assert result.returncode == 2
    assert "the secret `word` is not set" in result.stderr


def test_keys_are_renewed_while_secrets_stay(cli: Cli, system: System, tmp_path: Path) -> None:
    """The one that values are sealed to, and the master key, in a file that the running scheduler looks at."""
    kept(cli, "word", "abracadabra")
    file = system.data / "master-keys"
    before = file.read_text()
    refused = cli("secret", "rotate")
    assert refused.returncode == 1 and "the keys are the first team's" in refused.stderr
    owner = Cli(system, tmp_path)
    sealed = json.loads(owner("secret", "rotate", "--json").stdout)["sealing_version"]
    renewed = owner("secret", "rotate", "--master-keys", file)
    (version,) = re.findall(r"sealed to key (\d+) from now on", renewed.stderr)
    assert renewed.returncode == 0 and int(version) > sealed, renewed.stderr
    new, _, old = file.read_text().partition("\n")
    assert old == before and stat.S_IMODE(file.stat().st_mode) == 0o600 and new.partition(":")[2] not in renewed.stderr + renewed.stdout
    master = new.partition(":")[0]

    def all_under_it() -> bool:
        shown = json.loads(owner("secret", "rotate", "--json").stdout)
        return shown["master_key"] == master and list(shown["values"]) == [master]

    asyncio.run(eventually(all_under_it))
    file.write_text(f"{new}\n")  # the old one is needed no more
    script = 'test "$A" = abracadabra && test "$MY_KEY" = "of this build"'
    done = cli("execute", "-c", cli.task(script, more='"params": {"A": "((word))", "MY_KEY": "of this build"}'))
    assert done.returncode == 0, done.stderr
    missing = owner("secret", "rotate", "--master-keys", "nothing")
    assert (missing.returncode, missing.stderr) == (2, "Error: cannot change nothing: No such file or directory\n")


def call(cli: Cli, method: str, path: str, body: object = None) -> dict[str, object]:
    return json.loads(fetched(cli, path, method, None if body is None else json.dumps(body).encode()))


def fetched(cli: Cli, path: str, method: str = "GET", data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    """What the API answers; of a stream, what comes until it ends or pauses."""
    url = f"{cli.system.url}/api/v1/" + (path.removeprefix("/") if path.startswith("/") else f"teams/{cli.system.team}/{path}")
    own = {"Authorization": f"Bearer {cli.system.token}", "Content-Type": "application/json", **(headers or {})}
    with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=own, method=method), timeout=5) as response:
        seen = b""
        with contextlib.suppress(TimeoutError):
            while piece := response.read1(65536):
                seen += piece
        return seen


def test_nothing_that_the_system_keeps_shows_or_says_holds_a_secret(cli: Cli, interrupt: Callable[[subprocess.Popen[str]], None]) -> None:
    """FAULTS 97 to 99, and invariant 10, end to end."""
    given, literal, old = value(), value(), value()
    key = "-----BEGIN KEY-----\n" + "\n".join(secrets.token_urlsafe(48) for _ in range(6)) + "\n-----END KEY-----\n"
    for name, text in (("word", old), ("word", given), ("key", key)):
        kept(cli, name, text)
    params = {"A": "((word))", "B": "((key))", "MY_PASSWORD": literal}
    done = cli("execute", "-c", task(cli, params), "-i", "in=in", timeout=100)
    assert done.returncode == 0, done.stderr
    for name, text in (("A", given), ("B", key), ("MY_PASSWORD", literal)):
        assert f"{name} is {hashlib.sha256(text.encode()).hexdigest()}" in done.stdout
    assert done.stdout.count("***") > 30
    process = cli.start("execute", "-c", task(cli, params, "echo waits; while :; do sleep 0.05; done"), "-i", "in=in")
    assert process.stdout
    said = read_until(process.stdout, "waits")
    sources: dict[str, bytes] = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode(), "stdout of the second": said.encode()}
    sources |= dict(running(cli))
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    sources["rest of the second"] = (out + err).encode()
    (build, *_) = call(cli, "GET", "builds")["items"]  # type: ignore[misc]
    for number in (build["number"], build["number"] - 1):
        for path in ("", "/log", "/events", "/preparation"):
            sources[f"build {number}{path}"] = fetched(cli, f"builds/{number}{path}")
    for path in ("builds", "secrets", "user-artifacts", "/workers", "/events?last_event_id=0"):
        sources[path] = fetched(cli, path)
    sources |= asyncio.run(tables(cli.system.data))
    sources |= dict(files(cli.system.data))
    told = {name for name, content in sources.items() if b"in/tells.py" in content}  # what may be read is found where it must be
    assert "eventlog.event" in told and any("/nats/" in name for name in told) and any("/pg/" in name for name in told)
    texts = [text for one in (given, literal, old, key, key.strip(), *key.splitlines()[1:-1]) for text in encodings(one)]
    found = [(name, text) for name, content in sources.items() for text in texts if text in content]
    assert found == []


def running(cli: Cli) -> Iterator[tuple[str, bytes]]:
    """The command lines of all processes, and the environments of the system's own: those of the steps hold what they are given."""
    run = json.loads((cli.system.data / "run.json").read_text())
    ours = {str(run["supervisor"]["pid"]), *(str(child["pid"]) for child in run["children"].values())}
    assert len(ours) > 5
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ") if process.name in ours else ("cmdline",):
            with contextlib.suppress(OSError):
                yield str(process / name), (process / name).read_bytes()


async def tables(data: Path) -> dict[str, bytes]:
    """Every row of every table."""
    password, port = (json.loads((data / file).read_text()) for file in ("secrets.json", "ports.json"))
    connection = await asyncpg.connect(
        host="127.0.0.1", port=port["postgres"], user="postgres", password=password["database"]["postgres"], database="postgres"
    )
    try:
        names = await connection.fetch("SELECT schemaname s, tablename t FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')")
        assert {"event", "builds", "secret", "secrets"} <= {name["t"] for name in names}
        rows = {f"{n['s']}.{n['t']}": await connection.fetch(f'SELECT x::text FROM "{n["s"]}"."{n["t"]}" x') for n in names}
        assert len(rows["scheduler.secret"]) > 1
        return {name: "\n".join(str(row[0]) for row in found).encode() for name, found in rows.items()}
    finally:
        await connection.close()


def files(data: Path) -> Iterator[tuple[str, bytes]]:
    """Everything in the data folder: the database's files and its journal, JetStream's blocks, the services' logs, the worker's spool and folders."""
    seen = set()
    for path in data.rglob("*"):
        with contextlib.suppress(OSError):  # it may be gone, or a socket
            if path.is_file() and not path.is_symlink():
                seen.add(path.relative_to(data).parts[0])
                yield str(path), path.read_bytes()
    assert {"pg", "nats", "logs", "workers", "blobs"} <= seen


@pytest.mark.parametrize(
    "arguments", [["secret", "--help"], ["secret", "set", "--help"], ["secret", "ls", "-h"], ["secret", "rm", "-h"], ["secret", "rotate", "-h"]]
)
def test_help_says_what_it_is_for(cli: Cli, arguments: list[str]) -> None:
    assert "secret" in cli(*arguments).stdout
