"""Sampling: many requests with their own adapters, side by side, each as if it were alone."""

from collections import Counter

import pytest
import torch

from engine.adapter import Adapter
from engine.engine import Engine
from engine.sampling import Sample, advance, scoring
from tests.engine.loads import lora, mixlora, shake

LENGTH = 12
PROMPTS = [[5, 17, 300, 4, 250], [7], [81, 6, 99, 3, 41, 77, 12, 9, 9], [2, 2]]


@pytest.fixture(scope="module")
def adapters(engine: Engine) -> list[Adapter | None]:
    """The base itself, a LoRA and two MixLoRA."""
    adapters: list[Adapter | None] = [None]
    for index, config in enumerate([lora(), mixlora(), mixlora(8, 6, 1)]):
        run = engine.create_run(config, seed=index)
        shake(run, index)
        adapters.append(run.adapter)
    return adapters


def requests(adapters: list[Adapter | None], **options: float) -> list[Sample]:
    """Every prompt with every adapter."""
    return [
        Sample(prompt, LENGTH, adapter, seed=seed, **options)
        for seed, (prompt, adapter) in enumerate((prompt, adapter) for prompt in PROMPTS for adapter in adapters)
    ]


def assert_as_alone(engine: Engine, together: list[Sample], alone: list[Sample]) -> None:
    """`together` is finished; `alone` are the same requests, fresh."""
    for sample, other in zip(together, alone, strict=True):
        advance(engine.base, [other], LENGTH)
        assert sample.tokens == other.tokens
        assert sample.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert sample.finish_reason == other.finish_reason


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "temperature 1"])
def test_requests_of_all_adapters_together_get_what_each_gets_alone(
    engine: Engine, adapters: list[Adapter | None], options: dict[str, float]
) -> None:
    together = requests(adapters, **options)
    advance(engine.base, together, LENGTH)
    assert len({tuple(sample.tokens) for sample in together}) > 8, "the adapters say different things"
    assert_as_alone(engine, together, requests(adapters, **options))


def test_requests_may_join_between_slices(engine: Engine, adapters: list[Adapter | None]) -> None:
    together = requests(adapters)
    for stop in range(1, len(together) + 1):
        advance(engine.base, together[:stop], 2)
    advance(engine.base, together, LENGTH)
    assert_as_alone(engine, together, requests(adapters))


