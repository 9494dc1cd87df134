"""What a step's container is to find in its workspace, seen to before it is made."""

import os
import stat
from pathlib import Path

from services.worker.executors.commands import NotRunnable
from services.worker.executors.executor import CannotRun, Job
from services.worker.executors.hardened import Bind, binds_of


def checked(job: Job) -> list[Bind]:
    """What is to be mounted is there, and no link leads out of the workspace: the engine would follow it. Raises CannotRun, NotRunnable."""
    config = job.step.config
    binds = [bind for bind in binds_of(config) if bind.writable or job.link_in(bind.path) or (job.folders.workspace / bind.path).exists()]
    for bind in binds:
        if link := job.link_in(bind.path):
            raise CannotRun(f"the folder `{bind.path}` leads through a link, `{link}`")
    directory = config.run.dir or "."
    if not job.link_in(directory) and not (job.folders.workspace / directory).is_dir():
        raise NotRunnable(f"run.dir: the folder `{config.run.dir}` does not exist")
    if any("\0" in part for part in (config.run.path, *config.run.args)):
        raise NotRunnable("run: a command line cannot hold a NUL")
    return binds


def open_to_all(job: Job, binds: list[Bind]) -> None:
    """The step runs as somebody else than who made its folders: it may write where it should. What it can only read is left as it is."""
    for folder in (job.folders.workspace, job.folders.home):
        folder.chmod(0o777)
    read_only = [job.folders.workspace / bind.path for bind in binds if not bind.writable]
    for root, folders, files in os.walk(job.folders.workspace):
        folders[:] = [each for each in folders if Path(root, each) not in read_only]
        for path in (Path(root, each) for each in (*folders, *files)):
            seen = path.lstat().st_mode
            if stat.S_ISDIR(seen):
                path.chmod(0o777)
            elif stat.S_ISREG(seen):
                path.chmod(0o777 if seen & 0o111 else 0o666)
