"""Passes side by side: the bits of one after the other, and every microbatch in one of them."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from engine.adapter import Weights
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.exactness import any_number_of_threads
from engine.families import FAMILIES
from engine.lanes import LANE_TOKENS, PASS_TOKENS, Riders, on_all_threads, side_by_side, spread, take_share
from engine.router import Block
from engine.run import Microbatch, Row
from engine.segments import PAIRS, Segment
from tests.engine.gangs import random_job, train, train_alone
from tests.engine.loads import lora, mixlora, shake
from tests.models import VOCABULARY, tiny_base

LENGTHS = [[[200, 5, 90], [150]], [[33, 9, 70, 11, 180]], [[120], [26, 60]]]
JOBS = [
    random_job(lora(), 0, LENGTHS, VOCABULARY),
    random_job(mixlora(16, 8, 2), 1, LENGTHS, VOCABULARY),
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


class Gang(NamedTuple):
    passes: int
    lanes: int


@pytest.fixture
def gangs(monkeypatch: pytest.MonkeyPatch) -> list[Gang]:
    """How each gang of more than one microbatch went."""
    seen: list[Gang] = []

    def counted(work: Callable[[Riders], object], passes: list[Riders], lanes: int) -> list[object]:
        seen.append(Gang(len(passes), lanes))
        return side_by_side(work, passes, lanes)

    monkeypatch.setattr("engine.engine.side_by_side", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_bits_are_those_of_one_pass_after_the_other(
    threads: int, recompute: bool, dtype: torch.dtype, gangs: list[Gang]
) -> None:
    base = wide_base(dtype, recompute=recompute)
    may_share = any_number_of_threads(base)
    assert may_share or dtype is not torch.float32, "nothing would be tried"
    alone = [train_alone(Engine(base), job) for job in JOBS]
    assert not gangs
    assert train(Engine(base), JOBS, GANGS) == alone
    assert max(gang.passes for gang in gangs) >= 2
    assert {gang.lanes for gang in gangs} == ({1, threads} if may_share else {1})


def id_of(config: AdapterConfig) -> str:
    return f"{config.method} r={config.rank}"


@pytest.mark.parametrize(
    "config",
    [lora(3), lora(6), lora(11), mixlora(8, 6, 2), mixlora(1, 3, 1)],
    ids=id_of,
)
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_so_they_are_of_matrices_of_any_height(threads: int, config: AdapterConfig) -> None:
    """Threads may share a sum of few rows in another way: of 6, say, a router's of 6 experts among them."""
    base = wide_base(torch.float32)
    jobs = [random_job(config, seed, [[[200]]], VOCABULARY) for seed in range(4)]
    assert train(Engine(base), jobs, [[0, 1, 2, 3]]) == [train_alone(Engine(base), job) for job in jobs]


