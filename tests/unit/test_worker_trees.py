"""What the worker keeps in mind of trees with very many files."""

import hashlib
from pathlib import Path

import pytest

from libs.archives.rules import ArchiveRefused
from libs.archives.tree import Entry, InvalidManifest, TreeCheck, tree_of
from services.worker.stamps import ByInode
from services.worker.trees import Names, Survey, name_of


def file(path: str, contents: str = "", target: bytes = b"", mode: int = 0o644) -> Entry:
    return Entry(path.encode(), "file", mode, len(contents), hashlib.sha256(contents.encode()).digest() if contents else b"", target)


def test_names_are_counted_and_told_from_others() -> None:
    names = Names.of("b", "a", "b", "c")
    assert "a" in names and "b" in names and "d" not in names
    assert "a" not in Names([])
    assert names.repeated() == {hash("b")}
    assert names.counted([]) == {}
    assert names.counted([Names.of("b", "b", "x"), Names.of("c", "b")]) == {hash("b"): 3, hash("c"): 1}


def test_what_was_added_for_an_inode_is_found_whatever_its_order() -> None:
    made = ByInode()
    assert list(made.find(1)) == []
    for inode, what in ((9, b"nine"), (2, b"two"), (9, b""), (4, b"four"), (9, b"again")):
        made.add(inode, what)
    assert [list(made.find(inode)) for inode in (1, 2, 4, 9, 10)] == [[], [b"two"], [b"four"], [b"nine", b"", b"again"], []]
    made.add(1, b"late")
    assert list(made.find(1)) == [b"late"]


def test_a_survey_keeps_what_a_known_tree_needs_and_that_reads_its_manifest_again(tmp_path: Path) -> None:
    first, program = file("d/first", "x"), file("program", "x", mode=0o755)
    made = tree_of(
        [Entry(b"d", "folder", 0o755), first, file("linked", "x", b"d/first"), program, file("empty"), Entry(b"way", "link", 0o777, target=b"d")]
    )
    (tmp_path / "manifest").write_bytes(made.root.blobs[0])
    survey = Survey(TreeCheck())
    for at in range(0, len(made.root.blobs[0]), 7):
        survey.feed(made.root.blobs[0][at : at + 7])
    tree = survey.finish(made.summary.digest, tmp_path / "manifest")
    assert list(tree) == list(tree) == made.entries
    assert (tree.folders, tree.linked) == (1, {b"d/first", b"linked"})
    assert [entry.path for entry in tree.linked_files()] == [b"d/first", b"linked"]
    assert [entry.path for entry in tree.unlinked()] == [b"d", b"empty", b"program", b"way"]
    assert all(name_of(entry) in tree.names for entry in (first, program))
    assert not tree.names.repeated()


def test_a_survey_refuses_what_is_cut_another_tree_or_none(tmp_path: Path) -> None:
    made = tree_of([file("a", "x")])
    for manifest, digest in ((made.root.blobs[0][:-1], made.summary.digest), (made.root.blobs[0], "0" * 64)):
        survey = Survey()
        survey.feed(manifest)
        with pytest.raises(InvalidManifest):
            survey.finish(digest, tmp_path)
    with pytest.raises(ArchiveRefused):
        Survey(TreeCheck()).feed(tree_of([file("../a", "x")]).root.blobs[0])
