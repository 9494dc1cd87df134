"""What of a plan must not be read by others: values under names that look secret are set apart, before anything of the plan is recorded. Pure."""

import re
from typing import Any

from msgspec.structs import replace

from proto.plan import Plan, RunStep
from proto.secrets import NAME, OWN, looks_secret, mapped, parts

_NAME = re.compile(NAME)


def is_name(text: str) -> bool:
    """Whether a team's secret may be called so."""
    return _NAME.fullmatch(text) is not None


def set_apart(plan: Plan, build: str) -> tuple[Plan, dict[str, str]]:
    """The plan with a reference in place of each such value, in params and in what an image's source and params hold; and the values, by the names
    that the references use. References that are there already stay."""
    values: dict[str, str] = {}

    def kept(text: str, path: tuple[str, ...]) -> str:
        if not any(looks_secret(key) for key in path):
            return text
        return "".join(f"(({piece}))" if is_reference else named(piece) for piece, is_reference in parts(text))

    def named(value: str) -> str:
        name = f"{OWN}{build}/{len(values) + 1}"
        values[name] = value
        return f"(({name}))"

    def apart(step: RunStep) -> RunStep:
        config, resource = step.config, step.config.image_resource
        params = mapped(config.params, kept)
        if resource is not None:
            source, more = mapped(_as_text(resource.source), kept), mapped(_as_text(resource.params), kept)
            resource = replace(resource, source=source, params=more)
        return replace(step, config=replace(config, params=params, image_resource=resource))

    changed = replace(plan, stages=[replace(stage, steps=[apart(step) for step in stage.steps]) for stage in plan.stages])
    return (changed, values) if values else (plan, values)


def _as_text(value: Any, secret: bool = False) -> Any:
    """Numbers under such names are secrets, too."""
    if isinstance(value, dict):
        return {key: _as_text(inner, secret or looks_secret(str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner, secret) for inner in value]
    return str(value) if secret and isinstance(value, int | float) and not isinstance(value, bool) else value