@pytest.mark.parametrize("config", [lora(6, dora=True), lora(16, dora=True), mixlora(6, 4, 2, dora=True)], ids=id_of)
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_so_they_are_of_norms_of_any_rank(threads: int, config: AdapterConfig, gangs: list[Gang]) -> None:
    """They are summed in float32, of which heights that are tried in bfloat16 say nothing."""
    engine = Engine(wide_base(torch.bfloat16))
    rows = [random_job(config, seed, [[[200]]], VOCABULARY).steps[0][0] for seed in range(4)]
    alone, together = ([engine.create_run(config, seed) for seed in range(4)] for _ in range(2))
    for run in (*alone, *together):
        shake(run, run.seed)
    for run, own in zip(alone, rows, strict=True):
        engine.forward_backward([Microbatch(rows=own, run=run)])
    engine.forward_backward([Microbatch(rows=own, run=run) for run, own in zip(together, rows, strict=True)])
    assert [torch.equal(a.gradient, b.gradient) for a, b in zip(alone, together, strict=True)] == [True] * 4
    if {gang.lanes for gang in gangs} != {threads}:
        pytest.skip("on this machine, in bfloat16, bits depend on the number of threads: passes did not share them")


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_outcomes_come_in_the_order_of_the_microbatches(threads: int, gangs: list[Gang]) -> None:
    engine = Engine(wide_base(torch.float32))
    microbatches = [Microbatch(rows=job.steps[0][0], run=engine.create_run(job.config, job.seed)) for job in JOBS[:3]]
    together = engine.forward(microbatches)
    assert gangs == [Gang(2, 2)]
    for microbatch, outcome in zip(microbatches, together, strict=True):
        (alone,) = engine.forward([microbatch])
        assert [row.tolist() for row in outcome.logprobs] == [row.tolist() for row in alone.logprobs]


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_what_is_evaluated_goes_beside_what_trains_and_changes_no_bit_of_it(threads: int, gangs: list[Gang]) -> None:
    engine, trained, evaluated = Engine(wide_base(torch.float32)), JOBS[1], JOBS[2]
    alone, beside = (engine.create_run(trained.config, trained.seed) for _ in range(2))
    adapter = engine.create_run(evaluated.config, evaluated.seed).adapter
    rows = [Microbatch(rows=part, adapter=adapter) for part in evaluated.steps[0]]
    outcomes = engine.forward_backward([Microbatch(rows=part, run=alone) for part in trained.steps[0]])
    outcomes += engine.forward(rows)
    gangs.clear()
    both = engine.compute([Microbatch(rows=part, run=beside) for part in trained.steps[0]], rows)
    assert gangs == [Gang(2, 2)]
    assert torch.equal(beside.gradient, alone.gradient)
    for found, expected in zip([*both[0], *both[1]], outcomes, strict=True):
        assert [row.tolist() for row in found.logprobs] == [row.tolist() for row in expected.logprobs]


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_what_is_short_goes_alone_and_keeps_nobody_else_from_going_side_by_side(
    threads: int, gangs: list[Gang]
) -> None:
    engine = Engine(wide_base(torch.float32))
    run = engine.create_run(JOBS[1].config, 0)
    long, short = ([Row(np.zeros(n, np.int64), np.arange(1, n), np.ones(n - 1))] for n in (300, 20))
    training = [Microbatch(rows=long, run=run)] * 2
    engine.compute(training, [Microbatch(rows=short, adapter=run.adapter)])
    assert gangs == [Gang(2, 2), Gang(1, 1)]


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_where_bits_depend_on_the_number_of_threads_they_go_one_after_the_other(
    threads: int, gangs: list[Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.engine.any_number_of_threads", lambda base: False)
    train(Engine(wide_base(torch.float32)), JOBS, GANGS)
    assert {gang.lanes for gang in gangs} == {1}


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_whose_matrices_are_of_such_a_height_has_all_threads_and_others_go_side_by_side(
    threads: int, gangs: list[Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.engine.any_number_of_threads_at", lambda base, height, dtype: height != 5)
    engine, long = Engine(wide_base(torch.float32)), JOBS[1].steps[0][0]
    for configs in ([lora(5), lora(16), lora(16)], [mixlora(16, 5, 2), lora(16), lora(16)]):
        engine.forward_backward([Microbatch(rows=long, run=engine.create_run(config, 0)) for config in configs])
    assert gangs == [Gang(2, 2), Gang(1, 1)] * 2


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_bits_are_the_same_also_where_attention_depends_on_the_threads(threads: int, model_type: str) -> None:
    base = tiny_base(model_type)
    alone = [train_alone(Engine(base), job) for job in JOBS]
    assert train(Engine(base), JOBS, GANGS) == alone


@given(sizes=st.lists(st.integers(1, 1024), min_size=1, max_size=20), lanes=st.integers(1, 16))
def test_every_microbatch_is_in_one_pass_and_no_pass_is_far_longer(sizes: list[int], lanes: int) -> None:
    passes = spread(sizes, lanes)
    assert sorted(index for riders in passes for index in riders) == list(range(len(sizes)))
    assert all(riders == sorted(riders) and riders for riders in passes)
    loads = [sum(sizes[i] for i in riders) for riders in passes]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] - loads[-1] <= max(sizes)
    if len(passes) > 1:
        assert sum(sizes) // len(passes) >= (LANE_TOKENS if len(passes) <= lanes else PASS_TOKENS)


def test_as_many_passes_for_each_lane() -> None:
    assert spread([300, 400, 500, 600], 1) == [[0, 1], [3], [2]]
    assert spread([300, 400, 500, 600], 2) == [[0, 3], [1, 2]]
    assert spread([300, 400, 500, 600], 16) == [[3], [2], [1], [0]]
    assert spread([854, 539, 909, 549], 2) == [[2], [0], [3], [1]]
    assert spread([40] * 12, 2) == [list(range(12))]
    assert len(spread([40] * 13, 2)) == 2


def test_lanes_take_as_long_as_each_other_and_short_microbatches_of_large_adapters_are_worth_some() -> None:
    assert spread([400, *[40] * 10], 2) == [[0], list(range(1, 11))]
    assert spread([400, *[40] * 10], 2, [420, *[140] * 10]) == [[0, 4, 6, 8, 10], [1, 2, 3, 5, 7, 9]]
    assert spread([40] * 4, 2) == [[0, 1, 2, 3]]
    assert spread([40] * 4, 2, [140] * 4) == [[0, 2], [1, 3]]


def test_a_microbatch_takes_longer_the_more_matrices_its_adapter_has() -> None:
    engine = Engine(tiny_base())
    few, many = (Weights.of(engine.create_run(config, 0).adapter, torch.float32) for config in (lora(), mixlora()))
    ids = [torch.zeros(100, dtype=torch.int64)]
    num_layers, experts = engine.base.num_layers, mixlora().num_experts
    assert Segment(ids).effort == 100
    assert few.layout.num_pairs == num_layers * 7
    assert many.layout.num_pairs == num_layers * (4 + 3 * experts)
    assert Segment(ids, few).effort == 100 + few.layout.num_pairs // PAIRS
    assert Segment(ids, many).effort == 100 + many.layout.num_pairs // PAIRS > Segment(ids, few).effort


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_who_is_left_takes_the_threads_of_who_ended(threads: int) -> None:
    both, deadline = threading.Barrier(2, timeout=60), time.monotonic() + 60

    def work(riders: Riders) -> list[int]:
        seen = [torch.get_num_threads()]
        if riders != [2]:
            both.wait()
        while riders == [1] and torch.get_num_threads() == seen[0] and time.monotonic() < deadline:
            take_share()
        return [*seen, torch.get_num_threads()]

    assert side_by_side(work, [[0], [1], [2]], lanes=2) == [[2, 2], [2, 4], [2, 2]]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("threads", [4], indirect=True)
@pytest.mark.parametrize("lanes", [2, 3])
def test_so_many_at_a_time(threads: int, lanes: int) -> None:
    under_way, most = 0, 0
    lock, full = threading.Lock(), threading.Barrier(lanes, timeout=60)

    def work(riders: Riders) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        full.wait()
        with lock:
            under_way -= 1

    side_by_side(work, [[i] for i in range(2 * lanes)], lanes)
    assert most == lanes


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_a_pass_that_fails_is_told_when_all_have_ended(threads: int) -> None:
    ended = []

    def work(riders: Riders) -> None:
        if riders != [1]:
            raise MemoryError(riders)
        time.sleep(0.1)
        ended.append(riders)

    with pytest.raises(MemoryError, match="0"):
        side_by_side(work, [[0], [1], [2]], lanes=3)
    assert ended == [[1]]


@pytest.mark.parametrize("threads", [2, 5], indirect=True)
def test_a_lone_mixture_has_its_experts_on_all_threads_and_the_bits_of_one(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()

    def watched(work: Callable[[Block], object], blocks: list[Block]) -> list[object]:
        def named(block: Block) -> object:
            names.add(threading.current_thread().name.split("_")[0])
            return work(block)

        return on_all_threads(named, blocks)

    monkeypatch.setattr("engine.experts.on_all_threads", watched)
    engine, mixtures = Engine(wide_base(torch.float32)), [job for job in JOBS if job.config.is_mixture]
    on_all = [train_alone(engine, job) for job in mixtures]
    assert names == {"MainThread", "helper"}
    names.clear()
    torch.set_num_threads(1)
    assert [train_alone(engine, job) for job in mixtures] == on_all
    assert names == {"MainThread"}


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_items_go_at_once_on_a_thread_each_and_without_gradient(threads: int) -> None:
    met, seen = threading.Barrier(3, timeout=60), []

    def work(item: int) -> int:
        if item < 3:
            met.wait()
        seen.append((item, torch.get_num_threads(), torch.is_grad_enabled()))
        return -item

    assert on_all_threads(work, range(10)) == [-item for item in range(10)]
    assert sorted(seen) == [(item, 1, False) for item in range(10)]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("fails", ["MainThread", "helper"])
def test_an_item_that_fails_is_told_when_all_have_ended(threads: int, fails: str) -> None:
    met, ended = threading.Barrier(2, timeout=60), []

    def work(item: int) -> None:
        if item < 2:
            met.wait()
        if item < 2 and threading.current_thread().name.startswith(fails):
            raise ValueError("this one")
        ended.append(item)

    with pytest.raises(ValueError, match="this one"):
        on_all_threads(work, range(6))
    assert len(ended) == 5
    assert torch.get_num_threads() == 2
