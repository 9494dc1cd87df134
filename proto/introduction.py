"""What a worker and the gateway sign for one another: the purposes, each of its own, and the words. The client, which stands alone, has the first of
them once more."""

REGISTER = "penstock-register"
"""The worker's: it registers."""
STANDING = "penstock-standing"
"""The worker's: it asks what has become of it."""
BECOME = "penstock-become"
"""The gateway's: what has."""

EXPELLED = 77
"""The exit code of a worker that was revoked or removed: to start it again is of no use."""


def words(*parts: str) -> bytes:
    """What is signed of parts that hold no zero byte."""
    return "\0".join(parts).encode()
