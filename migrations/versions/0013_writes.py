"""A daemon's writes are counted, so that it knows a database that has lost some."""

import sqlalchemy as sa
from alembic import op

from migrations import INTEGER

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("daemons", sa.Column("writes", INTEGER, nullable=False, server_default=sa.text("0")))
