"""What the engine is asked for: a container that has what its step needs and nothing else. Pure."""

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from proto.messages import Attempt
from proto.plan import RunStep, TaskConfig
from services.worker.executors.executor import Environment
from services.worker.executors.sandboxes import Folders

_LEAST_SHARES = 2
WORKSPACE, HOME, TEMP = "/workspace", "/home/penstock", "/tmp"  # noqa: S108
WAITER, INIT = "/.penstock-waiter", "/.penstock-init"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_COMMAND = ("Entrypoint", "Cmd", "Env", "WorkingDir", "Labels")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The most that one container gets. `memory` in bytes, swap included; `cpus` in cores (0: all)."""

    memory: int
    cpus: float = 0.0
    pids: int = 4096

    def memory_of(self, config: TaskConfig) -> int:
        """A task may want less, and gets no more."""
        wanted = config.container_limits.memory if config.container_limits else None
        return min(wanted or self.memory, self.memory)


class Bind(NamedTuple):
    """A folder of the workspace, as the step sees it; `path` is relative ("." is all of it)."""

    path: str
    writable: bool


def binds_of(config: TaskConfig) -> list[Bind]:
    """Inputs can only be read, unless their folder is an output's or a cache's too. The shallow ones come first: they are mounted in this order."""
    writable = {posixpath.normpath(each.path or each.name) for each in config.outputs} | {posixpath.normpath(each.path) for each in config.caches}
    inputs = {posixpath.normpath(each.path or each.name) for each in config.inputs}
    read_only = {path for path in inputs if not any(_inside(path, each) for each in writable)}
    holes = {path for path in writable if any(_inside(path, each) for each in read_only)}
    found = {".": "." not in read_only, **dict.fromkeys(read_only, False), **dict.fromkeys(holes, True)}
    return sorted((Bind(*each) for each in found.items()), key=lambda bind: (bind.path != ".", bind.path.count("/"), bind.path))


def _inside(path: str, folder: str) -> bool:
    return folder == "." or path == folder or path.startswith(folder + "/")


def name_of(attempt: Attempt, step: RunStep) -> str:
    """What the step's container is called. A stage's name has no dot: no two are called the same."""
    return f"penstock-{attempt.build}-{attempt.stage}.{step.name}-{attempt.number}"


def container_of(step: RunStep, image: str, user: str, folders: Folders, binds: list[Bind], labels: dict[str, str], limits: Limits) -> dict[str, Any]:
    """The body of the engine's `create`. `image` is an id; `user` as the engine takes it, "" for the image's own."""
    config, memory = step.config, limits.memory_of(step.config)
    mounts = [_mount(str(folders.workspace / bind.path), posixpath.normpath(f"{WORKSPACE}/{bind.path}"), bind.writable) for bind in binds]
    host: dict[str, Any] = {
        "Mounts": [*mounts, _mount(str(folders.home), HOME, True)],
        "Tmpfs": {TEMP: "rw,nosuid,nodev,exec,mode=1777"},
        "NetworkMode": "bridge" if config.network else "none",
        "IpcMode": "private",
        "Init": True,  # it reaps what the step loses, and SIGTERM reaches the step, which as process 1 would not hear it
        "LogConfig": {"Type": "none"},
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": int(limits.cpus * 1e9),
        "CpuShares": max(_LEAST_SHARES, cpu) if (cpu := config.container_limits.cpu if config.container_limits else None) else 0,
        "PidsLimit": limits.pids,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
    }
    if step.privileged:
        host |= {"Privileged": True}
    else:
        host |= {"CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"], "ReadonlyRootfs": True}
    run, directory = config.run, posixpath.normpath(f"{WORKSPACE}/{config.run.dir or ''}")
    path = posixpath.normpath(f"{directory}/{run.path}") if "/" in run.path and not run.path.startswith("/") else run.path
    return {
        "Image": image,
        "Entrypoint": [path],
        "Cmd": run.args,
        "Env": [f"{key}={value}" for key, value in Environment(HOME, TEMP).of(step).items()],
        "WorkingDir": directory,
        "User": user,
        "Labels": labels,
        "AttachStdout": True,
        "AttachStderr": True,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": host,
    }


def shape_of(wanted: Mapping[str, Any]) -> bytes:
    """All of a container but for the command that it runs and what people are told of it: what is equal here may do the same."""
    return msgspec.json.encode({key: value for key, value in wanted.items() if key not in _COMMAND}, order="sorted")


def waiting_of(wanted: Mapping[str, Any], labels: dict[str, str], waiter: str, init: str) -> dict[str, Any]:
    """The same container, which waits to be told what to run. `waiter` and `init` are programs on the engine's machine: what waits becomes the
    init that the engine would have given it."""
    host = wanted["HostConfig"]
    mounts = [*host["Mounts"], _mount(waiter, WAITER, False), _mount(init, INIT, False)]
    return {
        **wanted,
        "Entrypoint": [WAITER],
        "Cmd": [],
        "Env": [],
        "WorkingDir": "/",
        "Labels": labels,
        "AttachStdin": True,
        "OpenStdin": True,
        "StdinOnce": True,
        "HostConfig": {**host, "Init": False, "Mounts": mounts},
    }


def command_of(wanted: Mapping[str, Any], image: Sequence[str], container: str) -> tuple[list[str], dict[str, str], str]:
    """What one that waited becomes, in which environment and where: as the engine does it. `image` is the image's own environment."""
    said = (each.partition("=")[::2] for each in (*image, *wanted["Env"]))
    environment = {"PATH": _PATH, "HOSTNAME": container[:12], **dict(said)}
    return [INIT, "--", *wanted["Entrypoint"], *wanted["Cmd"]], environment, wanted["WorkingDir"]


def can_wait(config: TaskConfig, binds: Sequence[Bind]) -> bool:
    """Whether its folders can be mounted before anything is in them: an input's must still be empty when it comes."""
    inner = [bind.path for bind in binds if bind.path != "."]
    apart = not any(_inside(path, other) for path in inner for other in inner if path != other)
    return binds[0].writable and apart and not any(each.optional for each in config.inputs)


def _mount(source: str, target: str, writable: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": not writable}
