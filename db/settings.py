"""Every setting of every process. Each is an environment variable with the prefix ``TENFOLD_``."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings", "load_settings"]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TENFOLD_", extra="ignore", frozen=True)

    data_dir: Path = Field(
        default=Path("data"), description="Folder of the SQLite files, the embedded queue's socket and scratch files."
    )
    database_url: str | None = Field(
        default=None,
        description="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME. Unset: tenfold.sqlite in the data folder. "
        "SQLite serves one host only.",
    )
    redis_url: str | None = Field(
        default=None,
        description="Redis or Valkey that carries the wake-up messages. Unset: one embedded in the data folder.",
    )
    blob_url: str | None = Field(
        default=None,
        description="file:///FOLDER or s3://BUCKET/PREFIX for the content of new files. Unset: kept in the database.",
    )
    pool_size: Annotated[int, Field(ge=1, le=200)] = Field(
        default=10, description="Database connections that one process keeps open; as many again for a moment."
    )

    host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(default=8000, description="Port that the API listens on.")

    queue: str = Field(default="cpu", description="Device class: which tasks a worker takes, and where new jobs go.")
    lease_seconds: Annotated[float, Field(gt=0)] = Field(
        default=90.0, description="A worker silent for this long has lost its task, and another takes it up."
    )
    jail: Literal["require", "best_effort", "off"] = Field(
        default="require",
        description="Confine the process that opens uploads: refuse to work without (require), use what the kernel has "
        "(best_effort), or not at all (off; only for your own uploads).",
    )
    memory_limit: ByteSize | None = Field(
        default=None,
        description="Memory of one compute process, such as 8GiB. Unset: four fifths of the machine's, which the "
        "workers of `tenfold-server up` share equally.",
    )
    task_hours: Annotated[float, Field(gt=0)] = Field(
        default=72.0, description="A profile, trial, refinement or export that takes longer is stopped and has failed."
    )

    max_upload_bytes: ByteSize = Field(default=ByteSize(20 * 2**30), description="Largest upload, such as 20GiB.")
    max_stored_bytes: ByteSize | None = Field(
        default=None, description="Sum of one owner's uploads, such as 200GiB. Unset: no limit."
    )
    max_live_jobs: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Jobs of one owner that are not finished; more are refused."
    )
    requests_per_minute: Annotated[int, Field(ge=1)] = Field(
        default=1200, description="Requests of one key per minute before it is asked to slow down."
    )
    blob_grace_seconds: Annotated[float, Field(ge=600)] = Field(
        default=3600.0, description="Content that nothing refers to is deleted after this long."
    )
    admin_key: SecretStr | None = Field(
        default=None, description="The first admin key's secret (tf_…), for set-ups without a terminal to print one on."
    )

    @property
    def database(self) -> str:
        """``database_url``, or the default file in the data folder."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'tenfold.sqlite').absolute()}"


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """From the environment, once per process."""
    return Settings()
