"""Logging with ranks, metrics with a reduce type, and the sinks they go to."""

from hcx.obs.log import get_logger, setup_logging
from hcx.obs.metrics import Metric, Reduce
from hcx.obs.progress import Progress
from hcx.obs.sinks import ConsoleSink, JsonlSink, Sink, TrackingConfig, WandbSink, make_sinks, read_jsonl

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "Metric",
    "Progress",
    "Reduce",
    "Sink",
    "TrackingConfig",
    "WandbSink",
    "get_logger",
    "make_sinks",
    "read_jsonl",
    "setup_logging",
]
