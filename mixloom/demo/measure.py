"""How well a model answers held-out rows: exact match of greedy answers, asked over REST."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mixloom.client import Client
from mixloom.demo.tasks import Row

ASKING_AT_ONCE = 32


def answer(client: Client, model: str, prompt: str, max_tokens: int) -> str:
    """The likeliest answer of an adapter, a job or "base"."""
    text: str = client.generate(model, prompt, max_tokens=max_tokens, temperature=0)["text"]
    return text.strip()


def accuracy(
    client: Client,
    model: str,
    rows: list[Row],
    max_tokens: int,
    say: Callable[[int], None] = lambda done: None,
) -> float:
    """Share of rows whose completion is the model's answer, word for word. `say` hears how many are done."""
    pool = ThreadPoolExecutor(ASKING_AT_ONCE)
    try:
        right = 0
        answers = pool.map(lambda row: answer(client, model, row["prompt"], max_tokens), rows)
        for done, (row, text) in enumerate(zip(rows, answers, strict=True), 1):
            right += text == row["completion"]
            say(done)
        return right / len(rows)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for answers
