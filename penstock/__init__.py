"""Penstock: upload a folder, run a task on a worker, watch it live, take the outputs.

`from penstock import Client` is the way in for programs. It is loaded on first use, so that the command line answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.client import Client as Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from penstock.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
