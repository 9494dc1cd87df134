"""Trees into the blob store, however they come, and into the log: whole, or not at all (sessions.py says why)."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import NamedTuple, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from libs.archives.compression import Format
from libs.archives.pages import Filling
from libs.archives.pump import in_thread, pump
from libs.archives.rules import Limits
from libs.archives.tree import ZERO_CHUNK, InvalidManifest, TreeSummary, manifest_of
from libs.blobstore.store import BlobMissing, BlobStore, QuotaExceeded, StoreFull, StoreUnavailable, Upload
from libs.eventlog.log import LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from proto.api.artifacts import PendingUpload
from services.artifacts.agenda import Agenda
from services.artifacts.commands import Command, SealArtifact
from services.artifacts.decider import Sealed, State
from services.artifacts.intake import BlobIntake, ManifestIntake, TarIntake
from services.artifacts.queries import Queries
from services.artifacts.sessions import Session, Sessions, holder_of
from services.artifacts.trees import Trees

logger = structlog.get_logger()

Piece = bytes | memoryview
P = TypeVar("P", bound=Piece)

_TOUCH = 60.0
"""Seconds between signs of life while a body comes."""
_REMEMBERED = 400_000
"""Chunks of trees under way that are in memory; what is not is read again from the manifest."""


_LOOKUP = 8192
"""Chunks that are looked up together."""


class UploadUnknown(Exception):
    """There is no such upload under way, or not any more."""


class TreeUnknown(Exception):
    """The team does not have this tree whole."""


class Gone(Exception):
    """The artifact was there, and has expired or was deleted."""


class ManifestRefused(Exception):
    """The bytes are no manifest; the text says why."""


class Room(NamedTuple):
    """Bytes that a team may store: new ones as of now, and in all. None: no limit."""

    left: int | None
    quota: int | None


class Wanted(msgspec.Struct):
    """The chunks of a tree, digest → size, in the order of their numbers; and those that are not in the store yet."""

    sizes: dict[bytes, int]
    missing: set[bytes]

    def pending(self, artifact: str) -> PendingUpload:
        ranges: list[tuple[int, int]] = []
        for number, digest in enumerate(self.sizes):
            if digest not in self.missing:
                continue
            if ranges and ranges[-1][1] == number - 1:
                ranges[-1] = (ranges[-1][0], number)
            else:
                ranges.append((number, number))
        size = sum(self.sizes[digest] for digest in self.missing)
        return PendingUpload(id=artifact, missing=ranges, missing_bytes=size, missing_blobs=len(self.missing))


class Uploads:
    """Uploads of teams. What they make is described by a SealArtifact without tree and expiry, and kept `lifetime` seconds (0: for ever). All
    methods raise Gone, Refused (another tree under this id), LogUnavailable, StoreUnavailable, StoreFull, and what the body raises."""

    def __init__(
        self,
        store: BlobStore,
        sessions: Sessions,
        trees: Trees,
        commands: CommandLoop[Command, State],
        queries: Queries,
        limits: Limits,
        ids: Callable[[], str],
        now: Callable[[], float],
    ) -> None:
        """`ids` gives names to sessions, each only once."""
        self._store = store
        self._sessions = sessions
        self._trees = trees
        self._commands = commands
        self._queries = queries
        self._limits = limits
        self._ids = ids
        self._now = now
        self._wanted: OrderedDict[str, Wanted] = OrderedDict()
        self.agenda = Agenda(now)
        """When something of them will be due, or what they gave up can be released."""

    async def tar(self, team: str, seal: SealArtifact, lifetime: int, cause: Cause, body: AsyncIterator[bytes], filling: Filling) -> Sealed:
        """A tar, plain, gzip or zstd, whose large chunks are in memory of `filling`'s. Raises ArchiveRefused, QuotaExceeded."""
        session = await self._sessions.open(Session(self._ids(), team, seal, lifetime), self._now())
        try:
            upload = self._store.begin(team, session.holder, *await self._room(team))
            try:
                intake = TarIntake(upload, self._limits)
                tree = await pump(self._alive(session, body), intake.feed, intake.finish, self._store.threads, filling)
            finally:
                await in_thread(upload.close, self._store.threads)
        except BaseException:
            # nobody else knows of this session, so that it is over; what it holds goes with it
            await self._drop(session)
            raise
        return await self._seal(session, tree, cause)

    async def manifest(
        self,
        team: str,
        seal: SealArtifact,
        lifetime: int,
        cause: Cause,
        body: AsyncIterator[bytes],
        form: Format = "tar",
        led: bool = False,
    ) -> Sealed | PendingUpload:
        """A manifest (`form` "tzst": compressed), `led` by some chunks of its tree. What the team lacks of it besides is then to be sent to `blobs`.
        Raises ArchiveRefused, ManifestRefused, QuotaExceeded."""
        intake = ManifestIntake(self._limits, form, led)
        try:
            tree = await pump(body, intake.feed, intake.finish, self._store.threads)
        except InvalidManifest as error:
            raise ManifestRefused(str(error)) from None
        sizes, blobs, ahead = intake.sizes, intake.blobs, intake.ahead
        del intake  # what it knows of a large tree is large
        return await self._begin(team, seal, lifetime, cause, tree, sizes, blobs, ahead)

    async def known(self, team: str, seal: SealArtifact, lifetime: int, cause: Cause, digest: str) -> Sealed:
        """A tree of which the team has an artifact, or will have one at once, by digest. Raises TreeUnknown."""
        done, row = await asyncio.gather(self._done(team, seal.artifact, digest), self._queries.with_tree(team, digest))
        if done is not None:
            return done
        if row is not None:
            return await self._copy(team, seal, lifetime, cause, TreeSummary(digest, row.size, row.files), row.upload)
        if (marked := await self._sessions.marked(team, digest)) is not None:
            return await self._copy(team, seal, lifetime, cause, TreeSummary(digest, marked.seal.size, marked.seal.files), marked.id)
        raise TreeUnknown(digest)

    async def copy(self, team: str, seal: SealArtifact, lifetime: int, cause: Cause, source: Sealed) -> Sealed:
        """The tree of another artifact. Raises TreeUnknown."""
        event = source.as_sealed
        if (done := await self._done(team, seal.artifact, event.digest)) is not None:
            return done
        return await self._copy(team, seal, lifetime, cause, TreeSummary(event.digest, event.size, event.files), event.upload)

    async def _copy(self, team: str, seal: SealArtifact, lifetime: int, cause: Cause, tree: TreeSummary, upload: str) -> Sealed:
        session = await self._sessions.open(Session(self._ids(), team, seal, lifetime), self._now())
        try:
            # what is damaged is asked for, and so healed
            shared, damaged = await asyncio.gather(
                self._store.share(team, holder_of(upload), session.holder), self._queries.is_damaged(team, holder_of(upload))
            )
            if shared and not damaged:
                with suppress(UploadUnknown):
                    return await self._seal(session, tree, cause, upload)
        except BaseException:
            await self._drop(session)
            raise
        await self._drop(session)
        raise TreeUnknown(tree.digest)

    async def part(self, team: str, seal: SealArtifact, lifetime: int, cause: Cause, digest: str, path: bytes) -> Sealed:
        """A part of a tree that the team has: what lies in a folder, or one file. Raises NoSuchPath, ArchiveRefused, BlobMissing."""
        tree = await self._trees.open(team, digest)
        intake = ManifestIntake(self._limits)

        def cut() -> TreeSummary:
            for piece in manifest_of(tree.part(path)):
                intake.feed(piece)
            return intake.finish()

        summary = await in_thread(cut, self._store.threads)
        begun = await self._begin(team, seal, lifetime, cause, summary, intake.sizes, intake.blobs, {})
        if isinstance(begun, PendingUpload):
            if (session := await self._sessions.find(team, seal.artifact, self._now())) is not None:
                await self._drop(session)
            raise BlobMissing(f"{begun.missing_blobs} chunks of {digest}")
        return begun

    async def blobs(self, team: str, artifact: str, cause: Cause, body: AsyncIterator[Piece]) -> Sealed | PendingUpload:
        """Chunks of a tree whose manifest is known. What came is kept, whatever becomes of the rest, unless the store is full. Raises
        UploadUnknown, ArchiveRefused, QuotaExceeded."""
        session = await self._sessions.find(team, artifact, self._now())
        if session is None:
            raise UploadUnknown
        wanted = await self._want(session)
        upload = self._store.begin(team, session.holder, *await self._room(team))
        intake = BlobIntake(upload, wanted.sizes)
        try:
            await self._receive(session, upload, intake, body)
        except StoreFull:
            await self._drop(session)  # what it holds would keep the store full until it lapses
            raise
        wanted.missing.difference_update(intake.came)
        if wanted.missing:
            # others may have brought them, here or elsewhere
            await self._look(session, wanted, wanted.missing)
        if wanted.missing:
            return wanted.pending(artifact)
        return await self._seal(session, TreeSummary(session.seal.digest, session.seal.size, session.seal.files), cause)

    async def _receive(self, session: Session, upload: Upload, intake: BlobIntake, body: AsyncIterator[Piece]) -> None:
        broken: list[Exception] = []
        try:
            await pump(_until_broken(self._alive(session, body), broken), intake.feed, intake.finish, self._store.threads)
        except Exception as error:
            await self._save(upload)
            raise (broken[0] if broken else error) from None
        finally:
            await in_thread(upload.close, self._store.threads)

    async def finish(self, session: Session, cause: Cause) -> Sealed | None:
        """Seal what was marked to be sealed, however long ago; None when another came before it."""
        try:
            sealed = (await self._commands.execute(session.seal, cause)).state
        except Refused:
            return None
        assert isinstance(sealed, Sealed)
        return sealed

    async def _begin(
        self,
        team: str,
        seal: SealArtifact,
        lifetime: int,
        cause: Cause,
        tree: TreeSummary,
        sizes: dict[bytes, int],
        blobs: list[bytes],
        ahead: Mapping[bytes, bytes],
    ) -> Sealed | PendingUpload:
        """Store the manifest and what came with it, and hold what else is there of the tree."""
        done, room = await asyncio.gather(self._done(team, seal.artifact, tree.digest), self._room(team))
        if done is not None:
            return done
        seal = replace(seal, digest=tree.digest, size=tree.size, files=tree.files)
        opened = Session(self._ids(), team, seal, lifetime)
        session = await self._sessions.open(opened, self._now())
        if session.seal.digest != tree.digest:
            raise Refused("conflict", "another tree is being uploaded under this id")
        wanted = Wanted(sizes, set())
        rest = [digest for digest in sizes if digest not in ahead] if ahead else sizes
        await asyncio.gather(self._keep_manifest(session, blobs, ahead, room), self._look(session, wanted, rest))
        blobs.clear()
        if not wanted.missing:
            return await self._seal(session, tree, cause)
        pending = wanted.pending(seal.artifact)
        if room.left is not None and pending.missing_bytes > room.left:
            if session.id == opened.id:
                await self._drop(session)
            raise QuotaExceeded(f"there is room for {room.left} new bytes, and {pending.missing_bytes} would come")
        self._remember(session, wanted)
        return pending

    async def _keep_manifest(self, session: Session, blobs: list[bytes], ahead: Mapping[bytes, bytes], room: Room) -> None:
        upload = self._store.begin(session.team, session.holder, *room)

        def store() -> None:
            try:
                for digest, contents in ahead.items():
                    upload.add(contents, digest)
                for blob in blobs:
                    upload.add(blob)
                upload.flush()
            finally:
                upload.close()

        await in_thread(store, self._store.threads)

    async def _look(self, session: Session, wanted: Wanted, digests: Iterable[bytes]) -> None:
        """Hold those of these chunks that are there; the others are missing. Nobody needs to have a chunk of zeros."""
        left = iter([digest for digest in digests if digest != ZERO_CHUNK])
        missing: set[bytes] = set()
        while asked := list(islice(left, _LOOKUP)):
            absent = await self._store.hold(session.team, session.holder, asked, [wanted.sizes[digest] for digest in asked])
            missing.update(asked[index] for index in absent)
        wanted.missing = missing

    async def _want(self, session: Session) -> Wanted:
        """What is still to come for a session, as this instance remembers, or as the manifest that the session holds says. Raises UploadUnknown."""
        wanted = self._wanted.get(session.id)
        if wanted is not None:
            self._wanted.move_to_end(session.id)
            return wanted
        try:
            tree = await self._trees.open(session.team, session.seal.digest)
            sizes = await tree.select(lambda entries: {digest: size for entry in entries for digest, size in entry.chunks()})
        except BlobMissing:  # the manifest itself was cut off
            raise UploadUnknown from None
        wanted = Wanted(sizes, set())
        await self._look(session, wanted, sizes)
        self._remember(session, wanted)
        return wanted

    def _remember(self, session: Session, wanted: Wanted) -> None:
        self._wanted[session.id] = wanted
        while len(self._wanted) > 1 and sum(len(each.sizes) for each in self._wanted.values()) > _REMEMBERED:
            self._wanted.popitem(last=False)

    async def _done(self, team: str, artifact: str, digest: str) -> Sealed | None:
        """The artifact with this tree, if it is there already. Raises Refused when there is another under its id, Gone."""
        sealed = await self._queries.artifact(team, artifact)
        return None if sealed is None else self._the_same(sealed, digest)

    def _the_same(self, sealed: Sealed, digest: str) -> Sealed:
        if sealed.as_sealed.digest != digest:
            raise Refused("conflict", "there is another artifact under this id")
        if sealed.gone:
            raise Gone
        return sealed

    async def _seal(self, session: Session, tree: TreeSummary, cause: Cause, shared: str = "") -> Sealed:
        """Everything is held: the artifact exists from now on. Raises UploadUnknown when the session has lapsed."""
        now = self._now()
        seal = replace(
            session.seal,
            digest=tree.digest,
            size=tree.size,
            files=tree.files,
            expires_at=int(now) + session.lifetime if session.lifetime else 0,
            upload=session.id,
        )
        self._wanted.pop(session.id, None)
        if seal.expires_at:
            self.agenda.expect(seal.expires_at)
        if not await self._sessions.mark(session.id, seal, now, shared):
            raise UploadUnknown
        sealed = await self.finish(Session(session.id, session.team, seal), cause)
        if sealed is None or sealed.as_sealed.upload != session.id:
            await self._let_go(self._sessions.end(session.id))
        if sealed is None:
            raise Refused("conflict", "there is another artifact under this id")
        return self._the_same(sealed, tree.digest)

    async def _drop(self, session: Session) -> None:
        """This stream is over; another one that has marked the session goes on."""
        await self._let_go(self._sessions.drop(session.id))

    async def _let_go(self, gone: Coroutine[None, None, None]) -> None:
        """At once if it can be; otherwise it lapses, or is ended by the janitor."""
        self.agenda.expect(self._now())
        try:
            await gone
        except LogUnavailable as error:
            logger.warning("an upload is left to lapse", why=str(error))

    async def _save(self, upload: Upload) -> None:
        try:
            await in_thread(upload.flush, self._store.threads)
        except (QuotaExceeded, StoreUnavailable, LogUnavailable) as error:
            logger.warning("what came of an upload is not kept", why=str(error))

    async def _room(self, team: str) -> Room:
        quota = (await self._queries.policy(team)).quota_bytes
        return Room(max(quota - await self._store.usage(team), 0), quota) if quota else Room(None, None)

    async def _alive(self, session: Session, body: AsyncIterator[P]) -> AsyncIterator[P]:
        """The body, while the session is alive. Raises UploadUnknown."""
        seen = self._now()
        async for piece in body:
            yield piece
            del piece
            if self._now() - seen > _TOUCH:
                seen = self._now()
                if not await self._sessions.touch(session.id, seen):
                    raise UploadUnknown


async def _until_broken(body: AsyncIterator[P], broken: list[Exception]) -> AsyncIterator[P]:
    """The body; what breaks it off is noted instead of raised, so that what came before is dealt with."""
    try:
        async for piece in body:
            yield piece
            del piece  # it may be large, and the next is long in coming
    except Exception as error:
        broken.append(error)
