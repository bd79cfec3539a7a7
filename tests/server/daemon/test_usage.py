"""What tenants are said to have used is what they have, whatever happened on the way."""

from collections.abc import Callable

from server.api.services import Services
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, job, submit


def trained(caller: Caller) -> int:
    tokens: int = caller.get("/usage").json()["trained_tokens"]
    return tokens


def test_each_step_counts_once_however_often_it_was_taken(
    life: Life, new_life: Callable[..., Life], alice: Caller, bob: Caller, admin: Caller, services: Services
) -> None:
    id_ = submit(alice, PLAIN)
    life.turn_until(lambda: job(services, id_).step == 8)
    assert trained(alice) == job(services, id_).tokens > 0
    new_life().finish()
    total = job(services, id_).total_tokens
    assert [trained(caller) for caller in (alice, bob)] == [total, 0]
    alice.delete(f"/jobs/{id_}")
    admin.delete(f"/admin/tenants/{alice.tenant_id}")
    listed = {one["tenant"]["name"]: one["trained_tokens"] for one in admin.get("/admin/usage").json()["data"]}
    assert listed == {"alice": total, "bob": 0}
