"""What an engine is asked for."""

from pathlib import Path
from typing import Any

import pytest

from proto.messages import Attempt, Offers
from proto.plan import ContainerLimits, Requirements, Run, RunStep, TaskCache, TaskConfig, TaskInput, TaskOutput
from services.scheduler.needs import offered, wanted
from services.worker.executors.hardened import Bind, Limits, binds_of, container_of, name_of
from services.worker.executors.sandboxes import Folders

LIMITS = Limits(memory=1 << 30, cpus=1.5, pids=100)


def config(inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), caches: tuple[str, ...] = (), **more: Any) -> TaskConfig:
    return TaskConfig(
        run=Run(path="make"),
        inputs=[TaskInput(name=f"i{n}", path=path) for n, path in enumerate(inputs)],
        outputs=[TaskOutput(name=f"o{n}", path=path) for n, path in enumerate(outputs)],
        caches=[TaskCache(path=path) for path in caches],
        **more,
    )


def asked(task: TaskConfig, privileged: bool = False) -> dict[str, Any]:
    step = RunStep(name="step", config=task, privileged=privileged)
    return container_of(step, "sha256:1", "", Folders.below(Path("/w")), binds_of(task), {"a": "b"}, LIMITS)


def test_no_two_steps_have_containers_of_one_name():
    """The second would have the first one's removed, as what an earlier life left."""
    names = {name_of(Attempt("b", stage, 1), RunStep(name=step, config=config())) for stage, step in (("a-b", "c"), ("a", "b-c"), ("a", "b.c"))}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("inputs", "outputs", "caches", "binds"),
    [
        ((), (), (), [(".", True)]),
        (("src",), ("dist",), (), [(".", True), ("src", False)]),
        (("src",), ("src",), (), [(".", True)]),
        (("src",), (), ("src",), [(".", True)]),
        (("src",), ("src/dist",), ("src/.cache",), [(".", True), ("src", False), ("src/.cache", True), ("src/dist", True)]),
        (("a/b", "a"), ("a",), (), [(".", True)]),
        (("a/b", "a"), (), (), [(".", True), ("a", False), ("a/b", False)]),
        ((".",), ("dist",), (), [(".", False), ("dist", True)]),
        (("src", "other"), (".",), (), [(".", True)]),
        (("./src/",), ("srcs",), (), [(".", True), ("src", False)]),
    ],
)
def test_inputs_are_read_only_where_nothing_else_is_to_be_written(
    inputs: tuple[str, ...], outputs: tuple[str, ...], caches: tuple[str, ...], binds: list[tuple[str, bool]]
) -> None:
    assert binds_of(config(inputs, outputs, caches)) == [Bind(*each) for each in binds]


def test_a_container_is_asked_for_with_nothing_that_its_step_does_not_need() -> None:
    body = asked(config(("src",)))
    host = body["HostConfig"]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"] and host["ReadonlyRootfs"] and host["Init"]
    assert (host["NetworkMode"], host["PidsLimit"], host["NanoCpus"]) == ("none", 100, 1_500_000_000)
    assert host["Memory"] == host["MemorySwap"] == 1 << 30
    assert not host.keys() & {"Privileged", "CapAdd", "Devices", "Binds", "VolumesFrom", "PidMode"}
    assert [(m["Source"], m["Target"], m["ReadOnly"]) for m in host["Mounts"]] == [
        ("/w/workspace", "/workspace", False),
        ("/w/workspace/src", "/workspace/src", True),
        ("/w/home", "/home/penstock", False),
    ]


def test_privileged_and_network_are_only_what_was_asked_for() -> None:
    host = asked(config(), privileged=True)["HostConfig"]
    assert host["Privileged"] and host["NetworkMode"] == "none" and host["Memory"] == 1 << 30
    assert asked(config(network=True))["HostConfig"]["NetworkMode"] == "bridge"
    assert "Privileged" not in asked(config(network=True))["HostConfig"]


def test_a_task_may_want_less_memory_and_a_share_of_the_processor() -> None:
    host = asked(config(container_limits=ContainerLimits(cpu=512, memory=64 << 20)))["HostConfig"]
    assert (host["Memory"], host["CpuShares"]) == (64 << 20, 512)
    assert LIMITS.memory_of(config(container_limits=ContainerLimits(memory=1 << 40))) == 1 << 30
    assert LIMITS.memory_of(config(container_limits=ContainerLimits(memory=0))) == 1 << 30


def test_a_relative_command_is_the_workspaces_and_a_name_the_images() -> None:
    for path, directory, seen in (
        ("make", "src", "make"),
        ("./do", None, "/workspace/do"),
        ("./do", "src", "/workspace/src/do"),
        ("/bin/x", "src", "/bin/x"),
    ):
        task = config()
        task = TaskConfig(run=Run(path=path, args=["a"], dir=directory))
        body = asked(task)
        assert (body["Entrypoint"], body["Cmd"]) == ([seen], ["a"])


def test_user_and_limits_are_kept_in_containers_only() -> None:
    engine = Offers(images=("image", "registry-image"), user=True, limits=True)
    able = set(offered(engine))
    assert able >= set(wanted(Requirements(image="registry-image", user=True, limits=True)))
    assert not able >= set(wanted(Requirements(user=True)))
    assert not able >= set(wanted(Requirements(image="image", privileged=True)))
    assert set(offered(Offers(images=("image",), privileged=True))) >= set(wanted(Requirements(image="image", privileged=True)))
