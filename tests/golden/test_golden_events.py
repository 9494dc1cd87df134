"""One stored example of every event, decoded for ever. They begin to bind with the first tagged version."""

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from proto.catalogue import CATEGORIES, EVENTS, OWNERS, SERVICES, TAGS, UnknownEvent, category_of, decode, encode
from proto.envelope import Recorded, cloud_event, decode_cloud_event, subject_of
from proto.schemas import stale

FOLDER = Path(__file__).parent / "events"
EXAMPLES = sorted(FOLDER.glob("*.json"))


def test_every_event_has_an_example():
    assert {path.name.rsplit(".", 2)[0] for path in EXAMPLES} == set(EVENTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_decoded_and_written_again_the_same(path):
    tag = path.name.rsplit(".", 2)[0]
    event = decode(tag, path.read_bytes())
    assert TAGS[type(event)] == tag
    assert msgspec.json.decode(encode(event)) == msgspec.json.decode(path.read_bytes())


def test_an_unknown_tag_is_said():
    with pytest.raises(UnknownEvent, match=r"build\.exploded"):
        decode("build.exploded", b"{}")


def test_a_field_that_is_not_known_yet_is_ignored():
    event = decode("build.finished", b'{"status":"failed","mood":"sad"}')
    assert encode(event) == b'{"status":"failed"}'


def test_no_schema_is_stale():
    assert stale() == []


def test_every_category_has_one_owner_that_is_a_service():
    assert len({c.name for c in CATEGORIES}) == len(CATEGORIES)
    assert set(OWNERS.values()) <= set(SERVICES)


def test_an_event_travels_as_a_cloudevent_and_comes_back_the_same():
    recorded = Recorded(
        position=7,
        stream="build-b1",
        version=6,
        event_id="e1",
        type="build.finished",
        data=b'{"status":"failed"}',
        team="main",
        correlation_id="c1",
        causation_id="e0",
        actor="builds",
        recorded_at=datetime(2026, 11, 22, tzinfo=UTC),
    )
    message = decode_cloud_event(cloud_event(recorded, epoch=3))
    assert message.recorded() == recorded
    assert (message.specversion, message.epoch, message.source) == ("1.0", 3, "penstock/build")
    assert subject_of(recorded) == "events.build.main.b1.BuildFinished"
    assert category_of(recorded.stream) == "build"
