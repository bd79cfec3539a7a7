"""Keys: who may call what, and what becomes of a secret."""

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from server.admin_key import ensure_admin_key
from server.api.app import open_services
from server.api.auth import hash_of_secret, new_secret
from server.api.services import Services
from server.db.tables import Key
from server.settings import Settings
from tests.server.conftest import ADMIN_KEY, Caller


def test_a_key_is_taken_as_bearer_or_as_x_api_key(alice: Caller, anonymous: Caller) -> None:
    for headers in (
        {"Authorization": f"Bearer {alice.key}"},
        {"Authorization": f"bearer  {alice.key}"},
        {"X-API-Key": str(alice.key)},
    ):
        assert anonymous.get("/me", headers=headers).json()["tenant"]["id"] == alice.tenant_id


def test_a_key_is_valid_under_either_brand(alice: Caller, anonymous: Caller) -> None:
    body = str(alice.key).removeprefix("mxl_")
    assert len(body) == 43
    assert anonymous.get("/me", headers={"X-API-Key": f"tml-{body}"}).status_code == 200
    assert anonymous.get("/me", headers={"X-API-Key": f"sk-{body}"}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer mxl_wrong"},
        {"Authorization": "Basic YTpi"},
        {"X-API-Key": ""},
        {"X-API-Key": "mxl_"},
        {"X-API-Key": "ü"},
    ],
)
@pytest.mark.parametrize("path", ["/me", "/jobs", "/admin/tenants", "/base"])
def test_a_wrong_or_missing_key_is_401(headers: dict[str, str], path: str, anonymous: Caller) -> None:
    answer = anonymous.get(path, headers={name: value.encode() for name, value in headers.items()})  # type: ignore[misc]
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_key_is_asked_for_before_the_body_is_judged(anonymous: Caller) -> None:
    for path in ("/jobs", "/generate", "/admin/tenants"):
        assert anonymous.post(path, json={"nonsense": 1}).status_code == 401


def test_a_revoked_key_is_worthless_at_once(admin: Caller, alice: Caller) -> None:
    key = alice.get("/me").json()["key"]["id"]
    assert admin.delete(f"/admin/tenants/{alice.tenant_id}/keys/{key}").status_code == 200
    assert alice.get("/me").status_code == 401


def test_the_admin_key_is_no_tenants_and_a_tenants_is_no_admins(admin: Caller, alice: Caller) -> None:
    as_tenant, as_admin = admin.get("/jobs"), alice.get("/admin/tenants")
    assert (as_tenant.status_code, as_tenant.json()["error"]["code"]) == (403, "tenant_key_required")
    assert (as_admin.status_code, as_admin.json()["error"]["code"]) == (403, "admin_key_required")
    assert as_admin.json()["error"]["type"] == "permission_error"


def test_only_a_hash_of_a_key_is_kept(alice: Caller, services: Services, settings: Settings) -> None:
    with services.database.read() as session:
        row = session.query(Key).one()
    assert row.secret_hash == hash_of_secret(str(alice.key))
    services.database.engine.dispose()
    content = b"".join(path.read_bytes() for path in settings.data_dir.rglob("*") if path.is_file())
    assert str(alice.key).encode() not in content
    assert ADMIN_KEY.encode() not in content


def test_me_says_who_one_is(alice: Caller, admin: Caller) -> None:
    me = alice.get("/me").json()
    assert (me["tenant"]["name"], me["scopes"], me["share"]) == ("alice", ["tenant"], 1.0)
    assert str(alice.key).startswith(me["key"]["shown"])
    assert len(me["key"]["shown"]) <= 8
    assert admin.get("/me").json()["scopes"] == ["admin"]


def test_secrets_have_256_bits_and_differ() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith("mxl_") and secret[4:].isalnum() and len(secret) == 47 for secret in secrets)


def test_the_first_start_writes_an_admin_key_that_only_its_owner_can_read(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    key, path = ensure_admin_key(settings)
    assert path == tmp_path / "data" / "admin.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) >= 32
    assert ensure_admin_key(settings) == (key, None)
    assert [file.name for file in path.parent.iterdir()] == ["admin.key"]


def test_a_key_that_was_half_written_is_left_neither_by_a_full_disk_nor_by_a_kill(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the disk takes nothing."""
    data = tmp_path / "data"
    start = f"from server.admin_key import *; ensure_admin_key(Settings(data_dir={str(data)!r}))"
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    failed = subprocess.run([sys.executable, "-c", full + start], capture_output=True, text=True)
    assert "File too large" in failed.stderr
    assert list(data.iterdir()) == []
    killed = "import os, signal; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); "
    assert subprocess.run([sys.executable, "-c", killed + start]).returncode == -signal.SIGKILL
    (draft,) = data.iterdir()
    key, path = ensure_admin_key(Settings(data_dir=data))
    assert path is not None
    assert path.read_text().strip() == key
    assert list(data.iterdir()) == [path]
    assert not draft.exists()


def test_an_admin_key_of_the_settings_is_never_written(tmp_path: Path) -> None:
    assert ensure_admin_key(Settings(data_dir=tmp_path / "data", admin_key=ADMIN_KEY)) == (ADMIN_KEY, None)
    assert not (tmp_path / "data").exists()


def test_the_written_admin_key_opens_the_admin_routes(routes: FastAPI, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    routes.state.services = open_services(settings)
    key = (tmp_path / "data" / "admin.key").read_text().strip()
    assert Caller(routes, key).get("/admin/tenants").status_code == 200
    assert Caller(routes, key[:-1]).get("/admin/tenants").status_code == 401
