"""Lives of daemons expire; runs and operations count the crashes that they were in."""

import sqlalchemy as sa
from alembic import op

from migrations import INTEGER

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("daemons", sa.Column("expires_at", sa.Float(), nullable=True))
    op.add_column("daemons", sa.Column("supervisor", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("crashes", INTEGER, nullable=False, server_default=sa.text("0")))
    op.add_column("runs", sa.Column("crash_step", INTEGER, nullable=True))
    op.create_index("ix_runs_crashes", "runs", ["crashes"])
    op.add_column("operations", sa.Column("lease_epoch", INTEGER, nullable=True))
    op.add_column("operations", sa.Column("attempts", INTEGER, nullable=False, server_default=sa.text("0")))
