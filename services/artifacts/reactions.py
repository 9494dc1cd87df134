"""An attempt has ended: its log is to be archived. Pure."""

import msgspec

from proto.envelope import Fact, decode_cloud_event, fact
from proto.events.build import StageFinished


class EndedLog(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an ended attempt's log. `chunks`: how many there are in all; -1 when nobody could say (the worker was lost)."""

    team: str
    build: str
    stage: str
    attempt: int
    worker: str
    chunks: int
    lines: int
    bytes: int
    correlation_id: str
    event_id: str

    @property
    def subject(self) -> str:
        """Where its chunks are on LOGS, whichever worker sent them."""
        return f"logs.*.{self.build}.{self.stage}.{self.attempt}"


def on_event(data: bytes, epoch: int) -> EndedLog | None:
    """A message of EVENTS; None when it ends no attempt, or one without a log, or is of an earlier epoch of the log: what is still so is published
    again."""
    event = decode_cloud_event(data)
    return ended_log(fact(event.recorded())) if event.epoch >= epoch else None


def ended_log(happened: Fact) -> EndedLog | None:
    """The same of a fact."""
    match happened.event:
        case StageFinished(log=log) as event if log is not None and log.chunks != 0:
            return EndedLog(
                team=happened.team,
                build=happened.subject_id,
                stage=event.stage,
                attempt=event.attempt,
                worker=event.worker,
                chunks=log.chunks,
                lines=log.lines,
                bytes=log.bytes,
                correlation_id=happened.correlation_id,
                event_id=happened.event_id,
            )
        case _:
            return None
