"""JSON Schemas of every event, generated from the catalogue: `python -m proto.schemas` writes them, `--check` says which are stale."""

import sys
from pathlib import Path
from typing import Any

import msgspec

from proto.catalogue import CATEGORIES
from proto.envelope import CloudEvent
from proto.events.base import tag_of

FOLDER = Path(__file__).parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """File name → schema: one for each event's `data`, and one for the message on the bus."""
    found = {"cloudevent.json": _schema(CloudEvent, "cloudevent")}
    for category in CATEGORIES:
        for cls in category.events:
            tag = tag_of(cls)
            found[f"{tag}.json"] = {"x-category": category.name, "x-owner": category.owner} | _schema(cls, tag)
    return found


def _schema(cls: type, name: str) -> dict[str, Any]:
    (root,), components = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
    return {"$schema": DIALECT, "$id": f"urn:penstock:schema:{name}", **root, "$defs": components}


def files() -> dict[Path, bytes]:
    """What the schema folder must hold."""
    return {FOLDER / name: msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n" for name, schema in schemas().items()}


def stale() -> list[str]:
    """Names of schema files that are missing, outdated or left over."""
    wanted = files()
    wrong = [path.name for path, text in wanted.items() if not path.exists() or path.read_bytes() != text]
    return sorted(wrong + [path.name for path in FOLDER.glob("*.json") if path not in wanted])


def main() -> int:
    """Write the files, or with `--check` only compare."""
    if "--check" in sys.argv[1:]:
        for name in stale():
            print(f"proto/schemas/{name} is stale: run `./just schemas`", file=sys.stderr)
        return 1 if stale() else 0
    FOLDER.mkdir(exist_ok=True)
    wanted = files()
    for path in FOLDER.glob("*.json"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.write_bytes(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
