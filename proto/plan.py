"""What a build runs: a DAG of stages, each a list of steps placed together on one worker.

The task config is Concourse's, field for field, so that existing task files run here.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from proto.image import RUNNABLE, BadImage, parse_image, reference_of
from proto.private import Private

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$(?!\n)", description="letters, digits, `_`, `-`, `.`; at most 64")]
StageName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)", description="letters, digits, `_`, `-`; at most 64")]
Seconds = Annotated[int, msgspec.Meta(ge=1, le=30 * 24 * 3600)]

DEFAULT_STEP_TIMEOUT: int = 24 * 3600
MAX_FOLDERS: int = 256
"""Inputs, outputs and caches that a task may name, each: a package names them all, and the bus carries it."""
_NOT_THE_STEPS = ("LD_", "PENSTOCK_")
"""Variables that the loader obeys in every program, a sandbox's too (FAULTS 41), and our own."""


class _Closed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a plan: an unknown field is refused, naming it."""


class Run(_Closed, frozen=True, kw_only=True):
    """The command: `path` is looked up in PATH or, with a slash, relative to `dir`; `dir` is relative to the workspace."""

    path: str
    args: list[str] = []
    dir: str | None = None
    user: str | None = None


class TaskInput(_Closed, frozen=True, kw_only=True):
    """An input by name, placed in folder `path` of the workspace (default: its name)."""

    name: Name
    path: str | None = None
    optional: bool = False


class TaskOutput(_Closed, frozen=True, kw_only=True):
    """An output by name, taken from folder `path` of the workspace (default: its name)."""

    name: Name
    path: str | None = None


class TaskCache(_Closed, frozen=True, kw_only=True):
    """A folder of the workspace that a later run on the same worker may find again."""

    path: str


class ImageResource(Private, _Closed, frozen=True, kw_only=True):
    """The image a step wants; a placement requirement."""

    type: str
    source: dict[str, Any] = {}
    params: dict[str, Any] = {}
    version: dict[str, str] | None = None


class ContainerLimits(_Closed, frozen=True, kw_only=True):
    """Limits a step wants enforced; a placement requirement. cpu in shares, memory in bytes."""

    cpu: int | None = None
    memory: int | None = None


class TaskConfig(Private, _Closed, frozen=True, kw_only=True):
    """Concourse's task file. `params` is the step's environment. Ours are `image`, a plain reference (`host:5000/team/img:tag@sha256:…`), and
    `network`: a step in a container has none unless it asks."""

    run: Run
    platform: str = "linux"
    image: str | None = None
    image_resource: ImageResource | None = None
    network: bool = False
    rootfs_uri: str | None = None
    inputs: Annotated[list[TaskInput], msgspec.Meta(max_length=MAX_FOLDERS)] = []
    outputs: Annotated[list[TaskOutput], msgspec.Meta(max_length=MAX_FOLDERS)] = []
    caches: Annotated[list[TaskCache], msgspec.Meta(max_length=MAX_FOLDERS)] = []
    params: dict[str, str] = {}
    container_limits: ContainerLimits | None = None


class RunStep(_Closed, frozen=True, kw_only=True, tag="run", tag_field="step"):
    """Run a task config. `timeout` in seconds; past it the step is interrupted and the build fails. `privileged`: with all rights on the worker's
    machine, in a container; for teams and on workers that allow it."""

    name: Name
    config: TaskConfig
    timeout: Seconds = DEFAULT_STEP_TIMEOUT
    privileged: bool = False


class Stage(_Closed, frozen=True, kw_only=True):
    """Steps placed together on one worker. `needs` names the stages that must succeed first; `max_attempts` bounds how
    often the stage is tried when a worker is lost (1: it must not run twice)."""

    name: StageName
    steps: Annotated[list[RunStep], msgspec.Meta(min_length=1, max_length=256)]
    needs: list[StageName] = []
    tags: list[Name] = []
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=10)] = 3


class Plan(_Closed, frozen=True, kw_only=True):
    """A DAG of stages; validated by `plan_problem`."""

    stages: Annotated[list[Stage], msgspec.Meta(min_length=1, max_length=256)]


class Requirements(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker must offer to run a stage; `image` is an image type, `user`, `limits` and `privileged` whether a step asks for them."""

    platform: str = "linux"
    tags: tuple[str, ...] = ()
    image: str | None = None
    user: bool = False
    limits: bool = False
    privileged: bool = False


def requirements_of(stage: Stage) -> Requirements:
    """The union of what the stage's steps require."""
    configs = [step.config for step in stage.steps]
    images = [kind for config in configs if (kind := image_type(config))]
    return Requirements(
        platform=configs[0].platform,
        tags=tuple(sorted(set(stage.tags))),
        image=images[0] if images else None,
        user=any(c.run.user for c in configs),
        limits=any(c.container_limits for c in configs),
        privileged=any(step.privileged for step in stage.steps),
    )


