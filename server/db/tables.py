"""The tables. Times are unix seconds; `key` columns are keys of the store, never paths."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it as it is)
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        str: String,
        float: Float,
        int: BigInteger().with_variant(Integer, "sqlite"),  # there each holds 64 bits
        bool: Boolean,
    }


class Tenant(Table):
    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    share: Mapped[float]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]

    __table_args__ = (
        Index(
            "tenants_by_name",
            "name",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
    )


class Counter(Table):
    """What the daemon of one seat (`server.db.seats`) adds up for a tenant.

    Others write it only to give back, and when a share changes.
    """

    __tablename__ = "counters"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    seat: Mapped[int] = mapped_column(primary_key=True)
    counter: Mapped[float] = mapped_column(default=0.0)  # V of docs/design.md §5; added to, set only by a lift
    backlogged: Mapped[bool] = mapped_column(default=False)  # as of the last plan, to know who returns
    trained_tokens: Mapped[int] = mapped_column(default=0)  # each step once
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    sampled_tokens: Mapped[int] = mapped_column(default=0)

    __table_args__ = (Index("counters_in_order", "seat", "counter"),)


class Key(Table):
    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    shown: Mapped[str]  # the first characters, to recognise a key by
    secret_hash: Mapped[str] = mapped_column(unique=True)  # sha256 of what follows the brand
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]


class IdempotencyKey(Table):
    """A request that was carried out, for a day."""

    __tablename__ = "idempotency_keys"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str]  # what it made; that may be gone
    created_at: Mapped[float] = mapped_column(index=True)


class Base(Table):
    """A base model that a daemon has loaded, as it published it."""

    __tablename__ = "bases"
    hash: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    path: Mapped[str]
    folder_key: Mapped[str]  # tokenizer files
    dtype: Mapped[str]
    context: Mapped[int]  # positions that the base was trained for
    microbatch_tokens: Mapped[int]  # longest row of a new job
    parameters: Mapped[int]
    num_layers: Mapped[int]
    targets: Mapped[dict[str, Any]]  # module name -> [out, in]
    fingerprint: Mapped[dict[str, Any]]  # `engine.base_model.Fingerprint`
    probe: Mapped[dict[str, Any]]  # dtype -> GFLOP/s, and what exactness the machine keeps
    published_at: Mapped[float]
    activation: Mapped[str | None]  # of the feed-forward, in transformers' words; null: published by an older version
    memory: Mapped[dict[str, Any] | None]  # `engine.memory.BaseMemory`; null: published by an older version
    manifest: Mapped[dict[str, Any] | None]  # of its tokenizer's files; null: published by an older version


class Dataset(Table):
    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    status: Mapped[str]  # uploaded | processed | failed
    format: Mapped[str]  # jsonl | csv | parquet | hub
    shape: Mapped[str]  # messages | prompt_completion | instruction | text
    columns: Mapped[dict[str, Any] | None]
    source: Mapped[dict[str, Any] | None]  # file name, or the hub's name, split and revision
    rows: Mapped[int]
    tokens: Mapped[dict[str, Any]]  # {"total", "histogram", "base_hash"}
    bytes: Mapped[int]
    sha256: Mapped[str]  # of `content`
    created_by: Mapped[str]  # key id
    created_at: Mapped[float]
    manifest: Mapped[dict[str, Any] | None]  # of its files; null: kept by an older version


class Job(Table):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)  # order of submission
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    request: Mapped[dict[str, Any]] = mapped_column(default=dict)  # as submitted: what a clone starts from
    status: Mapped[str]
    requested: Mapped[str | None]  # pause
    reason: Mapped[str | None]
    base_name: Mapped[str]
    base_hash: Mapped[str] = mapped_column(index=True)
    dataset_id: Mapped[str]  # of several the first. No foreign key: it may be deleted, the job keeps its tokens
    dataset_sha256: Mapped[str]
    validation: Mapped[dict[str, Any]]  # {"rows", "dataset" | "fraction"}
    adapter: Mapped[dict[str, Any]]  # resolved
    training: Mapped[dict[str, Any]]  # resolved
    tokens_key: Mapped[str]  # the job's own rows, as ids
    priority: Mapped[str]
    weight: Mapped[int]  # 1, 4, 16 by priority
    labels: Mapped[dict[str, Any]]  # the contract's `metadata`
    total_steps: Mapped[int]
    total_tokens: Mapped[int]
    step: Mapped[int] = mapped_column(default=0)
    tokens: Mapped[int] = mapped_column(default=0)
    adapter_id: Mapped[str | None]
    exact: Mapped[bool] = mapped_column(default=True)
    error: Mapped[dict[str, Any] | None]
    created_by: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    init_from: Mapped[dict[str, Any] | None]  # {"adapter", "sha256"}: see `server.starts`
    mixture: Mapped[list[Any] | None]  # of a job on several data sets: `server.api.parts.mixture_of`
    tokens_manifest: Mapped[dict[str, Any] | None]  # of its own rows' files; null: submitted to an older version

    __table_args__ = (Index("jobs_by_status", "status", "tenant_id"),)


Index("jobs_next", Job.tenant_id, Job.status, Job.base_hash, Job.weight.desc(), Job.number)


class Run(Table):
    """What is leased, fenced, scheduled, metered and recovered: one adapter in training."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), unique=True)
    tenant_id: Mapped[str] = mapped_column(index=True)
    lease_epoch: Mapped[int | None]  # the life that holds it, or held it last
    counter: Mapped[float] = mapped_column(default=0.0)  # V among the tenant's own runs
    cost_charged: Mapped[int] = mapped_column(default=0)  # token-equivalents
    attempts: Mapped[int] = mapped_column(default=0)
    fingerprint: Mapped[dict[str, Any] | None]
    crashes: Mapped[int] = mapped_column(default=0, server_default=text("0"), index=True)  # since it last got further
    crash_step: Mapped[int | None]  # the furthest step after which a daemon died that held it
    seat: Mapped[int] = mapped_column(default=1, server_default=text("1"))  # where it was charged last


