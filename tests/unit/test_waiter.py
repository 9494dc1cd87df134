"""The program that waits in a container, as a process of this machine."""

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.plan import TaskInput
from services.worker.executors.hardened import Bind, binds_of, can_wait, command_of, shape_of
from services.worker.executors.waiter import BEGUN, LARGEST, LONGEST, message, program
from tests.unit.test_containers import asked, config

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="there is no such program for other machines")


@pytest.fixture
def waiter(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    file = tmp_path / "waiter"
    file.write_bytes(program() or b"")
    file.chmod(0o555)
    with subprocess.Popen([file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_it_becomes_what_it_is_told_however_the_message_is_cut(waiter: "subprocess.Popen[bytes]") -> None:
    longest = "x" * (LONGEST - 2)
    said = message(["/bin/sh", "-c", 'echo "$X|$1|$(pwd)|${#Y}"; cat; exit 3', "sh", "é" * 1000], {"X": "a b", "Y": longest}, "/usr")
    assert said and waiter.stdin and waiter.stdout
    for piece in (said[:3], said[3:500], said[500:]):
        waiter.stdin.write(piece)
        waiter.stdin.flush()
    out, _ = waiter.communicate(timeout=20)
    assert (waiter.returncode, out) == (3, BEGUN + f"a b|{'é' * 1000}|/usr|{len(longest)}\n".encode())


NOWHERE, HERE = message(["/bin/true"], {}, "/no/such/folder") or b"", message(["/bin/true"], {}, "/") or b""


@pytest.mark.parametrize("told", [b"", b"\x09", NOWHERE, HERE[:-1]])
def test_where_it_cannot_begin_it_ends_and_says_nothing(waiter: "subprocess.Popen[bytes]", told: bytes) -> None:
    out, _ = waiter.communicate(told, timeout=20)
    assert (waiter.returncode, out) == (125, b"")


def test_the_largest_that_it_takes_the_kernel_takes(waiter: "subprocess.Popen[bytes]") -> None:
    most = {f"X{n}": "x" * 131_000 for n in range(8)}
    said = message(["/bin/true"], most, "/")
    assert said and LARGEST - (1 << 17) < len(said) <= LARGEST
    assert (waiter.communicate(said, timeout=20)[0], waiter.returncode) == (BEGUN, 0)


@pytest.mark.parametrize("environment", [{"X": "x" * (LONGEST - 1)}, {f"X{n}": "x" * 131_000 for n in range(9)}, {"X": "a\0b"}])
def test_what_the_kernel_might_not_take_is_an_engine_s_to_refuse(environment: dict[str, str]) -> None:
    assert message(["/bin/true"], environment, "/") is None


def test_one_shape_is_the_same_container_whatever_it_runs() -> None:
    one = asked(config(("src",), params={"X": "1"}))
    assert shape_of(one) == shape_of(asked(config(("src",), params={"X": "2"})))
    assert len({shape_of(asked(each)) for each in (config(("src",)), config(("other",)), config(network=True), config(("src",), ("src",)))}) == 4
    assert shape_of(one) != shape_of({**one, "Image": "sha256:2"}) != shape_of({**one, "User": "builder"})


def test_what_the_engine_would_add_to_an_environment_is_added() -> None:
    body = asked(config(params={"PATH": "/mine"}))
    argv, environment, directory = command_of(body, ["PATH=/image", "A=b=c"], "0123456789abcdef")
    assert argv == ["/.penstock-init", "--", "make"] and directory == "/workspace"
    assert (environment["PATH"], environment["A"], environment["HOSTNAME"], environment["HOME"]) == ("/mine", "b=c", "0123456789ab", "/home/penstock")
    assert command_of(asked(config()), [], "x")[1]["PATH"].endswith(":/bin")


def test_a_container_waits_only_where_all_that_is_mounted_can_be_empty_until_then() -> None:
    assert can_wait(config(("src", "other"), ("dist",)), binds_of(config(("src", "other"), ("dist",))))
    for task in (config(("src",), ("src/dist",)), config(("a", "a/b")), config((".",), ("dist",))):
        assert not can_wait(task, binds_of(task))
    optional = config()
    optional.inputs.append(TaskInput(name="src", optional=True))
    assert not can_wait(optional, [Bind(".", True), Bind("src", False)])
