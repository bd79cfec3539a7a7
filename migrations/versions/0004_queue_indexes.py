"""Indexes of the queue: a tenant's next job, and the tenants of smallest counter, each found without a search."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("jobs_next", table_name="jobs")
    op.create_index("jobs_next", "jobs", ["tenant_id", "status", "base_hash", sa.text("weight DESC"), "number"])
    op.create_index("jobs_by_status", "jobs", ["status", "tenant_id"])
    op.create_index("tenants_by_counter", "tenants", ["counter"])
