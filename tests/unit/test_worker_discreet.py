"""What the worker finds out for a step before it runs: nothing of this machine that the step itself would not see, whatever links there are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proto.messages import Attempt
from proto.plan import Run, RunStep, TaskConfig, TaskInput
from services.worker.executors.commands import Commands, NotRunnable
from services.worker.executors.engine import Engine
from services.worker.executors.executor import CannotRun, Job
from services.worker.executors.programs import Programs
from services.worker.executors.readied import checked
from services.worker.executors.sandboxes import Bubblewrap, Folders
from services.worker.workspace import Workspace

PATH = "/usr/bin:/bin"


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders.below(tmp_path / "work")
    for folder in (made.workspace, made.home, made.temp):
        folder.mkdir(parents=True)
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the worker's machine."""
    (tmp_path / "machines").mkdir()
    return tmp_path / "machines"


def put(place: Path, kind: str) -> None:
    if kind == "folder":
        place.mkdir()
    elif kind != "nothing":
        place.write_text("#!/opt/private/python\n" if kind == "script" else "\x7fELF")
        place.chmod(0o644 if kind == "file" else 0o755)


KINDS = ("nothing", "folder", "file", "program", "script")


def commands(folders: Folders) -> Commands:
    return Commands(Bubblewrap(folders.root.parent / "etc", []))


def said(folders: Folders, path: str, where: str = "") -> str:
    """What a task's author would read."""
    try:
        commands(folders).find(Run(path=path), {"PATH": where}, folders)
    except NotRunnable as error:
        return str(error)
    return ""


def job_of(folders: Folders, config: TaskConfig) -> Job:
    def link_in(path: str) -> object | None:
        return Workspace.link_in(cast(Any, SimpleNamespace(folder=folders.workspace)), path)

    return Job(Attempt("b", "main", 1), "t", RunStep(name="s", config=config), folders, lambda *_: True, lambda _: None, link_in)


async def test_a_command_above_the_workspace_is_looked_for_by_its_container_only(folders: Folders, outside: Path) -> None:
    for kind in KINDS:
        put(outside / kind, kind)
        job = job_of(folders, TaskConfig(run=Run(path=f"/workspace/../../machines/{kind}")))
        await Programs(cast(Engine, None)).check(job, "c", "i", job.step.config.run.path, {})


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_an_optional_inputs_place_is_refused_wherever_it_leads(folders: Folders, outside: Path, there: bool) -> None:
    (folders.workspace / "opt").symlink_to(outside if there else outside / "nothing")
    job = job_of(folders, TaskConfig(run=Run(path="true"), inputs=[TaskInput(name="opt", optional=True)]))
    with pytest.raises(CannotRun, match="the folder `opt` leads through a link, `opt`"):
        checked(job)


@pytest.mark.parametrize(
    ("path", "where"),
    [("./link", ""), ("folder/tool", ""), ("/workspace/link", ""), ("/home/link", ""), ("link", "/workspace"), ("tool", "/workspace/folder")],
)
def test_what_is_said_of_a_command_behind_a_link_does_not_tell_what_this_machine_has(folders: Folders, outside: Path, path: str, where: str) -> None:
    told = set()
    for kind in KINDS:
        (outside / kind).mkdir()
        put(outside / kind / "tool", kind)
        for link, target in ((folders.workspace / "link", "tool"), (folders.home / "link", "tool"), (folders.workspace / "folder", "")):
            link.unlink(missing_ok=True)
            link.symlink_to(outside / kind / target)
        told.add(said(folders, path, where))
    assert len(told) == 1 and "private" not in str(told)


@pytest.mark.parametrize("path", ["/usr/..{0}", "/workspace/../../secret", "../../secret", "./script", "./relative"])
def test_no_other_way_tells_either(folders: Folders, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a path that goes up, nor as an interpreter."""
    monkeypatch.chdir(folders.workspace)
    told = set()
    for kind in KINDS:
        secret = folders.root.parent / "secret"
        put(secret, kind)
        for name, interpreter in (("script", f"/usr/..{secret}"), ("relative", "../../secret")):
            put(folders.workspace / name, "program")
            (folders.workspace / name).write_text(f"#!{interpreter}\n")
        told.add(said(folders, path.format(secret)).replace(str(secret), ""))
        secret.rmdir() if kind == "folder" else secret.unlink(missing_ok=True)
    assert len(told) == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_to_run_in_that_is_a_link_is_the_sandboxes_to_find(folders: Folders, there: bool) -> None:
    (folders.workspace / "dir").symlink_to("/root" if there else "/opt/nothing")
    command = commands(folders).find(Run(path="sh", dir="dir"), {"PATH": PATH}, folders)
    assert (command.argv, command.directory) == (["/usr/bin/sh"], "dir")


def test_links_lead_where_they_lead_the_step(folders: Folders) -> None:
    """Within its own folders, and to what it is shown of this machine."""
    (folders.workspace / "v1").mkdir()
    put(folders.workspace / "v1" / "tool", "program")
    put(folders.workspace / "v1" / "plain", "file")
    put(folders.temp / "there", "program")
    links = {
        "now": "v1",
        "abs": "/workspace/now/tool",
        "up": "now/../now/plain",
        "temp": "/tmp/there",
        "sh": "/usr/bin/sh",
        "round": "round",
        "etc": "/etc/x",
    }
    for name, target in links.items():
        (folders.workspace / name).symlink_to(target)
    told = {}
    for path in ("./now/tool", "./now/nope", "./v1/../abs", "./up", "./temp", "./sh", "./round", "./etc", "/usr/bin/../bin/sh", "/opt/x"):
        told[path] = said(folders, path).removeprefix("run.path: ")
    refused = {"./now/nope": "does not exist", "./up": "is not executable", "/opt/x": "does not exist in the sandbox"}
    assert {path: why for path, why in told.items() if why} == {path: f"`{path}` {why}" for path, why in refused.items()}
    found = commands(folders).find(Run(path="sh"), {"PATH": "/workspace/now:/usr/bin"}, folders)
    assert found.argv == ["/usr/bin/sh"]
