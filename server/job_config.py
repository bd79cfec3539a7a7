"""The config of a job as a tenant writes it: what each field may be. For the rest see `resolve`.

None stands for `auto` everywhere.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from server.strict import StrictModel

MAX_SEED = 2**63 - 1
MAX_STEPS = 1_000_000
MAX_BATCH_SIZE = 4096
MAX_DATASETS = 32
MAX_NAME = 200
MAX_METADATA = 16

Count = Annotated[int, Field(ge=1, le=MAX_STEPS)]
METADATA_KEY = r"^[\w.:/-]{1,64}$"
MetadataKey = Annotated[str, Field(pattern=METADATA_KEY)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)]


def _validation(value: Any) -> str | float | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 0.5:
        raise ValueError("Input should be the id of a data set, or the part of the rows to hold out, 0 to 0.5")
    return float(value)


class DatasetShare(StrictModel):
    """One of the data sets that a job mixes."""

    id: Annotated[str, Field(description="A data set of yours, ds_….")]
    weight: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="Its part of the rows trained on, relative to the others'. All of them have one, or none: "
            "then an epoch takes every row once.",
        ),
    ] = None


def _one_or_several(value: Any) -> str | None:
    if isinstance(value, str):
        return "[one]"
    return "[several]" if isinstance(value, list) else None


DatasetField = Annotated[
    Annotated[str, Tag("[one]")]
    | Annotated[list[DatasetShare], Field(min_length=1, max_length=MAX_DATASETS), Tag("[several]")],
    Discriminator(
        _one_or_several,
        custom_error_type="dataset",
        custom_error_message="Input should be the id of a data set, such as 'ds_…', or a list of several with weights",
    ),
]


class AdapterConfig(StrictModel):
    """What is trained."""

    method: Annotated[
        Literal["mixlora", "lora"] | None,
        Field(description="mixlora (default): experts in the feed-forward, chosen by a router. lora: no router."),
    ] = None
    dora: Annotated[
        bool | None,
        Field(
            description="Also train a magnitude for each output, of each expert with mixlora (MixDoRA). Default false."
        ),
    ] = None
    rslora: Annotated[bool | None, Field(description="Scale by alpha / √rank. Default false.")] = None
    rank: Annotated[int | None, Field(ge=1, description="Default 16.")] = None
    alpha: Annotated[int | float | None, Field(gt=0, le=1e6, description="Default 2 * rank.")] = None
    dropout: Annotated[float | None, Field(ge=0, lt=1, description="Default 0.05.")] = None
    target_modules: Annotated[
        list[str] | None,
        Field(min_length=1, max_length=100, description="Default: all seven projections that the base has."),
    ] = None
    num_experts: Annotated[int | None, Field(ge=2, le=256, description="Default 8. mixlora only.")] = None
    top_k: Annotated[int | None, Field(ge=1, description="Experts that a token uses. Default 2. mixlora only.")] = None
    router_aux_loss_coef: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            description="Weight of the load-balancing loss, coef·E·ΣF·P averaged over layers, where F counts "
            "all top_k slots: a balanced router costs top_k * coef. Default 0.001. mixlora only.",
        ),
    ] = None


class TrainingConfig(StrictModel):
    """How it is trained."""

    epochs: Annotated[
        int | None, Field(ge=1, le=1000, description="Default: the fewest of 2 to 10 that give 100 steps.")
    ] = None
    max_steps: Annotated[Count | None, Field(description="Optimizer steps, in place of epochs.")] = None
    batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_BATCH_SIZE,
            description="Rows an optimizer step; the server cuts it into passes itself. Default 8, or 16 "
            "from 1,000 rows on.",
        ),
    ] = None
    learning_rate: Annotated[float | None, Field(gt=0, le=10, description="Peak. Default 2e-4.")] = None
    loraplus_ratio: Annotated[
        float | None, Field(gt=0, le=1e4, description="LoRA+: every B has the learning rate times this. Default 1.")
    ] = None
    schedule: Annotated[
        Literal["linear", "constant", "cosine"] | None,
        Field(description="After the warm-up. Default linear."),
    ] = None
    warmup_ratio: Annotated[float | None, Field(ge=0, le=1, description="Default 0.03.")] = None
    weight_decay: Annotated[float | None, Field(ge=0, le=10, description="Default 0.")] = None
    max_grad_norm: Annotated[float | None, Field(gt=0, le=1e9, description="Default 1.")] = None
    cutoff_length: Annotated[
        int | None,
        Field(ge=2, description="Longest row, in tokens. Default 2048, or what fits if that is less."),
    ] = None
    long_rows: Annotated[
        Literal["refuse", "skip", "truncate"] | None,
        Field(description="What is done with a row longer than the cutoff. Default refuse."),
    ] = None
    supervise: Annotated[
        Literal["completion", "all"] | None,
        Field(description="Which tokens are learned: completions (assistant turns; default), or all."),
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Default 42.")] = None
    evaluate_every: Annotated[Count | None, Field(description="Steps. Default: an epoch's.")] = None
    checkpoint_every: Annotated[Count | None, Field(description="Steps. Default: an epoch's.")] = None
    keep_checkpoints: Annotated[
        int | None, Field(ge=1, le=100, description="Newest ones kept, beside the best. Default 3.")
    ] = None
    early_stopping: Annotated[Any, Field(description="Not supported yet.")] = None


class _JobFields(StrictModel):
    name: Annotated[str | None, Field(min_length=1, max_length=MAX_NAME, description="Default: the data set's.")] = None
    base: Annotated[str | None, Field(description="Name or hash of the base in force, to be sure of it.")] = None
    validation: Annotated[
        str | float | None,
        PlainValidator(_validation, json_schema_input_type=str | float | None),
        Field(
            description="A data set, or the part of the rows to hold out (of several data sets, of each). Default: "
            "a tenth, at least 10 and at most 200 rows, when there are 100; else none."
        ),
    ] = None
    init_from: Annotated[
        str | None,
        Field(
            description="An adapter of yours, adp_…, whose weights are the first ones; the optimizer begins anew. "
            "`adapter` is the same as that one's but for dropout and router_aux_loss_coef: leave the rest out."
        ),
    ] = None
    preset: Annotated[
        Literal["paper"] | None,
        Field(description="Defaults of the MixLoRA paper's Table 3 for what is not given."),
    ] = None
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    priority: Annotated[
        Literal["low", "normal", "high"] | None, Field(description="Among your own jobs. Default normal.")
    ] = None
    metadata: Annotated[Metadata, Field(default_factory=dict, description="For you to filter by.")]


class JobConfig(_JobFields):
    """All of a job."""

    dataset: DatasetField


class JobCreate(_JobFields):
    """A job from scratch, or `from` another one: what is given here wins, the rest is the other's."""

    dataset: Annotated[
        DatasetField | None,
        Field(description="A data set of yours, ds_…, or several to be mixed; required without `from`."),
    ] = None
    source: Annotated[str | None, Field(alias="from", description="A job of yours to start from.")] = None
