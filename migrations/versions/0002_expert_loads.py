"""Loads of the experts."""

import sqlalchemy as sa
from alembic import op

from migrations import INTEGER

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "expert_loads",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("loads", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "step"),
    )
