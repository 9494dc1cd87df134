"""Configuration by environment, decoded once into a frozen struct."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

PREFIX = "PENSTOCK_"


class BadSettings(Exception):
    """A setting that is unknown, missing or of the wrong type; the text names it."""


def decode(cls: type[T], environ: Mapping[str, str]) -> T:
    """Read `PENSTOCK_<FIELD>` for each field of `cls`. A name that no field has is refused, so a typo is found at once. Raises BadSettings."""
    given = {key.removeprefix(PREFIX).lower(): value for key, value in environ.items() if key.startswith(PREFIX)}
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    for name in given:
        if name not in fields:
            raise BadSettings(f"there is no setting {PREFIX}{name.upper()}; known: {', '.join(PREFIX + f.upper() for f in sorted(fields))}")
    for name, field in fields.items():
        if field.required and name not in given:
            raise BadSettings(f"{PREFIX}{name.upper()} is missing")
    try:
        return msgspec.convert(given, cls, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        text = str(error)
        message, _, path = text.partition(" - at `$.")
        name = path.rstrip("`")
        if choices := get_args(fields[name].type) if get_origin(fields[name].type) is Literal else ():
            message = f"`{given[name]}` is none of {', '.join(choices)}"
        raise BadSettings(f"{PREFIX}{name.upper()}: {message}") from None


def _path(kind: type[object], value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"no setting can be a {kind.__name__}")
