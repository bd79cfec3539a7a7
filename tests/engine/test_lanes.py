"""Passes side by side: the bits of one after the other, and every microbatch in one of them."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from engine.base_model import BaseModel
from engine.engine import Engine
from engine.exactness import any_number_of_threads
from engine.families import FAMILIES
from engine.lanes import LANE_TOKENS, Lane, side_by_side, spread, take_share
from engine.run import Microbatch
from engine.segments import FEWEST_ROWS
from tests.engine.gangs import random_job, train, train_alone
from tests.engine.loads import lora, mixlora
from tests.models import VOCABULARY, tiny_base

LENGTHS = [[[200, 5, 90], [150]], [[33, 9, 70, 11, 180]], [[120], [26, 60]]]
JOBS = [
    random_job(lora(), 0, LENGTHS, VOCABULARY),
    random_job(mixlora(), 1, LENGTHS, VOCABULARY),
    random_job(mixlora(4, 4, 2, dora=True), 2, LENGTHS, VOCABULARY),
    random_job(lora(16), 3, [[[6], [170]], [[11], [150]]], VOCABULARY),
]
GANGS = [[0, 1, 2, 0, 1, 2, 3], [3, 2, 0, 1], [1, 2, 0, 0, 1, 2], [3, 3]]
"""Of up to 1,341 tokens. Two microbatches of a job ride in different lanes; the first and last hold a tiny one."""


def wide_base(dtype: torch.dtype, *, recompute: bool = False) -> BaseModel:
    """One layer as wide as SmolLM2's, and with as many heads: with few, attention depends on the number of threads."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    return BaseModel(model, name="wide", hash_="wide", microbatch_tokens=512, recompute=recompute)


@pytest.fixture
def widths_of_lanes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes went side by side in each gang."""
    widths: list[int] = []

    def counted(work: Callable[[Lane], object], lanes: list[Lane]) -> list[object]:
        widths.append(len(lanes))
        return side_by_side(work, lanes)

    monkeypatch.setattr("engine.engine.side_by_side", counted)
    return widths


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_bits_are_those_of_one_pass_after_the_other(
    threads: int, recompute: bool, dtype: torch.dtype, widths_of_lanes: list[int]
) -> None:
    base = wide_base(dtype, recompute=recompute)
    may_share = any_number_of_threads(base)
    assert may_share or dtype is not torch.float32, "nothing would be tried"
    alone = [train_alone(Engine(base), job) for job in JOBS]
    assert set(widths_of_lanes) == {1}
    widths_of_lanes.clear()
    assert train(Engine(base), JOBS, GANGS) == alone
    assert max(widths_of_lanes) == (threads if may_share else 1)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_outcomes_come_in_the_order_of_the_microbatches(threads: int, widths_of_lanes: list[int]) -> None:
    engine = Engine(wide_base(torch.float32))
    microbatches = [Microbatch(rows=job.steps[0][0], run=engine.create_run(job.config, job.seed)) for job in JOBS[:3]]
    together = engine.forward(microbatches)
    assert widths_of_lanes == [2]
    for microbatch, outcome in zip(microbatches, together, strict=True):
        (alone,) = engine.forward([microbatch])
        assert [row.tolist() for row in outcome.logprobs] == [row.tolist() for row in alone.logprobs]


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_where_bits_depend_on_the_number_of_threads_there_is_one_pass(
    threads: int, widths_of_lanes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.engine.any_number_of_threads", lambda base: False)
    train(Engine(wide_base(torch.float32)), JOBS, GANGS)
    assert set(widths_of_lanes) == {1}


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_bits_are_the_same_also_where_attention_depends_on_the_threads(threads: int, model_type: str) -> None:
    base = tiny_base(model_type)
    alone = [train_alone(Engine(base), job) for job in JOBS]
    assert train(Engine(base), JOBS, GANGS) == alone


@given(sizes=st.lists(st.integers(1, 1024), min_size=1, max_size=20), threads=st.integers(1, 16))
def test_every_microbatch_is_in_one_lane_and_no_lane_is_far_longer(sizes: list[int], threads: int) -> None:
    lanes = spread(sizes, threads)
    assert sorted(index for lane in lanes for index in lane) == list(range(len(sizes)))
    assert all(lane == sorted(lane) and lane for lane in lanes)
    loads = [sum(sizes[i] for i in lane) for lane in lanes]
    assert max(loads) - min(loads) <= max(sizes)
    assert len(lanes) == 1 or (min(sizes) >= FEWEST_ROWS and len(lanes) <= min(threads, sum(sizes) // LANE_TOKENS))


def test_as_many_lanes_as_threads_where_there_is_work_for_each() -> None:
    assert spread([300, 400, 500, 600], 2) == [[0, 3], [1, 2]]
    assert spread([300, 400, 500, 600], 16) == [[3], [2], [1], [0]]
    assert spread([40] * 12, 2) == [list(range(12))]
    assert len(spread([40] * 13, 2)) == 2
    assert spread([1000, 1000, 5], 2) == [[0, 1, 2]]


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_who_is_left_takes_the_threads_of_who_ended(threads: int) -> None:
    both, deadline = threading.Barrier(2, timeout=60), time.monotonic() + 60

    def work(lane: Lane) -> list[int]:
        seen = [torch.get_num_threads()]
        both.wait()
        while lane == [1] and torch.get_num_threads() == seen[0] and time.monotonic() < deadline:
            take_share()
        return [*seen, torch.get_num_threads()]

    assert side_by_side(work, [[0], [1]]) == [[2, 2], [2, 4]]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_a_lane_that_fails_is_told_when_all_have_ended(threads: int) -> None:
    ended = []

    def work(lane: Lane) -> None:
        if lane != [1]:
            raise MemoryError(lane)
        time.sleep(0.1)
        ended.append(lane)

    with pytest.raises(MemoryError, match="0"):
        side_by_side(work, [[0], [1], [2]])
    assert ended == [[1]]
