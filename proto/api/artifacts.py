"""Artifacts, their trees, and how their bytes move."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from proto.api.bodies import LONGEST, Answer, Request
from proto.private import Private


class ArtifactChange(Request, frozen=True, kw_only=True, omit_defaults=True):
    """`pinned`: it stays, whatever its expiry. `keep`: it expires so many seconds from now, unless that is sooner than before; with `shorten` also
    sooner. What is left away (or null) stays as it is."""

    pinned: bool | None = None
    keep: Annotated[int, msgspec.Meta(ge=0, le=LONGEST)] | None = None
    shorten: bool = False


class TreeRef(Answer, frozen=True, kw_only=True):
    """A tree of files: `digest` names its content, `size` is the bytes of its files."""

    id: str
    digest: str
    size: int
    files: int


ArtifactKind = Literal["user", "output", "part"]


class Artifact(Answer, frozen=True, kw_only=True):
    """A stored tree of files that a person uploaded (user), a step wrote (output; `build` is then the build's number), or a build was given as a part
    of another (part; listed only for whoever asks for that kind). `digest` names its content, `size` is the bytes of its files. `expires_at` is null
    when it stays; while it is `pinned` it stays in any case, and longer than it says while a build that was asked for before uses it."""

    id: str
    kind: ArtifactKind
    digest: str
    size: int
    files: int
    name: str = ""
    build: int | None = None
    build_id: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None
    pinned: bool = False


class Direct(Private, Answer, frozen=True, kw_only=True):
    """Where bytes may go, or come from, without the gateway in between: `url`, with `Authorization: Bearer` and this token, for so many seconds. It
    takes and answers what the gateway's own route does. Whoever cannot reach it, or is answered 401 or 403, uses that route."""

    url: str
    token: str
    seconds: int


class PendingUpload(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """The manifest is known, and these chunks are still to be sent: ranges [first, last] over the distinct chunk digests of the tree's files, in
    the order of their first appearance, from 0. `id` is the artifact's, once nothing is missing. `direct`: where they, or the tar, may go, too."""

    id: str
    missing: list[tuple[int, int]]
    missing_bytes: int
    missing_blobs: int
    direct: Direct | None = None


class TreeEntry(Answer, frozen=True, kw_only=True):
    """One name in a tree. `digest` names a file's content (hex), `target` is a symbolic link's text, or of a hard link the file that it shares
    its content with. Bytes of a name that are no UTF-8 are shown as `\\xNN`; `path_base64` is then the name itself."""

    path: str
    kind: Literal["file", "folder", "link"]
    size: int = 0
    executable: bool = False
    digest: str = ""
    target: str = ""
    path_base64: str | None = None


class TreePage(Answer, frozen=True, kw_only=True):
    """What lies in a folder, in order. `next` is the cursor of the next page, null at the end."""

    items: list[TreeEntry]
    next: str | None = None


class Usage(Answer, frozen=True, kw_only=True):
    """What a team stores: `stored_bytes` count the same content once, `artifact_bytes` each time that an artifact has it. `quota_bytes` is null
    without a limit."""

    stored_bytes: int
    artifacts: int
    artifact_bytes: int
    quota_bytes: int | None = None


class ArtifactPage(Answer, frozen=True, kw_only=True):
    """Artifacts, newest first. `next` is the cursor of the next page, null at the end."""

    items: list[Artifact]
    next: str | None = None
