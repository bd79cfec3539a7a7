"""Jobs over REST: submitted, shown, listed, stopped, cloned, forgotten."""

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.api.services import Services
from server.db import drains
from server.db.states import TRANSITIONS, JobStatus
from server.db.tables import Base, Event, Metric, Run
from server.job_config import AdapterConfig, JobCreate, TrainingConfig
from server.tokens import TokenRows
from tests.server.conftest import TARGETS, Caller
from tests.server.making import add_adapter, add_metric, change_job, prompt_rows, submit, upload

pytestmark = pytest.mark.usefixtures("base")

ANSWER = {
    *("id", "object", "name", "status", "requested", "base", "dataset", "dataset_sha256", "validation", "adapter"),
    *("training", "priority", "metadata", "progress", "queue", "estimated_finish", "metrics", "adapter_id"),
    *("adapter_sha256", "best_checkpoint", "loads_in", "exact", "error", "created_by", "created_at", "started_at"),
    "finished_at",
}


def events_of(caller: Caller, job_id: str) -> list[str]:
    answer = caller.get(f"/jobs/{job_id}/events", params={"order": "asc", "limit": 100})
    return [event["kind"] for event in answer.json()["data"]]


def test_a_job_is_answered_with_everything_resolved(alice: Caller, base: Base) -> None:
    answer = alice.post("/jobs", json={"dataset": upload(alice, prompt_rows(120), "mine.jsonl")})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert set(job) == ANSWER
    assert job["id"].startswith("job_")
    assert (job["object"], job["name"], job["status"]) == ("job", "mine.jsonl", "queued")
    assert job["base"] == {"name": "tiny", "hash": base.hash}
    assert job["validation"] == {"rows": 12, "fraction": 0.1}
    assert (job["training"]["batch_size"], job["training"]["epochs"]) == (8, 8)
    assert job["progress"] == {
        "step": 0,
        "total_steps": 112,
        "tokens": 0,
        "total_tokens": job["progress"]["total_tokens"],
    }
    assert job["loads_in"] == ["mixloom", "mixlora"]
    assert alice.get(answer.headers["location"]).json()["id"] == job["id"]


def test_an_accepted_job_keeps_its_own_tokens_and_a_run(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(120))
    job = submit(alice, dataset, training={"max_steps": 15})
    folder = services.store.path(f"jobs/{job['id']}")
    train, valid = (TokenRows.load(folder / f"{name}.safetensors") for name in ("train", "valid"))
    assert (len(train), len(valid)) == (108, 12)
    lengths = sorted([*train.lengths, *valid.lengths])
    assert sum(lengths) == alice.get(f"/datasets/{dataset}").json()["tokens"]["total"]
    with services.database.read() as session:
        run = session.query(Run).one()
    assert (run.job_id, run.tenant_id, run.lease_epoch, run.cost_charged) == (job["id"], alice.tenant_id, None, 0)
    assert alice.delete(f"/datasets/{dataset}").status_code == 200
    assert alice.get(f"/jobs/{job['id']}").status_code == 200


def test_without_validation_there_is_no_file_for_it(alice: Caller, services: Services) -> None:
    job = submit(alice)
    assert job["validation"] == {"rows": 0, "fraction": 0.0}
    assert not (services.store.path(f"jobs/{job['id']}") / "valid.safetensors").exists()


def test_total_tokens_are_those_of_the_steps(alice: Caller, services: Services) -> None:
    job = submit(alice, training={"epochs": 3, "batch_size": 4})
    rows = TokenRows.load(services.store.path(f"jobs/{job['id']}") / "train.safetensors")
    assert job["progress"]["total_steps"] == 9
    assert job["progress"]["total_tokens"] == 3 * rows.lengths.sum()


def test_a_data_set_can_be_the_validation(alice: Caller, services: Services) -> None:
    other = upload(alice, prompt_rows(5))
    job = submit(alice, validation=other)
    assert job["validation"] == {"rows": 5, "dataset": other}
    assert job["training"]["evaluate_every"] == 2
    assert len(TokenRows.load(services.store.path(f"jobs/{job['id']}") / "valid.safetensors")) == 5


