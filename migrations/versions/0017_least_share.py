"""A share is a hundredth at least: by a tiny one counters get so large that what others are charged is lost in them.

Who is ahead stays so by as much work, as with any new share.
"""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


FLOOR = "COALESCE((SELECT floor FROM daemons WHERE seat = counters.seat ORDER BY epoch DESC LIMIT 1), 0)"
SHARE = "(SELECT share FROM tenants WHERE id = counters.tenant_id)"


def upgrade() -> None:
    op.execute(
        f"UPDATE counters SET counter = {FLOOR} + (counter - {FLOOR}) * {SHARE} / 0.01 "
        f"WHERE counter > {FLOOR} AND {SHARE} < 0.01"
    )
    op.execute("UPDATE tenants SET share = 0.01 WHERE share < 0.01")
