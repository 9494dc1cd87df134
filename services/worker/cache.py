"""The files and trees that this worker has had, so that what comes again is neither fetched nor written again: all teams' parts, under one limit.

Each part is a team's own (`teamcache.py`): what lies below an overlay shows its number of links and its times, which would tell one team what
another has. What was used longest ago goes first, whosever it is, but for what a running attempt uses.

Nothing is synced. So what an earlier run of the machine left may be damaged: it is in doubt until it is wanted, and is read first.
"""

import heapq
import itertools
import os
import shutil
import threading
from itertools import islice
from pathlib import Path

from proto.messages import MAX_HINTS, TREE_HINT
from services.worker.teamcache import CachedFile, TeamCache, inodes_in, used_at, weight_of

_MACHINE = Path("/proc/sys/kernel/random/boot_id")


class Cache:
    """Of all teams. All methods block, and may be called in several threads at once. `limit` in bytes; 0: only what is being used is kept."""

    def __init__(self, root: Path, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._root = root
        self._new = root / "new"
        self._lock = threading.Lock()
        self._trimming = threading.Lock()
        self._teams: dict[str, TeamCache] = {}
        self._known: dict[tuple[str, str], None] = {}
        self._hints: tuple[str, ...] | None = None
        self._numbers = itertools.count(1)

    def open(self) -> None:
        """Take up what an earlier life left, less what is damaged. Raises OSError."""
        shutil.rmtree(self._new, ignore_errors=True)
        folders = [self._root / each for each in ("files", "trees", "doubtful")]
        for each in (*folders, self._new):
            each.mkdir(parents=True, exist_ok=True)
        machine, seen = _machine(), self._root / "machine"
        restarted = not machine or not seen.exists() or seen.read_text() != machine
        for folder in folders:
            for left in folder.iterdir():
                # `files` has each team; what else is here is another version's
                if not left.is_dir() or not (folders[0] / left.name).is_dir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in folders[0].iterdir():
            self.of(left.name).take_up(restarted)
        seen.write_text(machine)
        self.bytes = sum(file.bytes for team in self._teams.values() for _, file in team.files())
        trees = [tree for team in self._teams.values() for tree in team.trees()]
        self.bytes += sum(map(weight_of, trees))
        self._known = dict.fromkeys((tree.parent.name, tree.name) for tree in sorted(trees, key=used_at))
        self.trim()

    def close(self) -> None:
        for team in self._teams.values():
            team.close()
        self._teams.clear()

    def of(self, team: str) -> TeamCache:
        """What is kept for a team. Raises OSError."""
        if (found := self._teams.get(team)) is None:
            if not team or "/" in team or team in (".", ".."):
                raise ValueError(f"no name of a team: {team}")
            found = self._teams.setdefault(team, TeamCache(self, self._root, team))
        return found

    def hints(self) -> tuple[str, ...]:
        """The trees that are known, the latest first, as heartbeats name them. The same object as before when there is nothing new to say."""
        with self._lock:
            if self._hints is None:
                trees = dict.fromkeys(digest[:TREE_HINT] for _, digest in reversed(self._known))
                self._hints = tuple(islice(trees, MAX_HINTS))
            return self._hints

    def note(self, team: str, digest: str, known: bool) -> None:
        """The tree was used, or is gone."""
        with self._lock:
            self._known.pop((team, digest), None)
            if known:
                self._known[team, digest] = None
            # Their order is news to nobody unless it decides which are named.
            if self._hints is not None and known != (digest[:TREE_HINT] in self._hints):
                self._hints = None

    def count(self, more: int) -> None:
        """So many bytes have come."""
        with self._lock:
            self.bytes += more

    def new_path(self) -> Path:
        """Where something may be made that is then added."""
        return self._new / str(next(self._numbers))

    def trim(self, to: int | None = None) -> None:
        """When there is more than the limit allows (or than `to` bytes): remove what was used longest ago, and a tenth more so that this is seldom
        done. What a running attempt uses stays."""
        room = self.room() if to is None else to
        if self.bytes <= room:
            return
        goal = room * 9 // 10 if to is None else to
        with self._trimming:
            files = self._scan()
            trees = {tree: weight_of(tree) for team in list(self._teams.values()) for tree in team.trees()}
            total = sum(file.bytes for file in files.values()) + sum(trees.values())
            oldest = [(file.used_at, "", inode) for inode, file in files.items() if file.links == 1]
            oldest += [(used_at(tree), str(tree), 0) for tree in trees]
            heapq.heapify(oldest)
            while total > goal and oldest:
                when, tree, inode = heapq.heappop(oldest)
                path = Path(tree) if tree else files[inode].path
                if (taken := self._teams[path.parent.name].take(path)) is None:
                    continue
                if not tree:
                    total -= files[inode].bytes
                    taken.unlink()
                    continue
                total -= trees[path]
                self.note(path.parent.name, path.name, known=False)
                for inode in inodes_in(taken):
                    if (file := files.get(inode)) is not None:
                        file.links -= 1
                        if file.links == 1:
                            heapq.heappush(oldest, (when, "", inode))
                shutil.rmtree(taken, ignore_errors=True)
            with self._lock:
                self.bytes = total

    def room(self) -> int:
        """The limit, but never more than stays free on the disk: steps need it too."""
        disk = os.statvfs(self._root)
        return min(self.limit, (self.bytes + disk.f_bavail * disk.f_frsize) // 2)

    def _scan(self) -> dict[int, CachedFile]:
        """The files, by inode."""
        return {inode: file for team in list(self._teams.values()) for inode, file in team.files()}


def _machine() -> str:
    """Which run of the machine this is; "" when it does not say."""
    try:
        return _MACHINE.read_text().strip()
    except OSError:
        return ""