def test_jobs_are_numbered_in_the_order_of_their_submission(alice: Caller, bob: Caller) -> None:
    jobs = [submit(caller)["id"] for caller in (alice, bob, alice)]
    listed = alice.get("/jobs", params={"order": "asc"}).json()["data"]
    assert [job["id"] for job in listed] == [jobs[0], jobs[2]]


FIELDS: dict[str, Any] = {
    "name": "another",
    "base": "nobody's",
    "dataset": [{"id": "ds_1", "weight": 1}],
    "validation": 0.25,
    "init_from": "adp_1",
    "preset": "paper",
    "priority": "high",
    "metadata": {"team": "blue"},
    "from": "job_unknown",
    "adapter.method": "lora",
    "adapter.dora": True,
    "adapter.rslora": True,
    "adapter.rank": 4,
    "adapter.alpha": 5,
    "adapter.dropout": 0.5,
    "adapter.target_modules": ["up_proj"],
    "adapter.num_experts": 3,
    "adapter.top_k": 1,
    "adapter.router_aux_loss_coef": 0.5,
    "training.epochs": 3,
    "training.max_steps": 5,
    "training.batch_size": 3,
    "training.learning_rate": 1e-3,
    "training.loraplus_ratio": 16,
    "training.schedule": "cosine",
    "training.warmup_ratio": 0.5,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 2.0,
    "training.cutoff_length": 100,
    "training.long_rows": "skip",
    "training.supervise": "all",
    "training.seed": 7,
    "training.evaluate_every": 3,
    "training.checkpoint_every": 3,
    "training.keep_checkpoints": 7,
    "training.early_stopping": {"patience": 2},
}
REFUSED = {"base": "unknown_base", "from": "not_found"}
NOT_YET = {"dataset", "init_from", "adapter.dora", "training.loraplus_ratio", "training.early_stopping"}


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        parts = {"adapter": AdapterConfig, "training": TrainingConfig}
        if not prefix and name in parts:
            yield from fields_of(parts[name], f"{name}.")
        else:
            yield prefix + (field.alias or name)


def test_the_fields_tried_here_are_those_of_the_schema() -> None:
    assert set(FIELDS) == set(fields_of(JobCreate))


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_an_effect_or_is_refused(field: str, alice: Caller) -> None:
    dataset = upload(alice, prompt_rows(110))
    whole: dict[str, Any] = {"dataset": dataset, "adapter": {}, "training": {}}
    usual = submit(alice, **whole)
    place = whole
    *parts, name = field.split(".")
    for part in parts:
        place = place[part]
    place[name] = FIELDS[field]
    answer = alice.post("/jobs", json=whole)
    if field in NOT_YET or field in REFUSED:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (REFUSED.get(field, "not_supported_yet"), field)
        return
    assert answer.status_code == 201, answer.text
    changed = {key for key in ANSWER if answer.json()[key] != usual[key]} - {"id", "created_at"}
    assert changed - {"progress", "queue"} or field == "dataset"
    if parts:
        assert answer.json()[parts[0]][name] == FIELDS[field]


