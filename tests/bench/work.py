"""What is run: plans of one stage and one step."""

from typing import Any


def task(path: str, *args: str) -> dict[str, Any]:
    """A submission of one command."""
    config = {"run": {"path": path, "args": list(args)}}
    return {"plan": {"stages": [{"name": "main", "steps": [{"step": "run", "name": "task", "config": config}]}]}}


def no_op() -> dict[str, Any]:
    return task("true")
