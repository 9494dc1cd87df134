"""Builds after they were started: watched, listed, aborted, and brought home later."""

import json
import stat
from pathlib import Path

import pytest

from penstock import Client
from penstock.client import BuildEnded, BuildLogged, NotFound, PenstockError, Refused, Unauthorized
from tests.e2e.conftest import Cli, System, read_until


def started(cli: Cli, script: str, *options: str, outputs: tuple[str, ...] = ()) -> str:
    result = cli("execute", "-c", cli.task(script, outputs=outputs), "--detach", *options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_detach_prints_only_the_number_and_the_rest_can_be_had_later(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> None:
    result = cli("execute", "-c", cli.task("echo out; echo err >&2; echo kept > dist/x; exit 5", outputs=["dist"]), "--detach")
    number = result.stdout.strip()
    assert number.isdigit()
    assert result.stderr == ""
    watched = cli("watch", number)
    assert (watched.returncode, watched.stdout) == (5, "out\n")
    assert watched.stderr.splitlines()[-1] == "failed"
    assert "err" in watched.stderr.splitlines()
    logged = cli("logs", number)
    assert (logged.returncode, logged.stdout) == (0, "out\n")
    assert "err" in logged.stderr.splitlines()
    elsewhere = Cli(cli.system, tmp_path_factory.mktemp("elsewhere"))
    assert elsewhere("download", number, "-o", "dist=./out").returncode == 0
    assert (elsewhere.folder / "out/x").read_text() == "kept\n"
    assert elsewhere("download", number).returncode == 0
    assert (elsewhere.folder / "dist/x").read_text() == "kept\n"
    wrong = elsewhere("download", number, "-o", "dits=out")
    assert (wrong.returncode, wrong.stderr) == (1, f"Error: build {number} has no output `dits` (it has dist)\n")


def test_a_detached_build_with_outputs_says_how_to_get_them(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("true", outputs=["dist"]), "-b", "-o", "dist=out")
    assert f"penstock download {result.stdout.strip()} -o dist=out" in result.stderr


def test_a_build_is_known_by_its_id_too(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("echo x"), "--detach", "--json")
    build = json.loads(result.stdout)
    assert cli("watch", build["id"]).stdout == "x\n"
    assert json.loads(cli("watch", str(build["number"]), "--json").stdout)["status"] == "succeeded"


def test_logs_by_stream_as_json_and_byte_for_byte(cli: Cli) -> None:
    number = started(cli, r"echo a; printf 'b\377\n' >&2; printf c")
    assert cli("watch", number).returncode == 0
    lines = json.loads(cli("logs", number, "--json").stdout)
    told = [(line["stream"], line["text"]) for line in lines if line["step"] and line["text"] in ("a\n", "c")]
    assert told == [("stdout", "a\n"), ("stdout", "c")]
    process = cli.start("logs", number, "--plain")
    assert process.stdout
    raw = process.stdout.buffer.read()  # type: ignore[attr-defined]
    assert b"b\xff\n" in raw


def test_many_lines_come_complete_and_in_order(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("seq 1 20000"))
    expected = "".join(f"{n}\n" for n in range(1, 20001))
    assert result.stdout == expected
    number = next(line.split()[1].rstrip(":") for line in result.stderr.splitlines() if line.startswith("build "))
    assert cli("logs", number).stdout == expected


def test_a_pipe_that_closes_ends_logs_quietly(cli: Cli) -> None:
    number = started(cli, "seq 1 50000")
    assert cli("watch", number).returncode == 0
    for command in (["logs", number], ["watch", number], ["logs", number, "--plain"]):
        process = cli.start(*command)
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(30) == 141


def test_abort_ends_a_build_and_once_only(cli: Cli) -> None:
    number = started(cli, "sleep 100")
    aborted = cli("abort", number)
    assert (aborted.returncode, aborted.stdout) == (0, ""), aborted.stderr
    assert cli("watch", number).returncode == 3
    again = cli("abort", number)  # FAULTS 14
    assert again.returncode == 1
    assert again.stderr.startswith("Error: ")
    assert "Traceback" not in again.stderr


def test_builds_are_listed_newest_first_as_a_table_and_as_json(cli: Cli) -> None:
    numbers = [started(cli, "exit 3", "--name", f"listed-{n}") for n in range(3)]
    for number in numbers:
        assert cli("watch", number).returncode == 3
    table = cli("builds", "--limit", "3", NO_COLOR="1").stdout.splitlines()
    assert table[0].split() == ["number", "status", "name", "created", "took", "by"]
    assert [row.split()[:3] for row in table[1:]] == [[n, "failed", f"listed-{i}"] for i, n in reversed(list(enumerate(numbers)))]
    listed = json.loads(cli("builds", "--limit", "2", "--json", "--status", "failed").stdout)
    assert [(build["status"], build["number"]) for build in listed] == [("failed", 3), ("failed", 2)]
    assert json.loads(cli("builds", "--json", "--status", "succeeded").stdout) == []


@pytest.mark.parametrize("command", [["watch"], ["logs"], ["abort"], ["download"]])
def test_an_unknown_build_is_one_clear_line(cli: Cli, command: list[str]) -> None:
    result = cli(*command, "999999")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_another_team_is_as_if_absent(cli: Cli) -> None:  # FAULTS 11
    result = cli("builds", "--team", "others")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_token_is_said_before_anything_is_uploaded(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("true"), PENSTOCK_TOKEN="pst_" + "x" * 43)
    assert result.returncode == 1
    assert "log in with `penstock login`" in result.stderr
    assert "uploaded" not in result.stderr


def test_login_checks_the_token_and_keeps_it_to_oneself(cli: Cli, team: System) -> None:
    targets = cli.folder / "own/targets.json"
    here = {"PENSTOCK_TARGETS": str(targets)}
    assert cli("login", "--url", team.url, "--token", "pst_" + "x" * 43, **here).returncode == 1
    assert not targets.exists()
    done = cli("login", "--url", team.url, "--token", team.token, "--name", "mine", **here)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(targets.stat().st_mode) == 0o600
    assert cli("builds", **here).returncode == 0
    assert cli("version", **here).stdout.splitlines()[1].startswith("server ")


def test_a_running_build_is_watched_live_by_several(cli: Cli) -> None:
    number = started(cli, "echo first; for i in $(seq 100); do sleep 0.02; done; echo last")
    watchers = [cli.start("watch", number) for _ in range(2)]
    for watcher in watchers:
        assert watcher.stdout
        assert read_until(watcher.stdout, "first") == "first\n"
    for watcher in watchers:
        out, err = watcher.communicate(timeout=60)
        assert (watcher.returncode, out) == (0, "last\n"), err


# --- the same by the client


async def test_the_client_does_it_all(team: System, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("x" * 5000)
    script = {"path": "sh", "args": ["-c", "cat src/a > out/b; echo hi"]}
    config = {"inputs": [{"name": "src"}], "outputs": [{"name": "out"}], "run": script}
    plan = {"stages": [{"name": "s", "steps": [{"step": "run", "name": "t", "config": config}]}]}
    async with Client(team.url, team.token, team.team) as client:
        artifact = await client.upload(tmp_path / "in", "src")
        assert (artifact.size, artifact.files) == (5000, 1)
        build = await client.create_build(plan, {"src": artifact}, key="once")
        assert (await client.create_build(plan, {"src": artifact}, key="once")).id == build.id  # FAULTS 12
        events = [event async for event in client.events(build.id)]
        assert isinstance(events[-1], BuildEnded)
        assert "hi\n" in [event.entry.text for event in events if isinstance(event, BuildLogged)]
        middle = next(i for i, event in enumerate(events) if isinstance(event, BuildLogged))
        again = [event async for event in client.events(build.id, events[middle].id)]
        logged = [event.entry for event in events[middle + 1 :] if isinstance(event, BuildLogged)]
        assert [event.entry for event in again if isinstance(event, BuildLogged)] == logged
        done = await client.wait(build.number)
        assert (done.status, done.percent, done.exit_code) == ("succeeded", 100, 0)
        assert await client.download(done.outputs["out"], tmp_path / "out") == 1
        assert (tmp_path / "out/b").read_text() == "x" * 5000
        tar: list[bytes] = []

        async def take(piece: bytes) -> None:
            tar.append(piece)

        assert await client.download(artifact, take) == len(b"".join(tar))
        quick = await client.create_build(plan, {"src": artifact.id}, wait=30)
        assert quick.status == "succeeded"
        assert (await anext(client.builds("succeeded"))).number >= quick.number


async def test_the_client_says_what_is_wrong_by_kind(team: System) -> None:
    async with Client(team.url, team.token, team.team) as client:
        with pytest.raises(NotFound):
            await client.build(10**6)
        with pytest.raises(NotFound):
            await client.download("00000000-0000-0000-0000-000000000000", Path("never"))
        with pytest.raises(Refused) as refused:
            step = {"step": "run", "name": "t", "config": {"run": {"path": "true"}}}
            await client.create_build({"stages": [{"name": "s", "steps": [step]}], "nonsense": 1})
        assert "nonsense" in str(refused.value) + refused.value.path
        with pytest.raises(PenstockError):
            await client.upload(b"this is no archive", "x")
    async with Client(team.url, "pst_" + "y" * 43) as client:
        with pytest.raises(Unauthorized):
            await client.info()
