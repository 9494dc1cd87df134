"""Whether a command is there, found out before anything of its step runs: what is said of it once the step runs, the step may say."""

import posixpath
import stat
from collections.abc import Mapping
from pathlib import Path

from services.worker.executors.commands import NotRunnable
from services.worker.executors.engine import Engine, Refused
from services.worker.executors.executor import Job
from services.worker.executors.hardened import HOME, TEMP, WORKSPACE

REMEMBERED = 4096
_MADE_AT_START = (HOME, TEMP, "/proc", "/dev", "/sys")


class Programs:
    """What an image has is asked once: it does not change."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._there: dict[tuple[str, str, str], None] = {}

    async def check(self, job: Job, container: str, image: str, path: str, environment: Mapping[str, str]) -> None:
        """That a container of `image` finds `path` (see `container_of`). What cannot be known beforehand is left to whoever runs it. Raises
        NotRunnable, EngineGone."""
        if ".." in path.split("/"):
            return  # where that leads, its container sees
        if path.startswith(f"{WORKSPACE}/"):
            _check_here(job, path.removeprefix(f"{WORKSPACE}/"))
            return
        folders = [""] if "/" in path else environment.get("PATH", "").split(":")
        places = [posixpath.normpath(f"{folder}/{path}") if folder else path for folder in folders]
        known = image, path, ":".join(folders)
        if known in self._there or not all(_is_the_images(place) for place in places):
            return
        why = ""
        for place in places:
            try:
                mode = await self._engine.mode(container, place)
            except Refused:
                return
            if mode is not None and not (unfit := _why_not(mode)):
                self._there[known] = None
                if len(self._there) > REMEMBERED:
                    del self._there[next(iter(self._there))]
                return
            why = why or (f"`{place}` {unfit}" if mode is not None else "")
        run = job.step.config.run.path
        raise NotRunnable(
            f"run.path: {why or f'`{run}` does not exist'} in its image" + (f" (PATH is {':'.join(folders)})" if folders != [""] else "")
        )


def _is_the_images(place: str) -> bool:
    return place.startswith("/") and not any(f"{place}/".startswith(f"{made}/") for made in (WORKSPACE, *_MADE_AT_START))


def _check_here(job: Job, path: str) -> None:
    """One of the workspace, which is on this machine. Where a link leads is for its container to see. Raises NotRunnable."""
    if job.link_in(path):
        return
    try:
        why = _why_not(Path(job.folders.workspace, path).lstat().st_mode)
    except OSError:
        why = "does not exist"
    if why:
        raise NotRunnable(f"run.path: `{job.step.config.run.path}` {why}")


def _why_not(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "" if stat.S_ISLNK(mode) or mode & 0o111 else "is not executable"
