"""What a row looks like to a client. Pure."""

from datetime import UTC, datetime

from proto.api import Artifact, Build
from services.gateway.projection import ArtifactRow, BuildRow


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
        digest=row.digest,
        size=row.size,
        files=row.files,
        name=row.name,
        created_at=row.created_at,
        expires_at=datetime.fromtimestamp(row.expires_at, UTC) if row.expires_at else None,
    )
