"""Tenants and their keys, as the operator makes them."""

from typing import Any

import pytest
from fastapi import FastAPI

from server.db.tables import Base
from tests.server.conftest import Caller, new_tenant
from tests.server.making import submit


def test_a_tenant_comes_with_a_first_key(app: FastAPI, admin: Caller) -> None:
    answer = admin.post("/admin/tenants", json={"name": "alice", "share": 2.5})
    tenant = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/admin/tenants/{tenant['id']}"
    assert (tenant["name"], tenant["share"]) == ("alice", 2.5)
    assert Caller(app, tenant["key"]).get("/me").json()["tenant"] == {"id": tenant["id"], "name": "alice"}
    shown = admin.get(f"/admin/tenants/{tenant['id']}").json()
    assert shown == {name: value for name, value in tenant.items() if name != "key"}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_field", "name"),
        ({"name": ""}, "invalid_request", "name"),
        ({"name": "a", "share": 0}, "invalid_request", "share"),
        ({"name": "a", "share": -1}, "invalid_request", "share"),
        ({"name": "a", "share": 0.0099}, "invalid_request", "share"),
        ({"name": "a", "share": 1000.1}, "invalid_request", "share"),
        ({"name": "a", "shares": 1}, "unknown_field", "shares"),
    ],
)
def test_a_bad_tenant_is_refused(body: dict[str, Any], code: str, param: str, admin: Caller) -> None:
    answer = admin.post("/admin/tenants", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param)


def test_names_are_unique_until_a_tenant_is_deleted(app: FastAPI, admin: Caller, bob: Caller) -> None:
    alice = new_tenant(app, admin, "alice")
    assert admin.post("/admin/tenants", json={"name": "alice"}).json()["error"]["code"] == "name_taken"
    renamed = admin.patch(f"/admin/tenants/{bob.tenant_id}", json={"name": "alice"})
    assert renamed.json()["error"]["code"] == "name_taken"
    admin.delete(f"/admin/tenants/{alice.tenant_id}")
    assert admin.post("/admin/tenants", json={"name": "alice"}).status_code == 201


def test_name_and_share_can_be_changed_one_by_one(admin: Caller, alice: Caller) -> None:
    path = f"/admin/tenants/{alice.tenant_id}"
    assert admin.patch(path, json={"share": 3.0}).json()["share"] == 3.0
    assert admin.patch(path, json={"name": "alicia"}).json()["name"] == "alicia"
    assert admin.patch(path, json={}).json() == admin.get(path).json()
    both = {"name": "alice", "share": 2.0}
    assert admin.patch(path, json=both).json().items() >= both.items()
    assert admin.get(path).json().items() >= both.items()
    admin.patch(path, json={"share": 3.0})
    assert alice.get("/me").json()["share"] == 3.0


def test_tenants_are_listed_and_found_by_name(admin: Caller, alice: Caller, bob: Caller) -> None:
    listed = admin.get("/admin/tenants", params={"order": "asc"}).json()["data"]
    assert [tenant["name"] for tenant in listed] == ["alice", "bob"]
    found = admin.get("/admin/tenants", params={"name": "bob"}).json()["data"]
    assert [tenant["id"] for tenant in found] == [bob.tenant_id]


def test_a_deleted_tenant_has_no_key_no_jobs_and_is_404(base: Base, admin: Caller, alice: Caller, bob: Caller) -> None:
    submit(alice)
    other = submit(bob)["id"]
    path = f"/admin/tenants/{alice.tenant_id}"
    assert admin.delete(path).json() == {"id": alice.tenant_id, "object": "tenant", "deleted": True}
    assert alice.get("/jobs").status_code == 401
    for answer in (admin.get(path), admin.delete(path), admin.patch(path, json={}), admin.get(f"{path}/keys")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert [entry["id"] for entry in admin.get("/admin/queue").json()["data"]] == [other]


def test_keys_are_made_listed_and_revoked(app: FastAPI, admin: Caller, alice: Caller) -> None:
    path = f"/admin/tenants/{alice.tenant_id}/keys"
    made = admin.post(path, json={"name": "laptop"}).json()
    assert Caller(app, made["key"]).get("/me").json()["key"]["name"] == "laptop"
    listed = admin.get(path, params={"order": "asc"}).json()["data"]
    assert [key["name"] for key in listed] == ["first key", "laptop"]
    assert all("key" not in key for key in listed)
    assert admin.delete(f"{path}/{made['id']}").json()["deleted"] is True
    assert Caller(app, made["key"]).get("/me").status_code == 401
    assert admin.get(f"{path}/{made['id']}").json()["revoked_at"] is not None
    assert alice.get("/me").status_code == 200


def test_a_key_is_found_under_its_own_tenant_alone(admin: Caller, alice: Caller, bob: Caller) -> None:
    key = alice.get("/me").json()["key"]["id"]
    for method in ("get", "delete"):
        answer = getattr(admin, method)(f"/admin/tenants/{bob.tenant_id}/keys/{key}")
        assert answer.status_code == 404
    assert alice.get("/me").status_code == 200
