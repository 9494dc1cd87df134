"""What a task's inputs are: folders to upload, things stored on the server, the inputs of an earlier build."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from penstock.cli.quantities import counted, readable_size
from penstock.cli.references import Reference, find, is_reference, look, parse_reference
from penstock.cli.running import Failure, Mistake
from penstock.cli.terminal import Terminal, printable
from penstock.client import Artifact, Build, Client, Expired, NotFound, PenstockError, Selection, select
from penstock.taskfile import Input, Task


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """`folders` and `stored` are by the name that -i gave them; `chosen` says which of these each input of the task gets; the `borrowed` ones are for
    the inputs of build `earlier` of that name, or of the name that -m gave."""

    folders: dict[str, Selection] = {}
    stored: dict[str, Reference] = {}
    chosen: dict[str, str] = {}
    earlier: str = ""
    borrowed: dict[str, str] = {}
    optional: frozenset[str] = frozenset()


def choose_inputs(
    task: Task,
    given: Sequence[tuple[str, str]],
    mapping: Mapping[str, str],
    earlier: str,
    task_file: Path,
    terminal: Terminal,
    *,
    include_ignored: bool,
    include_git: bool,
) -> Inputs:
    """Which of what is given each of the task's inputs gets; the current folder goes by its own name when nothing is given. Folders are looked at,
    nothing is sent. Raises Mistake."""
    sources = _sources(given)
    names = [item.name for item in task.inputs]
    known("-m", list(mapping), names, "input", task_file)
    wanted = {name: mapping.get(name, name) for name in names}
    known("-i", list(sources), list(wanted.values()), "input", task_file)
    here = Path.cwd().name
    chosen: dict[str, str] = {}
    borrowed: dict[str, str] = {}
    for item in task.inputs:
        source = wanted[item.name]
        if source in sources or (not sources and not earlier and source == here):
            chosen[item.name] = source
        elif earlier:
            borrowed[item.name] = source
        elif not item.optional:
            raise Mistake(_missing(item, source))
    paths = {source: sources.get(source, Path.cwd()) for source in dict.fromkeys(chosen.values())}
    return Inputs(
        folders={
            source: _selected(source, path, terminal, include_ignored=include_ignored, include_git=include_git)
            for source, path in paths.items()
            if isinstance(path, Path)
        },
        stored={source: reference for source, reference in paths.items() if isinstance(reference, Reference)},
        chosen=chosen,
        earlier=earlier,
        borrowed=borrowed,
        optional=frozenset(item.name for item in task.inputs if item.optional),
    )


def known(option: str, named: Sequence[str], names: Sequence[str], kind: str, task_file: Path) -> None:
    """Raises Mistake for what the task file has no such thing of."""
    for name in named:
        if name not in names:
            raise Mistake(f"{option} {name}=…: {task_file} has no {kind} `{name}` (it has {', '.join(dict.fromkeys(names)) or 'none'})")


def _missing(item: Input, source: str) -> str:
    return f"the task's input `{item.name}` is not given: add -i {source}=PATH"


def _sources(given: Sequence[tuple[str, str]]) -> dict[str, Path | Reference]:
    sources: dict[str, Path | Reference] = {}
    for name, text in given:
        if name in sources:
            raise Mistake(f"-i {name}=…: given twice")
        try:
            stored = text.startswith(("artifact:", "build:"))
            if stored and printable(text) != text:
                raise Mistake(f"-i {name}=…: a path with a name that is no text cannot be an input: take the folder that it is in")
            sources[name] = parse_reference(text) if stored else Path(text).expanduser()
        except ValueError as error:
            raise Mistake(f"-i {name}=…: {error}; a folder of that name is ./{text}") from error
    return sources


def _selected(source: str, path: Path, terminal: Terminal, *, include_ignored: bool, include_git: bool) -> Selection:
    try:
        selection = select(path, include_ignored=include_ignored, include_git=include_git)
    except PenstockError as error:
        hint = f" (what is stored is artifact:{path})" if is_reference(str(path)) else ""
        raise Mistake(f"-i {source}={path}: {error}{hint}") from error
    for skipped in selection.skipped:
        terminal.say(f"{source}: {skipped} is no file, folder or link: not uploaded")
    return selection


async def find_inputs(client: Client, inputs: Inputs, terminal: Terminal) -> dict[str, str]:
    """The task's inputs that are on the server already, as references, so that what is missing is said before anything is uploaded. Raises
    Failure."""
    found: dict[str, str] = {}
    for source, reference in inputs.stored.items():
        there = await find(client, reference)
        await look(client, there)
        much = f"{counted(there.artifact.files, 'file')}, {readable_size(there.artifact.size)}"
        terminal.say(f"{source}: {there.given}: {'a part of ' if there.path else ''}{much}")
        found |= {name: there.reference for name, chosen in inputs.chosen.items() if chosen == source}
    if inputs.borrowed:
        build = await client.build(inputs.earlier)
        for name, source in inputs.borrowed.items():
            artifact = await _borrowed(client, build, name, source, optional=name in inputs.optional)
            if artifact:
                terminal.say(f"{name}: as in build {build.number}: {counted(artifact.files, 'file')}, {readable_size(artifact.size)}")
                found[name] = artifact.id
    return found


async def _borrowed(client: Client, build: Build, name: str, source: str, *, optional: bool) -> Artifact | None:
    artifact = build.inputs.get(source) or build.inputs.get(name)
    if artifact is None:
        if optional:
            return None
        had = ", ".join(build.inputs) or "none"
        raise Mistake(f"the task's input `{name}` is not given, and build {build.number} had no such input (it had {had}): add -i {source}=PATH")
    try:
        return await client.artifact(artifact.id)
    except (Expired, NotFound) as error:
        raise Failure(f"input `{name}` of build {build.number} is gone ({error}): give it with -i {source}=PATH") from error
