"""A Docker engine of the tests' own, and images for it: no registry, no network, nothing of the machine's engine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from services.worker.executors.processes import look, send

IMAGE = "penstock-test:1"
PROGRAMS = ("sh", "ls", "cat", "id", "sleep", "pwd", "echo", "touch", "mkdir", "ln", "dd", "true", "ip")
"""Of busybox, in the image."""


class Dockerd:
    """`kill` it as nothing else may, `start` it again: what it had on disk is there. Its mounts are its own, and go with it; so is its network, where
    it has a `bridge` (its address there, with the length of the prefix)."""

    def __init__(self, folder: Path, bridge: str = "") -> None:
        self.folder = folder
        self._bridge = bridge
        self.url = f"unix://{folder}/docker.sock"
        self._supervisors: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        (self.folder / "pid").unlink(missing_ok=True)
        supervised = [sys.executable, "-m", "tests.engine_supervisor", "dockerd"]
        settings = [
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/pid",
            f"--host={self.url}",
            f"--config-file={self.folder}/config.json",
            # Neither the machine's network nor its firewall is touched.
            *([f"--bip={self._bridge}", "--userland-proxy=false", "--ip-forward=false"] if self._bridge else ["--bridge=none"]),
            "--iptables=false",
            "--ip6tables=false",
        ]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["unshare", *(["--net"] if self._bridge else []), "--mount", "--propagation=slave", *supervised, *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parent.parent,
                start_new_session=True,
            )
        self._supervisors.append(process)
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "--host", self.url, "version"], capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("no engine here: " + (self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def inside(self, *command: str) -> list[str]:
        """To run a command in its network."""
        return ["nsenter", "--net", "--target", str(self._pid()), *command]

    def kill(self) -> None:
        """dockerd alone: containerd and the containers go on."""
        pid = self._pid()
        send(pid, signal.SIGKILL)
        while (seen := look(pid)) is not None and seen.state != "Z":
            time.sleep(0.01)

    def terminate(self) -> None:
        """As a restart of the service does it: it stops its containers, and ends."""
        send(self._pid(), signal.SIGTERM)

    def stop(self) -> None:
        """And everything that it began."""
        with contextlib.suppress(FileNotFoundError):
            self.terminate()
        for process in reversed(self._supervisors):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.terminate()
            process.wait()

    def _pid(self) -> int:
        return int((self.folder / "pid").read_text())


def root_filesystem() -> bytes:
    """A tar of busybox and what needs no more than that."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.add(os.path.realpath(busybox), "bin/busybox")
        for name in PROGRAMS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for path, text in {
            "etc/passwd": "root:x:0:0::/root:/bin/sh\nbuilder:x:1234:1234::/:/bin/sh\n",
            "etc/group": "root:x:0:\nbuilder:x:1234:\n",
            "bin/not-executable": "#!/bin/sh\n",
        }.items():
            info = tarfile.TarInfo(path)
            info.size = len(text)
            tar.addfile(info, BytesIO(text.encode()))
    return made.getvalue()


@contextlib.contextmanager
def a_dockerd(bridge: str = "") -> Iterator[Dockerd]:
    """With IMAGE on it. Only where `no_engine` says nothing."""
    # Short: containerd's sockets lie below, and their paths have 100 letters.
    folder = Path(tempfile.mkdtemp(prefix="pe-", dir="/tmp"))
    (folder / "config.json").write_text("{}")
    engine = Dockerd(folder, bridge)
    try:
        engine.start()
        subprocess.run(["docker", "--host", engine.url, "import", "-", IMAGE], input=root_filesystem(), capture_output=True, check=True)
        yield engine
    finally:
        engine.stop()
        shutil.rmtree(folder)


def no_engine() -> str:
    """Why none can be started here; "" when one can."""
    missing = [name for name in ("dockerd", "docker", "docker-init", "busybox", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return "no Docker engine to start: it takes root, and the packages docker.io, tini and busybox-static"
    return ""


@pytest.fixture(scope="session")
def engines() -> None:
    """They can be started. A skip counts as a failure in CI."""
    if why := no_engine():
        pytest.skip(why)


@pytest.fixture(scope="session")
def dockerd(engines: None) -> Iterator[Dockerd]:
    """Shared: for tests that leave it as it is."""
    with a_dockerd() as engine:
        yield engine


@pytest.fixture
def dockerd_of_our_own(engines: None) -> Iterator[Dockerd]:
    with a_dockerd() as engine:
        yield engine
