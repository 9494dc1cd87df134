"""What git shows of a folder, asked in the background: git works while the caller does something else."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from penstock.client.errors import Unreadable


class GitList:
    """Tracked and untracked paths below a folder, ended by NUL each. Begins at once; `close` it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]] = []
        real = folder.resolve()
        self._within = "GIT_DIR" in os.environ or any(os.path.lexists(parent / ".git") for parent in (real, *real.parents))
        self._top = os.path.lexists(real / ".git")
        if not self._within:
            return
        try:
            self._start("ls-files", "-z", "--cached", "--others", "--exclude-standard")
            if not self._top:
                self._start("check-ignore", "-q", ".")
        except FileNotFoundError:
            raise Unreadable(
                f"{folder} is in a git work tree, but there is no `git` here to list it: install git, or use --include-ignored"
            ) from None

    def result(self) -> bytes | None:
        """The paths, or None when all of the folder is meant: it is in no work tree, or is itself ignored by the one it is in (who names an
        ignored folder means what is in it). Raises Unreadable."""
        if not self._within:
            return None
        code, listed, said = self._ended(0)
        if code:
            if b"dubious ownership" in said:
                real = self._folder.resolve()
                raise Unreadable(f"git does not trust {self._folder}, which someone else owns: `git config --global --add safe.directory '{real}'`")
            self._start("rev-parse", "--is-inside-work-tree")
            code, inside, _ = self._ended(-1)
            if code or inside.strip() != b"true":
                return None
            raise Unreadable(f"git cannot list {self._folder}: {os.fsdecode(said).strip()}")
        if not self._top and self._ended(1)[0] == 0:
            return None
        return listed

    def close(self) -> None:
        for process, out, said in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            out.close()
            said.close()

    def _start(self, *arguments: str) -> None:
        """Its output goes to files: a pipe would hold git up until somebody reads."""
        out, said = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        try:
            command = ["git", "-C", str(self._folder), *arguments]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, env={**os.environ, "LC_ALL": "C"})
        except BaseException:
            out.close()
            said.close()
            raise
        self._processes.append((process, out, said))

    def _ended(self, n: int) -> tuple[int, bytes, bytes]:
        process, out, said = self._processes[n]
        code = process.wait()
        out.seek(0)
        said.seek(0)
        return code, out.read(), said.read()
