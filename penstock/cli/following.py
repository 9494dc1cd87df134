"""Showing a build while it runs, and what it all comes to: the exit code and the last line."""

from contextlib import aclosing

from penstock.cli.terminal import STATUS_COLOURS, Terminal
from penstock.client import Build, BuildEnded, BuildLogged, BuildStatus, Client, Stage, StreamBroken

EXIT_CODES = {"succeeded": 0, "failed": 1, "errored": 2, "aborted": 3}


async def follow(client: Client, build: Build, terminal: Terminal, *, until_reader_goes: bool = False) -> Build:
    """Print the build's log and what becomes of it until it ends (or until nobody reads stdout any more); the build as it is then."""
    teller = _Teller(terminal)
    teller.tell(build)
    async with aclosing(client.events(build.id)) as events:
        async for event in events:
            match event:
                case BuildLogged(_, stage, attempt, entry):
                    teller.attempt(stage, attempt)
                    terminal.log(entry.stream, entry.text)
                    if terminal.reader_gone and until_reader_goes:
                        return build
                case BuildStatus(_, build):
                    teller.tell(build)
                case BuildEnded(_, build):
                    return build
    raise StreamBroken("the event stream ended before the build")


class _Teller:
    """Says what changed, once."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._reasons: dict[str, str] = {}
        self._placed: set[tuple[str, int]] = set()
        self._runs: dict[str, Stage] = {}
        """Each stage's last attempt that was placed."""
        self._imaged: set[tuple[str, int, str]] = set()
        self._attempts: dict[str, int] = {}

    def tell(self, build: Build) -> None:
        """Why a stage waits while it does; where each attempt runs, in which sandbox, and each step in which image; that one was lost."""
        for stage in build.stages:
            named = f"{stage.name}: " if len(build.stages) > 1 else ""
            if (ran := self._runs.get(stage.name)) and stage.attempt > ran.attempt:
                del self._runs[stage.name]
                self._terminal.say(f"{named}attempt {ran.attempt} was lost with its worker, {ran.worker}; attempt {stage.attempt} follows", "yellow")
            if stage.reason != self._reasons.get(stage.name, ""):
                self._reasons[stage.name] = stage.reason
                if stage.reason:
                    self._terminal.say(f"{named}waiting: {stage.reason}", "yellow")
            if stage.sandbox and stage.attempt and (stage.name, stage.attempt) not in self._placed:
                self._placed.add((stage.name, stage.attempt))
                self._runs[stage.name] = stage
                again = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
                self._terminal.say(f"{named}running on {stage.worker}, sandbox {stage.sandbox}{again}", "cyan")
            for step in stage.steps:
                if step.image and (stage.name, stage.attempt, step.name) not in self._imaged:
                    self._imaged.add((stage.name, stage.attempt, step.name))
                    called = f"step `{step.name}`: " if len(stage.steps) > 1 else ""
                    self._terminal.say(f"{called}image {step.reference}, exactly {step.image}", "cyan")

    def attempt(self, stage: str, number: int) -> None:
        """The log starts again when a stage does."""
        before = self._attempts.setdefault(stage, number)
        if number != before:
            self._attempts[stage] = number
            self._terminal.say(f"the log of attempt {number} of `{stage}` begins; what came before is of attempt {before}", "yellow")


def say_why(build: Build, terminal: Terminal) -> None:
    """The reasons of a build that did not succeed, each once."""
    if build.status == "succeeded":
        return
    given = [build.error, *(stage.error for stage in build.stages), *(step.error for stage in build.stages for step in stage.steps)]
    for why in dict.fromkeys(filter(None, given)):
        if not any(why != other and why in other for other in given):
            terminal.say(f"{build.status}: {why}", STATUS_COLOURS.get(build.status))


def say_end(build: Build, terminal: Terminal) -> None:
    """The last line."""
    terminal.say(build.status, STATUS_COLOURS.get(build.status))


def exit_code_of(build: Build) -> int:
    """As fly's: the task's own; where it has none, or 0, one for the build's status. A signal's number becomes 128 + it, as in a shell."""
    code = build.exit_code or 0
    if build.status == "failed" and code:
        return 128 - code if code < 0 else code & 0xFF or 1
    return EXIT_CODES.get(build.status, 1)
