"""What is stored, by the command line on a running system: folders go up, are looked at, compared, kept, used by builds and brought back."""

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli
from tests.e2e.test_execute import folder

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\n")


@pytest.fixture
def work(cli: Cli) -> Path:
    """A folder with one of everything that survives."""
    root = folder(cli.folder / "work", **{"a.txt": "one\n", "ü": "two\n", "empty.txt": ""})
    folder(root / "bin", run="#!/bin/sh\necho ran\n")
    (root / "bin/run").chmod(0o755)
    (root / "bare").mkdir()
    (root / "link").symlink_to("bin/run")
    os.link(root / "a.txt", root / "twin")
    return root


def upload(cli: Cli, *arguments: str | Path) -> str:
    result = cli("artifact", "upload", *arguments)
    assert result.returncode == 0, result.stderr
    assert ID.fullmatch(result.stdout)
    return result.stdout.strip()


def test_a_folder_goes_up_is_looked_at_and_comes_back_as_it_was(cli: Cli, work: Path) -> None:
    artifact = upload(cli, work)
    listed = cli("artifact", "ls", artifact)
    assert listed.stdout.splitlines() == ["a.txt", "bare/", "bin/", "empty.txt", "link", "twin", "ü"]
    assert cli("artifact", "ls", "-r", artifact).stdout.splitlines() == ["a.txt", "bare/", "bin/", "bin/run", "empty.txt", "link", "twin", "ü"]
    assert cli("artifact", "ls", f"{artifact}/bin").stdout == "run\n"
    assert cli("artifact", "ls", f"artifact:{artifact}/bin/run").stdout == "run\n"
    long = cli("artifact", "ls", "-l", artifact)
    assert re.search(r"^- +4 B  [0-9a-f]{12}  a\.txt$", long.stdout, re.MULTILINE)
    assert "link -> bin/run\n" in long.stdout
    assert "twin = a.txt\n" in long.stdout
    assert long.stderr == "4 files, 8 B\n"
    assert cli("artifact", "cat", f"{artifact}/a.txt", f"{artifact}/ü").stdout == "one\ntwo\n"
    for path, said in (
        ("bin", "is a folder: name a file in it"),
        ("link", "is a link to bin/run: name that"),
        ("none", "there is nothing at `none`"),
    ):
        refused = cli("artifact", "cat", f"{artifact}/{path}")
        assert (refused.stdout, refused.stderr.count("\n"), said in refused.stderr) == ("", 1, True), refused.stderr
    brought = cli("artifact", "download", artifact, "back")
    assert brought.returncode == 0, brought.stderr
    assert brought.stderr.splitlines()[0] == f"artifact:{artifact}: 5 files, 27 B, into back"
    back = cli.folder / "back"
    assert {path.relative_to(back) for path in back.rglob("*")} == {path.relative_to(work) for path in work.rglob("*")}
    assert (back / "bin/run").stat().st_mode & 0o111
    assert (back / "link").readlink() == Path("bin/run")
    assert (back / "a.txt").samefile(back / "twin")
    assert cli("artifact", "diff", artifact, "back").returncode == 0


def test_an_upload_says_what_it_moved_and_a_repeated_one_moves_nothing(cli: Cli, work: Path) -> None:
    first = cli("artifact", "upload", "work")
    assert first.stderr.splitlines()[0] == "uploaded work: 5 files, 27 B: hashed 27 B, sent 27 B"
    assert re.fullmatch(r"kept until \d{4}-\d\d-\d\d \d\d:\d\d", first.stderr.splitlines()[1])
    again = cli("artifact", "upload", "work")
    assert "sent nothing, saved 27 B" in again.stderr
    (work / "a.txt").write_text("three\n")
    edited = cli("artifact", "upload", "work")
    assert "sent 6 B, saved 23 B" in edited.stderr
    digests = [json.loads(cli("artifact", "ls", "--json").stdout)[n]["digest"] for n in range(3)]
    assert digests[1] == digests[2] != digests[0]