@pytest.mark.parametrize(
    ("config", "status", "code", "param"),
    [
        ({"dataset": None}, 422, "invalid_request", "dataset"),
        ({"dataset": "ds_nothing"}, 404, "not_found", "dataset"),
        ({"validation": "ds_nothing"}, 404, "not_found", "validation"),
        ({"validation": 0.6}, 422, "invalid_request", "validation"),
        ({"base": "llama"}, 422, "unknown_base", "base"),
        ({"colour": "blue"}, 422, "unknown_field", "colour"),
        ({"adapter": {"r": 8}}, 422, "unknown_field", "adapter.r"),
        ({"training": {"warmup_steps": 8}}, 422, "unknown_field", "training.warmup_steps"),
        ({"adapter": {"rank": 0}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": 8.5}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": "8"}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": True}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": 10**30}}, 422, "rank_too_large", "adapter.rank"),
        ({"adapter": {"dropout": 1}}, 422, "invalid_request", "adapter.dropout"),
        ({"adapter": {"num_experts": 1}}, 422, "invalid_request", "adapter.num_experts"),
        ({"adapter": {"top_k": 9}}, 422, "top_k_too_large", "adapter.top_k"),
        ({"adapter": {"target_modules": ["nope"]}}, 422, "unknown_target", "adapter.target_modules"),
        ({"adapter": {"method": "vera"}}, 422, "invalid_request", "adapter.method"),
        ({"training": {"epochs": 1, "max_steps": 1}}, 422, "epochs_and_max_steps", "training.max_steps"),
        ({"training": {"batch_size": 13}}, 422, "batch_too_large", "training.batch_size"),
        ({"training": {"seed": 2**63}}, 422, "invalid_request", "training.seed"),
        ({"training": {"cutoff_length": 20}}, 422, "row_too_long", "dataset"),
        ({"training": {"cutoff_length": 129}}, 422, "cutoff_too_large", "training.cutoff_length"),
        ({"metadata": {"a key": "x"}}, 422, "invalid_request", "metadata.a key"),
        ({"metadata": {"key": 1}}, 422, "invalid_request", "metadata.key"),
        ({"metadata": {f"k{i}": "x" for i in range(17)}}, 422, "invalid_request", "metadata"),
    ],
)
def test_a_bad_config_is_refused_by_name_and_keeps_nothing(
    config: dict[str, Any], status: int, code: str, param: str, alice: Caller, services: Services
) -> None:
    answer = alice.post("/jobs", json={"dataset": upload(alice, prompt_rows(12)), **config})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert alice.get("/jobs").json()["data"] == []
    assert services.store.list("jobs") == []


def test_several_mistakes_are_all_listed(alice: Caller) -> None:
    body = {"dataset": "ds_1", "adapter": {"rank": 0, "r": 1}, "training": {"seed": -1}}
    details = alice.post("/jobs", json=body).json()["error"]["details"]
    assert {detail["column"] for detail in details} == {"adapter.rank", "adapter.r", "training.seed"}


def test_before_there_is_a_base_a_job_is_refused_as_too_early(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(3))
    with services.database.write() as session:
        session.execute(Base.__table__.delete())
    answer = alice.post("/jobs", json={"dataset": dataset})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_not_ready")
    assert answer.headers["retry-after"]


def test_long_rows_are_named_by_line_and_can_be_skipped_or_truncated(alice: Caller) -> None:
    rows = prompt_rows(12)
    rows[4]["completion"] = "long " * 20
    dataset = upload(alice, rows)
    answer = alice.post("/jobs", json={"dataset": dataset, "training": {"cutoff_length": 70}})
    assert [detail["line"] for detail in answer.json()["error"]["details"]] == [5]
    for long_rows, words in (("skip", "left out"), ("truncate", "are cut")):
        job = submit(alice, dataset, training={"cutoff_length": 70, "long_rows": long_rows})
        events = alice.get(f"/jobs/{job['id']}/events").json()["data"]
        assert [words in event["message"] for event in events if event["kind"] == "warning"] == [True]


def test_a_single_expert_a_token_is_warned_of(alice: Caller) -> None:
    assert events_of(alice, submit(alice, adapter={"top_k": 1})["id"]) == ["queued", "warning"]


