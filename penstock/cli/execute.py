"""`penstock execute`: the one thing every user comes for."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from penstock.cli.fetching import check_folders, fetch, output_of
from penstock.cli.following import exit_code_of, follow, say_end, say_why
from penstock.cli.inputs import Inputs, choose_inputs, find_inputs, known
from penstock.cli.interruption import Interruption
from penstock.cli.quantities import Duration, Keep
from penstock.cli.running import Assignment, BuildRef, Failure, Mistake, connect, print_json, run, team_option
from penstock.cli.sending import send
from penstock.cli.terminal import Terminal
from penstock.client import Artifact, Build, Client, Conflict, PenstockError, Refused
from penstock.taskfile import TaskFileProblem, overridden_params, plan_of, read_task
from penstock.variables import VariableProblem, gather_variables

LONGEST_TIMEOUT = 30 * 24 * 3600
TASK_IN_PLAN = "plan.stages[0].steps[0]."


class TaskCommand(click.Command):
    """What stands after `--` is for the task."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            cut = args.index("--")
            ctx.meta["penstock.arguments"] = args[cut + 1 :]
            args = args[:cut]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ARGS…]"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, checked against the task file and this machine's folders: nothing has been sent yet. `keep`: the outputs, for so many
    seconds (0: as the team's policy says)."""

    task_file: Path
    plan: dict[str, Any]
    name: str
    inputs: Inputs
    outputs: dict[str, Path]
    keep: int | Literal["forever"]


@click.command(cls=TaskCommand, short_help="Run a task on folders of yours.")
@click.option("-c", "--config", "task_file", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The task file.")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=WHAT",
    type=Assignment(),
    help="An input: a folder to upload, artifact:ID or build:N/OUTPUT.",
)
@click.option("--inputs-from", "earlier", metavar="BUILD", type=BuildRef(), help="The inputs that -i does not give are those of this earlier build.")
@click.option("-o", "--output", "outputs", multiple=True, metavar="NAME=PATH", type=Assignment(), help="Bring an output back into a folder.")
@click.option("-m", "--input-mapping", "mapping", multiple=True, metavar="NAME=OTHER", type=Assignment(), help="The task's input NAME is -i OTHER.")
@click.option("--include-ignored", is_flag=True, help="Upload what git ignores, too.")
@click.option("--include-git", is_flag=True, help="Upload the .git folder, too.")
@click.option("-v", "--var", "texts", multiple=True, metavar="NAME=TEXT", help="Set a variable of the task file to text.")
@click.option("-y", "--yaml-var", "yamls", multiple=True, metavar="NAME=YAML", help="Set a variable to a YAML value.")
@click.option("-l", "--load-vars-from", "files", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help="Variables from a YAML file.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Run on a worker with this tag.")
@click.option(
    "--timeout",
    type=Duration(LONGEST_TIMEOUT, "a time like 90s, 10m or 1h30m, 30 days at most"),
    metavar="TIME",
    help="Interrupt the task after this long: 90s, 10m, 1h30m.",
)
@click.option("--image", metavar="IMAGE", help="Run it in this image, whatever the task file says: host:5000/team/img:tag@sha256:…")
@click.option("-p", "--privileged", is_flag=True, help="With all rights on the worker, in a container: where team and worker allow it.")
@click.option("--keep", type=Keep(), default=0, metavar="TIME", help="Keep its outputs so long: 12h, 7d, forever; else as the team's policy says.")
@click.option("--name", default="", help="A name for the build.")
@click.option("-b", "--detach", is_flag=True, help="Do not wait: print the build's number only.")
@team_option
@click.option("--json", "as_json", is_flag=True, help="Print the build as JSON on stdout; the log goes to stderr.")
@click.pass_context
def execute(ctx: click.Context, /, detach: bool, team: str | None, as_json: bool, **options: Any) -> None:
    """Upload folders, run a task on them on a worker, watch it live, and bring the outputs back.

    A folder in a git work tree is uploaded as git shows it: tracked and untracked, without the ignored; only what the server lacks is sent. The
    current folder is uploaded without -i if an input of the task has its name. What is stored already is named instead of a folder, and nothing is
    sent: `-i src=artifact:ID[/path]`, `-i src=build:7/dist[/path]`, or all inputs of an earlier build by --inputs-from.

    The exit code is the task's own; else 1 failed, 2 errored, 3 aborted, 255 the events broke off. Ctrl-C aborts
    the build; a second one leaves at once.
    """
    client = connect(ctx, team)
    terminal = Terminal(log_to_stderr=as_json)
    request = _request(terminal, ctx.meta.get("penstock.arguments", []), **options)
    build, code = run(_executed(client, request, terminal, detach))
    if as_json:
        print_json(build)
    elif detach:
        click.echo(build.number)
    ctx.exit(code)


def _request(
    terminal: Terminal,
    arguments: Sequence[str],
    *,
    task_file: Path,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    mapping: Sequence[tuple[str, str]],
    include_ignored: bool,
    include_git: bool,
    texts: Sequence[str],
    yamls: Sequence[str],
    files: Sequence[Path],
    tags: Sequence[str],
    timeout: int | None,
    image: str | None,
    privileged: bool,
    name: str,
    keep: int | Literal["forever"],
    earlier: str | None,
) -> Request:
    text = _read(task_file)
    try:
        variables = gather_variables(texts, yamls, [(str(path), _read(path)) for path in files])
        task = read_task(str(task_file), text, variables, os.environ)
    except (TaskFileProblem, VariableProblem) as problem:
        raise Failure(str(problem)) from problem
    for param in overridden_params(text, os.environ):
        terminal.say(f"param {param}: taken from the environment, not from {task_file}")
    wanted = _output_folders(outputs)
    known("-o", list(wanted), [output.name for output in task.outputs], "output", task_file)
    check_folders(wanted)
    chosen = choose_inputs(task, inputs, dict(mapping), earlier or "", task_file, terminal, include_ignored=include_ignored, include_git=include_git)
    plan = plan_of(task, arguments=arguments, tags=tags, timeout=timeout, image=image, privileged=privileged)
    return Request(task_file=task_file, plan=plan, name=name, inputs=chosen, outputs=wanted, keep=keep)


def _output_folders(pairs: Sequence[tuple[str, str]]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, path in pairs:
        if name in folders:
            raise Mistake(f"-o {name}=…: given twice")
        folders[name] = Path(path).expanduser()
    return folders


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from error


def _in_task(error: Refused, task_file: Path) -> PenstockError | Failure:
    """Whoever has written a task file knows nothing of the plan that is made of it."""
    place = error.path.removeprefix(TASK_IN_PLAN)
    return error if place == error.path else Failure(f"{task_file}: {place.removeprefix('config.')}: {str(error).removeprefix(f'{error.path}: ')}")


async def _executed(client: Client, request: Request, terminal: Terminal, detach: bool) -> tuple[Build, int]:
    """Upload, start, and unless detached watch and fetch; the build and the exit code."""
    with Interruption("left; no build was started") as interruption:
        async with client:
            interruption.cancels()
            try:
                await client.info()  # a wrong token is said before an upload, not after it
                inputs: dict[str, Artifact | str] = {**await find_inputs(client, request.inputs, terminal)}
                uploaded = await send(client, request.inputs.folders, terminal)
            except asyncio.CancelledError:
                raise click.Abort from None
            inputs |= {name: uploaded[source] for name, source in request.inputs.chosen.items() if source in uploaded}
            interruption.first(None, "left; the build may have been started")
            try:
                build = await client.create_build(request.plan, inputs, name=request.name, keep=request.keep)
            except Refused as error:
                raise _in_task(error, request.task_file) from error
            if not detach or request.outputs:
                terminal.say(f"build {build.number}: {build.url}")
            if detach:
                fetch_later = " ".join(f"-o {name}={folder}" for name, folder in request.outputs.items())
                if fetch_later:
                    terminal.say(f"when it has ended: penstock download {build.number} {fetch_later}")
                return build, 0
            build = await _watched(client, build, terminal, interruption)
            return build, await _ended(client, build, request, terminal, interruption)


async def _watched(client: Client, build: Build, terminal: Terminal, interruption: Interruption) -> Build:
    """The build at its end; the first signal aborts it on the server and goes on watching."""
    aborting: set[asyncio.Task[None]] = set()

    async def abort() -> None:
        terminal.say(f"aborting build {build.number}; again to leave at once", "yellow")
        try:
            await client.abort(build.id)
        except Conflict:
            pass  # it ended meanwhile: its own end is shown
        except PenstockError as error:
            terminal.say(f"cannot abort: {error}", "red")

    interruption.first(lambda: aborting.add(asyncio.ensure_future(abort())), f"left; see `penstock watch {build.number}`")
    build = await follow(client, build, terminal)
    for task in aborting:
        await task
    return build


async def _ended(client: Client, build: Build, request: Request, terminal: Terminal, interruption: Interruption) -> int:
    """What the task made is brought back whatever became of the build; the exit code."""
    say_why(build, terminal)
    code = exit_code_of(build)
    if not interruption.happened:
        interruption.cancels()
    there: dict[str, Artifact] = {}
    for name in request.outputs:
        artifact = output_of(build, name)
        if artifact:
            there[name] = artifact
        else:
            terminal.say(f"output `{name}`: the build has none")
    try:
        await fetch(client, there, {name: request.outputs[name] for name in there}, terminal)
    except Failure as failure:
        terminal.say(f"Error: {failure.message}", "red")
        code = code or 1
    except asyncio.CancelledError:
        raise click.Abort from None
    say_end(build, terminal)
    return code
