"""The log, its append function, who owns which category, the epoch."""

from pathlib import Path

from alembic import op

revision = "0001_log"
down_revision = None


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
