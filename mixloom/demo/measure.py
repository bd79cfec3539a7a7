"""How well a model answers held-out rows: exact match of greedy answers, asked over REST."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mixloom.client import Client
from mixloom.demo.tasks import Row

ASKING_AT_ONCE = 64


def answer(client: Client, model: str, prompt: str, max_tokens: int) -> str:
    """The likeliest answer of an adapter, a job or "base"."""
    text: str = client.generate(model, prompt, max_tokens=max_tokens, temperature=0)["text"]
    return text.strip()


@dataclass(frozen=True)
class Exam:
    """Rows that a model is to answer."""

    client: Client
    model: str
    rows: list[Row]
    max_tokens: int


def accuracies(exams: list[Exam], say: Callable[[int], None] = lambda done: None) -> list[float]:
    """For each exam the share of rows whose completion is the model's answer, word for word.

    All are asked at once: the server lets adapters of different jobs answer in one pass. `say` hears how many
    rows are done.
    """
    questions = [(number, exam, row) for number, exam in enumerate(exams) for row in exam.rows]
    pool = ThreadPoolExecutor(ASKING_AT_ONCE)
    try:
        right = [0] * len(exams)
        answers = pool.map(lambda q: answer(q[1].client, q[1].model, q[2]["prompt"], q[1].max_tokens), questions)
        for done, ((number, _, row), text) in enumerate(zip(questions, answers, strict=True), 1):
            right[number] += text == row["completion"]
            say(done)
        return [count / len(exam.rows) for count, exam in zip(right, exams, strict=True)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for answers
