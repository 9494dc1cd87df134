"""References to secrets, what is set apart of a plan, the decider's versions, and the keys that encrypt."""

import msgspec
import pytest

from libs.runtime.settings import BadSettings
from libs.sealing import NotSealed, new_sealing_key, seal, sealing_public_key, unseal
from libs.tokens import new_seed
from proto.events.secret import SecretRemoved, SecretSet
from proto.messages import Attempt, Package, SecretValues
from proto.plan import ImageResource, Plan, Run, RunStep, Stage, TaskConfig
from proto.secrets import looks_secret, misplaced, parts, plan_references, stage_references, substituted
from services.gateway.secrecy import is_name, set_apart
from services.scheduler.commands import RemoveSecret, SetSecret, secret_stream
from services.scheduler.decider import SchedulerDecider
from services.scheduler.master_keys import Keyring, MissingKey, Tampered
from services.scheduler.secret_index import SecretIndex
from services.scheduler.wiring import Settings, master_keys
from services.worker.secrets import NoSecret, filled_in


def plan(**config):
    step = RunStep(name="run", config=TaskConfig(run=Run(path="true", args=["((in.args))"]), **config))
    return Plan(stages=[Stage(name="main", steps=[step])])


def config_of(made):
    return made.stages[0].steps[0].config


@pytest.mark.parametrize("name", ["NPM_TOKEN", "apiKey", "password", "DB_PASSWD", "client_id", "ClientId", "GOOGLE_CREDENTIALS", "aws_secret"])
def test_names_that_look_secret(name):
    assert looks_secret(name)


@pytest.mark.parametrize("name", ["PATH", "user", "GIT_BRANCH", "repository", "CLIENT"])
def test_names_that_do_not(name):
    assert not looks_secret(name)


def test_references_are_found_in_params_and_images_and_nowhere_else():
    image = ImageResource(
        type="registry-image", source={"username": "((user.name))", "more": [{"password": "x((pw))y((pw))"}]}, params={"p": "((q))"}
    )
    made = plan(params={"A": "((a))", "B": "$((1 + 2)) ((no no)) (())"}, image_resource=image)
    at = "stages[0].steps[0].config."
    assert list(plan_references(made)) == [
        (f"{at}params.A", "a"),
        (f"{at}image_resource.source.username", "user.name"),
        (f"{at}image_resource.source.more.0.password", "pw"),
        (f"{at}image_resource.source.more.0.password", "pw"),
        (f"{at}image_resource.params.p", "q"),
    ]
    assert stage_references(made.stages[0]) == {"a", "user.name", "pw", "q"}
    assert misplaced(made) is None
    assert parts("x((a))((b))y") == [("x", False), ("a", True), ("b", True), ("y", False)]


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"image": "((a))"}, "image"),
        ({"rootfs_uri": "x((a))"}, "rootfs_uri"),
        ({"image_resource": ImageResource(type="registry-image", source={"repository": "a", "tag": "((a))"})}, "image_resource.source.tag"),
    ],
)
def test_no_secret_may_stand_in_what_names_an_image(config, path):
    """FAULTS 39."""
    assert misplaced(plan(**config))[0] == f"stages[0].steps[0].config.{path}"


def test_values_are_filled_in_and_a_missing_one_is_named():
    image = ImageResource(type="registry-image", source={"repository": "a", "auth": ["((pw))", 3, None]})
    step = plan(params={"A": "<((pw))>", "B": "((pw))((b))", "C": "plain"}, image_resource=image).stages[0].steps[0]
    config = filled_in(step, {"pw": "((b))", "b": "v"}, {}).config
    assert config.params == {"A": "<((b))>", "B": "((b))v", "C": "plain"}
    assert config.image_resource.source == {"repository": "a", "auth": ["((b))", 3, None]}
    assert config.run.args == ["((in.args))"]
    with pytest.raises(NoSecret, match="the secret `b` is not set"):
        filled_in(step, {"pw": "x"}, {"b": "is not set"})
    with pytest.raises(KeyError):
        substituted("((b))", {})


def test_what_looks_secret_is_set_apart_piece_by_piece():
    source = {"repository": "a", "password": 77, "insecure_tokens": True, "auth": {"api_key": ["k1", "k2"]}}
    made = plan(params={"TOKEN": "a((b))c", "KEY": "((b))", "EMPTY_KEY": "", "PLAIN": "p"}, image_resource=ImageResource(type="t", source=source))
    changed, values = set_apart(made, "x1")
    assert list(values.values()) == ["a", "c", "77", "k1", "k2"]
    assert config_of(changed).params == {"TOKEN": "((build/x1/1))((b))((build/x1/2))", "KEY": "((b))", "EMPTY_KEY": "", "PLAIN": "p"}
    assert config_of(changed).image_resource.source["auth"] == {"api_key": ["((build/x1/4))", "((build/x1/5))"]}
    assert config_of(changed).image_resource.source["insecure_tokens"] is True
    back = substituted(config_of(changed).params, values | {"b": "B"})
    assert back == {"TOKEN": "aBc", "KEY": "B", "EMPTY_KEY": "", "PLAIN": "p"}
    assert set_apart(changed, "x1") == (changed, {})
    assert not is_name("build/x1/1") and not is_name("a\n") and is_name("a.b-c_1")