def test_an_estimate_says_what_a_job_would_be_and_keeps_nothing(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    body = {
        "dataset": upload(alice, prompt_rows(12)),
        "adapter": {"method": "lora", "rank": 2, "target_modules": ["q_proj"]},
    }
    estimate = alice.post("/jobs/estimate", json=body).json()
    assert (estimate["object"], estimate["steps"], estimate["rows"], estimate["seconds"]) == ("estimate", 20, 12, None)
    assert estimate["parameters"] == 2 * 2 * 128
    assert estimate["bytes"] == {"adapter": 4 * 512, "memory": 16 * 512}
    assert alice.get("/jobs").json()["data"] == []
    assert services.store.list("jobs") == []
    publish_base(detail={"tokens_per_second": 50.0})
    assert alice.post("/jobs/estimate", json=body).json()["seconds"] == estimate["tokens"] / 50


def test_a_clone_is_the_job_it_starts_from_with_changes(alice: Caller, bob: Caller) -> None:
    first = submit(alice, name="first", adapter={"rank": 4}, training={"epochs": 2}, metadata={"a": "b"})
    answer = alice.post("/jobs", json={"from": first["id"], "training": {"max_steps": 3}})
    clone = answer.json()
    assert answer.status_code == 201
    assert (clone["name"], clone["metadata"], clone["dataset"]) == ("first", {"a": "b"}, first["dataset"])
    assert clone["adapter"] == first["adapter"]
    assert (clone["training"]["epochs"], clone["training"]["max_steps"]) == (None, 3)
    foreign = bob.post("/jobs", json={"from": first["id"]})
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (404, "from")


def test_lists_can_be_filtered(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(12))
    blue = submit(alice, dataset, name="one", metadata={"team": "blue", "run.1": "x"})["id"]
    red = submit(alice, dataset, name="two", metadata={"team": "red"})["id"]
    change_job(services, red, status="succeeded")

    def ids(**params: str) -> list[str]:
        return [job["id"] for job in alice.get("/jobs", params=params).json()["data"]]

    assert ids(name="one") == ids(status="queued") == ids(**{"metadata[team]": "blue"}) == [blue]
    assert ids(**{"metadata[team]": "blue", "metadata[run.1]": "x"}) == [blue]
    assert ids(**{"metadata[team]": "blue", "metadata[run.1]": "y"}) == []
    assert ids() == [red, blue]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"status": "sleeping"}, "invalid_request"),
        ({"statuss": "queued"}, "unknown_parameter"),
        ({'metadata["]': "x"}, "invalid_request"),
        ({"limit": "0"}, "invalid_request"),
        ({"limit": "101"}, "invalid_request"),
        ({"order": "up"}, "invalid_request"),
    ],
)
def test_bad_parameters_of_a_list_are_refused(params: dict[str, str], code: str, alice: Caller) -> None:
    answer = alice.get("/jobs", params=params)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)


def test_cancel_is_final_in_the_answer_and_idempotent(alice: Caller) -> None:
    job = submit(alice)["id"]
    first, second = alice.post(f"/jobs/{job}/cancel"), alice.post(f"/jobs/{job}/cancel")
    assert (first.status_code, first.json()["status"]) == (200, "cancelled")
    assert second.json()["finished_at"] == first.json()["finished_at"]
    assert first.json()["finished_at"] is not None
    assert events_of(alice, job) == ["queued", "cancelled"]


def test_a_waiting_job_is_paused_at_once_and_resumed(alice: Caller) -> None:
    job = submit(alice)["id"]
    assert [alice.post(f"/jobs/{job}/pause").json()["status"] for _ in range(2)] == ["paused", "paused"]
    assert [alice.post(f"/jobs/{job}/resume").json()["status"] for _ in range(2)] == ["queued", "queued"]
    assert events_of(alice, job) == ["queued", "paused", "resumed"]


@pytest.mark.parametrize("status", ["preparing", "running"])
def test_pausing_a_resident_job_is_a_wish_that_can_be_taken_back(
    status: str, alice: Caller, services: Services
) -> None:
    job = submit(alice)["id"]
    change_job(services, job, status=status)
    for _ in range(2):
        answer = alice.post(f"/jobs/{job}/pause").json()
        assert (answer["status"], answer["requested"]) == (status, "pause")
    answer = alice.post(f"/jobs/{job}/resume").json()
    assert (answer["status"], answer["requested"]) == (status, None)
    assert events_of(alice, job) == ["queued", "pause_requested", "resumed"]


