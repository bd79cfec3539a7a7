"""Statements on keys."""

import time

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from server.db.pages import Listing, Page
from server.db.session import Reader, rows
from server.db.tables import Key, Tenant
from server.ids import new_id

_VALID = (
    select(Key.id, Key.tenant_id)
    .join(Tenant, Tenant.id == Key.tenant_id)
    .where(Key.secret_hash == bindparam("secret_hash"), Key.revoked_at.is_(None), Tenant.deleted_at.is_(None))
)
_KEYS = Listing(
    select(Key).where(Key.tenant_id == bindparam("tenant_id")), identity=Key.id, order=(Key.created_at, Key.id)
)


def find_valid(reader: Reader, secret_hash: str) -> tuple[str, str] | None:
    """The ids of the key with this hash and of its tenant, if neither is gone."""
    found = rows(reader, _VALID, {"secret_hash": secret_hash})
    return (found[0].id, found[0].tenant_id) if found else None


def add_key(session: Session, tenant_id: str, name: str, shown: str, secret_hash: str) -> Key:
    """Keep a new key; the secret itself is not kept."""
    key = Key(
        id=new_id("key"),
        tenant_id=tenant_id,
        name=name,
        shown=shown,
        secret_hash=secret_hash,
        created_at=time.time(),
        revoked_at=None,
    )
    session.add(key)
    session.flush()
    return key


def get_key(session: Session, tenant_id: str, key_id: str) -> Key | None:
    """A tenant's key, revoked or not."""
    return session.scalar(select(Key).where(Key.tenant_id == tenant_id, Key.id == key_id))


def list_keys(session: Session, tenant_id: str, page: Page) -> tuple[list[Key], bool]:
    """A page of a tenant's keys, revoked ones among them, and whether more follow."""
    return _KEYS.page(session, page, {"tenant_id": tenant_id})


def revoke(session: Session, tenant_id: str, key_id: str | None = None) -> None:
    """Make one key of a tenant, or all of them, worthless from the next request on."""
    statement = update(Key).where(Key.tenant_id == tenant_id, Key.revoked_at.is_(None))
    if key_id is not None:
        statement = statement.where(Key.id == key_id)
    session.execute(statement.values(revoked_at=time.time()))
