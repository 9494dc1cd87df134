"""A step with its secrets filled in. Pure."""

from collections.abc import Mapping

from msgspec.structs import replace

from proto.plan import RunStep
from proto.secrets import substituted


class NoSecret(Exception):
    """The step refers to one that is not to be had; the text names it, and says why."""


def filled_in(step: RunStep, secrets: Mapping[str, str], unreadable: Mapping[str, str]) -> RunStep:
    """The step as it is to run: it holds the values now, and is for its executor alone. Raises NoSecret."""
    config = step.config
    try:
        params = substituted(config.params, secrets)
        resource = config.image_resource
        if resource is not None:
            resource = replace(resource, source=substituted(resource.source, secrets), params=substituted(resource.params, secrets))
    except KeyError as missing:
        name = str(missing.args[0])
        raise NoSecret(f"the secret `{name}` {unreadable.get(name, 'is not there')}") from None
    return replace(step, config=replace(config, params=params, image_resource=resource))
