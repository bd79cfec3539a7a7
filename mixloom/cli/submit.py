"""`submit` and `estimate`: from files of rows and some flags, or a YAML file, to a job."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mixloom.cli.bars import follow
from mixloom.cli.names import ColumnOption, job_of, pairs_of
from mixloom.cli.output import JsonFlag, note, print_json, print_object, say, usage_error
from mixloom.cli.parts import Part, parts_of_yaml, weighted
from mixloom.client import Client
from mixloom.stored import remember_last_job
from mixloom.transport import Object, given

SECTIONS = {
    "adapter": ("method", "rank", "alpha", "dropout", "num_experts", "top_k"),
    "training": ("epochs", "max_steps", "batch_size", "learning_rate", "seed"),
}
"""Where in the job's JSON a flag's value goes; the others stand at its top."""

ADAPTER, TRAINING = "Adapter", "Training"
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[DATA|ds_…]...|JOB.yaml",
        help="Rows (JSONL, CSV, Parquet), a data set that is there already, several of these to be mixed, or a YAML "
        "file: the job's JSON, with what to train on under `data`: a file, a data set, or a list of "
        "{data, weight, columns}. Flags win over it.",
    ),
]
Weight = Annotated[
    list[float] | None,
    typer.Option(
        help="Of several data sets, in their order: its part of the rows trained on. Default: every row once an epoch.",
    ),
]
From = Annotated[str | None, typer.Option("--from", metavar="JOB", help="Start from an earlier job's config.")]
InitFrom = Annotated[
    str | None,
    typer.Option("--init-from", metavar="adp_…", help="Start from the weights of this adapter, with its config."),
]
Name = Annotated[str | None, typer.Option(help="A name for the job.")]
Method = Annotated[str | None, typer.Option(help="mixlora or lora.", rich_help_panel=ADAPTER)]
Rank = Annotated[int | None, typer.Option(help="Rank of each expert or adapter.", rich_help_panel=ADAPTER)]
Alpha = Annotated[float | None, typer.Option(help="Output is scaled by alpha / rank.", rich_help_panel=ADAPTER)]
Dropout = Annotated[float | None, typer.Option(help="0 to below 1.", rich_help_panel=ADAPTER)]
NumExperts = Annotated[int | None, typer.Option(help="MixLoRA: experts a layer.", rich_help_panel=ADAPTER)]
TopK = Annotated[int | None, typer.Option(help="MixLoRA: experts that a token uses.", rich_help_panel=ADAPTER)]
Epochs = Annotated[int | None, typer.Option(help="Times through the rows.", rich_help_panel=TRAINING)]
MaxSteps = Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int | None, typer.Option(help="Rows an optimizer step.", rich_help_panel=TRAINING)]
LearningRate = Annotated[float | None, typer.Option(help="Its peak.", rich_help_panel=TRAINING)]
Seed = Annotated[int | None, typer.Option(help="Of the adapter, the order and the dropout.", rich_help_panel=TRAINING)]
Validation = Annotated[str | None, typer.Option(metavar="ds_…|FRACTION", help="Rows held out to measure the loss.")]
Priority = Annotated[str | None, typer.Option(help="low, normal or high, among your own jobs.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any other field of the job's JSON: --set training.schedule=cosine.",
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Show it while it trains; exit 1 if it does not succeed.")]


def submit(
    context: typer.Context,
    sources: Sources = None,
    column: ColumnOption = None,
    weight: Weight = None,
    from_: From = None,
    init_from: InitFrom = None,
    name: Name = None,
    method: Method = None,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    num_experts: NumExperts = None,
    top_k: TopK = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    validation: Validation = None,
    priority: Priority = None,
    set_: Set = None,
    watch: Watch = False,
    as_json: JsonFlag = False,
) -> None:
    """Submit a training job. What is left out, the server chooses."""
    client = Client()
    job = client.jobs.submit(_config(client, context.params))
    remember_last_job(client.url, job["id"])
    if watch:
        note(f"Submitted {job['id']}.")
        raise typer.Exit(follow(client, [job["id"]], as_json=as_json))
    if as_json:
        print_json(job)
    else:
        say(job["id"])
        note(f"{job['progress']['total_steps']} steps to go. `mixloom watch @last` shows them.")


def estimate(
    context: typer.Context,
    sources: Sources = None,
    column: ColumnOption = None,
    weight: Weight = None,
    from_: From = None,
    init_from: InitFrom = None,
    name: Name = None,
    method: Method = None,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    num_experts: NumExperts = None,
    top_k: TopK = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    validation: Validation = None,
    priority: Priority = None,
    set_: Set = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a job would take, without submitting it (rows given as a file are uploaded)."""
    client = Client()
    print_object(client.jobs.estimate(_config(client, context.params)), as_json)


def _config(client: Client, params: Object) -> Object:
    """The JSON for `POST /jobs` that the command line asks for; its rows are uploaded on the way."""
    config: Object = {}
    if params["from_"]:
        config["from"] = job_of(client, params["from_"])["id"]
    sources, columns = params["sources"] or [], pairs_of(params["column"], "--column")
    if sources and sources[0].endswith((".yaml", ".yml")):
        if len(sources) > 1:
            raise usage_error(f"{sources[0]} is a whole job; name the data in it, under `data`.")
        config |= _read_yaml(Path(sources[0]))
        parts = parts_of_yaml(config, Path(sources[0]).parent)
    else:
        parts = [Part(source) for source in sources]
    if parts:
        config["dataset"] = _dataset(client, weighted(parts, params["weight"] or []), columns)
    elif params["weight"]:
        raise usage_error("--weight belongs to data given here: name the files or data sets.")
    elif "dataset" not in config and "from" not in config:
        raise usage_error("A job needs rows: give a file, a data set, a YAML file with `data`, or --from JOB.")
    for field in ("name", "priority", "init_from"):
        if params[field] is not None:
            config[field] = params[field]
    if params["validation"] is not None:
        config["validation"] = yaml.safe_load(params["validation"])
    for section, fields in SECTIONS.items():
        for field in fields:
            if params[field] is not None:
                _put(config, f"{section}.{field}", params[field])
    for field, value in pairs_of(params["set_"], "--set").items():
        _put(config, field, yaml.safe_load(value))
    return config


def _put(config: Object, field: str, value: Any) -> None:
    """`_put(config, "training.seed", 1)`."""
    *sections, last = field.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = value


def _read_yaml(path: Path) -> Object:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise usage_error(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise usage_error(f"{path} must be a mapping with the fields of a job (name, data, adapter, training, …).")
    return config


def _dataset(client: Client, parts: list[Part], columns: dict[str, str]) -> Any:
    """What the job's JSON says of its data; files are uploaded."""
    ids = [
        part.data if part.data.startswith("ds_") else _upload(client, Path(part.data), columns or part.columns)
        for part in parts
    ]
    if len(parts) == 1 and parts[0].weight is None:
        return ids[0]
    return [{"id": id_, **given(weight=part.weight)} for id_, part in zip(ids, parts, strict=True)]


def _upload(client: Client, path: Path, columns: dict[str, str]) -> str:
    dataset = client.datasets.upload(path, columns=columns or None)
    num_tokens = dataset["tokens"]["total"]
    note(f"Uploaded {path.name} as {dataset['id']}: {dataset['rows']} rows, {num_tokens} tokens.")
    id_: str = dataset["id"]
    return id_
