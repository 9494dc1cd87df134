"""The async Python client of the public API; the command line is built on it and on nothing else of Penstock.

Names are loaded on first use: reading the targets file needs no HTTP.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.client.api import Client as Client
    from penstock.client.errors import Changed as Changed
    from penstock.client.errors import Conflict as Conflict
    from penstock.client.errors import Damaged as Damaged
    from penstock.client.errors import Expired as Expired
    from penstock.client.errors import Forbidden as Forbidden
    from penstock.client.errors import Full as Full
    from penstock.client.errors import NoTarget as NoTarget
    from penstock.client.errors import NotFound as NotFound
    from penstock.client.errors import PenstockError as PenstockError
    from penstock.client.errors import Refused as Refused
    from penstock.client.errors import StreamBroken as StreamBroken
    from penstock.client.errors import Unauthorized as Unauthorized
    from penstock.client.errors import Unavailable as Unavailable
    from penstock.client.errors import Unreadable as Unreadable
    from penstock.client.errors import Unwritable as Unwritable
    from penstock.client.fleet import BuildPreparation as BuildPreparation
    from penstock.client.fleet import Candidate as Candidate
    from penstock.client.fleet import Holder as Holder
    from penstock.client.fleet import Preparation as Preparation
    from penstock.client.fleet import RunningBuild as RunningBuild
    from penstock.client.fleet import Waiting as Waiting
    from penstock.client.fleet import Worker as Worker
    from penstock.client.model import Artifact as Artifact
    from penstock.client.model import Build as Build
    from penstock.client.model import BuildEnded as BuildEnded
    from penstock.client.model import BuildEvent as BuildEvent
    from penstock.client.model import BuildLogged as BuildLogged
    from penstock.client.model import BuildStatus as BuildStatus
    from penstock.client.model import Info as Info
    from penstock.client.model import LogLine as LogLine
    from penstock.client.model import LogPage as LogPage
    from penstock.client.model import Policy as Policy
    from penstock.client.model import Problem as Problem
    from penstock.client.model import Progress as Progress
    from penstock.client.model import Secret as Secret
    from penstock.client.model import SecretKeys as SecretKeys
    from penstock.client.model import Stage as Stage
    from penstock.client.model import Step as Step
    from penstock.client.model import Transfer as Transfer
    from penstock.client.model import TreeEntry as TreeEntry
    from penstock.client.model import Usage as Usage
    from penstock.client.selection import Selection as Selection
    from penstock.client.selection import select as select
    from penstock.client.targets import Target as Target
    from penstock.client.tree import Entry as Entry

_NAMES = {
    "api": ["Client"],
    "errors": [
        "Changed",
        "Conflict",
        "Damaged",
        "Expired",
        "Forbidden",
        "Full",
        "NoTarget",
        "NotFound",
        "PenstockError",
        "Refused",
        "StreamBroken",
        "Unauthorized",
        "Unavailable",
        "Unreadable",
        "Unwritable",
    ],
    "fleet": ["BuildPreparation", "Candidate", "Holder", "Preparation", "Registration", "RunningBuild", "Waiting", "Worker"],
    "model": [
        "Artifact",
        "Build",
        "BuildEnded",
        "BuildEvent",
        "BuildLogged",
        "BuildStatus",
        "Info",
        "LogLine",
        "LogPage",
        "Policy",
        "Problem",
        "Progress",
        "Secret",
        "SecretKeys",
        "Stage",
        "Step",
        "Transfer",
        "TreeEntry",
        "Usage",
    ],
    "selection": ["Selection", "select"],
    "targets": ["Target"],
    "tree": ["Entry"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"penstock.client.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
