"""What travels beside the log, and may be lost at any moment: then whoever still holds it sends it again.

subject                              from → to               delivery
`reports.<worker>.<build>`           worker → builds         JetStream REPORTS; the spool keeps it until a receipt
`logs.<worker>.<build>.<stage>.<n>`  worker → artifacts      JetStream LOGS; the spool keeps it until a LogArchived holds it
`presence.<worker>`                  worker → scheduler      core NATS, signed by the worker
`control.<worker>`                   scheduler → worker      core NATS, signed by the scheduler
`why.<build>`                        gateway → scheduler     core NATS, a question; any scheduler answers
`withhold.<worker>`                  builds → schedulers     core NATS: Withhold
`execute_build_package.<worker>`     scheduler → worker      core NATS, signed by the scheduler and sealed to a credit's key
`secrets.<team>`                     gateway → a scheduler   core NATS request: SecretRequest, answered with SecretAnswer

All of them are msgpack. The worker's identity is read from the subject, never from the body.
"""

from typing import Annotated, Literal

import msgspec

from proto.events.base import ArtifactRef, Status
from proto.plan import Name, Stage
from proto.private import Private

Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
"""What a worker names must be fit to be a part of a stream's name, whoever sent it."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Attempt(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One try of a stage; the key of everything a worker does."""

    build: Id
    stage: Id
    number: int


# --- reports -----------------------------------------------------------------------------------------------------------------------


class ReportStepStarted(_Message, frozen=True, kw_only=True, tag="step.started"):
    """`image`: exactly which one it runs in, by digest where it has one; `reference`: how its task names it."""

    step: str
    sandbox: str = ""
    image: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    reference: Annotated[str, msgspec.Meta(max_length=1024)] = ""


class ReportStepProgressed(_Message, frozen=True, kw_only=True, tag="step.progressed"):
    step: str
    percent: int


Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
"""Numbers of which a worker tells end up in columns: what none holds must not get that far (FAULTS 48)."""


class ReportStepFinished(_Message, frozen=True, kw_only=True, tag="step.finished"):
    step: str
    status: Status
    exit_code: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    error: str = ""
    outputs: dict[Name, ArtifactRef] = {}


class ReportStageFinished(_Message, frozen=True, kw_only=True, tag="stage.finished"):
    """`chunks`, `lines`, `bytes`: what the attempt's log holds in all."""

    status: Status
    error: str = ""
    chunks: Count = 0
    lines: Count = 0
    bytes: Count = 0
    dropped: Count = 0


ReportBody = ReportStepStarted | ReportStepProgressed | ReportStepFinished | ReportStageFinished


class Reports(_Message, frozen=True, kw_only=True):
    """Consecutive reports of one attempt: the first is number `first` (they count from 1)."""

    attempt: Attempt
    first: int
    bodies: list[ReportBody]


# --- logs --------------------------------------------------------------------------------------------------------------------------


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive whole lines of one stream of one step (each ends in a newline), or one piece of a line that is unfinished (no newline).
    `at` is unix time in milliseconds."""

    step: str
    stream: Literal["stdout", "stderr"]
    at: int
    data: bytes


class LogChunk(_Message, frozen=True, kw_only=True):
    """Chunk `number` (from 1) of an attempt's log; `first_line` (from 0) numbers its first line. At most 64 KiB of data.
    A line is what a newline ends, or an unfinished piece: `count_lines` is the one definition."""

    attempt: Attempt
    number: int
    first_line: int
    segments: list[Segment]


def count_lines(data: bytes) -> int:
    """How many numbered lines a segment holds: its newlines, and one more for an unfinished piece at its end."""
    return data.count(b"\n") + (0 if data.endswith(b"\n") or not data else 1)


# --- presence and control ------------------------------------------------------------------------------------------------------------


MAX_SHORT = 256
Short = Annotated[str, msgspec.Meta(max_length=MAX_SHORT)]


class Offers(_Message, frozen=True, kw_only=True):
    """What a worker can do: matched against a stage's requirements. `images` are image types it can run; `user`, `limits` and `privileged`
    are for steps with an image."""

    platform: Short = "linux"
    tags: Annotated[tuple[Short, ...], msgspec.Meta(max_length=256)] = ()
    images: Annotated[tuple[Short, ...], msgspec.Meta(max_length=64)] = ()
    user: bool = False
    limits: bool = False
    privileged: bool = False
    sandbox: Short = ""


CREDIT_SECONDS = 10.0
"""For so long a worker honours a credit."""


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """A single-use offer of one free slot. `key` is the boot's X25519 public key to seal to."""

    nonce: Annotated[str, msgspec.Meta(max_length=64)]
    key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Running(msgspec.Struct, frozen=True, array_like=True):
    """An attempt the worker holds (running, or ended but not yet known to be recorded) and the last report it has made."""

    attempt: Attempt
    reported: int


