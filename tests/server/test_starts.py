"""`init_from`: a job that starts from an adapter, as the API sees it."""

from collections.abc import Callable
from typing import Any

import pytest

from server.api.services import Services
from server.db.tables import Base
from tests.server.conftest import Caller
from tests.server.making import add_adapter, change_job, prompt_rows, submit, upload

pytestmark = pytest.mark.usefixtures("base")

WEIGHTS = "adapter_model.safetensors"
SHAPE = {
    "method": "mixlora",
    "rank": 4,
    "alpha": 3,
    "dropout": 0.2,
    "dora": True,
    "rslora": True,
    "target_modules": ["up_proj", "q_proj"],
    "num_experts": 3,
    "top_k": 1,
    "router_aux_loss_coef": 0.5,
}


@pytest.fixture
def start(alice: Caller, services: Services) -> dict[str, Any]:
    """An adapter of alice's, of a shape that no default gives."""
    id_ = add_adapter(services, submit(alice, adapter=SHAPE)["id"], 7)
    return dict(alice.get(f"/adapters/{id_}").json())


@pytest.fixture
def dataset(alice: Caller) -> str:
    return upload(alice, prompt_rows(12))


def test_what_is_not_given_is_the_adapters(alice: Caller, start: dict[str, Any], dataset: str) -> None:
    job = submit(alice, dataset, init_from=start["id"])
    assert job["adapter"] == SHAPE
    assert job["init_from"] == {"adapter": start["id"], "sha256": start["sha256"]}
    assert submit(alice, dataset, init_from=start["id"], preset="paper")["adapter"] == SHAPE
    assert submit(alice, dataset)["init_from"] is None


def test_dropout_the_auxiliary_loss_and_the_training_may_differ(
    alice: Caller, start: dict[str, Any], dataset: str
) -> None:
    changes = {"dropout": 0.0, "router_aux_loss_coef": 0.01}
    same = {"rank": 4, "method": "mixlora", "target_modules": ["q_proj", "up_proj"]}
    job = submit(
        alice, dataset, init_from=start["id"], adapter={**changes, **same}, training={"learning_rate": 1e-5, "seed": 7}
    )
    assert job["adapter"] == {**SHAPE, **changes}
    assert (job["training"]["learning_rate"], job["training"]["seed"]) == (1e-5, 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "lora"),
        ("rank", 8),
        ("alpha", 8),
        ("dora", False),
        ("rslora", False),
        ("num_experts", 4),
        ("top_k", 2),
        ("target_modules", ["up_proj"]),
    ],
)
def test_another_shape_than_the_adapters_is_refused_by_name(
    name: str, value: Any, alice: Caller, start: dict[str, Any], dataset: str, services: Services
) -> None:
    before = services.store.list("jobs")
    answer = alice.post("/jobs", json={"dataset": dataset, "init_from": start["id"], "adapter": {name: value}})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "init_from_mismatch", f"adapter.{name}")
    assert services.store.list("jobs") == before


def test_experts_are_no_field_of_a_lora_adapter(alice: Caller, services: Services, dataset: str) -> None:
    plain = add_adapter(services, submit(alice, adapter={"method": "lora"})["id"], 1)
    answer = alice.post("/jobs", json={"dataset": dataset, "init_from": plain, "adapter": {"num_experts": 4}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "field_needs_mixlora")


def test_an_adapter_of_another_base_is_refused(
    alice: Caller, start: dict[str, Any], dataset: str, publish_base: Callable[..., Base]
) -> None:
    publish_base(hash="another")
    answer = alice.post("/jobs", json={"dataset": dataset, "init_from": start["id"]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "adapter_of_other_base", "init_from")


def test_the_job_keeps_the_weights_when_the_adapter_is_deleted(
    alice: Caller, start: dict[str, Any], dataset: str, services: Services
) -> None:
    weights = (services.store.path(f"adapters/{start['id']}") / WEIGHTS).read_bytes()
    job = submit(alice, dataset, init_from=start["id"])
    alice.delete(f"/adapters/{start['id']}")
    assert (services.store.path(f"jobs/{job['id']}") / WEIGHTS).read_bytes() == weights
    assert alice.get(f"/jobs/{job['id']}").json()["init_from"] == job["init_from"]
    gone = alice.post("/jobs", json={"from": job["id"]})
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "init_from")
    fresh = alice.post("/jobs", json={"from": job["id"], "init_from": None})
    assert (fresh.status_code, fresh.json()["init_from"]) == (201, None)
    change_job(services, job["id"], status="cancelled")
    alice.delete(f"/jobs/{job['id']}")
    assert not services.store.path(f"jobs/{job['id']}").exists()


def test_an_adapter_whose_files_are_gone_or_damaged_is_no_start_and_leaves_no_job(
    alice: Caller, start: dict[str, Any], dataset: str, services: Services
) -> None:
    before = services.store.list("jobs")
    path = services.store.path(f"adapters/{start['id']}") / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    damaged = alice.post("/jobs", json={"dataset": dataset, "init_from": start["id"]})
    assert (damaged.status_code, damaged.json()["error"]["code"]) == (500, "adapter_unreadable")
    path.unlink()
    gone = alice.post("/jobs", json={"dataset": dataset, "init_from": start["id"]})
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "init_from")
    assert services.store.list("jobs") == before