def test_a_part_comes_back_alone(cli: Cli, work: Path) -> None:
    artifact = upload(cli, work, "--name", "src")
    assert cli("artifact", "download", f"{artifact}/bin").returncode == 0
    assert [path.name for path in (cli.folder / "bin").iterdir()] == ["run"]
    one = cli("artifact", "download", f"{artifact}/a.txt")
    assert (one.returncode, (cli.folder / "a.txt").read_text()) == (0, "one\n"), one.stderr
    assert cli("artifact", "download", f"{artifact}/bin/run", "into").returncode == 0
    assert [path.name for path in (cli.folder / "into").iterdir()] == ["run"]
    assert cli("artifact", "download", artifact).returncode == 0
    assert (cli.folder / "src/a.txt").read_text() == "one\n"
    gone = cli("artifact", "download", f"{artifact}/none")
    assert (gone.returncode, gone.stderr.count("\n")) == (1, 1)
    assert "nothing at `none`" in gone.stderr


def test_what_is_there_already_is_not_fetched_again(cli: Cli, work: Path) -> None:
    artifact = upload(cli, work)
    assert "received" not in cli("artifact", "download", artifact, "back").stderr
    assert "5 files, 27 B: all of it was here" in cli("artifact", "download", artifact, "back").stderr
    (cli.folder / "back/ü").write_text("TWO\n")
    again = cli("artifact", "download", artifact, "back")
    assert "received 4 B, saved 23 B" in again.stderr
    assert (cli.folder / "back/ü").read_text() == "two\n"


def test_a_listing_has_columns_and_a_reader_may_leave(cli: Cli, work: Path) -> None:
    artifact = upload(cli, work, "--name", "src", "--keep", "2d")
    heading, row = cli("artifact", "ls").stdout.splitlines()
    assert heading.split() == ["id", "origin", "files", "size", "age", "expires"]
    assert row.startswith(f"{artifact}  src   ")
    assert row.endswith("  in 2 d")
    assert cli("artifact", "ls", "--kind", "output").stdout.split() == heading.split()
    process = cli.start("artifact", "cat", f"{artifact}/a.txt")
    assert process.stdout
    process.stdout.close()
    assert process.wait(30) in (0, 141)


def test_two_trees_are_compared_as_diff_does(cli: Cli, work: Path) -> None:
    before = upload(cli, work)
    (work / "a.txt").unlink()
    (work / "a.txt").write_text("one\nmore\n")
    (work / "ü").unlink()
    (work / "new").write_text("x")
    (work / "bin/run").chmod(0o644)
    after = upload(cli, work)
    for right in (after, "work"):
        result = cli("artifact", "diff", before, right)
        assert result.returncode == 1
        assert [line.split(maxsplit=1)[0] + line.rpartition("  ")[2] for line in result.stdout.splitlines()] == [
            "~a.txt",
            "~bin/run (no longer executable)",
            "+new",
            "-ü",
        ]
        assert result.stderr == "1 added, 1 removed, 2 changed\n"
    patch = cli("artifact", "diff", "-p", f"{before}", after).stdout
    assert "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1,2 @@\n one\n+more\n" in patch
    assert cli("artifact", "diff", "--stat", before, after).stdout == "1 added, 1 removed, 2 changed\n"
    changes = json.loads(cli("artifact", "diff", "--json", before, after).stdout)
    assert (changes[0]["path"], changes[0]["change"]) == ("a.txt", "changed")
    same = cli("artifact", "diff", after, "work")
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    one = cli("artifact", "diff", f"{before}/a.txt", f"{after}/a.txt")
    assert one.returncode == 1
    trouble = cli("artifact", "diff", f"{before}/a.txt", after)
    assert (trouble.returncode, trouble.stdout) == (2, "")


