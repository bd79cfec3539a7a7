"""Which state of a run is left when its numbers broke."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.adapter import Adapter
from engine.base_model import BaseModel
from engine.engine import Engine
from engine.run import Microbatch
from server.daemon.last_good import Candidate, Good, last_good
from tests.engine.loads import mixlora, random_row, shake


@pytest.fixture
def engine(frozen: BaseModel) -> Engine:
    return Engine(frozen)


@pytest.fixture
def adapter(engine: Engine) -> Adapter:
    run = engine.create_run(mixlora(), 0)
    shake(run, 0)
    return run.adapter


@pytest.fixture
def broken(engine: Engine) -> Adapter:
    """One number of an expert's is none: rows that the router sends elsewhere do not show it."""
    adapter = engine.create_run(mixlora(), 0).adapter
    adapter.flat[0] = torch.nan
    return adapter


def giving(adapter: Adapter) -> Callable[[], Adapter]:
    return lambda: adapter


def lost() -> Adapter:
    raise FileNotFoundError("no such folder")


def test_it_is_the_newest_that_is_whole_and_an_adapter_before_the_same_elsewhere(
    engine: Engine, adapter: Adapter, broken: Adapter
) -> None:
    candidates = [
        Candidate(3, giving(adapter), "adp_3"),
        Candidate(9, giving(broken)),
        Candidate(8, lost),
        Candidate(7, giving(adapter)),
        Candidate(7, giving(adapter), "adp_7"),
        Candidate(5, giving(adapter)),
    ]
    assert last_good(engine, candidates, []) == Good(7, adapter, "adp_7")
    assert last_good(engine, candidates[1:4], []) == Good(7, adapter, None)
    assert last_good(engine, candidates[1:3], []) is None


def test_before_the_first_step_there_is_nothing_to_keep(engine: Engine, adapter: Adapter) -> None:
    assert last_good(engine, [Candidate(0, giving(adapter))], []) is None


def test_it_gives_finite_numbers_on_every_row_that_broke(engine: Engine, adapter: Adapter) -> None:
    draw = np.random.default_rng(0)
    rows = [Microbatch(rows=[random_row(9, draw)], adapter=adapter) for _ in range(2)]
    huge = Adapter(adapter.config, adapter.layout, torch.full_like(adapter.flat, 1e30))
    assert torch.isfinite(huge.flat).all()
    candidates = [Candidate(2, giving(huge)), Candidate(1, giving(adapter))]
    good = last_good(engine, candidates, rows)
    assert good is not None
    assert good.step == 1
