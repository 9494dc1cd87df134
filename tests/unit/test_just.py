"""`./just` on a machine that lacks something says what, and what to install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVERYWHERE = ("sh", "cat", "cksum", "dirname", "mkdir", "rm", "sed", "mv")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone beside a folder of programs that holds only what every system has."""
    (tmp_path / "bin").mkdir()
    for program in EVERYWHERE:
        found = shutil.which(program)
        assert found is not None
        (tmp_path / "bin" / program).symlink_to(found)
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("just", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, clone)
    return clone


def install(clone: Path, name: str, script: str) -> None:
    program = clone.parent / "bin" / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def run(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([clone / "just"], env={"PATH": str(clone.parent / "bin")}, capture_output=True, text=True, timeout=30)


def test_git_is_asked_for(clone: Path) -> None:
    ended = run(clone)
    assert (ended.returncode, ended.stderr) == (1, "just: git is missing; as root: apt-get install git\n")


def test_python_is_asked_for_also_when_it_is_too_old(clone: Path) -> None:
    install(clone, "git", "")
    wanted = "just: Python 3.11 or newer is missing; as root: apt-get install python3 python3-venv\n"
    assert run(clone).stderr == wanted
    install(clone, "python3", 'case "$2" in *version_info*) exit 1 ;; esac')
    assert (run(clone).returncode, run(clone).stderr) == (1, wanted)


def test_the_venv_module_is_asked_for(clone: Path) -> None:
    install(clone, "git", "")
    install(clone, "python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    assert run(clone).stderr == "just: python3 has no venv module; as root: apt-get install python3-venv\n"


def test_an_environment_that_is_made_is_used_as_it_is(clone: Path) -> None:
    """Nothing but the stamp is looked at: neither git nor Python nor a network is needed."""
    made = clone / ".venv" / "bin"
    made.mkdir(parents=True)
    (made / "python").symlink_to(sys.executable)
    (made / "just").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (made / "just").chmod(0o755)
    both = (clone / "pyproject.toml").read_bytes() + (clone / "requirements.lock").read_bytes()
    sums = subprocess.run(["cksum"], input=both, capture_output=True, check=True).stdout.decode().strip()
    (clone / ".venv" / ".made-for").write_text(f"{os.path.realpath(clone)} {sums}")
    ended = run(clone)
    assert (ended.stdout, ended.stderr) == (f"--justfile\n{os.path.realpath(clone)}/justfile\n", "")


def test_the_pins_name_no_registry() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--hash=sha256:" in lock
