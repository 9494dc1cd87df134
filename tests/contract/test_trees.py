"""The client's trees and the server's: two writings of one format, which give the same digest for the same folder."""

import hashlib
import os
from pathlib import Path

import pytest

from libs.archives import tree as server
from penstock.client import select, tree
from penstock.client.scan import hash_files
from penstock.client.threads import Threads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one of everything."""
    root = tmp_path / "root"
    for name, contents in {"a": b"1", "a.b": b"2", "a-b/c": b"3", "a b/d/e": b"", "deep/x": b"x" * 1000}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents)
    (root / "big").write_bytes(os.urandom(tree.CHUNK + 5))
    (root / "even").write_bytes(bytes(tree.CHUNK * 2))
    with open(root / "hole", "wb") as file:
        file.truncate(tree.CHUNK * 3 + 7)
    (root / "empty").mkdir()
    (root / "deep/run").write_bytes(b"run")
    (root / "deep/run").chmod(0o700)
    (root / "deep/link").symlink_to("../a")
    os.link(root / "deep/run", root / "A-twin")
    os.link(root / "deep/run", root / "z-twin")
    Path(os.fsdecode(os.path.join(os.fsencode(root), b"not-utf8-\xff"))).write_text("odd")
    return root


async def entries_of(root: Path) -> tuple[list[tree.Entry], bytes]:
    selection = select(root, environ={})
    async with Threads(2) as threads:
        digest = await hash_files(selection, threads, lambda done: None)
    return selection.entries, digest


async def test_client_and_server_name_the_same_folder_by_the_same_digest(folder: Path) -> None:
    entries, digest = await entries_of(folder)
    manifest = b"".join(tree.manifest_of(entries))
    read = server.read_manifest(manifest)
    assert [tuple(getattr(entry, name) for name in ("path", "kind", "mode", "size", "digest", "target")) for entry in read] == [
        (entry.path, entry.kind, entry.mode, entry.size, entry.digest, entry.target) for entry in entries
    ]
    assert b"".join(server.manifest_of(read)) == manifest
    assert server.root_of([manifest]).digest == digest
    check = server.TreeCheck()
    for entry in read:
        check.add(entry)
    summary = check.finish(digest)
    selection = select(folder, environ={})
    assert (summary.digest, summary.files, summary.size) == (digest.hex(), selection.files, selection.size)
    assert [entry.file_id for entry in read if entry.kind == "file"] == [entry.file_id for entry in entries if entry.kind == "file"]


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 70_000])
def test_trees_of_any_length_have_the_same_digest(count: int) -> None:
    digest = hashlib.sha256(b"x").digest() * 3
    size = 2 * tree.CHUNK + 1
    names = sorted((b"%032d" % n for n in range(count)), key=tree.order)
    ours = list(tree.manifest_of(tree.Entry(name, "file", 0o644, size, digest) for name in names))
    theirs = list(server.manifest_of(server.Entry(name, "file", 0o644, size, digest) for name in names))
    assert b"".join(ours) == b"".join(theirs)
    assert tree.tree_digest(ours) == server.root_of(theirs).digest == tree.tree_digest([b"".join(ours)])
    reader = tree.ManifestReader()
    data = b"".join(theirs)
    assert sum(1 for at in range(0, len(data), 100_003) for _ in reader.feed(data[at : at + 100_003])) == count
    reader.finish()


def test_they_agree_on_what_a_chunk_is() -> None:
    assert (tree.CHUNK, tree.ZERO_CHUNK) == (server.CHUNK, server.ZERO_CHUNK)
    assert hashlib.sha256(bytes(tree.CHUNK)).digest() == tree.ZERO_CHUNK
