"""The builds that run while things break, and what each must come to."""

import io
import tarfile
from collections.abc import Mapping
from typing import Any, NamedTuple

INPUT = {"one": b"first\n", "deep/two": bytes(range(256)) * 64}


class Work(NamedTuple):
    """A script and its one right result. `lines` is all of its stdout; `outputs` are files by output."""

    name: str
    script: str
    status: str = "succeeded"
    exit_code: int | None = 0
    lines: tuple[str, ...] = ()
    outputs: Mapping[str, Mapping[str, bytes]] = {}

    def plan(self, mark: str) -> dict[str, Any]:
        """`mark` goes into the step's environment. A killed worker is no fault of the build: it may be tried often."""
        config: dict[str, Any] = {"run": {"path": "sh", "args": ["-c", self.script]}, "params": {"MARK": mark}}
        if self.outputs:
            config |= {"inputs": [{"name": "src"}], "outputs": [{"name": name} for name in self.outputs]}
        return {"stages": [{"name": "main", "steps": [{"step": "run", "name": "task", "config": config}], "max_attempts": 10}]}


INSTANT = Work("instant", "true")
FAILING = Work("failing", "echo this goes wrong; exit 7", "failed", 7, ("this goes wrong\n",))
COPYING = Work("copying", "cp -r src/. dist && echo new > dist/new", outputs={"dist": {**INPUT, "new": b"new\n"}})


def talking(lines: int, pause: float) -> Work:
    """Numbered lines, one after each pause (in seconds)."""
    script = f"i=0; while [ $i -lt {lines} ]; do echo line $i; sleep {pause}; i=$((i+1)); done"
    return Work(f"talking {lines}", script, lines=tuple(f"line {i}\n" for i in range(lines)))


def sleeping(seconds: float) -> Work:
    return Work(f"sleeping {seconds:g}", f"echo begin; sleep {seconds}; echo end", lines=("begin\n", "end\n"))


MIX = (INSTANT, talking(10, 0.1), FAILING, sleeping(0.5), COPYING, INSTANT, talking(300, 0.002), sleeping(1.5))


def archive(files: Mapping[str, bytes]) -> bytes:
    """The files as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def files_of(tar: bytes) -> dict[str, bytes]:
    """A tar's files."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archived:
        return {member.name: archived.extractfile(member).read() for member in archived if member.isfile()}  # type: ignore[union-attr]
