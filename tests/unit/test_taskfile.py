"""The task file: Concourse's, with exact types, refused before anything leaves the machine."""

from typing import Any

import msgspec
import pytest

from penstock.taskfile import TaskFileProblem, overridden_params, plan_of, read_task
from penstock.variables import VariableProblem, gather_variables
from penstock.yamlfile import MAX_BYTES, YamlProblem, read_yaml
from proto.plan import Plan, plan_problem

WHOLE = """
platform: linux
image_resource:
  type: registry-image
  source: {repository: python, tag: 3.11}
  version: {digest: "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}
rootfs_uri: docker:///busybox
inputs:
  - name: src
  - {name: extra, path: in/extra, optional: true}
outputs:
  - {name: dist, path: out/dist}
caches:
  - path: .cache
params:
  TEXT: hello
  NUMBER: 010
  FLOAT: 1.50
  YES: true
  NORWAY: NO
run:
  path: sh
  args: [-c, "echo"]
  dir: src
  user: nobody
container_limits: {cpu: 512, memory: 1GB}
"""


def task(text: str, variables: dict[str, Any] | None = None, **environ: str) -> Any:
    return read_task("task.yml", text, variables or {}, environ)


def refusal(text: str, variables: dict[str, Any] | None = None, **environ: str) -> str:
    with pytest.raises(TaskFileProblem) as refused:
        task(text, variables, **environ)
    return str(refused.value)


def test_a_whole_task_file_becomes_a_plan_that_the_server_takes() -> None:
    plan = plan_of(task(WHOLE), arguments=["a", "b"], tags=["gpu"], timeout=90)
    known = msgspec.convert(plan, Plan)
    assert plan_problem(known) is None
    (stage,) = known.stages
    (step,) = stage.steps
    assert (stage.tags, step.timeout) == (["gpu"], 90)
    config = step.config
    assert config.run.args == ["-c", "echo", "a", "b"]
    assert config.image_resource and config.image_resource.source == {"repository": "python", "tag": 3.11}
    assert config.container_limits and config.container_limits.memory == 1024**3
    assert [(i.name, i.path, i.optional) for i in config.inputs] == [("src", None, False), ("extra", "in/extra", True)]


@pytest.mark.parametrize("name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_DEBUG_OUTPUT", "PENSTOCK_WORKER_KEY"])
def test_what_would_reach_what_runs_the_step_is_refused(name: str) -> None:
    """FAULTS 41: a sandbox's own program would load it, outside of the sandbox."""
    plan = plan_of(task(WHOLE), arguments=[], tags=[], timeout=90)
    plan["stages"][0]["steps"][0]["config"]["params"] = {name: "x"}
    problem = plan_problem(msgspec.convert(plan, Plan))
    assert problem is not None and problem[0] == f"stages[0].steps[0].config.params.{name}"


def test_params_become_text_as_they_were_written() -> None:  # FAULTS 43
    params = task(WHOLE).params
    assert params == {"TEXT": "hello", "NUMBER": "010", "FLOAT": "1.50", "YES": "true", "NORWAY": "NO"}


def test_params_that_are_structures_become_json() -> None:
    assert task("run: {path: a}\nparams: {A: {x: [1, 010]}, B: ''}").params == {"A": '{"x":[1,10]}', "B": ""}


def test_a_param_that_is_null_must_be_supplied_by_the_environment() -> None:
    text = "run: {path: a}\nparams:\n  TOKEN:\n"
    assert refusal(text) == ("task.yml:3: params.TOKEN: has no value and must be supplied: set it in the environment, `TOKEN=… penstock execute …`")
    assert task(text, TOKEN="t").params == {"TOKEN": "t"}


