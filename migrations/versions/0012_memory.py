"""What passes of a base take of memory, as the engine has measured it."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("bases", sa.Column("memory", sa.JSON(), nullable=True))
