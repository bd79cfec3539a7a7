"""What a job leaves behind: events, metrics, checkpoints."""

import csv

import pytest

from server.api.services import Services
from server.db.tables import Metric
from tests.server.conftest import Caller
from tests.server.making import add_adapter, add_expert_loads, add_metric, change_job, submit

pytestmark = pytest.mark.usefixtures("base")


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
    for wrong in ("nothing", "99", "9" * 30, "-1", "²"):
        answer = alice.get(f"/jobs/{job}/events", params={"after": wrong})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_cursor")
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
    job = submit(alice, training={"max_steps": 10_002})["id"]
    add_metric(services, job, 1)
    with services.database.write() as session:
        row = session.query(Metric).one()
        values = {column.name: getattr(row, column.name) for column in Metric.__table__.columns}
        session.execute(Metric.__table__.insert(), [{**values, "step": step} for step in range(2, 10_003)])
    answer = alice.get(f"/jobs/{job}/metrics").json()
    assert (answer["every"], answer["rows"][-1][0], len(answer["rows"])) == (2, 10_002, 5001)
    assert alice.get(f"/jobs/{job}/metrics", params={"format": "csv"}).headers["x-every"] == "2"
    assert len(alice.get(f"/jobs/{job}/metrics", params={"every": 1}).json()["rows"]) == 10_002


def test_loads_of_experts_are_pages_of_parts_of_each_layers_slots(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    assert alice.get(f"/jobs/{job}/experts").json()["data"] == []
    for step in (10, 20, 24):
        add_expert_loads(services, job, step, [[step, step, step, step], [4 * step, 0, 0, 0]])
    page = alice.get(f"/jobs/{job}/experts", params={"order": "asc", "limit": 2}).json()
    assert ([one["step"] for one in page["data"]], page["has_more"], page["last_id"]) == ([10, 20], True, "20")
    rest = alice.get(f"/jobs/{job}/experts", params={"order": "asc", "after": "20"}).json()
    (last,) = rest["data"]
    assert (last["id"], last["object"], last["step"], last["slots"]) == ("24", "expert_loads", 24, 96)
    even, uneven = last["layers"]
    assert even == {"layer": 0, "loads": [0.25] * 4, "mean": 0.25, "std": 0.0}
    assert uneven["loads"] == [1, 0, 0, 0]
    assert uneven["std"] == pytest.approx(3**0.5 / 4)
    assert (last["mean"], last["std"]) == (0.25, pytest.approx(3**0.5 / 8))
    other = submit(alice)["id"]
    assert alice.get(f"/jobs/{other}/experts", params={"after": "20"}).json()["error"]["code"] == "unknown_cursor"


def test_a_lora_job_has_no_loads_of_experts(alice: Caller) -> None:
    answer = alice.get(f"/jobs/{submit(alice, adapter={'method': 'lora'})['id']}/experts")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_experts")


def test_checkpoints_are_adapters_in_the_order_of_their_steps(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    made = [add_adapter(services, job, step, valid_loss=loss) for step, loss in ((2, 0.5), (4, 0.3), (6, 0.4))]
    change_job(services, job, status="succeeded", adapter_id=made[2])
    listed = alice.get(f"/jobs/{job}/checkpoints", params={"order": "asc"}).json()["data"]
    assert [adapter["id"] for adapter in listed] == made
    answer = alice.get(f"/jobs/{job}").json()
    assert (answer["best_checkpoint"], answer["adapter_id"]) == (made[1], made[2])
    assert answer["adapter_sha256"] == listed[2]["sha256"]
