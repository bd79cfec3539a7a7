"""Hashes of jobs' own rows; recovery points' manifests with the size of each file."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("tokens_manifest", sa.JSON(), nullable=True))
    points = sa.table("recovery_points", sa.column("id", sa.String()), sa.column("manifest", sa.JSON()))
    connection = op.get_bind()
    for point in connection.execute(sa.select(points)).all():
        manifest = {name: {"sha256": sha256, "bytes": None} for name, sha256 in point.manifest.items()}
        connection.execute(points.update().where(points.c.id == point.id).values(manifest=manifest))
