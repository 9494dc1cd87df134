"""What a plan needs beyond its own rules: that every input a step must have will be there, and that its steps may have the rights they want. Pure."""

from collections.abc import Collection

from proto.plan import Plan


def privileged_step(plan: Plan) -> str | None:
    """The path of the first step that wants to be privileged."""
    steps = ((i, j, step) for i, stage in enumerate(plan.stages) for j, step in enumerate(stage.steps))
    return next((f"plan.stages[{i}].steps[{j}].privileged" for i, j, step in steps if step.privileged), None)


def missing_input(plan: Plan, given: Collection[str]) -> tuple[str, str] | None:
    """(path, rule) of the first required input that is neither given nor an output of an earlier step of its stage or of a stage it needs, or None.
    The plan must have no `plan_problem`: its stages need each other in no circle."""
    stages = {stage.name: stage for stage in plan.stages}
    made = {stage.name: {output.name for step in stage.steps for output in step.config.outputs} for stage in plan.stages}
    before: dict[str, set[str]] = {}

    def available(name: str) -> set[str]:
        pending = [name]
        while pending:
            top = pending[-1]
            unknown = [need for need in stages[top].needs if need not in before]
            if unknown:
                pending.extend(unknown)
                continue
            before[top] = set(given).union(*(before[need] | made[need] for need in stages[top].needs))
            pending.pop()
        return before[name]

    for i, stage in enumerate(plan.stages):
        names = set(available(stage.name))
        for j, step in enumerate(stage.steps):
            for k, wanted in enumerate(step.config.inputs):
                if not wanted.optional and wanted.name not in names:
                    path = f"plan.stages[{i}].steps[{j}].config.inputs[{k}]"
                    return path, f"a missing input: `{wanted.name}` is not given, and nothing before step `{step.name}` makes it"
            names.update(output.name for output in step.config.outputs)
    return None