def test_artifacts_are_pinned_touched_and_removed_several_at_once(cli: Cli, work: Path) -> None:
    one, two = upload(cli, work), upload(cli, work, "--keep", "forever")
    pinned = cli("artifact", "pin", one, two)
    assert pinned.stderr.splitlines() == [f"artifact:{one}: pinned", f"artifact:{two}: pinned"]
    assert all(row["pinned"] for row in json.loads(cli("artifact", "ls", "--json").stdout))
    assert cli("artifact", "unpin", one, two).stderr.splitlines()[1] == f"artifact:{two}: kept forever"
    touched = json.loads(cli("artifact", "touch", "--keep", "30d", one, "--json").stdout)
    assert [row["id"] for row in touched] == [one]
    for shorten in ([], ["--shorten"]):
        [kept] = json.loads(cli("artifact", "touch", "--keep", "1d", one, "--json", *shorten).stdout)
        assert (kept["expires_at"] < touched[0]["expires_at"]) == bool(shorten)
    removed = cli("artifact", "rm", one, two)
    assert removed.stderr.splitlines() == [f"artifact:{one}: removed (5 files, 27 B)", f"artifact:{two}: removed (5 files, 27 B)"]
    gone = cli("artifact", "rm", one, two)
    assert (gone.returncode, len(gone.stderr.splitlines())) == (1, 2)
    looked = cli("artifact", "ls", one)
    assert (looked.returncode, len(looked.stderr.splitlines())) == (1, 1)
    assert "penstock artifact upload" in looked.stderr
    assert json.loads(cli("artifact", "ls", "--json").stdout) == []


def test_usage_and_policy(cli: Cli, work: Path) -> None:
    upload(cli, work)
    upload(cli, work)
    used = json.loads(cli("artifact", "usage", "--json").stdout)
    assert (used["artifacts"], used["artifact_bytes"]) == (2, 54)
    assert cli("artifact", "usage").stdout.splitlines()[1] == "artifacts  2, 54 B if each were stored for itself"
    assert cli("artifact", "policy").stdout.splitlines() == [
        "inputs   kept for 12 h",
        "outputs  kept for 30 d",
        "quota    none",
        "steps    may not be privileged",
    ]
    changed = cli("artifact", "policy", "--inputs", "36h", "--outputs", "forever", "--quota", "50GB")
    assert changed.stdout.splitlines() == ["inputs   kept for 36 h", "outputs  kept forever", "quota    50.0 GB", "steps    may not be privileged"], (
        changed.stderr
    )
    assert "of 50.0 GB (0%)" in cli("artifact", "usage").stdout
    assert cli("artifact", "policy", "--quota", "none").stdout.splitlines()[2] == "quota    none"


def test_a_quota_refuses_what_is_too_much_in_one_line(cli: Cli, work: Path) -> None:
    assert cli("artifact", "policy", "--quota", "1kB").returncode == 0
    (work / "big").write_bytes(os.urandom(200_000))
    refused = cli("artifact", "upload", work)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "quota" in refused.stderr


def test_a_task_runs_on_what_is_stored(cli: Cli, work: Path) -> None:
    artifact = upload(cli, work)
    task = cli.task("cat src/run; cp src/run dist/copy; mkdir dist/sub; echo x > dist/sub/x", inputs=["src"], outputs=["dist"])
    first = cli("execute", "-c", task, "-i", f"src=artifact:{artifact}/bin", "--detach", "--keep", "forever")
    assert first.returncode == 0, first.stderr
    number = first.stdout.strip()
    assert cli("watch", number).stdout == "#!/bin/sh\necho ran\n"
    [output] = json.loads(cli("artifact", "ls", "--build", number, "--json").stdout)
    assert (output["kind"], output["build"], output["expires_at"]) == ("output", int(number), None)
    assert cli("artifact", "ls", f"build:{number}/dist").stdout.splitlines() == ["copy", "sub/"]
    assert cli("artifact", "cat", f"build:{number}/dist/sub/x").stdout == "x\n"
    assert cli("artifact", "download", f"build:{number}/dist").returncode == 0
    assert (cli.folder / "dist/sub/x").read_text() == "x\n"
    task = cli.task("ls src", inputs=["src"])
    assert cli("execute", "-c", task, "-i", f"src=build:{number}/dist").stdout == "copy\nsub\n"
    assert cli("execute", "-c", task, "-i", f"src=build:{number}/dist/sub").stdout == "x\n"
    assert cli("execute", "-c", task, "--inputs-from", number).stdout == "run\n"


