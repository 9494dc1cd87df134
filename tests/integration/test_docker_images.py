"""Images that an engine pulls from a registry, which speaks the real protocol and fails as it is told to."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proto.messages import Attempt
from proto.plan import ImageResource, RunStep
from services.worker.executors.engine import Engine
from services.worker.executors.executor import CannotRun
from services.worker.executors.images import Guarded, Images
from tests.engine_controls import a_docker_system, docker, script
from tests.engine_fixture import Dockerd
from tests.registry import Registry, a_registry


@pytest.fixture
async def registry(dockerd: Dockerd) -> AsyncIterator[Registry]:
    async with a_registry() as found:
        yield found
    for image in docker(dockerd, "images", "--quiet", f"{found.repository}*").split():
        docker(dockerd, "rmi", "--force", image)
    for mark in docker(dockerd, "volume", "ls", "--quiet").split():
        docker(dockerd, "volume", "rm", mark)


def resource(registry: Registry, version: dict[str, str] | None = None, **source: Any) -> RunStep:
    """A step in the registry's image, as Concourse names it."""
    plain = script("echo here")
    image = ImageResource(type="registry-image", source={"repository": registry.repository, **source}, version=version)
    return msgspec.structs.replace(plain, config=msgspec.structs.replace(plain.config, image=None, image_resource=image))