class RecoveryPoint(Table):
    __tablename__ = "recovery_points"
    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    epoch: Mapped[int]
    step: Mapped[int]
    cursor: Mapped[dict[str, Any]]  # the job program's own state
    cost_charged: Mapped[int]
    key: Mapped[str]
    manifest: Mapped[dict[str, Any]]  # file name -> {"sha256", "bytes"}; bytes null: written by an older version
    created_at: Mapped[float]


class Adapter(Table):
    """An immutable set of weights: a finished job's, or one of its checkpoints."""

    __tablename__ = "adapters"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(index=True)
    step: Mapped[int]
    final: Mapped[bool]
    base_name: Mapped[str]
    base_hash: Mapped[str]
    method: Mapped[str]
    config: Mapped[dict[str, Any]]
    valid_loss: Mapped[float | None]
    exact: Mapped[bool]
    key: Mapped[str]
    sha256: Mapped[str]  # of adapter_model.safetensors
    bytes: Mapped[int]
    created_at: Mapped[float]
    manifest: Mapped[dict[str, Any] | None]  # of its files; null: kept by an older version

    __table_args__ = (Index("adapters_of_job", "job_id", "step", unique=True),)


class Metric(Table):
    __tablename__ = "metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[float]
    tokens: Mapped[int]
    train_loss: Mapped[float]
    valid_loss: Mapped[float | None]
    aux_loss: Mapped[float | None]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float]
    tokens_per_second: Mapped[float]
    gang: Mapped[int]  # number of the gang that ended the step, within the daemon's life
    gang_jobs: Mapped[int]  # jobs that rode in it
    created_at: Mapped[float]
    train_losses: Mapped[list[Any] | None]  # of each data set of a mixture; null where it had no row in the step
    valid_losses: Mapped[list[Any] | None]


class ExpertLoads(Table):
    """How many slots of a step each expert took."""

    __tablename__ = "expert_loads"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    loads: Mapped[list[Any]]  # [layers][experts]


class Event(Table):
    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    tenant_id: Mapped[str] = mapped_column(index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    kind: Mapped[str]
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Operation(Table):
    """Interactive work (`/generate`). Payload and result are files in the store under `key`."""

    __tablename__ = "operations"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(index=True)
    adapter_id: Mapped[str | None]
    base_hash: Mapped[str]
    kind: Mapped[str]  # sample
    status: Mapped[str] = mapped_column(index=True)  # pending | running | done | failed
    error: Mapped[dict[str, Any] | None]  # {"category": user | server, "code", "message"}
    key: Mapped[str]
    deadline: Mapped[float]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    lease_epoch: Mapped[int | None]  # the life that computes it, or did so last
    attempts: Mapped[int] = mapped_column(default=0, server_default=text("0"))


class Store(Table):
    """The data directory that has the files, in one row: see `server.db.stores`."""

    __tablename__ = "stores"
    id: Mapped[str] = mapped_column(primary_key=True)


class Drain(Table):
    __tablename__ = "drains"
    id: Mapped[str] = mapped_column(primary_key=True)
    mode: Mapped[str]  # quick | graceful | fast
    deadline_at: Mapped[float | None]
    reason: Mapped[str]
    exit: Mapped[bool]
    created_by: Mapped[str]
    created_at: Mapped[float]
    ended_at: Mapped[float | None]
    daemon: Mapped[str | None]  # the name of those that it is for; null: all


class Daemon(Table):
    """One life of an engine daemon. Its number is the lease epoch that fences its writes."""

    __tablename__ = "daemons"
    epoch: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    pid: Mapped[int]
    base_hash: Mapped[str | None]
    state: Mapped[str]  # starting | ready | drained | disk_full | stopped
    detail: Mapped[dict[str, Any]]  # resident runs, tokens a second, gangs
    floor: Mapped[float] = mapped_column(default=0.0)  # the scheduler's last smallest counter
    started_at: Mapped[float]
    heartbeat_at: Mapped[float]  # this and the next by the database's clock
    ended_at: Mapped[float | None]
    expires_at: Mapped[float | None]  # of its lease; null: of an older version, whose lives had none
    supervisor: Mapped[str | None]  # whose child it is
    name: Mapped[str | None]  # what a drain calls it; the lives of one daemon have the same, and several may share one
    rests_under: Mapped[str | None]  # the drain for which it has let every run go
    writes: Mapped[int] = mapped_column(default=0, server_default=text("0"))  # that it has made: it knows how many
    seat: Mapped[int] = mapped_column(
        default=1, server_default=text("1")
    )  # whose counters it adds to: `server.db.seats`
