"""Alembic's revisions, the same for SQLite and PostgreSQL."""

from sqlalchemy import BigInteger, Integer

INTEGER = BigInteger().with_variant(Integer(), "sqlite")
"""A whole number of 64 bits: SQLite's INTEGER is one."""
