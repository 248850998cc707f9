"""The measurements that the report reads: JSON files inside artifact directories, typed so that writers and page agree.

| manifest kind | file | model |
|---|---|---|
| `quality` | `quality.json` | `Quality` |
| `samples` | `samples.json` | `Samples` |
| `serving` | `serving.json` | `Serving` |
| `eval` | `results.json` | `EvalResults` (owned by `hcx.evals`; read leniently) |
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from hcx.config import Config

LANGUAGES = {"ko": "Korean", "en": "English", "code": "code"}
"""Language keys in the order of display, with their names."""


class Measure(Config):
    """A value with its uncertainty, where one was computed."""

    value: float
    """The point estimate."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""


class Difference(Measure):
    """How far a model's figure lies from that of full precision on the same rows."""

    p_value: float
    """Of the paired test: how often chance alone gives at least this difference."""


class HeldOut(Config):
    """How much held-out text stands behind the figures of a language."""

    documents: int
    """Documents scored."""
    tokens: int
    """Tokens scored, ends of documents included."""
    bytes: int
    """UTF-8 bytes of those documents."""
    description: str = ""
    """What kind of text it is: `software-documentation register`."""


class ModelQuality(Config):
    """One model directory, measured on the held-out text."""

    label: str
    """Short name for tables: `full`, `4 bit`."""
    digest: str
    """Digest of the model's manifest."""
    bits: float | None = None
    """Bits per quantized weight that were asked for; None: full precision."""
    bits_per_weight: float
    """Bits per parameter of the decoder's linear parts, scales included."""
    file_bytes: int
    """Bytes of the weight files."""
    own_grid: bool = False
    """Whether the weights were values of this very grid before: the figures then say nothing of the method."""
    numerics: str = "reference"
    """Class of the kernels that it was measured with."""
    tokens_per_s: float | None = None
    """Generated tokens per second of one request, where it was timed."""
    difference: dict[str, Difference] = Field(default_factory=dict)
    """Language -> bits per byte more than full precision, paired."""
    bits_per_byte: dict[str, Measure] = Field(default_factory=dict)
    """Language -> held-out bits per UTF-8 byte, end of document included."""
    kl: dict[str, Measure] = Field(default_factory=dict)
    """Language -> mean KL divergence (nats per token) of this model from full precision."""
    top1: dict[str, Measure] = Field(default_factory=dict)
    """Language -> share of positions whose most likely token is that of full precision."""


class Verdict(Config):
    """One acceptance bar, met or not."""

    name: str
    """What was asked."""
    met: bool
    """Whether the measurement met it."""
    detail: str
    """The numbers behind the verdict."""


class Quality(Config):
    """Held-out quality of a model and of its compressed versions."""

    protocol: str
    """How the figures came about, in a sentence or two."""
    held_out: dict[str, HeldOut] = Field(default_factory=dict)
    """Language -> what was scored."""
    baselines: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Baseline name -> language -> bits per byte under the same accounting."""
    models: tuple[ModelQuality, ...] = ()
    """Full precision first, then from more to fewer bits."""
    verdicts: tuple[Verdict, ...] = ()
    """Acceptance bars that these figures decide."""


class Sample(Config):
    """A prompt and what each model made of it."""

    language: str
    """Language key of the prompt."""
    prompt: str
    """The text the model continues."""
    outputs: dict[str, str]
    """Model label -> continuation."""


class Samples(Config):
    """Continuations side by side."""

    protocol: str
    """Sampling settings in words."""
    samples: tuple[Sample, ...] = ()
    """In the order of display."""


class ServedRequest(Config):
    """One request to the running server."""

    title: str
    """What was asked for: `chat completion`, `streamed completion`."""
    prompt: str
    """What was sent."""
    text: str
    """What came back."""
    tokens: int
    """Generated tokens, as the server counts them."""
    seconds: float
    """From request to last byte, as the client saw it."""
    ttft_ms: float | None = None
    """From request to first text (streams only)."""
    events: int | None = None
    """Server-sent events that carried text (streams only)."""


class Serving(Config):
    """What the server did with a compressed model."""

    model: str
    """Label of the served model."""
    numerics: str
    """Numerics class that the server states for itself."""
    backend: str = ""
    """Kernel that it states."""
    requests: tuple[ServedRequest, ...] = ()
    """In order."""


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class MethodTable(_Lenient):
    """What `hcx bench methods` found, as its table shows it."""

    name: str
    """Of the comparison."""
    protocol: str
    """How it was measured."""
    columns: tuple[str, ...]
    """Their names."""
    cells: tuple[tuple[str, ...], ...]
    """Row by row."""


class EvalMetric(_Lenient):
    """One metric of one task."""

    value: float | None = None
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    chance: float | None = None
    contains_chance: bool | None = None


class EvalTask(_Lenient):
    """One task's metrics and protocol."""

    metrics: dict[str, EvalMetric] = Field(default_factory=dict)
    language: str | None = None
    category: str | None = None
    version: str | int | float | None = None
    protocol: str | dict[str, object] | None = None
    items: int | None = None
    of: int | None = None


class EvalResults(_Lenient):
    """`results.json` of `hcx eval`."""

    tasks: dict[str, EvalTask] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)
