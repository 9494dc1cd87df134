"""What a row looks like to a client. Pure."""

from datetime import UTC, datetime

from proto.api.artifacts import Artifact
from proto.api.builds import Build
from proto.api.secrets import Secret
from proto.api.teams import Policy
from proto.events.team import DEFAULT_POLICY
from services.gateway.projection import ArtifactRow, BuildRow, SecretRow, TeamRow


def build_view(row: BuildRow, public_url: str) -> Build:
    return Build(
        id=row.id,
        number=row.number,
        team=row.team,
        name=row.name,
        status=row.status,
        percent=row.percent,
        error=row.error,
        reason=row.reason,
        exit_code=row.exit_code,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        requested_by=row.requested_by,
        url=f"{public_url}/api/v1/teams/{row.team}/builds/{row.number}",
        inputs=row.inputs,
        outputs=row.outputs,
        stages=row.stages,
        positions=row.positions,
    )


def artifact_view(row: ArtifactRow) -> Artifact:
    return Artifact(
        id=row.id,
        kind=row.kind,
        digest=row.digest,
        size=row.size,
        files=row.files,
        name=row.name,
        build=row.build_number or None,
        build_id=row.build,
        created_at=row.created_at,
        expires_at=datetime.fromtimestamp(row.expires_at, UTC) if row.expires_at and not row.pinned else None,
        pinned=row.pinned,
    )


def policy_view(row: TeamRow | None) -> Policy:
    policy = row or DEFAULT_POLICY
    return Policy(
        input_seconds=policy.input_seconds, output_seconds=policy.output_seconds, quota_bytes=policy.quota_bytes, privileged=policy.privileged
    )


def secret_view(row: SecretRow) -> Secret:
    return Secret(name=row.name, version=row.version, set_at=row.set_at, set_by=row.set_by)