TREE_HINT = 16
"""Letters of a tree's digest that say that a worker has it: a wrong guess costs a download, nothing else."""
MAX_HINTS = 256


Mode = Literal["push", "pull"]
"""Whether a worker's credits are renewed by themselves, or given one by one when it wants work."""
MAX_SLOTS = 4096
Slots = Annotated[int, msgspec.Meta(ge=0, le=MAX_SLOTS)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class About(_Message, frozen=True, kw_only=True):
    """What a worker says of itself for people; nothing is decided by it. `address` is what it reaches the bus from."""

    version: Short = ""
    hostname: Short = ""
    address: Short = ""
    mode: Mode = "push"


class Availability(_Message, frozen=True, kw_only=True):
    """What a worker can take now. `challenge` quotes the last one the scheduler gave (b"" at first); `credits` are all the open ones.
    `cached` are the trees of inputs it has, the latest, each by the beginning of its digest; None: as it said last in this boot. It is sent until a
    heartbeat that holds it was answered, after each change, and with every new challenge (whose giver may not have heard it)."""

    challenge: bytes
    offers: Offers
    credits: Annotated[list[Credit], msgspec.Meta(max_length=MAX_SLOTS)] = []
    cached: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=TREE_HINT)], ...], msgspec.Meta(max_length=MAX_HINTS)] | None = None


Rank = tuple[int, str]
"""(since, boot): of two boots of one worker the greater is the later."""


class Heartbeat(_Message, frozen=True, kw_only=True):
    """Sent every second, and whenever a slot becomes free. `since`: when its boot began, in unix milliseconds by the worker's own clock, and more
    than that of every boot before. `logs` are attempts whose log still waits in the spool for LogArchived. `goodbye`: the worker leaves.
    `busy` are slots in use, `trouble` why it can take no work ("" if it can), `limited` why it offers less than it could, `cache_*` bytes of its
    cache."""

    boot: Id
    since: Count
    number: int
    slots: Slots
    availability: Availability
    running: list[Running] = []
    logs: list[Attempt] = []
    draining: bool = False
    goodbye: bool = False
    busy: Slots = 0
    trouble: Short = ""
    limited: Short = ""
    about: About = About()
    cache_used: Bytes = 0
    cache_limit: Bytes = 0

    @property
    def rank(self) -> Rank:
        return self.since, self.boot


class Held(msgspec.Struct, frozen=True, array_like=True):
    """An attempt the worker may hold; reports up to `recorded` are events; `interrupted` says why it must stop ("" if it need not)."""

    attempt: Attempt
    recorded: int
    interrupted: str = ""


class ArchivedLog(Attempt, frozen=True, array_like=True):
    """What of an attempt's log may be forgotten: chunks up to number `last` (-1: all there are) but for those in `gaps` (first, last)."""

    last: int = -1
    gaps: list[tuple[int, int]] = []

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.build, self.stage, self.number)

    def holds(self, chunk: int) -> bool:
        return self.last < 0 or (chunk <= self.last and not any(first <= chunk <= last for first, last in self.gaps))


class Control(_Message, frozen=True, kw_only=True):
    """The answer to heartbeat `number` of `boot`, or (with number 0) an early word. An attempt that the heartbeat listed and `held` does not is
    not the worker's any more: kill it and forget its reports. `archived`: forget that of these logs. With number 0 only what is listed is meant.
    `drain`: finish what runs and offer nothing, until an answer (not an early word) says otherwise. No `challenge`: a later boot has the name."""

    boot: str
    number: int
    challenge: bytes
    lease_seconds: float
    held: list[Held] = []
    archived: list[ArchivedLog] = []
    drain: bool = False


