"""A share is a hundredth at least: by a tiny one counters get so large that what others are charged is lost in them."""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("UPDATE tenants SET share = 0.01 WHERE share < 0.01")
