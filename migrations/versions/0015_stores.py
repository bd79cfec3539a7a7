"""Which data directory has the files that the tables name."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table("stores", sa.Column("id", sa.String(), primary_key=True))