async def test_an_image_is_pulled_once_with_progress_in_the_log_and_its_digest_recorded(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    exact = f"{registry.repository}@{registry.digest}"
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        first = await scheduler.send(script("echo here", image=f"{registry.repository}:1"))
        assert await scheduler.log(first, "stdout") == "here\n"
        said = await scheduler.log(first, "stderr")
        assert f"penstock: pulling {registry.repository}:1\n" in said
        assert f"penstock: pulled {exact} in " in said
        assert (await scheduler.started(first)).image == exact
        asked = registry.asked["manifest"]
        second = await scheduler.send(resource(registry, {"digest": registry.digest}, tag="other"))
        assert await scheduler.log(second, "stdout") == "here\n"
        assert (await scheduler.started(second)).image == exact
        assert registry.asked["manifest"] == asked


async def test_a_tag_means_what_the_registry_says_and_one_image_within_a_build(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    def tagged(name: str = "step") -> RunStep:
        return script("echo $VERSION", name=name, image=f"{registry.repository}:1")

    async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
        first = await scheduler.send(tagged(), tagged("second"))
        assert await scheduler.log(first, "stdout") == "\n\n"
        asked = registry.asked["manifest"]
        exact = registry.publish("VERSION=two")
        another = Attempt(first.build, first.stage, 2)
        await scheduler.bus.send("execute_build_package.w1", await scheduler.package(another, tagged()))
        assert await scheduler.log(another, "stdout") == "\n"
        assert registry.asked["manifest"] == asked
        after = await scheduler.send(tagged())
        assert await scheduler.log(after, "stdout") == "two\n"
        assert f"pulling {registry.repository}:1\n" in await scheduler.log(after, "stderr")
        started = await scheduler.started(after)
        assert (started.reference, started.image) == (f"{registry.repository}:1", f"{registry.repository}@{exact}")
        again = await scheduler.send(tagged())
        assert await scheduler.log(again, "stdout") == "two\n"
        assert "pull" not in await scheduler.log(again, "stderr")


async def test_a_registry_that_is_away_leaves_what_is_here_and_the_log_says_so(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
        first = await scheduler.send(resource(registry, tag="1"))
        assert await scheduler.log(first, "stdout") == "here\n"
        registry.down = 1 << 30
        second = await scheduler.send(resource(registry, tag="1"))
        assert await scheduler.log(second, "stdout") == "here\n"
        said = f"penstock: {registry.repository}:1 is used as it is here, {registry.repository}@{registry.digest}: "
        assert said in await scheduler.log(second, "stderr")


async def test_what_one_worker_pulled_with_a_login_another_on_its_engine_gives_nobody_without_one(
    tmp_path: Path, dockerd: Dockerd, registry: Registry
) -> None:
    registry.login = "someone", "pass-word-1"
    async with (
        a_docker_system(tmp_path / "one", dockerd, pull_seconds=600.0) as (scheduler, _),
        a_docker_system(tmp_path / "two", dockerd, pull_seconds=600.0) as (others, _),
    ):
        ours = await scheduler.send(resource(registry, tag="1", username="someone", password="pass-word-1"))
        assert await scheduler.log(ours, "stdout") == "here\n"
        others._numbers = iter([1000, 1001])
        theirs = await others.send(resource(registry, {"digest": registry.digest}))
        assert (await others.finished(theirs)).status == "errored"
        assert "cannot be pulled" in others.step(theirs).error
        registry.login = None
        public = await others.send(resource(registry, {"digest": registry.digest}))
        assert await others.log(public, "stdout") == "here\n"


async def test_a_pull_that_may_yet_succeed_is_tried_again(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    registry.down = 3  # the engine tries some itself
    async with a_docker_system(tmp_path, dockerd, pull_seconds=20.0) as (scheduler, _):
        attempt = await scheduler.send(resource(registry, tag="1"))
        assert await scheduler.log(attempt, "stdout") == "here\n"
        assert "503 Service Unavailable; again in 1 s" in await scheduler.log(attempt, "stderr")


async def test_a_pull_that_hangs_is_given_up_in_time(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    """FAULTS 52."""
    registry.hangs = True
    async with a_docker_system(tmp_path, dockerd, pull_seconds=1.0) as (scheduler, _):
        attempt = await scheduler.send(resource(registry, tag="1"))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error == f"the image {registry.repository}:1 could not be pulled within 1 s"


async def test_an_abort_ends_a_pull(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    registry.hangs = True
    async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
        attempt = await scheduler.send(resource(registry, tag="1"))
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt)).status == "aborted"


async def test_an_image_that_is_not_there_is_said_at_once(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
        attempt = await scheduler.send(resource(registry, tag="nope"))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error.startswith(f"the image {registry.repository}:nope cannot be pulled: ")
        assert "manifest unknown" in scheduler.step(attempt).error


class Counting(Engine):
    """Which says how many pulls there were, and at most at once."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.now = self.most = self.pulls = 0

    async def pull(self, reference: str, auth: Mapping[str, str] | None) -> AsyncIterator[dict[str, Any]]:
        self.now, self.pulls = self.now + 1, self.pulls + 1
        self.most = max(self.most, self.now)
        try:
            async for said in super().pull(reference, auth):
                yield said
        finally:
            self.now -= 1


@pytest.mark.parametrize(("tag", "pulls"), [("1", 1), ("nope", 12)])
async def test_one_image_is_pulled_by_one_at_a_time(tmp_path: Path, dockerd: Dockerd, registry: Registry, tag: str, pulls: int) -> None:
    """Also by whoever comes when one has just failed, while another has waited for that."""
    engine = Counting(dockerd.url)
    images = Images(engine, 60.0, Guarded(engine, tmp_path / "guarded"))
    config = resource(registry, tag=tag).config

    async def want(who: int) -> None:
        for build in range(3):
            with suppress(CannotRun):
                await images.ready(config, "main", f"{who}.{build}", lambda text: None)

    try:
        await asyncio.gather(*map(want, range(4)))
    finally:
        await engine.close()
    assert (engine.pulls, engine.most) == (pulls, 1)


async def test_an_image_that_somebody_removed_from_the_engine_is_pulled_again(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    engine = Engine(dockerd.url)
    images, said = Images(engine, 60.0, Guarded(engine, tmp_path / "guarded")), list[str]()
    try:
        for build in ("1", "1", "2"):
            found = await images.ready(resource(registry, tag="1").config, "main", build, said.append)
            assert docker(dockerd, "images", "--quiet", "--no-trunc", f"{registry.repository}:1") == found.id
            docker(dockerd, "rmi", "--force", found.id)
    finally:
        await engine.close()
    assert len([text for text in said if text.startswith("pulled ")]) == 3


async def test_a_registry_that_wants_a_login_gets_the_sources(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    registry.login = "someone", "pass-word-1"
    async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
        without = await scheduler.send(resource(registry, tag="1"))
        assert (await scheduler.finished(without)).status == "errored"
        wrong = await scheduler.send(resource(registry, tag="1", username="someone", password="pass-word-2"))
        assert (await scheduler.finished(wrong)).status == "errored"
        right = await scheduler.send(resource(registry, tag="1", username="someone", password="pass-word-1"))
        assert await scheduler.log(right, "stdout") == "here\n"
        for attempt in (wrong, right):
            assert "pass-word" not in await scheduler.log(attempt) + str(scheduler.reports[attempt])


async def test_what_one_team_pulled_with_a_login_no_other_gets_without_one(tmp_path: Path, dockerd: Dockerd, registry: Registry) -> None:
    """It lies on the engine; and still does when the worker begins anew."""
    registry.login = "someone", "pass-word-1"
    login = {"username": "someone", "password": "pass-word-1"}
    for life in ("first", "second"):
        async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
            ours = await scheduler.send(resource(registry, tag="1", **login))
            assert await scheduler.log(ours, "stdout") == "here\n"
            asked = registry.asked["manifest"]
            for theirs in (resource(registry, tag="1"), resource(registry, {"digest": registry.digest})):
                attempt = await scheduler.send(theirs, team="others")
                assert (await scheduler.finished(attempt)).status == "errored", life
                assert "cannot be pulled" in scheduler.step(attempt).error
            again = await scheduler.send(resource(registry, {"digest": registry.digest}))
            assert await scheduler.log(again, "stdout") == "here\n"
            assert registry.asked["manifest"] == asked
    registry.login = None
    async with a_docker_system(tmp_path, dockerd, pull_seconds=600.0) as (scheduler, _):
        for _ in range(2):
            public = await scheduler.send(resource(registry, tag="1"), team="others")
            assert await scheduler.log(public, "stdout") == "here\n"