def test_many_requests_are_prefilled_and_scored_in_parts(
    engine: Engine, adapters: list[Adapter | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of a prefill and rows of the head have their limits; which part one is in changes nothing."""
    monkeypatch.setattr("engine.sampling.PREFILL_TOKENS", 10)
    monkeypatch.setattr("engine.sampling.CHUNK_ROWS", 3)
    together = requests(adapters)
    advance(engine.base, together, LENGTH)
    assert_as_alone(engine, together, requests(adapters))


def test_logprobs_are_the_models_own_at_temperature_1(engine: Engine, adapters: list[Adapter | None]) -> None:
    samples = requests(adapters, temperature=2.0, top_k=20)
    advance(engine.base, samples, LENGTH)
    outcomes = engine.forward([scoring(sample.prompt + sample.tokens, sample.adapter) for sample in samples])
    for sample, outcome in zip(samples, outcomes, strict=True):
        assert sample.logprobs == pytest.approx(outcome.logprobs[0][-LENGTH:].tolist(), abs=1e-5)


def test_a_seed_gives_the_same_tokens_and_another_one_others(engine: Engine) -> None:
    samples = [Sample(PROMPTS[0], 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    for sample in samples:
        advance(engine.base, [sample], 20)
    assert samples[0].tokens == samples[1].tokens
    assert samples[0].tokens != samples[2].tokens


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_choice_is_greedy(engine: Engine, options: dict[str, float]) -> None:
    greedy, narrow = Sample(PROMPTS[0], LENGTH), Sample(PROMPTS[0], LENGTH, **{"temperature": 3.0} | options)
    advance(engine.base, [greedy, narrow], LENGTH)
    assert narrow.tokens == greedy.tokens


LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 1.5])
BY_LIKELIHOOD = [1, 5, 3, 0, 4, 2]


def drawn(count: int, **options: float) -> Counter[int]:
    """Tokens drawn from LOGITS by so many requests of different seeds."""
    samples = [Sample([0], 1, seed=seed, **{"temperature": 1.0} | options) for seed in range(count)]
    for sample in samples:
        sample.take(LOGITS)
    return Counter(sample.tokens[0] for sample in samples)


@pytest.mark.parametrize(
    ("options", "kept"), [({}, 6), ({"temperature": 0.5}, 6), ({"top_k": 3}, 3), ({"top_k": 100}, 6)], ids=str
)
def test_tokens_are_drawn_by_their_probability(options: dict[str, float], kept: int) -> None:
    """Frequencies within 4 standard deviations; the seeds are fixed."""
    count = 3000
    frequencies = drawn(count, **options)
    logits = torch.full_like(LOGITS, -torch.inf)
    logits[BY_LIKELIHOOD[:kept]] = LOGITS[BY_LIKELIHOOD[:kept]]
    for token, p in enumerate((logits / options.get("temperature", 1.0)).softmax(0).tolist()):
        assert frequencies[token] == pytest.approx(count * p, abs=4 * (count * p * (1 - p)) ** 0.5)


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float) -> None:
    probabilities = LOGITS.softmax(0)[BY_LIKELIHOOD].cumsum(0)
    fewest = int((probabilities < top_p - 1e-6).sum()) + 1
    assert set(drawn(3000, top_p=top_p)) == set(BY_LIKELIHOOD[: min(fewest, 6)])


def test_a_stop_token_ends_it_and_is_kept(engine: Engine) -> None:
    free = Sample(PROMPTS[0], LENGTH)
    advance(engine.base, [free], LENGTH)
    place = next(n for n in range(2, LENGTH) if free.tokens[n] not in free.tokens[:n])
    stopped = Sample(PROMPTS[0], LENGTH, stop_tokens=frozenset({free.tokens[place], 511}))
    advance(engine.base, [stopped], LENGTH)
    assert (stopped.tokens, stopped.finish_reason) == (free.tokens[: place + 1], "stop")
    assert free.finish_reason == "length"


def test_max_tokens_end_it_and_its_cache_is_let_go(engine: Engine) -> None:
    sample = Sample(PROMPTS[0], max_tokens=5)
    advance(engine.base, [sample], 3)
    assert (len(sample.tokens), sample.finish_reason) == (3, None)
    assert sample.cache is not None
    advance(engine.base, [sample], 100)
    assert (len(sample.tokens), len(sample.logprobs), sample.finish_reason) == (5, 5, "length")
    assert sample.cache is None


def test_no_tokens_at_all_is_finished_before_it_begins(engine: Engine) -> None:
    sample = Sample(PROMPTS[0], max_tokens=0)
    advance(engine.base, [sample], 10)
    assert (sample.tokens, sample.finish_reason, sample.cache) == ([], "length", None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("weight", [float("nan"), 1e38])
def test_an_adapter_whose_numbers_broke_ends_its_own_request_alone(
    engine: Engine, weight: float, temperature: float
) -> None:
    broken = engine.create_run(mixlora(), seed=0).adapter
    broken.flat.fill_(weight)
    samples = [Sample(PROMPTS[0], LENGTH, adapter, temperature=temperature) for adapter in (None, broken, None)]
    advance(engine.base, samples, LENGTH)
    assert (samples[1].tokens, samples[1].finish_reason) == ([], "diverged")
    assert_as_alone(engine, samples[::2], [Sample(PROMPTS[0], LENGTH, temperature=temperature) for _ in range(2)])
