"""Bodies of requests that need no more than their shape checked. A job's config is `server.job_config`."""

from typing import Annotated, Any, Literal, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import Field, PlainValidator, ValidationError

from server.job_config import MAX_SEED
from server.strict import StrictModel

Name = Annotated[str, Field(min_length=1, max_length=200, description="To tell it from the others.")]
Share = Annotated[float, Field(ge=0.01, le=1000, description="Of the machine, relative to the other tenants'.")]

Options = TypeVar("Options", bound=StrictModel)


def validated(model: type[Options], values: Any) -> Options:
    """What FastAPI would make of a body, for the fields of a form."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


class TenantCreate(StrictModel):
    name: Name
    share: Share = 1.0


class TenantUpdate(StrictModel):
    name: Name | None = None
    share: Share | None = None


class KeyCreate(StrictModel):
    name: Name = "key"


DaemonName = Annotated[
    str | None,
    Field(max_length=200, description="Only daemons of this name, as GET /admin/daemons shows it; else all."),
]


class DrainCreate(StrictModel):
    mode: Annotated[
        Literal["quick", "graceful", "fast"],
        Field(
            description="quick: save every run at its next step, then rest. graceful: first let the resident runs "
            "finish. fast: rest now; runs go back to their last recovery point."
        ),
    ] = "quick"
    deadline_seconds: Annotated[
        float | None, Field(gt=0, le=30 * 86400, description="With graceful: after this, quick.")
    ] = None
    reason: Annotated[str, Field(max_length=500, description="Shown to every tenant.")] = ""
    daemon: DaemonName = None
    exit: Annotated[
        bool, Field(description="Let the daemon end when it rests; under `serve` undrain starts it again.")
    ] = False


class Undrain(StrictModel):
    daemon: DaemonName = None


def _prompt(value: Any) -> str | list[int]:
    is_ids = isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    if not isinstance(value, str) and not is_ids:
        raise ValueError("Input should be a text or a list of token ids")
    return value


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    is_texts = isinstance(texts, list) and all(isinstance(text, str) and 1 <= len(text) <= 100 for text in texts)
    if not is_texts or len(texts) > 4:
        raise ValueError("Input should be a text of 1 to 100 characters, or a list of up to 4 of them")
    return texts


class Message(StrictModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=10**6)]


class Generate(StrictModel):
    model: Annotated[str, Field(max_length=100, description="An adapter's id, a job's (its newest one), or `base`.")]
    prompt: Annotated[
        str | list[int] | None,
        PlainValidator(_prompt, json_schema_input_type=str | list[int]),
        Field(description="A text, made a user's turn by the base's chat template; or token ids, as they are."),
    ] = None
    messages: Annotated[
        list[Message] | None,
        Field(min_length=1, max_length=1000, description="A conversation, in place of a prompt."),
    ] = None
    raw: Annotated[bool, Field(description="Take the prompt without the template.")] = False
    max_tokens: Annotated[
        int | None,
        Field(
            ge=0,
            le=10**6,
            description="Default: 256, or what the context leaves. 0 with `logprobs` scores the prompt.",
        ),
    ] = None
    temperature: Annotated[float, Field(ge=0, le=100, description="0, the default, takes the likeliest token.")] = 0.0
    top_k: Annotated[int | None, Field(ge=1, le=10**6, description="Choose among so many likeliest tokens.")] = None
    top_p: Annotated[
        float | None, Field(gt=0, le=1, description="Choose among the likeliest, up to this probability.")
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Default: another one each time.")] = None
    stop: Annotated[
        list[str],
        PlainValidator(_stop, json_schema_input_type=str | list[str]),
        Field(default_factory=list, description="Up to 4 texts; the answer ends before the first of them."),
    ]
    logprobs: Annotated[bool, Field(description="Log-probabilities of the prompt's and the answer's tokens.")] = False
    stream: Annotated[bool, Field(description="Not supported yet.")] = False
