"""Files that only their owner may read."""

import os
from pathlib import Path

from penstock.client.private import write_private


def test_a_private_file_is_its_owner_s_alone_and_stays_so_when_root_replaces_it(tmp_path: Path) -> None:
    """A service that runs as somebody else must be able to read the master keys that were put first in its file."""
    file = tmp_path / "keys"
    write_private(file, b"one")
    assert (file.stat().st_mode & 0o777, file.stat().st_uid) == (0o600, os.geteuid())
    if os.geteuid() == 0:
        os.chown(file, 12345, 54321)
    owner = file.stat().st_uid, file.stat().st_gid
    write_private(file, b"two")
    assert (file.read_bytes(), file.stat().st_mode & 0o777, (file.stat().st_uid, file.stat().st_gid)) == (b"two", 0o600, owner)
    assert os.listdir(tmp_path) == ["keys"]
