"""Names of images, and what of them a plan may say."""

import msgspec
import pytest

from proto.image import BadImage, parse_image, reference_of
from proto.plan import ImageResource, Plan, Requirements, Run, RunStep, Stage, TaskConfig, plan_problem, requirements_of

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("team/img", "docker.io/team/img:latest"),
        ("host:5000/img", "host:5000/img:latest"),
        ("host:5000/img:tag", "host:5000/img:tag"),
        ("host:5000/a/b/c:tag", "host:5000/a/b/c:tag"),
        ("localhost/img", "localhost/img:latest"),
        ("registry.example/img:1", "registry.example/img:1"),
        ("[::1]:5000/img:1", "[::1]:5000/img:1"),
        (f"host:5000/img:tag@{DIGEST}", f"host:5000/img@{DIGEST}"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        ("img:5000", "docker.io/library/img:5000"),
    ],
)
def test_a_name_is_made_whole(text: str, whole: str) -> None:
    assert str(parse_image(text)) == whole
    assert str(parse_image(whole)) == whole


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Busybox",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:b:c",
        "a@sha256:1",
        f"a@{DIGEST}x",
        "a b",
        "a\n",
        "((image))",
        "a:((tag))",
        "a" * 600,
        "a:-x",
        "../a",
        "-x/y z",
    ],
)
def test_what_names_no_image_is_refused(text: str) -> None:
    with pytest.raises(BadImage):
        parse_image(text)


def test_a_resource_names_an_image_as_concourse_does_it() -> None:
    assert str(reference_of("registry-image", {"repository": "python", "tag": 3.11}, None)) == "docker.io/library/python:3.11"
    assert str(reference_of("docker-image", {"repository": "host:5000/a", "tag": "1"}, {"digest": DIGEST})) == f"host:5000/a@{DIGEST}"
    for kind, source, version in (
        ("git", {"repository": "a"}, None),
        ("registry-image", {}, None),
        ("registry-image", {"repository": "a", "tag": "a/b"}, None),
        ("registry-image", {"repository": "a"}, {"digest": "latest"}),
    ):
        with pytest.raises(BadImage):
            reference_of(kind, source, version)


def plan(privileged: bool = False, **config: object) -> Plan:
    return Plan(stages=[Stage(name="s", steps=[RunStep(name="t", config=TaskConfig(run=Run(path="true"), **config), privileged=privileged)])])


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"image": "Nope"}, "config.image"),
        ({"image": "((secret))"}, "config.image"),
        ({"image": "a", "rootfs_uri": "docker:///b"}, "config.image"),
        ({"image_resource": ImageResource(type="registry-image", source={"repository": "A"})}, "config.image_resource"),
        ({"privileged": True}, "privileged"),
    ],
)
def test_a_plan_with_an_image_that_cannot_be_is_refused_with_its_place(config: dict[str, object], path: str) -> None:
    problem = plan_problem(plan(**config))
    assert problem is not None and problem[0] == f"stages[0].steps[0].{path}"


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("docker:///busybox#1.36", "write `image: busybox:1.36`"),
        ("docker://registry.example:5000/a/b", "write `image: registry.example:5000/a/b`"),
        ("docker:///Nope", "name an image, by `image` or `image_resource`"),
        ("raw:///var/rootfs", "name an image, by `image` or `image_resource`"),
        ("/var/rootfs", "name an image, by `image` or `image_resource`"),
    ],
)
def test_a_root_file_system_of_a_workers_is_refused_with_what_to_write_instead(uri: str, instead: str) -> None:
    path, why = plan_problem(plan(rootfs_uri=uri)) or ("", "")
    assert path == "stages[0].steps[0].config.rootfs_uri"
    assert why.endswith(f": {instead}")
    assert plan_problem(plan(rootfs_uri=uri, image_resource=ImageResource(type="registry-image", source={"repository": "a"}))) is None


def test_what_a_stage_wants_of_a_worker() -> None:
    one = plan(image="a", privileged=True).stages[0]
    assert plan_problem(Plan(stages=[one])) is None
    assert requirements_of(one) == Requirements(image="image", privileged=True)
    other = plan(image_resource=ImageResource(type="git")).stages[0]
    assert plan_problem(Plan(stages=[other])) is None  # no worker offers it, and that is said
    assert requirements_of(other).image == "git"


def test_what_is_new_costs_a_plan_without_it_nothing() -> None:
    assert msgspec.json.encode(plan()) == b'{"stages":[{"name":"s","steps":[{"step":"run","name":"t","config":{"run":{"path":"true"}}}]}]}'
