"""The activation of a base, to compare with what an uploaded adapter asks for."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("bases", sa.Column("activation", sa.String(), nullable=True))