ACTIONS = {
    "cancel": dict.fromkeys(("queued", "preparing", "running", "paused", "cancelled"), "cancelled"),
    "pause": {"queued": "paused", "preparing": "preparing", "running": "running", "paused": "paused"},
    "resume": {"queued": "queued", "preparing": "preparing", "running": "running", "paused": "queued"},
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("status", list(TRANSITIONS))
def test_every_action_in_every_status_follows_the_table(
    action: str, status: JobStatus, alice: Caller, services: Services
) -> None:
    job = submit(alice)["id"]
    change_job(services, job, status=status)
    answer = alice.post(f"/jobs/{job}/{action}")
    after = ACTIONS[action].get(status)
    if after is None:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "job_ended")
        assert alice.get(f"/jobs/{job}").json()["status"] == status
        return
    assert answer.json()["status"] == after
    assert after == status or JobStatus(after) in TRANSITIONS[status]


def test_only_an_ended_job_can_be_deleted_and_all_of_it_goes(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    add_metric(services, job, 1)
    adapter = add_adapter(services, job, 1)
    with services.database.read() as session:
        run = session.query(Run).one().id
    services.store.put(f"recovery/{run}/1-1", lambda folder: None)
    refused = alice.delete(f"/jobs/{job}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "job_not_ended")
    alice.post(f"/jobs/{job}/cancel")
    assert alice.delete(f"/jobs/{job}").json() == {"id": job, "object": "job", "deleted": True}
    assert alice.get(f"/jobs/{job}").status_code == alice.get(f"/adapters/{adapter}").status_code == 404
    for folder in (f"jobs/{job}", f"adapters/{adapter}", f"recovery/{run}"):
        assert not services.store.path(folder).exists()
    with services.database.read() as session:
        assert [session.query(table).count() for table in (Run, Event, Metric)] == [0, 0, 0]


def test_a_waiting_job_says_what_it_waits_for(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    job = submit(alice)["id"]

    def reason() -> str:
        queue = alice.get(f"/jobs/{job}").json()["queue"]
        assert queue["sentence"]
        return str(queue["reason"])

    assert reason() == "fair_share"
    with services.database.write() as session:
        drains.add_drain(
            session, mode="quick", deadline_seconds=None, reason="a new disk", exit_=False, created_by="admin"
        )
    assert reason() == "draining"
    assert "a new disk" in alice.get(f"/jobs/{job}").json()["queue"]["sentence"]
    assert submit(alice)["queue"]["reason"] == "draining"
    with services.database.write() as session:
        drains.end_drains(session)
    publish_base(hash="4567")
    assert reason() == "waiting_for_base"
    publish_base(live=False)
    assert reason() == "no_daemon"


def test_a_job_that_trains_or_has_ended_waits_for_nothing(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    for status in ("running", "paused", "succeeded"):
        change_job(services, job, status=status)
        assert alice.get(f"/jobs/{job}").json()["queue"]["reason"] is None


def test_estimates_follow_from_shares_and_speed(
    alice: Caller, bob: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    publish_base(detail={"tokens_per_second": 100.0})
    job = submit(alice)
    alone = job["estimated_finish"] - job["queue"]["estimated_start"]
    assert alone == pytest.approx(job["progress"]["total_tokens"] / 100, rel=0.01)
    submit(bob)
    shared = alice.get(f"/jobs/{job['id']}").json()
    assert shared["queue"]["share"] == 0.5
    assert shared["estimated_finish"] - shared["queue"]["estimated_start"] == pytest.approx(2 * alone, rel=0.01)
    change_job(services, job["id"], status="paused")
    assert alice.get(f"/jobs/{job['id']}").json()["estimated_finish"] is None


def test_events_are_pages(alice: Caller) -> None:
    job = submit(alice)["id"]
    for action in ("pause", "resume", "pause", "resume"):
        alice.post(f"/jobs/{job}/{action}")
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = alice.get(f"/jobs/{job}/events", params={"limit": 2, "order": "asc", **after}).json()
        seen += [event["kind"] for event in page["data"]]
        after = {"after": page["last_id"]}
        if not page["has_more"]:
            break
    assert seen == ["queued", "paused", "resumed", "paused", "resumed"]
    stream = alice.get(f"/jobs/{job}/events", headers={"Accept": "text/event-stream"})
    assert (stream.status_code, stream.json()["error"]["code"]) == (422, "not_supported_yet")


def test_metrics_are_rows_or_csv(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    for step in range(1, 8):
        add_metric(services, job, step, valid_loss=0.5 if step == 3 else None)
    whole = alice.get(f"/jobs/{job}/metrics").json()
    assert (whole["object"], whole["every"], len(whole["rows"])) == ("metrics", 1, 7)
    assert whole["columns"][:3] == ["step", "epoch", "tokens"]

    def steps(**params: int) -> list[int]:
        return [row[0] for row in alice.get(f"/jobs/{job}/metrics", params=params).json()["rows"]]

    assert steps(from_step=6) == [6, 7]
    assert steps(every=4) == [3, 4, 7]
    for request in ({"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}):
        answer = alice.get(f"/jobs/{job}/metrics", **request)  # type: ignore[arg-type]
        assert answer.headers["content-type"].startswith("text/csv")
        table = list(csv.DictReader(answer.text.splitlines()))
        assert [float(row["train_loss"]) for row in table] == [1 / step for step in range(1, 8)]
    assert alice.get(f"/jobs/{job}").json()["metrics"]["step"] == 7


def test_more_than_10000_steps_are_thinned_and_say_so(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    add_metric(services, job, 1)
    with services.database.write() as session:
        row = session.query(Metric).one()
        values = {column.name: getattr(row, column.name) for column in Metric.__table__.columns}
        session.execute(Metric.__table__.insert(), [{**values, "step": step} for step in range(2, 10_003)])
    answer = alice.get(f"/jobs/{job}/metrics").json()
    assert (answer["every"], answer["rows"][-1][0], len(answer["rows"])) == (2, 10_002, 5001)
    assert alice.get(f"/jobs/{job}/metrics", params={"format": "csv"}).headers["x-every"] == "2"
    assert len(alice.get(f"/jobs/{job}/metrics", params={"every": 1}).json()["rows"]) == 10_002


def test_loads_of_experts_are_refused_as_not_there_yet(alice: Caller) -> None:
    answer = alice.get(f"/jobs/{submit(alice)['id']}/experts")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_supported_yet")


def test_checkpoints_are_adapters_in_the_order_of_their_steps(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    made = [add_adapter(services, job, step, valid_loss=loss) for step, loss in ((2, 0.5), (4, 0.3), (6, 0.4))]
    change_job(services, job, status="succeeded", adapter_id=made[2])
    listed = alice.get(f"/jobs/{job}/checkpoints", params={"order": "asc"}).json()["data"]
    assert [adapter["id"] for adapter in listed] == made
    answer = alice.get(f"/jobs/{job}").json()
    assert (answer["best_checkpoint"], answer["adapter_id"]) == (made[1], made[2])
    assert answer["adapter_sha256"] == listed[2]["sha256"]


def test_a_job_with_targets_of_its_own_keeps_their_order(alice: Caller) -> None:
    targets = list(reversed(TARGETS))
    assert submit(alice, adapter={"target_modules": targets})["adapter"]["target_modules"] == targets


def test_messages_on_a_base_without_a_template_are_refused(alice: Caller, publish_base: Callable[..., Base]) -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    dataset = upload(alice, [{"messages": messages}])
    publish_base(hash="89ab", template=False)
    answer = alice.post("/jobs", json={"dataset": dataset})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_chat_template")


def test_a_job_never_shows_what_is_in_its_rows(alice: Caller) -> None:
    rows = prompt_rows(12)
    rows[0]["prompt"] = "a canary sings"
    job = submit(alice, upload(alice, rows))
    assert "canary" not in json.dumps(job)
