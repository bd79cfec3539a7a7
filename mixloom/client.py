"""The client: one object for one server and one key, with the server's nouns as attributes."""

from types import TracebackType
from typing import Any

from mixloom.adapters import Adapters
from mixloom.admin import Admin
from mixloom.datasets import Datasets
from mixloom.jobs import Jobs
from mixloom.stored import current_login
from mixloom.transport import Object, Transport

TIMEOUT_SECONDS = 600.0  # `/generate` may wait for its turn that long


class Client:
    """A Mixloom server as Python sees it. Answers are plain dicts, as the API gives them.

        client = Client("http://127.0.0.1:8000", "mxl_…")
        data = client.datasets.upload("data.csv", columns={"prompt": "question", "completion": "answer"})
        job = client.jobs.wait(client.jobs.submit(dataset=data["id"])["id"])
        print(client.generate(job["id"], "What is a loom?")["text"])

    What is left out comes from MIXLOOM_URL and MIXLOOM_API_KEY, or from `mixloom login`. Failures are
    `MixloomError`s. Threads may share a client.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout: float = TIMEOUT_SECONDS):
        login = current_login(url)
        self.url = login.url
        self._transport = Transport(login.url, api_key or login.api_key, timeout)
        self.datasets = Datasets(self._transport)
        self.jobs = Jobs(self._transport)
        self.adapters = Adapters(self._transport)
        self.admin = Admin(self._transport)

    def generate(self, model: str, prompt: str | list[int] | None = None, **options: Any) -> Object:
        """What `model` (an adapter, a job, or "base") says to a prompt, or to `messages=[…]`.

        Options: max_tokens, temperature, top_k, top_p, seed, stop, logprobs, raw.
        """
        asked = {"prompt": prompt} if prompt is not None else {}
        return self._transport.post("/generate", {"model": model, **asked, **options})

    def base(self) -> Object:
        """The base model in force."""
        return self._transport.get("/base")

    def me(self) -> Object:
        """Whose key this is."""
        return self._transport.get("/me")

    def usage(self) -> Object:
        """The tokens that you have trained on, asked and been answered so far."""
        return self._transport.get("/usage")

    def ready(self) -> Object:
        """Whether the server can train now: `{"status": "ready" | "not_ready", "reasons"}`. Needs no key."""
        return self._transport.get("/readyz", answers=(503,))

    def close(self) -> None:
        """Let go of the connections."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"
