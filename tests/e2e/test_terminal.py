"""What a task writes, as a pipe and as a terminal get it."""

import os
import pty
import subprocess
import urllib.request
from collections.abc import Sequence
from contextlib import suppress

import pytest

from tests.e2e.conftest import COMMAND, Cli

HOSTILE = (
    b"\x1b]52;c;aGFybQ==\x07"  # the clipboard
    b"\x1b]0;another title\x1b\\"
    b"\x1b[2J\x1b[H\x1b[7A"  # all is gone, and what follows stands elsewhere
    b"\x1b[?1049h\x1b[6n\x1bc\x1bP$qm\x1b\\\x9b3A\x0e"
    b"<script>alert(1)</script> \x1b[1;31mred\x1b[0m 10 %\r20 %\x1b[K\n"
)
SHOWN = "<script>alert(1)</script> \x1b[1;31mred\x1b[0m 10 %\r20 %\x1b[K\r\n"


def printf(data: bytes) -> str:
    return "printf %b '" + "".join(f"\\0{byte:03o}" for byte in data) + "'"


def on_a_terminal(cli: Cli, arguments: Sequence[str], ends: int = 0) -> str:
    """All that the command line writes when both its streams are a terminal."""
    ours, theirs = pty.openpty()
    environ = {**cli.system.environ, "TERM": "xterm-256color", "PYTHONWARNINGS": "error"}
    process = subprocess.Popen([*COMMAND, *arguments], cwd=cli.folder, env=environ, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert process.wait(60) == ends, seen
    return seen.decode()


def raw(cli: Cli, *arguments: str) -> bytes:
    """What it writes to a pipe."""
    return subprocess.run([*COMMAND, *arguments], cwd=cli.folder, env=cli.system.environ, capture_output=True, check=True, timeout=60).stdout


def ran(cli: Cli, script: str) -> str:
    """The number of a build that has ended."""
    number = cli("execute", "-c", cli.task(script), "--detach").stdout.strip()
    assert cli("watch", number).returncode == 0
    return number


@pytest.mark.parametrize("command", ["execute", "watch", "logs", "logs --plain"])
def test_a_terminal_gets_text_and_colours_and_a_pipe_gets_all(cli: Cli, command: str) -> None:
    """FAULTS 102: the clipboard, the title, the cursor and what a terminal would answer are nobody's but the user's."""
    script = printf(HOSTILE) + "; " + printf(b"\x1b[41mleft red")
    task = cli.task(script)
    arguments = ["execute", "-c", str(task)] if command == "execute" else [*command.split(), ran(cli, script)]
    seen = on_a_terminal(cli, arguments)
    after = seen.partition(SHOWN)[2]
    assert after.startswith("\x1b[41mleft red\x1b[0m"), seen
    for harm in ("\x1b]", "\x1b[2J", "\x1b[H", "\x1b[7A", "\x1b[?1049", "\x1b[6n", "\x1bc", "\x1bP", "\x0e", "\x07"):
        assert harm not in seen
    got = raw(cli, *arguments)
    if command != "logs --plain":  # what is no UTF-8 is only raw where nothing else is said
        assert HOSTILE.replace(b"\x9b", "\ufffd".encode()) in got
    else:
        assert HOSTILE in got


def test_a_file_that_is_printed_is_harmless_on_a_terminal_and_whole_in_a_pipe(cli: Cli) -> None:
    """FAULTS 102: it may be a stranger's."""
    script = f"{printf(HOSTILE)} >dist/text; {printf(bytes([0, 27, 99]))} >dist/binary"
    number = cli("execute", "-c", cli.task(script, outputs=["dist"]), "--detach").stdout.strip()
    assert cli("watch", number).returncode == 0
    text, binary = f"build:{number}/dist/text", f"build:{number}/dist/binary"
    assert on_a_terminal(cli, ["artifact", "cat", text]) == "\ufffd3A" + SHOWN
    said = on_a_terminal(cli, ["artifact", "cat", binary], ends=1)
    assert said.startswith(f"Error: {binary} is binary, and this is a terminal") and "\0" not in said and "\x1b" not in said
    assert raw(cli, "artifact", "cat", text, binary) == HOSTILE + bytes([0, 27, 99])


def test_to_a_browser_a_log_is_text(cli: Cli) -> None:
    """FAULTS 102: whatever it holds, and whatever the browser would make of it."""
    number, system = ran(cli, "echo '<!doctype html><script>alert(1)</script>'"), cli.system
    url = f"{system.url}/api/v1/teams/{system.team}/builds/{number}/log"
    headers = {"Authorization": f"Bearer {system.token}", "Accept": "text/html"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        assert b"<script>" in response.read()
    assert (response.headers["Content-Type"], response.headers["X-Content-Type-Options"]) == ("text/plain; charset=utf-8", "nosniff")
