"""`generate`."""

import sys
from typing import Annotated

import typer

from mixloom.cli.names import job_of
from mixloom.cli.output import JsonFlag, print_json, say, usage_error
from mixloom.client import Client
from mixloom.transport import given


def generate(
    model: Annotated[str, typer.Argument(metavar="JOB|ADAPTER|base", help="Who answers.")],
    prompt: Annotated[str | None, typer.Argument(help="Default: all of stdin.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest, up to this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask an adapter, or the base model, to answer a prompt."""
    if prompt is None:
        if sys.stdin.isatty():
            raise usage_error("There is no prompt; give one as an argument, or through stdin.")
        prompt = sys.stdin.read()
    client = Client()
    if model != "base" and not model.startswith("adp_"):
        model = job_of(client, model)["id"]
    options = given(top_k=top_k, top_p=top_p, seed=seed, stop=stop, raw=raw or None)
    answer = client.generate(model, prompt, max_tokens=max_tokens, temperature=temperature, **options)
    if as_json:
        print_json(answer)
    else:
        say(answer["text"])
