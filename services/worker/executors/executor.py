"""What a stage needs of whatever runs its steps: a process in a sandbox, or a container."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import msgspec

from proto.messages import Attempt
from proto.plan import RunStep, TaskConfig, image_type
from services.worker.executors.sandboxes import Folders

Stream = Literal["stdout", "stderr"]


class CannotRun(Exception):
    """The step cannot be run, or not to its end, through no fault of its command: it is errored. The text is for people."""


class Job(msgspec.Struct, frozen=True):
    """One step of an attempt, its inputs in their places. `on_output` says whether it will take more now; if not, `Running.resume` follows. `say`
    puts a line into the step's log. `link_in` finds the first link on the way to a folder of the workspace: steps make them. `fresh`: no step has
    run in its folders yet."""

    attempt: Attempt
    team: str
    step: RunStep
    folders: Folders
    on_output: Callable[[Stream, bytes], bool]
    say: Callable[[str], None]
    link_in: Callable[[str], object | None]
    fresh: bool = False


class Running(Protocol):
    """A step that runs."""

    @property
    def ended(self) -> "asyncio.Future[int]":
        """Its exit code, or minus the number of the signal that ended it; nothing of it is left then. Or CannotRun."""

    @property
    def image(self) -> str:
        """Exactly which image it runs in, "" without."""

    @property
    def reference(self) -> str:
        """How its task names that image, made whole."""

    @property
    def error(self) -> str:
        """When it has ended: why, where the code does not tell."""

    def interrupt(self, grace: float) -> None:
        """SIGTERM that reaches the task; SIGKILL for everything when that has not ended it within `grace` seconds."""

    def kill(self) -> None:
        """SIGKILL for everything."""

    def resume(self) -> None:
        """Read on, after `on_output` had enough."""


class Executor(Protocol):
    @property
    def name(self) -> str:
        """What people are told that steps run in."""

    @property
    def wraps(self) -> bool:
        """Whether a signal that ends the step comes back as exit code 128 + n of something around it."""

    async def start(self, job: Job) -> Running:
        """Raises CannotRun, NotRunnable, OSError. When cancelled: nothing of it is left."""


class Containers(Executor, Protocol):
    """They take time to start, and one may wait for its step already, in folders of its own."""

    def folders_for(self, step: RunStep) -> Folders | None:
        """Those in which the first step of a stage would begin at once, if there are any. Whoever gets them will `start` it in them, or not, and then
        `release` them."""

    async def release(self, folders: Folders) -> None:
        """Nothing will be started in them any more: they can be removed when this is done."""


class Executors(msgspec.Struct, frozen=True):
    """What this worker has: `containers` only where an engine answered."""

    process: Executor
    containers: Containers | None = None

    def of(self, config: TaskConfig) -> Executor:
        """Raises CannotRun."""
        if image_type(config) is None:
            return self.process
        if self.containers is None:
            raise CannotRun("this worker runs no images")
        return self.containers

    def folders_for(self, step: RunStep) -> Folders | None:
        """See Containers."""
        return self.containers.folders_for(step) if self.containers is not None and image_type(step.config) else None

    async def release(self, folders: Folders) -> None:
        """See Containers."""
        if self.containers is not None:
            await self.containers.release(folders)


class Environment(msgspec.Struct, frozen=True):
    """What every step finds in its environment, beside its own params."""

    home: str
    temp: str

    def of(self, step: RunStep, path: str = "") -> Mapping[str, str]:
        return {**({"PATH": path} if path else {}), "HOME": self.home, "TMPDIR": self.temp, "LANG": "C.UTF-8", **step.config.params}
