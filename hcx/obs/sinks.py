"""Where metrics go. The JSONL file is always on and is the source of truth; wandb mirrors it."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from hcx.config import Config
from hcx.errors import ConfigError, DataError, MissingExtra
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

    def event(self, step: int, name: str, details: Mapping[str, Any]) -> None:
        """Takes something that happened at a step, in JSON values."""
        ...

    def rewind(self, step: int) -> None:
        """The run went back to after `step`: later metrics will come again."""
        ...

    def close(self) -> None:
        """Flushes and releases."""
        ...


class JsonlSink:
    """One JSON object per line: `{"step": .., "time": .., metrics...}`, flushed at once.

    A torn last line (from a kill) is cut off when the file is reopened, and metrics beyond `resume_step` are dropped,
    so a resumed run has one row of metrics per step. Events (`{"step": .., "time": .., "event": name, details...}`)
    stay: they happened, whatever became of the step.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._keep(resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def _keep(self, until: int | None) -> None:
        rows = list(read_jsonl(self.path))
        kept = [row for row in rows if until is None or "event" in row or row.get("step", 0) <= until]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        os.replace(temporary, self.path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append({"step": step, "time": round(time.time(), 3)}, metrics)

    def event(self, step: int, name: str, details: Mapping[str, Any]) -> None:
        self._append({"step": step, "time": round(time.time(), 3), "event": name}, details)

    def _append(self, row: dict[str, Any], values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            # JSON has no NaN: keep what happened readable instead of writing an invalid file.
            row[name] = value if not isinstance(value, float) or math.isfinite(value) else str(value)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        self._file.close()
        self._keep(step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

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

    def event(self, step: int, name: str, details: Mapping[str, Any]) -> None:
        log.info("step %d  %s: %s", step, name, "  ".join(f"{key}={value}" for key, value in details.items()))

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class WandbSink:
    """Mirrors metrics to wandb under one run id, which is kept in `wandb_run_id` beside the JSONL file.

    A mirror that breaks while the run goes on is told once and left: no training is lost for it. SLURM's SIGTERM goes
    to every process of a step; wandb's service ends on it at once, while the run still saves.
    """

    def __init__(self, directory: str | Path, config: TrackingConfig, run_config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "tracking", f"tracking.wandb = {config.wandb!r}") from None
        directory = Path(directory)
        id_file = directory / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._broken = False
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.run_name,
                id=id_file.read_text(encoding="utf-8").strip(),
                # Offline runs cannot ask the server, so `resume` is only for online ones; the shared id joins the
                # folders.
                resume="allow" if config.wandb == "online" else None,
                mode=config.wandb,
                dir=str(directory),
                config=dict(run_config),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"tracking.wandb = {config.wandb!r}: wandb does not start: {error}; use offline, and "
                "`wandb sync --append` later, or disabled"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._run.log(dict(metrics), step=step))

    def _try(self, work: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            work()
        except Exception as error:
            # Whatever it is: its client raises what its connection, its service and its files raise.
            self._broken = True
            log.warning("wandb has stopped (%s: %s); metrics.jsonl goes on", type(error).__name__, error)

    def event(self, step: int, name: str, details: Mapping[str, Any]) -> None:
        # Events are the JSONL file's; the mirror has curves.
        pass

    def rewind(self, step: int) -> None:
        # wandb takes no step twice: it shows the first values until the run is past where it was.
        pass

    def close(self) -> None:
        self._try(self._run.finish)


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
