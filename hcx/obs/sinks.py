"""Where metrics go. The JSONL file is always on and is the source of truth; wandb mirrors it."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from hcx.config import Config
from hcx.errors import DataError, MissingExtra
from hcx.obs.log import get_logger

log = get_logger(__name__)


class TrackingConfig(Config):
    """Where the metrics of a run are mirrored to."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Mode of wandb; `offline` writes a folder that `wandb sync --append` uploads later."""
    project: str = "hcx"
    """The wandb project."""
    run_name: str | None = None
    """A name for people; the run id is kept beside the JSONL file and survives requeues."""


class Sink(Protocol):
    """Receives the metrics of one step, already reduced over ranks."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""
        ...

    def close(self) -> None:
        """Flushes and releases."""
        ...


class JsonlSink:
    """One JSON object per line: `{"step": .., "time": .., metrics...}`, flushed at once.

    A torn last line (from a kill) is cut off when the file is reopened, and rows beyond `resume_step` are dropped, so a
    resumed run has one row per step.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            rows = list(read_jsonl(self.path))
            kept = [row for row in rows if resume_step is None or row.get("step", 0) <= resume_step]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in metrics.items():
            # JSON has no NaN: keep what happened readable instead of writing an invalid file.
            row[name] = value if not isinstance(value, float) or math.isfinite(value) else str(value)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; a torn last line is left out, damage elsewhere is an error."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                return
            raise DataError(f"{path}:{number}: not a JSON line") from None


CONSOLE = ("train/loss", "train/lr", "train/grad_norm", "train/skipped", "throughput/tokens_per_s")
"""What the console shows of a training step; the JSONL file has everything."""


class ConsoleSink:
    """One log line per `every` steps, and one for every row that is not of a step."""

    def __init__(self, every: int = 10) -> None:
        self.every = max(1, every)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        is_training_row = "train/loss" in metrics
        if is_training_row:
            if step % self.every and step != 1:
                return
            metrics = {name: metrics[name] for name in CONSOLE if name in metrics}
        log.info("step %d  %s", step, "  ".join(f"{name}={value:.5g}" for name, value in metrics.items()))

    def close(self) -> None:
        pass


class WandbSink:
    """Mirrors metrics to wandb under one run id, which is kept in `wandb_run_id` beside the JSONL file."""

    def __init__(self, directory: str | Path, config: TrackingConfig, run_config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "tracking", f"tracking.wandb = {config.wandb!r}") from None
        directory = Path(directory)
        id_file = directory / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=config.project,
            name=config.run_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            # Offline runs cannot ask the server, so `resume` is only for online ones; the shared id joins the folders.
            resume="allow" if config.wandb == "online" else None,
            mode=config.wandb,
            dir=str(directory),
            config=dict(run_config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def make_sinks(
    directory: str | Path,
    tracking: TrackingConfig,
    run_config: Mapping[str, Any],
    resume_step: int | None = None,
    console_every: int = 10,
) -> list[Sink]:
    """The sinks of one run: JSONL always, the console, wandb if configured."""
    sinks: list[Sink] = [JsonlSink(Path(directory) / "metrics.jsonl", resume_step), ConsoleSink(console_every)]
    if tracking.wandb != "disabled":
        sinks.append(WandbSink(directory, tracking, run_config))
    return sinks
