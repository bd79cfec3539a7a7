"""Jobs on several data sets."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("mixture", sa.JSON(), nullable=True))
    op.add_column("metrics", sa.Column("train_losses", sa.JSON(), nullable=True))
    op.add_column("metrics", sa.Column("valid_losses", sa.JSON(), nullable=True))