# --- why a stage waits: asked of the schedulers on `why.<build>`, of which any one answers --------------------------------------------


class WhyWaiting(_Message, frozen=True, kw_only=True):
    """gateway → scheduler: what of these waits, and why?"""

    attempts: list[Attempt]


class SlotsHeld(_Message, frozen=True, kw_only=True):
    """Who has the slots of a worker: attempts of the asked one's team, and how many of others; and how many of them it offers."""

    worker: str
    slots: int
    offered: int
    own: list[Attempt]
    others: int


class StageWaits(_Message, frozen=True, kw_only=True):
    """It waits for a worker that offers all that it `requires`. `ahead` come before it (or more, with `more`), of which `own` are the first of its
    own team; `able` workers could take it, `holders` are the first of them."""

    attempt: Attempt
    requires: list[str]
    ahead: int
    more: bool
    own: list[Attempt]
    able: int
    holders: list[SlotsHeld]


class StagesWait(_Message, frozen=True, kw_only=True):
    """scheduler → gateway: those that wait, as this instance knows it."""

    stages: list[StageWaits]


# --- withhold: said to every scheduler, about a worker that fills a stream -------------------------------------------------------------

Withheld = Literal["reports", "logs"]


class Withhold(_Message, frozen=True, kw_only=True):
    """The worker may say nothing of this kind for so many seconds."""

    kind: Withheld
    seconds: float


# --- packages ------------------------------------------------------------------------------------------------------------------------


class Package(Private, _Message, frozen=True, kw_only=True):
    """An attempt made ready for one credit. It names everything that it is for, because a sealed box authenticates no context.
    `token` is the build token (JWT, EdDSA) for the artifacts service at `artifacts_url`. `secrets` are the values that the stage refers to, by name;
    of those that are not there `unreadable` says why."""

    attempt: Attempt
    team: str
    worker: str
    boot: str
    credit: str
    lease_seconds: float
    stage: Stage
    inputs: dict[str, ArtifactRef]
    token: str
    artifacts_url: str
    secrets: dict[str, str] = {}
    unreadable: dict[str, str] = {}


class Signed(msgspec.Struct, frozen=True, array_like=True):
    """`body` and its Ed25519 signature over its context, a zero byte and itself (context: `presence`, `control.<worker>` or
    `execute_build_package.<worker>`, and those of libs/proofs.py and proto/introduction.py, so that no message passes for another). A package's body
    is a SealedBox around a Package."""

    body: bytes
    signature: bytes


# --- secrets -------------------------------------------------------------------------------------------------------------------------


class SecretValues(Private, _Message, frozen=True, kw_only=True):
    """What the gateway seals to a key of the schedulers': values by name, and whose they are, because a sealed box authenticates no context."""

    team: str
    values: dict[str, str]


class KeepSecret(_Message, frozen=True, kw_only=True, tag="set"):
    """gateway → scheduler, on `secrets.<team>`: set the one secret that is in `sealed`. `key`: the `entry` of the SealingKeyMade it is sealed to."""

    key: str
    sealed: bytes
    by: str


class RemoveSecret(_Message, frozen=True, kw_only=True, tag="remove"):
    """gateway → scheduler: the team shall have it no more."""

    name: str
    by: str


class KeepForBuild(_Message, frozen=True, kw_only=True, tag="build"):
    """gateway → scheduler: keep what is in `sealed` until the build is over. There need not be the build yet."""

    build: Id
    key: str
    sealed: bytes


class RotateKeys(_Message, frozen=True, kw_only=True, tag="rotate"):
    """gateway → scheduler: make a new key to seal to, and look at the master keys now."""

    by: str


SecretRequest = KeepSecret | RemoveSecret | KeepForBuild | RotateKeys


class SecretAnswer(_Message, frozen=True, kw_only=True):
    """`position`: where in the log it is recorded (0: nowhere, or it was so already). `refused`: why nothing was done ("" when it was).
    To RotateKeys: `master` is the first master key's id, `under` how many values are under which."""

    position: int = 0
    version: int = 0
    refused: str = ""
    master: str = ""
    under: dict[str, int] = {}
