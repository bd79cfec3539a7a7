"""Hashes of every file of data sets, adapters and bases' tokenizers."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("datasets", "adapters", "bases"):
        op.add_column(table, sa.Column("manifest", sa.JSON(), nullable=True))
