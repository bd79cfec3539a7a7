"""Daemons have names, and drains may be for one of them; a daemon says which drain it rests under."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("daemons", sa.Column("name", sa.String(), nullable=True))
    op.add_column("daemons", sa.Column("rests_under", sa.String(), nullable=True))
    op.add_column("drains", sa.Column("daemon", sa.String(), nullable=True))