def image_type(config: TaskConfig) -> str | None:
    """The type of the image that a task wants, if it wants any."""
    return "image" if config.image else config.image_resource.type if config.image_resource else None


def plan_problem(plan: Plan) -> tuple[str, str] | None:
    """(path, rule) of the first rule the plan breaks beyond its types, or None."""
    seen: set[str] = set()
    for i, stage in enumerate(plan.stages):
        if stage.name in seen:
            return f"stages[{i}].name", f"stage `{stage.name}` is named twice"
        seen.add(stage.name)
        names = [step.name for step in stage.steps]
        for j, name in enumerate(names):
            if name in names[:j]:
                return f"stages[{i}].steps[{j}].name", f"step `{name}` is named twice in its stage"
        if len({step.config.platform for step in stage.steps}) > 1:
            return f"stages[{i}].steps", "the steps of a stage run on one worker and must name the same platform"
        for j, step in enumerate(stage.steps):
            if problem := _task_problem(step.config):
                return f"stages[{i}].steps[{j}].config.{problem[0]}", problem[1]
            if step.privileged and image_type(step.config) is None:
                return f"stages[{i}].steps[{j}].privileged", "needs an image: only a container can be privileged"
    needs = {stage.name: stage.needs for stage in plan.stages}
    for i, stage in enumerate(plan.stages):
        for j, need in enumerate(stage.needs):
            if need not in needs:
                return f"stages[{i}].needs[{j}]", f"there is no stage `{need}`"
    cycle = _cycle(needs)
    return ("stages", "stages need each other in a circle: " + " → ".join(cycle)) if cycle else None


def _task_problem(config: TaskConfig) -> tuple[str, str] | None:
    if not config.run.path:
        return "run.path", "is empty"
    folders: tuple[tuple[str, Sequence[TaskInput | TaskOutput]], ...] = (("inputs", config.inputs), ("outputs", config.outputs))
    for kind, items in folders:
        names: set[str] = set()
        for i, item in enumerate(items):
            if item.name in names:
                return f"{kind}[{i}].name", f"`{item.name}` is named twice"
            names.add(item.name)
            if item.path is not None and not _inside(item.path):
                return f"{kind}[{i}].path", "must stay inside the workspace"
    for i, cache in enumerate(config.caches):
        if not _inside(cache.path):
            return f"caches[{i}].path", "must stay inside the workspace"
    if config.run.dir is not None and not _inside(config.run.dir):
        return "run.dir", "must stay inside the workspace"
    for key, value in config.params.items():
        if not key or "=" in key or "\0" in key or "\0" in value:
            return f"params.{key}", "is no environment variable: a name has no `=`, and neither part a NUL"
        if key.startswith(_NOT_THE_STEPS):
            return f"params.{key}", "would reach past the step, to what runs it: set it in the command itself"
    return _image_problem(config)


def _image_problem(config: TaskConfig) -> tuple[str, str] | None:
    if config.image is not None and (config.image_resource or config.rootfs_uri):
        return "image", "is named twice: `image_resource` or `rootfs_uri` does it too"
    if config.rootfs_uri and not config.image_resource:  # beside one Concourse overlooks it, too
        return "rootfs_uri", f"is for the container engine of a Concourse worker: {_instead_of(config.rootfs_uri)}"
    field, resource = "image", config.image_resource
    try:
        if config.image is not None:
            parse_image(config.image)
        elif resource and resource.type in RUNNABLE:
            field = "image_resource"
            reference_of(resource.type, resource.source, resource.version)
    except BadImage as bad:
        return field, str(bad)
    return None


def _instead_of(rootfs_uri: str) -> str:
    """Garden's `docker://[host]/repository[#tag]` names an image, all else a place on a machine."""
    scheme, _, rest = rootfs_uri.partition("://")
    name, _, tag = rest.removeprefix("/").partition("#")
    try:
        parse_image(text := f"{name}:{tag}" if tag else name)
    except BadImage:
        scheme = ""
    return f"write `image: {text}`" if scheme == "docker" else "name an image, by `image` or `image_resource`"


def _inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/") and "\0" not in path and path != ""


def _cycle(needs: dict[str, list[str]]) -> list[str] | None:
    done: set[str] = set()
    for start in needs:
        trail: list[str] = []
        stack: list[tuple[str, int]] = [(start, 0)]
        while stack:
            name, i = stack.pop()
            if i == 0:
                if name in done:
                    continue
                if name in trail:
                    return [*trail[trail.index(name) :], name]
                trail.append(name)
            if i < len(needs[name]):
                stack.append((name, i + 1))
                stack.append((needs[name][i], 0))
            else:
                trail.pop()
                done.add(name)
    return None
