"""What tenants have used."""

import sqlalchemy as sa
from alembic import op

from migrations import INTEGER

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("trained_tokens", "prompt_tokens", "sampled_tokens"):
        op.add_column("tenants", sa.Column(name, INTEGER, nullable=False, server_default=sa.text("0")))