def test_the_environment_overrides_params_as_with_fly_and_it_is_known_which() -> None:
    text = "run: {path: a}\nparams: {A: a, B: , C: c}"
    environ = {"A": "x", "B": "y"}
    assert task(text, **environ).params == {"A": "x", "B": "y", "C": "c"}
    assert overridden_params(text, environ) == ["A"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "task.yml: is not a task file: it must be a mapping with at least `run`"),
        ("- run", "task.yml: is not a task file: it must be a mapping with at least `run`"),
        ("platform: linux", "task.yml:1: run: is missing"),
        ("run: {}", "task.yml:1: run.path: is missing"),
        ("run: echo", "task.yml:1: run: must be a mapping, not text"),
        ("run:\n  path: 1", "task.yml:2: run.path: must be text, not a whole number: put it in quotes"),
        ("run:\n  path: ''", "task.yml:2: run.path: is empty"),
        ("run:\n  path: a\n  args:\n  - x\n  - 1", "task.yml:5: run.args[1]: must be text, not a whole number: put it in quotes"),
        ("run: {path: a}\nrnu: {}", "task.yml:2: rnu: there is no such key in a task file"),
        ("run:\n  path: a\n  pth: b", "task.yml:3: run.pth: there is no such key in a task file"),
        ("run: {path: a}\ninputs:\n- nme: x", "task.yml:3: inputs[0].nme: there is no such key in a task file"),
        ("run: {path: a}\ninputs: src", "task.yml:2: inputs: must be a list, not text"),
        ("run: {path: a}\ninputs: [{path: x}]", "task.yml:2: inputs[0].name: is missing"),
        ("run: {path: a}\ninputs: [{name: a/b}]", "task.yml:2: inputs[0].name: must be a name: letters, digits, `_`, `-`, `.`; at most 64"),
        ("run: {path: a}\ninputs: [{name: a}, {name: a}]", "task.yml:2: inputs[1].name: `a` is named twice"),
        ("run: {path: a}\noutputs: [{name: a}, {name: a}]", "task.yml:2: outputs[1].name: `a` is named twice"),
        (
            "run: {path: a}\noutputs: [{name: a, path: ../b}]",
            "task.yml:2: outputs[0].path: `../b` must be a folder inside the workspace: relative, without `..`",
        ),
        ("run: {path: a}\ncaches: [{path: /b}]", "task.yml:2: caches[0].path: `/b` must be a folder inside the workspace: relative, without `..`"),
        ("run: {path: a, dir: ''}", "task.yml:1: run.dir: `` must be a folder inside the workspace: relative, without `..`"),
        ("run: {path: a}\nparams: [A]", "task.yml:2: params: must be a mapping, not a list"),
        ("run: {path: a}\nparams: {A=B: c}", "task.yml:2: params.A=B: is no name for an environment variable"),
        ("run: {path: a}\ninputs: [{name: a, optional: 'yes'}]", "task.yml:2: inputs[0].optional: must be true or false, not text"),
        ("run: {path: a}\ncontainer_limits: {cpu: many}", "task.yml:2: container_limits.cpu: must be a whole number, not text"),
        (
            "run: {path: a}\ncontainer_limits: {memory: lots}",
            "task.yml:2: container_limits.memory: `lots` is no size: a number of bytes, or like 512mb or 1GB",
        ),
        (
            "run: {path: a}\ncontainer_limits: {memory: -1}",
            "task.yml:2: container_limits.memory: `-1` is no size: a number of bytes, or like 512mb or 1GB",
        ),
    ],
)
def test_what_is_wrong_is_refused_naming_file_line_and_path(text: str, said: str) -> None:
    assert refusal(text) == said


