"""The command line's words for what is stored: references, times, sizes, names, tables, and what two trees differ in."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from penstock.cli.artifact.listing import print_artifacts
from penstock.cli.quantities import FOREVER, Duration, Keep, Size, exact_time, readable_size, readable_time
from penstock.cli.references import Found, Reference, is_reference, output_in, parse_reference
from penstock.cli.running import Failure
from penstock.cli.sending import send
from penstock.cli.terminal import Bars, Terminal, printable
from penstock.cli.trees import Part, compare, part_of
from penstock.client import Artifact, Build, Client, Entry, Progress, Transfer, select
from tests.unit.test_cli import here, penstock

__all__ = ["here"]

ID = "01234567-89ab-7def-8123-456789abcdef"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (ID, Reference(id=ID)),
        (ID.upper(), Reference(id=ID)),
        (f"{ID}/a/b", Reference(id=ID, path="a/b")),
        (f"{ID}//a/./b/", Reference(id=ID, path="a/b")),
        (f"artifact:{ID}/a:b", Reference(id=ID, path="a:b")),
        ("build:7/dist", Reference(build="7", path="dist")),
        ("build:#7/dist/bin/x", Reference(build="7", path="dist/bin/x")),
        (f"build:{ID}/dist", Reference(build=ID, path="dist")),
        ("build:7", Reference(build="7")),
    ],
)
def test_a_reference_is_an_id_or_a_build_and_a_path(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names nothing stored"),
        ("dist", "names nothing stored"),
        ("artifact:7", "names nothing stored"),
        (f"other:{ID}", "names nothing stored"),
        ("build:x/dist", "names no build"),
        ("build:/dist", "names no build"),
        (f"{ID}/../x", "has no `..`"),
        ("build:7/dist/../x", "has no `..`"),
    ],
)
def test_what_is_no_reference_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_reference(text)


def test_a_folder_here_is_not_taken_for_something_stored() -> None:
    assert [is_reference(text) for text in (ID, f"{ID}/x", "artifact:x", "build:7")] == [True] * 4
    assert [is_reference(text) for text in ("dist", "./build:7", f"./{ID}", "/", "~/x", ".", "")] == [False] * 7


def build(outputs: list[str], **fields: Any) -> Build:
    return Build(id="b", number=7, outputs={name: Artifact(id=f"id of {name}") for name in outputs}, **{"status": "succeeded", **fields})


@pytest.mark.parametrize(
    ("outputs", "path", "found"),
    [
        (["dist"], "dist", ("dist", "")),
        (["dist"], "", ("dist", "")),
        (["dist"], "dist/bin/x", ("dist", "bin/x")),
        (["compile/dist", "test/report"], "dist/x", ("compile/dist", "x")),
        (["compile/dist", "test/report"], "compile/dist/x", ("compile/dist", "x")),
        (["dist", "dist.old"], "dist.old/x", ("dist.old", "x")),
        (["dist", "compile/dist"], "dist/x", ("dist", "x")),
    ],
)
def test_an_output_is_the_longest_name_that_the_path_begins_with(outputs: list[str], path: str, found: tuple[str, str]) -> None:
    assert output_in(build(outputs), path) == found


@pytest.mark.parametrize(
    ("made", "path", "said"),
    [
        (build(["dist", "docs"]), "dits", "build 7 has no output `dits`: there is build:7/dist, build:7/docs"),
        (build(["dist", "docs"]), "", "build 7 has several outputs: there is build:7/dist, build:7/docs"),
        (build([]), "dist", "build 7 has no output `dist`"),
        (build([]), "", "build 7 has no outputs"),
        (build(["a/dist", "b/dist"]), "dist", "build 7 has no output `dist`: there is build:7/a/dist, build:7/b/dist"),
        (build([], status="started"), "dist", "build 7 is started and has no output `dist` yet: wait with `penstock watch 7`"),
    ],
)
def test_an_output_that_a_build_has_not_is_said_with_those_that_it_has(made: Build, path: str, said: str) -> None:
    with pytest.raises(Failure) as refused:
        output_in(made, path)
    assert refused.value.message == said


@pytest.mark.parametrize(
    ("artifact", "path", "output", "name"),
    [
        (Artifact(id=ID, name="src"), "", "", "src"),
        (Artifact(id=ID, name="src"), "docs/guide", "", "guide"),
        (Artifact(id=ID), "", "compile/dist", "dist"),
        (Artifact(id=ID, name="../../etc"), "", "", ID),
        (Artifact(id=ID, name=".."), "", "", ID),
        (Artifact(id=ID, name="a\nb"), "", "", ID),
        (Artifact(id=ID), "", "", ID),
    ],
)
def test_a_copy_is_called_what_the_reference_ends_in_when_that_is_a_name_for_a_file(artifact: Artifact, path: str, output: str, name: str) -> None:
    assert Found(artifact, path, "given", output).name == name


def test_times_are_typed_as_people_do() -> None:
    texts = {"90": 90, "90s": 90, "10m": 600, "1h30m": 5400, "12h": 43200, "7d": 604800, "2w": 1209600, "1d12h": 129600, " 7D ": 604800}
    assert {text: Duration().convert(text, None, None) for text in texts} == texts
    assert Keep().convert("forever", None, None) == "forever"
    assert Keep().convert("7d", None, None) == 604800


@pytest.mark.parametrize("text", ["", "0", "d", "soon", "7 days", "-1h", "1.5h", "30m1h", "99999999d", "9" * 50])
def test_what_is_no_time_is_refused(text: str) -> None:
    for kind, said in ((Duration(), "must be a time like 90s, 12h or 7d"), (Keep(), "must be `forever`, or a time")):
        with pytest.raises(click.BadParameter, match=said):
            kind.convert(text, None, None)


def test_sizes_are_typed_as_people_do() -> None:
    texts = {
        "50GB": 50 * 10**9,
        "1.5 gb": 15 * 10**8,
        "500MB": 5 * 10**8,
        "10GiB": 10 << 30,
        "10g": 10**10,
        "0": 0,
        "none": 0,
        "7": 7,
        "2TB": 2 * 10**12,
    }
    assert {text: Size().convert(text, None, None) for text in texts} == texts
    for text in ("", "GB", "-1GB", "much", "1,5GB", "9" * 25):
        with pytest.raises(click.BadParameter, match="must be a size like 500MB or 50GB"):
            Size().convert(text, None, None)


def test_times_and_sizes_are_shown_in_one_unit() -> None:
    assert [readable_time(seconds) for seconds in (-5, 0, 59, 110, 120, 43199, 43200, 160000, 172799, 172800, 2592000)] == (
        ["0 s", "0 s", "59 s", "110 s", "2 min", "12 h", "12 h", "44 h", "2 d", "2 d", "30 d"]
    )
    assert [exact_time(seconds) for seconds in (90, 43200, 129600, 2592000, FOREVER)] == ["90 s", "12 h", "36 h", "30 d", "36,500 d"]
    assert [readable_size(size) for size in (0, 999, 1500, 3_000_000, 10**15)] == ["0 B", "999 B", "1.5 kB", "3.0 MB", "1000.0 TB"]


def test_names_from_elsewhere_cannot_move_the_cursor() -> None:
    assert printable("plain ü.txt") == "plain ü.txt"
    assert printable("a\x1b[2Jb\nc\u202e") == r"a\x1b[2Jb\x0ac\u202e"
    assert printable(b"latin \xfc".decode("utf-8", "surrogateescape")) == r"latin \xfc"


def test_artifacts_are_listed_in_columns(capfd: pytest.CaptureFixture[str]) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    made = {"created_at": now - timedelta(hours=3)}
    artifacts = [
        Artifact(id=ID, name="src", files=5000, size=10**8, expires_at=now + timedelta(hours=9), **made),
        Artifact(id=ID, kind="output", name="dist", files=1, size=8, build=7, pinned=True, **made),
        Artifact(id=ID, name="a\nb", **made),
    ]
    print_artifacts(artifacts, now.timestamp())
    assert capfd.readouterr().out.splitlines() == [
        "id                                    origin        files      size  age  expires",
        f"{ID}  src           5,000  100.0 MB  3 h  in 9 h",
        f"{ID}  build:7/dist      1       8 B  3 h  pinned",
        rf"{ID}  a\x0ab            0       0 B  3 h  never",
    ]


def file(path: bytes, content: bytes, *, mode: int = 0o644, size: int = 1, target: bytes = b"") -> Entry:
    return Entry(path, "file", mode, size, content.ljust(32, b"\0"), target)


def folder(path: bytes) -> Entry:
    return Entry(path, "folder", 0o755)


def tree(*entries: Entry) -> dict[bytes, Entry]:
    return {entry.path: entry for entry in entries}


def test_trees_differ_in_what_was_added_removed_and_changed() -> None:
    before = tree(
        folder(b"d"),
        file(b"d/gone", b"1"),
        file(b"d/same", b"1"),
        folder(b"empty"),
        Entry(b"link", "link", 0o777, target=b"a"),
        file(b"run", b"1"),
        file(b"x", b"1"),
        folder(b"y"),
    )
    after = tree(
        folder(b"d"),
        file(b"d/same", b"1", target=b"elsewhere"),
        Entry(b"link", "link", 0o777, target=b"b"),
        folder(b"new"),
        file(b"new/file", b"1"),
        file(b"run", b"1", mode=0o755),
        file(b"x", b"2"),
        file(b"y", b"1"),
    )
    changes = list(compare(before, after))
    assert [(change.sign, change.path) for change in changes] == [
        ("-", b"d/gone"),
        ("-", b"empty"),
        ("~", b"link"),
        ("+", b"new/file"),
        ("~", b"run"),
        ("~", b"x"),
        ("~", b"y"),
    ]
    assert [change.path for change in changes if change.is_content] == [b"x"]
    assert list(compare(before, before)) == []


def test_a_part_of_a_tree_is_a_folder_or_one_file() -> None:
    entries = tree(folder(b"d"), file(b"d/a", b"1", size=5), file(b"d/b", b"1", size=5, target=b"d/a"), file(b"da", b"2", size=7)).values()
    inside = part_of(entries, b"d")
    assert inside
    assert (sorted(inside.entries), inside.files, inside.size) == ([b"a", b"b"], 2, 5)
    one = part_of(entries, b"da")
    assert one
    assert (list(one.entries), one.is_folder, one.size) == ([b""], False, 7)
    assert part_of(entries, b"none") is None
    whole = part_of(entries)
    assert whole
    assert (len(whole.entries), whole.size) == (4, 12)
    assert Part({}).size == 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_an_upload_moved_is_told_from_its_phases() -> None:
    bars = Bars(Terminal(), drawn=False)
    told = bars.add("src")
    assert bars.moved("src", "sending") is None
    for transfer in (Transfer("hashing", 5, 10, 90), Transfer("hashing", 10, 10, 90), Transfer("sending", 3, 3, 97)):
        told(transfer)
    assert (bars.moved("src", "hashing"), bars.moved("src", "sending")) == (10, 3)


class HalfWay(Client):
    """Sends some of it, and then nothing more comes."""

    def __init__(self, phase: Literal["hashing", "sending"]) -> None:
        super().__init__("http://127.0.0.1:9", "")
        self._phase = phase

    async def upload(self, source: object, name: str = "", progress: Progress | None = None, keep: object = None) -> Artifact:
        assert progress
        progress(Transfer(self._phase, 1, 2, 0))
        return await asyncio.Future()


@pytest.mark.parametrize(
    ("phase", "said"),
    [("hashing", "nothing was sent"), ("sending", "what was sent is kept for an hour, and the same command goes on from there")],
)
async def test_an_upload_that_is_interrupted_says_what_becomes_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: Literal["hashing", "sending"], said: str
) -> None:
    task = asyncio.ensure_future(send(HalfWay(phase), {"src": select(tmp_path)}, Terminal()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(click.Abort, match=f"interrupted: {said}"):
        await task


@pytest.mark.parametrize("command", ["upload", "ls", "cat", "download", "diff", "pin", "unpin", "touch", "rm", "usage", "policy"])
def test_every_artifact_command_has_help(tmp_path: Path, command: str) -> None:
    result = penstock("artifact", command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"Usage: penstock artifact {command}" in result.stdout
    assert f"  {command} " in penstock("artifact", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "dist"], "`dist` names nothing stored: give an artifact's id (see `penstock artifact ls`), or build:N/output"),
        (["ls", "-l"], "Error: -r and -l look into an artifact: name one, `penstock artifact ls -l ID`"),
        (["ls", ID, "--build", "7"], "Error: --kind and --build choose among all artifacts: leave REF away"),
        (["pin", f"{ID}/x"], f"`{ID}/x` is a part of an artifact, and only all of it can be meant: `{ID}`"),
        (["touch", ID], "Missing option '--keep'"),
        (["touch", ID, "--keep", "forever"], "`forever` must be a time like 90s, 12h or 7d"),
        (["upload", "gone"], "Error: gone does not exist"),
        (["upload", "task.yml"], "Error: task.yml is not a folder"),
        (["download", ID, "task.yml"], "Error: task.yml is there and is not a folder"),
        (["diff", ID, "gone"], "`gone` is neither a folder here nor anything stored"),
        (["diff", ID, "task.yml"], "task.yml is a file: compare it with `penstock artifact cat REF | diff - task.yml`"),
        (["policy", "--quota", "much"], "`much` must be a size like 500MB or 50GB, or `none`"),
    ],
)
def test_an_artifact_command_that_cannot_be_meant_is_refused(here: Path, arguments: list[str], said: str) -> None:
    result = penstock("artifact", *arguments, cwd=here)
    assert said in result.stderr
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize(
    "arguments", [["ls"], ["ls", ID], ["cat", f"{ID}/x"], ["download", ID], ["diff", ID, ID], ["upload", "in"], ["pin", ID], ["usage"], ["policy"]]
)
def test_an_artifact_command_without_a_server_is_one_line_that_says_what_to_do(here: Path, arguments: list[str]) -> None:
    result = penstock("artifact", *arguments, cwd=here)
    assert result.stderr == "Error: cannot reach http://127.0.0.1:9: is it running? start it with `penstock up`\n"
    assert result.returncode == (2 if arguments[0] == "diff" else 1)
