"""A tree that becomes known to this worker, from outside: checked as its manifest comes."""

import contextlib
import shutil
from collections.abc import Iterable

from libs.archives.tree import TreeCheck
from services.worker.teamcache import TeamCache
from services.worker.trees import MANIFEST, SANE, KnownTree, Survey


class NewTree:
    """A tree whose manifest is coming; to be closed, which removes what did not become whole."""

    def __init__(self, cache: TeamCache, digest: str) -> None:
        """Raises OSError."""
        self._cache = cache
        self._digest = digest
        self._survey = Survey(TreeCheck(SANE))
        self._made = cache.new_path()
        self._made.mkdir()
        self._file = (self._made / MANIFEST).open("wb")

    def feed(self, data: bytes) -> None:
        """Raises InvalidManifest, ArchiveRefused, OSError."""
        self._survey.feed(data)
        self._file.write(data)

    def finish(self) -> KnownTree:
        """It is known from now on. Raises InvalidManifest, for another digest too; ArchiveRefused, OSError."""
        self._file.close()
        folder = self._cache.folder_of(self._digest)
        tree = self._survey.finish(self._digest, folder / MANIFEST)
        self._cache.publish(self._made, folder)
        self._cache.all.note(self._cache.name, self._digest, known=True)
        return tree

    def close(self) -> None:
        self._file.close()
        shutil.rmtree(self._made, ignore_errors=True)


def add_tree(cache: TeamCache, digest: str, manifest: Iterable[bytes]) -> KnownTree:
    """Remember a tree, whose manifest comes in pieces and should have this digest. Raises InvalidManifest, ArchiveRefused for what is none,
    OSError."""
    with contextlib.closing(NewTree(cache, digest)) as new:
        for piece in manifest:
            new.feed(piece)
        return new.finish()
