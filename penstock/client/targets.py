"""Which Penstock to talk to: a small file of named targets, and the environment over it.

The file is `PENSTOCK_TARGETS`, else `$XDG_CONFIG_HOME/penstock/targets.json`, else `~/.config/penstock/targets.json`; it holds tokens and is
readable by its owner alone. `PENSTOCK_URL`, `PENSTOCK_TOKEN` and `PENSTOCK_TEAM` override what it says.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from penstock.client.discreet import Discreet
from penstock.client.errors import NoTarget
from penstock.client.private import write_private


class Target(Discreet, frozen=True, kw_only=True):
    """Where, as whom, and for which team."""

    url: str
    token: str = ""
    team: str = "main"


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """`current` is used when none is named."""

    current: str = ""
    targets: dict[str, Target] = {}


def targets_path(environ: Mapping[str, str]) -> Path:
    """Where the targets file is (or would be)."""
    if named := environ.get("PENSTOCK_TARGETS"):
        return Path(named)
    config = environ.get("XDG_CONFIG_HOME")
    folder = Path(config) if config and Path(config).is_absolute() else Path.home() / ".config"
    return folder / "penstock" / "targets.json"


def read_targets(path: Path) -> Targets:
    """All targets; none when there is no file. Raises NoTarget when the file is there and cannot be used."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Targets)
    except FileNotFoundError:
        return Targets()
    except OSError as error:
        raise NoTarget(f"cannot read {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise NoTarget(f"{path} is not a targets file ({error}): remove it and log in again with `penstock login`") from error


def write_targets(path: Path, targets: Targets) -> None:
    """Replace the file in one step, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, msgspec.json.format(msgspec.json.encode(targets), indent=2) + b"\n")


def find_target(name: str | None, environ: Mapping[str, str]) -> Target:
    """The target of that name (None: the current one) with the environment's overrides. Raises NoTarget."""
    path = targets_path(environ)
    url = environ.get("PENSTOCK_URL", "")
    known = read_targets(path)
    chosen = known.targets.get(name or known.current)
    if chosen is None:
        if name:
            listed = ", ".join(sorted(known.targets)) or "none"
            raise NoTarget(f"there is no target `{name}` in {path} (known: {listed}): add it with `penstock login --name {name} --url …`")
        if not url:
            raise NoTarget("no Penstock is known yet: start one with `penstock up`, or log in to one with `penstock login --url …`")
        chosen = Target(url=url)
    elif url and url.rstrip("/") != chosen.url.rstrip("/"):
        chosen = Target(url=url, team=chosen.team)  # a token is for the server that gave it, never for another
    return Target(url=url or chosen.url, token=environ.get("PENSTOCK_TOKEN") or chosen.token, team=environ.get("PENSTOCK_TEAM") or chosen.team)
