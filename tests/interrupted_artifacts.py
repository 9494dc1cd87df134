"""The artifacts service as a process that stops before the n-th time that it asks the database or the store for something, counted from SIGUSR1 on.

`python -m tests.interrupted_artifacts N SIGNAL`: with N = 0 it never stops. SIGNAL is what it sends itself."""

import os
import signal
import sys
from typing import Any

import asyncpg

from libs.blobstore.objects import Folder
from services.artifacts.__main__ import main

_left = 0


def _count() -> None:
    global _left
    if _left:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), int(sys.argv[2]))


def _counted(cls: type, name: str) -> None:
    inner = getattr(cls, name)

    def call(*args: Any, **options: Any) -> Any:
        _count()
        return inner(*args, **options)

    setattr(cls, name, call)


def _begin(*_: object) -> None:
    global _left
    _left = int(sys.argv[1])


if __name__ == "__main__":
    for name in ("fetch", "fetchrow", "fetchval", "execute"):
        _counted(asyncpg.Connection, name)
    for name in ("put", "delete"):
        _counted(Folder, name)
    signal.signal(signal.SIGUSR1, _begin)
    main(os.environ, {})
