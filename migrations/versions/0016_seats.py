"""What each daemon adds up for a tenant: what all of them have added up is of the first seat."""

import sqlalchemy as sa
from alembic import op

from migrations import INTEGER

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

MOVED = ("counter", "backlogged", "trained_tokens", "prompt_tokens", "sampled_tokens")


def upgrade() -> None:
    op.create_table(
        "counters",
        sa.Column("tenant_id", sa.String(), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("seat", INTEGER, primary_key=True),
        sa.Column("counter", sa.Float(), nullable=False),
        sa.Column("backlogged", sa.Boolean(), nullable=False),
        *(sa.Column(name, INTEGER, nullable=False) for name in MOVED[2:]),
    )
    op.execute(f"INSERT INTO counters SELECT id, 1, {', '.join(MOVED)} FROM tenants")
    op.create_index("counters_in_order", "counters", ["seat", "counter"])
    op.drop_index("tenants_by_counter", table_name="tenants")
    for name in MOVED:
        op.drop_column("tenants", name)
    for table in ("runs", "daemons"):
        op.add_column(table, sa.Column("seat", INTEGER, nullable=False, server_default=sa.text("1")))