def test_a_build_can_have_only_its_own_and_its_teams():
    kept = SecretIndex()
    kept.apply("t", SecretSet(name="a", version=1, entry="e1"))
    kept.apply("t", SecretSet(name="a", version=2, entry="e2"))
    stage = plan(params={"A": "((a))((build/x1/1))((build/x2/1))((gone))"}).stages[0]
    wanted = kept.wanted("t", "x1", stage)
    assert {name: entry and entry.entry for name, entry in wanted.entries.items()} == {
        "a": "e2",
        "build/x1/1": "build/x1/1",
        "build/x2/1": None,
        "gone": None,
    }
    assert wanted.versions == {"a": 2}
    assert kept.wanted("u", "x1", stage).entries["a"] is None
    kept.apply("t", SecretRemoved(name="a", version=2))
    assert kept.wanted("t", "x1", stage).entries["a"] is None


def test_versions_count_on_and_a_removal_is_recorded_once():
    decider = SchedulerDecider()
    state, events = decider.initial, []
    commands = [
        SetSecret(team="t", name="a", by="me", entry="e1"),
        SetSecret(team="t", name="a", by="me", entry="e2"),
        RemoveSecret(team="t", name="a", by="me"),
        RemoveSecret(team="t", name="a", by="me"),
        SetSecret(team="t", name="a", by="me", entry="e3"),
    ]
    for command in commands:
        for event in decider.decide(command, state):
            events.append(event)
            state = decider.evolve(state, event)
    assert [(type(event).__name__, event.version) for event in events] == [
        ("SecretSet", 1),
        ("SecretSet", 2),
        ("SecretRemoved", 2),
        ("SecretSet", 3),
    ]
    assert {decider.stream(command) for command in commands} == {secret_stream("t", "a")}
    assert secret_stream("t", "a") != secret_stream("ta", "")


def test_sealed_and_encrypted_for_one_alone():
    key, other = new_sealing_key(), new_sealing_key()
    sealed = seal(sealing_public_key(key), b"text")
    assert unseal(key, sealed) == b"text"
    for wrong, box in ((other, sealed), (key, sealed[:-1]), (key, b"")):
        with pytest.raises(NotSealed):
            unseal(wrong, box)
    with pytest.raises(ValueError):
        seal("short", b"")
    ring = Keyring(f"a:{new_seed()}, b:{new_seed()}")
    key_id, text = ring.encrypt(b"value", b"t/a")
    assert (key_id, ring.decrypt(key_id, text, b"t/a")) == ("a", b"value") and b"value" not in text
    for wrong_id, wrong_text, bound in (("a", text, b"t/b"), ("b", text, b"t/a"), ("a", text[:-1], b"t/a"), ("a", b"", b"t/a")):
        with pytest.raises(Tampered):
            ring.decrypt(wrong_id, wrong_text, bound)
    with pytest.raises(MissingKey, match="c"):
        ring.decrypt("c", text, b"t/a")


def test_no_struct_shows_a_value():
    package = Package(
        attempt=Attempt("b", "s", 1),
        team="t",
        worker="w",
        boot="b",
        credit="c",
        lease_seconds=1,
        stage=plan().stages[0],
        inputs={},
        token="t",
        artifacts_url="",
        secrets={"a": "hunter2"},
    )
    assert "hunter2" not in repr(package) and msgspec.msgpack.decode(msgspec.msgpack.encode(package), type=Package) == package
    assert "hunter2" not in f"{SecretValues(team='t', values={'a': 'hunter2'})}"


def test_the_master_keys_come_from_a_setting_or_a_file_which_may_change(tmp_path):
    def settings(**more):
        return Settings(database_url="", nats_url="", nats_seed="", server_key="", callout_seed="", artifacts_url="", **more)

    file = tmp_path / "keys"
    first, second = (f"k{n}:{new_seed()}" for n in (1, 2))
    file.write_text(first + "\n")
    keys = master_keys(settings(secret_keys_file=file))
    known = keys()
    assert keys() is known
    file.write_text(f"{second}\n{first}\n")
    assert keys().first == "k2" and "k1" in keys()
    assert master_keys(settings(secret_keys=first))().first == "k1"
    (tmp_path / "binary").write_bytes(b"k1:\xff")
    for wrong in (
        {"secret_keys_file": tmp_path / "binary"},
        {},
        {"secret_keys": first, "secret_keys_file": file},
        {"secret_keys": "nonsense"},
        {"secret_keys_file": tmp_path / "none"},
    ):
        with pytest.raises(BadSettings, match="PENSTOCK_SECRET_KEYS"):
            master_keys(settings(**wrong))
