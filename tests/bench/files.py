"""A tree of files as a project has it, made anew from a seed: most of it text, some of it already compressed; and what others do with it."""

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path

WORDS = [f"{a}{b}" for a in ("get", "set", "make", "find", "read", "write", "send", "open") for b in ("er", "_all", "_one", "s", "_by_name", "")]


def write_tree(root: Path, files: int, size: int, seed: int = 3) -> None:
    """`files` files of `size` bytes in all; a fifth of them, no text."""
    source = random.Random(seed)
    average = size // files
    for number in range(files):
        folder = root / f"part{number % 40:02d}" / f"module{number // 40 % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        length = source.randint(average // 2, average * 3 // 2)
        content = source.randbytes(length) if number % 5 == 0 else text(source, length)
        (folder / f"file{number:05d}.{'bin' if number % 5 == 0 else 'py'}").write_bytes(content)


def text(source: random.Random, length: int) -> bytes:
    words = " ".join(source.choices(WORDS, k=length // 6 + 1)).encode()
    return words[:length].ljust(length, b"\n")


def edit(root: Path) -> None:
    """One file in the middle is another than before."""
    middle = sorted(path for path in root.rglob("*.py"))[1000 % sum(1 for _ in root.rglob("*.py"))]
    middle.write_bytes(middle.read_bytes()[:-1] + os.urandom(8).hex().encode())


def timed(*command: str) -> float:
    """Seconds a command takes. Raises CalledProcessError."""
    began = time.monotonic()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def tar_zstd(root: Path, into: Path) -> float:
    return timed("sh", "-c", 'tar -C "$1" -cf - . | zstd -1 -q -f -o "$2"', "sh", str(root), str(into))


def rsync(root: Path, into: Path) -> float:
    return timed("rsync", "-a", "--delete", f"{root}/", f"{into}/")


def hash_and_write(source: Path, target: Path) -> float:
    """Seconds to read, sha256 and write a file, and to have it on the disk: what no store can do without."""
    began = time.monotonic()
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        while piece := read.read(1 << 20):
            digest.update(piece)
            write.write(piece)
        os.fsync(write.fileno())
    return time.monotonic() - began
