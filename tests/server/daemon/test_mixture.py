"""A job on several data sets at the real daemon: the same bits however it is disturbed, and losses of each set."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row
from server.api.services import Services
from server.db.tables import Event, Metric
from server.tokens import TokenRows
from tests.engine.client import train_by_hand
from tests.engine.gangs import fingerprint
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, events, final_hash, job, steps, submit
from tests.server.making import Row as DataRow
from tests.server.making import prompt_rows, upload

NewLife = Callable[..., Life]
Losses = list[tuple[int, Any, Any]]


def backward_rows(count: int) -> list[DataRow]:
    """Another task than that of `prompt_rows`."""
    return [{"prompt": f"Say {number:03} backwards.", "completion": f"{number:03}"[::-1]} for number in range(count)]


def shares(caller: Caller, *weights: float | None) -> list[dict[str, Any]]:
    """Two new data sets, of 20 and of 10 rows."""
    ids = [upload(caller, prompt_rows(20)), upload(caller, backward_rows(10))]
    return [{"id": id_, "weight": weight} for id_, weight in zip(ids, weights, strict=True)]


def submit_mixed(caller: Caller, **fields: Any) -> str:
    """17 steps of 4 rows, of which an epoch has 27; the small set is gone through twice in it."""
    training = {"evaluate_every": 5, **fields.pop("training", {})}
    fields = {"dataset": shares(caller, 1, 2), "validation": 0.1, **fields}
    return submit(caller, MIXTURE, steps=17, training=training, **fields)


def losses(services: Services, job_id: str) -> Losses:
    """(step, train loss, validation loss) of each set, as recorded."""
    with services.database.read() as session:
        rows = session.query(Metric).filter_by(job_id=job_id).order_by(Metric.step)
        return [(row.step, row.train_losses, row.valid_losses) for row in rows]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def undisturbed(kept: dict[str, Any], new_life: NewLife, alice: Caller, services: Services) -> tuple[str, Losses]:
    """Hash and losses of `submit_mixed(alice)`, trained alone and at a stretch."""
    if not kept:
        life = new_life()
        id_ = submit_mixed(alice)
        life.finish()
        kept["job"] = final_hash(services, id_), losses(services, id_)
        alice.delete(f"/jobs/{id_}")
    return kept["job"]


def test_a_mixture_comes_out_the_same_in_company_and_on_another_budget(
    undisturbed: tuple[str, Losses], new_life: NewLife, alice: Caller, bob: Caller, services: Services
) -> None:
    life = new_life(token_budget=512)
    submit(bob, PLAIN, steps=20, batch=6)
    first, second = submit_mixed(alice), submit_mixed(bob)
    life.finish()
    for id_ in (first, second):
        assert (final_hash(services, id_), losses(services, id_)) == undisturbed


def test_a_mixture_killed_and_paused_in_the_middle_of_epochs_comes_out_the_same(
    undisturbed: tuple[str, Losses], life: Life, new_life: NewLife, alice: Caller, services: Services
) -> None:
    id_ = submit_mixed(alice)
    life.turn_until(lambda: job(services, id_).step == 8)
    second = new_life()  # the first one is gone as after kill -9
    second.turn_until(lambda: job(services, id_).step == 11)
    alice.post(f"/jobs/{id_}/pause")
    second.turn_until(lambda: job(services, id_).status == "paused")
    alice.post(f"/jobs/{id_}/resume")
    second.turn_until(lambda: job(services, id_).step == 13)
    new_life().finish()
    assert steps(services, id_) == list(range(1, 18))
    assert events(services, id_).count("evaluated") == 4, "those of steps 5, 10, 15 and 17, though two were repeated"
    assert (final_hash(services, id_), losses(services, id_)) == undisturbed


def test_without_weights_a_mixture_trains_as_the_one_file_of_all_its_rows(
    life: Life, alice: Caller, services: Services
) -> None:
    mixed = submit(alice, PLAIN, steps=10, dataset=shares(alice, None, None), validation=0)
    pooled = submit(alice, PLAIN, steps=10, dataset=upload(alice, [*prompt_rows(20), *backward_rows(10)]), validation=0)
    life.finish()
    assert final_hash(services, mixed) == final_hash(services, pooled)


def test_a_plain_loop_over_the_engine_gives_the_adapter_of_a_mixture(
    undisturbed: tuple[str, Losses], life: Life, alice: Caller, services: Services
) -> None:
    one = job(services, submit_mixed(alice))
    data = TokenRows.load(services.store.path(one.tokens_key) / "train.safetensors")
    config = AdapterConfig.from_dict(one.adapter)
    run = train_by_hand(Engine(life.roster.engine.base), config, one.training, data, one.mixture)
    assert fingerprint(run) == undisturbed[0]


def test_losses_of_each_set_are_its_own_and_add_up_to_the_jobs(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit_mixed(alice)
    life.turn_until(lambda: job(services, id_).step == 5)
    adapter = life.resident(id_).run.adapter
    data = TokenRows.load(services.store.path(job(services, id_).tokens_key) / "valid.safetensors")
    assert len(data) == 3
    expected, counts = [], []
    for part in ([0, 1], [2]):
        rows = [Row(tokens, places, np.ones(len(places))) for tokens, places in map(data.row, part)]
        (outcome,) = life.roster.engine.forward([Microbatch(rows=rows, adapter=adapter)])
        counts.append(sum(len(row.targets) for row in rows))
        expected.append(outcome.loss / counts[-1])
    life.turn()  # the evaluation
    with services.database.read() as session:
        metric = session.get_one(Metric, (id_, 5))
        event = session.query(Event).filter_by(job_id=id_, kind="evaluated").one()
    assert metric.valid_losses == pytest.approx(expected, rel=1e-5)
    assert metric.valid_loss == pytest.approx(np.average(expected, weights=counts), rel=1e-5)
    ids = [part["id"] for part in job(services, id_).mixture or ()]
    assert event.data == {
        "step": 5,
        "valid_loss": metric.valid_loss,
        **{f"valid_loss.{part}": loss for part, loss in zip(ids, metric.valid_losses, strict=True)},
    }
    assert f"rows.jsonl {metric.valid_losses[0]:.4f}" in event.message


def test_a_step_without_a_row_of_a_set_has_no_loss_of_it(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit(alice, PLAIN, steps=10, batch=2, dataset=shares(alice, 1, 1), validation=0)
    life.finish()
    with services.database.read() as session:
        rows = session.query(Metric).filter_by(job_id=id_).all()
    assert any(None in row.train_losses for row in rows)
    for row in rows:
        measured = [loss for loss in row.train_losses if loss is not None]
        assert min(measured) - 1e-5 <= row.train_loss <= max(measured) + 1e-5


def test_the_card_of_an_adapter_names_what_it_was_made_from(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit(alice, PLAIN, steps=1, dataset=shares(alice, 1, 2), validation=0)
    life.finish()
    one = job(services, id_)
    card = alice.get(f"/adapters/{one.adapter_id}/files/README.md").text
    assert f"- data: sha256 {one.dataset_sha256}\n" in card
    first, second = one.mixture or ()
    assert f"  - sha256 {first['sha256']}, weight 1: 20 rows, 10 in an epoch\n" in card
    assert f"  - sha256 {second['sha256']}, weight 2: 10 rows, 20 in an epoch\n" in card