def test_the_inputs_of_an_earlier_build_are_taken_unless_given(cli: Cli, work: Path) -> None:
    other = folder(cli.folder / "other", o="other\n")
    task = cli.task("cat src/a.txt lib/o", inputs=["src", "lib"])
    number = cli("execute", "-c", task, "-i", "src=work", "-i", "lib=other", "--detach").stdout.strip()
    assert cli("execute", "-c", task, "--inputs-from", number).stdout == "one\nother\n"
    (other / "o").write_text("changed\n")
    mixed = cli("execute", "-c", task, "--inputs-from", number, "-i", "lib=other")
    assert mixed.stdout == "one\nchanged\n", mixed.stderr
    more = cli.task("true", inputs=["src", "third"])
    missing = cli("execute", "-c", more, "--inputs-from", number)
    assert missing.returncode == 2
    assert f"build {number} had no such input (it had lib, src): add -i third=PATH" in missing.stderr.replace("src, lib", "lib, src")
    for artifact in json.loads(cli("artifact", "ls", "--kind", "user", "--json").stdout):
        cli("artifact", "rm", artifact["id"])
    gone = cli("execute", "-c", task, "--inputs-from", number)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert f"input `src` of build {number} is gone" in gone.stderr
    assert "give it with -i src=PATH" in gone.stderr


def test_a_reference_that_means_nothing_is_said_before_anything_is_uploaded(cli: Cli, work: Path) -> None:
    task = cli.task("true", inputs=["src", "lib"])
    nobody = "01234567-89ab-7def-8123-456789abcdef"
    stored = upload(cli, work / "bin")
    for what, said in (
        (f"artifact:{nobody}", "there is no such artifact"),
        (f"artifact:{stored}/none", "there is nothing at `none`"),
        ("build:99/dist", "99"),
        ("build:x/dist", "names no build"),
    ):
        result = cli("execute", "-c", task, "-i", "lib=work", "-i", f"src={what}")
        assert result.returncode in (1, 2)
        assert said in result.stderr
        assert "uploaded" not in result.stderr
    assert [row["id"] for row in json.loads(cli("artifact", "ls", "--json").stdout)] == [stored]
    hinted = cli("execute", "-c", task, "-i", "lib=work", "-i", f"src={nobody}")
    assert f"(what is stored is artifact:{nobody})" in hinted.stderr


def test_what_has_expired_says_when_and_what_to_do(cli: Cli, work: Path) -> None:
    artifact = upload(cli, work)
    assert cli("artifact", "touch", "--keep", "1s", "--shorten", artifact).returncode == 0
    while (looked := cli("artifact", "ls", artifact)).returncode == 0:
        pass
    assert re.fullmatch(
        rf"Error: artifact:{artifact}: artifact `{artifact}` has expired on \d{{4}}-\d\d-\d\d at \d\d:\d\d UTC; "
        "upload it again with `penstock artifact upload`, or run again what made it\n",
        looked.stderr,
    )


def test_names_that_are_no_text_are_shown_escaped_and_can_be_asked_for(cli: Cli) -> None:
    work = folder(cli.folder / "odd")
    inner = Path(os.fsdecode(os.fsencode(work) + b"/d\xff"))
    folder(inner, **{"new\nline": "x"})
    artifact = upload(cli, work)
    assert cli("artifact", "ls", "-r", artifact).stdout.splitlines() == [r"d\xff/", r"d\xff/new\x0aline"]
    asked = f"{artifact}/{os.fsdecode(b'd' + bytes([255]))}"
    assert cli("artifact", "ls", asked).stdout == "new\\x0aline\n"
    assert cli("artifact", "cat", f"{asked}/new\nline").stdout == "x"
    assert cli("artifact", "download", asked, "back").returncode == 0
    assert (cli.folder / "back/new\nline").read_text() == "x"
    assert cli("artifact", "download", artifact, "odd2").returncode == 0
    assert cli("artifact", "diff", artifact, "odd2").returncode == 0


def test_ctrl_c_ends_an_upload_at_once(cli: Cli, work: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        process = cli.start("artifact", "upload", work, PENSTOCK_URL=f"http://127.0.0.1:{mute.getsockname()[1]}")
        connection, _ = mute.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "interrupted: nothing was sent\n")