@pytest.mark.parametrize(("written", "size"), [("512mb", 512 * 1024**2), ("1GB", 1024**3), ("2k", 2048), ("7", 7), ("7b", 7)])
def test_memory_has_units(written: str, size: int) -> None:
    assert task(f"run: {{path: a}}\ncontainer_limits: {{memory: {written}}}").container_limits.memory == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {path: a", "task.yml:2: while parsing a flow mapping did not find expected ',' or '}'"),
        ("run: {path: a}\nrun: {path: b}", "task.yml:2: the key `run` is there twice"),
        ("a: !!python/object/apply:os.system [x]", "task.yml:1: the tag `!!python/object/apply:os.system` is not taken here"),  # FAULTS 35
        ("a: 1\n---\nb: 1", "task.yml:2: holds more than one document (`---`)"),
        ("a: *b", "task.yml:1: the alias `*b` refers to nothing before it"),
        ("a: &a [*a]", "task.yml:1: the alias `*a` refers to nothing before it"),
        ("? [a]\n: b", "task.yml:1: a key must be plain text"),
        ("[" * 100_000, "task.yml:1: is nested more than 64 deep"),
        ("a: " + "b" * MAX_BYTES, "task.yml:1: is larger than 1024 KiB"),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(text: str, said: str) -> None:
    assert refusal(text) == said


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(YamlProblem, match="is not text"):
        read_yaml(b"a: \xff")


def test_an_alias_bomb_is_refused() -> None:  # FAULTS 34
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "holds more than 50,000 values once its aliases are unfolded" in refusal("\n".join(levels))


def test_anchors_and_merge_keys_work() -> None:
    text = "run: &run {path: a, args: [x]}"
    assert task(text).run.args == ["x"]
    merged = "run:\n  <<: {path: a, dir: d}\n  dir: e"
    assert (task(merged).run.path, task(merged).run.dir) == ("a", "e")


def test_scalars_mean_what_was_written() -> None:  # FAULTS 43
    value = read_yaml("[NO, yes, on, 010, 0x10, 1e3, .5, null, ~, 'true', true, 12:30, 2020-01-01, 1_000, .inf]").value
    assert value == ["NO", "yes", "on", 10, 16, 1000.0, 0.5, None, None, "true", True, "12:30", "2020-01-01", "1_000", ".inf"]
    assert value[3].text == "010"


# --- variables


def test_a_whole_value_keeps_the_type_of_its_variable() -> None:
    variables = gather_variables([], ["memory=2048", "args=[a, b]", "o=true"], [])
    made = task("run: {path: a, args: ((args))}\ncontainer_limits: {memory: ((memory))}\ninputs: [{name: i, optional: ((o))}]", variables)
    assert (made.run.args, made.container_limits.memory, made.inputs[0].optional) == (["a", "b"], 2048, True)


def test_variables_inside_text_and_fields_and_quoted_names() -> None:
    variables = gather_variables(["a.b=deep", '"x.y"=dotted'], ["n=010"], [])
    assert task('run: {path: "/((a.b))/((\\"x.y\\"))/((n))"}', variables).run.path == "/deep/dotted/010"


def test_the_command_line_wins_over_files_and_a_later_file_over_an_earlier() -> None:
    variables = gather_variables(["c=line"], [], [("1.yml", b"a: 1\nb: 1\nc: 1"), ("2.yml", b"b: 2")])
    assert variables == {"a": 1, "b": 2, "c": "line"}


def test_a_missing_variable_is_named_with_its_place() -> None:
    assert refusal("run:\n  path: ((where.it))/x", {"where": {}}) == (
        "task.yml:2: run.path: the variable `((where.it))` has no value: give it with `-v where.it=…`, `-y where.it=…` or `-l file.yml`"
    )


def test_arithmetic_of_a_shell_is_no_variable() -> None:
    assert task('run: {path: sh, args: [-c, "echo $((i+1)) $(( i ))"]}').run.args[1] == "echo $((i+1)) $(( i ))"


def test_a_structure_cannot_stand_inside_text() -> None:
    assert "cannot stand inside other text" in refusal("run: {path: x((l))}", {"l": [1]})


def test_a_variable_of_the_wrong_type_is_refused_where_it_stands() -> None:
    assert (
        refusal("run:\n  path: ((p))", gather_variables([], ["p=1"], []))
        == "task.yml:2: run.path: must be text, not a whole number: put it in quotes"
    )


@pytest.mark.parametrize(
    ("texts", "yamls", "files", "said"),
    [
        (["novalue"], [], [], "-v novalue: must be name=value"),
        (["=x"], [], [], "-v =x: must be name=value"),
        ([], ["a=[1"], [], "-y a: while parsing a flow sequence did not find expected ',' or ']'"),
        ([], [], [("v.yml", b"[1]")], "v.yml: is not a file of variables: it must be a mapping of names to values"),
        ([], [], [("v.yml", b"a: 1\na: 2")], "v.yml:2: the key `a` is there twice"),
    ],
)
def test_variables_that_cannot_be_read_are_refused(texts: list[str], yamls: list[str], files: list[tuple[str, bytes]], said: str) -> None:
    with pytest.raises(VariableProblem) as refused:
        gather_variables(texts, yamls, files)
    assert str(refused.value) == said


def test_what_has_no_value_in_params_and_images_may_be_a_secret_of_the_server() -> None:
    text = "run: {path: a}\nparams: {A: ((secret)), B: x((known))((other.one))}\nimage_resource: {type: t, source: {password: ((pw))}}"
    made = task(text, {"known": "K"})
    assert made.params == {"A": "((secret))", "B": "xK((other.one))"}
    assert made.image_resource.source == {"password": "((pw))"}
    assert "has no value" in refusal("run: {path: a}\nparams: {A: ((known.field))}", {"known": {"other": 1}})
    assert "has no value" in refusal("run: {path: a}\nimage_resource: {type: ((t))}")
