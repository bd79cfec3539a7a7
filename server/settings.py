"""The operator's settings: a flag, then `MIXLOOM_…`, then a line of `mixloom.toml`, then the default."""

import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FilePath, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from server import faults

MIB = 2**20
OTHER_VARIABLES = {"MIXLOOM_URL", "MIXLOOM_API_KEY", faults.VARIABLE}
"""Read by the client and the CLI, and by tests; not here."""


class Settings(BaseSettings):
    """Everything that an operator can set; `mixloom config` prints each with its source."""

    model_config = SettingsConfigDict(env_prefix="MIXLOOM_", toml_file="mixloom.toml", extra="forbid")

    data_dir: Path = Field(Path("mixloom-data"), description="Where everything that must survive is kept.")
    database_url: str | None = Field(
        None,
        description="PostgreSQL instead of SQLite in the data directory: postgresql://USER@HOST/NAME.",
        repr=False,
    )
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port that the API listens on; 0 takes a free one.")
    base: str = Field("smollm2-135m", description="Base model: a hub name, a local directory or a GGUF file.")
    chat_template: FilePath | None = Field(None, description="A Jinja file to use in place of the base's own template.")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="Arithmetic of the frozen base; auto probes the machine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the engine computes.")
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 takes every core.")
    memory_limit_gib: float | None = Field(
        None,
        gt=0,
        description="Memory that the engine may take, with the base (on CUDA: of the GPU); without it 80 % of what is "
        "free at start. Runs come into memory as far as they and their passes fit.",
    )
    token_budget: Annotated[int, Field(ge=256, le=8192)] | Literal["auto"] = Field(
        "auto",
        description="Most tokens in one gang; auto: as many as fit into memory beside the resident runs, and at most "
        "4,096.",
    )
    microbatch_tokens: int = Field(
        1024, ge=64, le=8192, description="Most tokens in one microbatch of a new job; also its longest row."
    )
    recompute: bool = Field(
        False,
        description="Whether a training pass keeps of each decoder layer its input alone, and runs the layer again in "
        "the backward: less memory and more time for the same bits, where rows are long.",
    )
    max_resident_runs: int = Field(16, ge=1, description="Most runs whose adapters are in memory at once.")
    stay_tokens: int = Field(
        16384, ge=0, description="Tokens that a run trains before it may have to give its place to another tenant's."
    )
    recovery_seconds: float = Field(300.0, gt=0, description="Seconds between two recovery points of a run.")
    recovery_steps: int = Field(0, ge=0, description="Also a recovery point every so many steps; 0: by time only.")
    daemon_name: str | None = Field(
        None,
        min_length=1,
        description="What `admin drain --daemon` calls the engine daemons started here; else the machine's host name.",
    )
    lease_seconds: float = Field(
        30.0, gt=1, description="Seconds without a heartbeat after which a daemon counts as gone and its runs as free."
    )
    hang_seconds: float = Field(
        600.0,
        gt=0,
        description="Seconds without a pass after which a daemon is hung; longer where passes take longer.",
    )
    sampling_share: float = Field(
        0.25, gt=0, le=1, description="Most of the time that sampling takes while training waits."
    )
    stop_seconds: float = Field(30.0, gt=0, description="Seconds that a first SIGTERM leaves for recovery points.")
    max_upload_mib: int = Field(64, ge=1, description="Largest data set in one upload.")
    max_datasets_mib: int | None = Field(
        None,
        ge=1,
        description="Most that a tenant's data sets may have together, as they were uploaded; without it as much as "
        "the disk takes.",
    )
    max_adapter_mib: int = Field(1024, ge=1, description="Largest adapter in one upload.")
    retention_days: float = Field(
        0, ge=0, description="Days after its end that a job is kept, with its adapters; 0: until its tenant deletes it."
    )
    min_free_disk_mib: int = Field(
        256, ge=0, description="With less room on the data directory's disk, uploads are refused and training waits."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON.")
    admin_key: str | None = Field(None, description="The operator's key, 32 characters or more.", repr=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_variable(cls, values: Any) -> Any:
        """A misspelt `MIXLOOM_…` is an error: it would do nothing."""
        known = {f"MIXLOOM_{name.upper()}" for name in cls.model_fields} | OTHER_VARIABLES
        unknown = sorted(name for name in os.environ if name.startswith("MIXLOOM_") and name not in known)
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not a setting of this version; `mixloom config` lists them all")
        return values

    @field_validator("admin_key")
    @classmethod
    def _long_admin_key(cls, value: str | None) -> str | None:
        if value is not None and len(value) < 32:
            raise ValueError(f"MIXLOOM_ADMIN_KEY must have 32 characters or more, it has {len(value)}")
        return value

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: str | None) -> str | None:
        try:
            is_right = value is None or make_url(value).drivername == "postgresql"
        except (ArgumentError, ValueError):  # neither's words are fit to be shown: they hold the password
            is_right = False
        if not is_right:
            raise ValueError("it must be like postgresql://USER@HOST/NAME, or be left out for SQLite in the data_dir")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (the constructor's arguments) win over the environment, and that over the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def name_of_daemon(self) -> str:
        """`daemon_name`, or what stands for it."""
        return self.daemon_name or socket.gethostname()

    @property
    def database(self) -> URL:
        """Where the tables are, as SQLAlchemy names it."""
        if self.database_url is None:
            return URL.create("sqlite", database=str(self.data_dir / "mixloom.db"))
        return make_url(self.database_url).set(drivername="postgresql+psycopg")

    def with_sources(self, flags: dict[str, Any]) -> list[tuple[str, Any, str, str]]:
        """(name, value, source, description) of every setting, for `mixloom config`."""
        toml = TomlConfigSettingsSource(type(self))()
        rows = []
        for name, info in type(self).model_fields.items():
            if name in flags:
                source = "flag"
            elif f"MIXLOOM_{name.upper()}" in os.environ:
                source = f"MIXLOOM_{name.upper()}"
            else:
                source = "mixloom.toml" if name in toml else "default"
            value = getattr(self, name)
            if name == "admin_key" and value:
                value = "(set)"
            if name == "database_url" and value:
                value = make_url(value).render_as_string(hide_password=True)
            rows.append((name, value, source, info.description or ""))
        return rows
