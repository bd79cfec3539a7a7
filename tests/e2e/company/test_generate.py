"""Asking the base and adapters over the live server, many at once, while training goes on."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import base_model
from engine.engine import Engine
from engine.run import Microbatch, Row
from mixloom import Client, MixloomError
from tests.e2e.making import MIXTURE, PLAIN, dataset, submit
from tests.e2e.server import Server, wait_for

PROMPT = "What is 003?"


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return server.tenant("asking")


@pytest.fixture(scope="module")
def data(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    return dataset(client, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def trained(server: Server, client: Client, data: str) -> str:
    """A job of an adapter that differs much from the base."""
    job = submit(client, data, MIXTURE, 60, training={"batch_size": 4, "learning_rate": 2e-2})
    server.finish(job)
    return job


def logprob_of(client: Client, model: str, tokens: list[int], *, of_last: int) -> float:
    """log p of the last tokens of a prompt."""
    answer = client.generate(model, tokens, max_tokens=0, logprobs=True)
    return float(sum(answer["prompt_logprobs"][-of_last:]))


def test_an_adapter_knows_what_the_base_does_not(client: Client, trained: str) -> None:
    asked = client.generate("base", PROMPT, max_tokens=0, logprobs=True)["prompt_tokens"]
    right = client.generate("base", "It is 003.", raw=True, max_tokens=0, logprobs=True)["prompt_tokens"]
    of_base, of_adapter = (
        logprob_of(client, model, [*asked, *right], of_last=len(right)) for model in ("base", trained)
    )
    assert of_adapter > of_base + 10
    answers = {client.generate(model, PROMPT, max_tokens=8)["text"] for model in ("base", trained)}
    assert len(answers) == 2


def test_the_logprobs_of_a_prompt_are_those_of_the_engine(
    server: Server, client: Client, trained: str, base: Path
) -> None:
    answer = client.generate(trained, PROMPT, max_tokens=0, logprobs=True)
    assert (answer["tokens"], answer["finish_reason"]) == ([], "length")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = Engine(base_model.load(base, name="tiny", dtype=torch.float32, device="cpu"))
        key = server.rows("SELECT key FROM adapters WHERE job_id = ? AND final", trained)[0]["key"]
        tokens = np.array(answer["prompt_tokens"])
        row = Row(tokens, np.arange(1, len(tokens)), np.ones(len(tokens) - 1))
        (outcome,) = engine.forward([Microbatch(rows=[row], adapter=engine.load_adapter(server.data / key))])
    finally:
        torch.set_num_threads(threads)
    assert answer["prompt_logprobs"] == [None, *outcome.logprobs[0].tolist()]


def test_a_hundred_ask_at_once_while_a_job_trains_and_each_gets_its_own_answer(
    server: Server, client: Client, trained: str, data: str
) -> None:
    prompts = [f"What is {n:03}?" for n in range(10)]
    models = ["base", trained]

    def ask(model: str, prompt: str) -> list[int]:
        tokens: list[int] = client.generate(model, prompt, max_tokens=16, temperature=0)["tokens"]
        return tokens

    alone = {(model, prompt): ask(model, prompt) for model in models for prompt in prompts}
    (undisturbed,) = server.finish(submit(client, data, PLAIN, 30))
    job = submit(client, data, PLAIN, 30)
    long = submit(client, data, PLAIN, 400)
    wait_for(lambda: server.step(long) >= 2)
    before = server.step(long)
    asked = [(models[n % 2], prompts[n // 2 % 10]) for n in range(100)]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda one: ask(*one), asked))
    assert answers == [alone[one] for one in asked]
    assert server.step(long) > before, "training went on"
    assert server.status(long) == "running"
    assert server.finish(job) == [undisturbed]
    client.jobs.cancel(long)


def test_a_seed_draws_the_same_and_another_one_another(client: Client, trained: str) -> None:
    def draw(seed: int) -> list[int]:
        answer = client.generate(trained, PROMPT, max_tokens=20, temperature=1.5, seed=seed)
        return [*answer["tokens"]]

    assert draw(1) == draw(1) != draw(2)


def test_an_adapter_whose_files_are_damaged_fails_its_own_request_alone(
    server: Server, client: Client, data: str
) -> None:
    job = submit(client, data, PLAIN, 2)
    server.finish(job)
    key = server.rows("SELECT key FROM adapters WHERE job_id = ? AND final", job)[0]["key"]
    weights = server.data / key / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MixloomError) as caught:
        client.generate(job, PROMPT, max_tokens=2)
    assert (caught.value.status, caught.value.code) == (500, "adapter_unreadable")
    assert str(server.data) not in str(caught.value)
    assert client.generate("base", PROMPT, max_tokens=2)["tokens"]
    assert not list((server.data / "operations").glob("*"))


def test_what_was_asked_is_erased_when_it_was_answered(server: Server, client: Client) -> None:
    client.generate("base", "a secret that nobody may find", max_tokens=2)
    assert not server.rows("SELECT * FROM operations")
    for path in server.data.rglob("*.json*"):
        assert "secret" not in json.dumps(path.read_text(errors="replace"))
    assert "a secret" not in server.log
