"""The steps of `hcx demo`. Each one finds its finished artifact and goes on, or makes it."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hcx.artifacts import artifact_input, digest_file, find_resource, is_complete, new_artifact, read_manifest
from hcx.cli.client import get, post, request, running_server
from hcx.errors import LaunchError
from hcx.obs import get_logger
from hcx.report.schema import HeldOut, Measure, ModelQuality, Quality, Sample, Samples, ServedRequest, Serving, Verdict

log = get_logger(__name__)

BITS = (4, 3, 2, 1)
GROUP_SIZE = 64
SEQ_LEN = 256
REGISTER = "software-documentation register"
PROMPTS = (
    ("ko", "파일을 저장하려면"),
    ("ko", "이 함수는 문자열을"),
    ("ko", "데이터베이스에 연결할 수"),
    ("en", "To save the document,"),
    ("en", "This function returns"),
    ("code", "def read_file(path):\n    "),
    ("code", "import os\nimport sys\n\nclass "),
)


class Clock:
    """Time since the start, as m:ss."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def stamp(self) -> str:
        """Minutes and seconds."""
        seconds = int(time.monotonic() - self._start)
        return f"{seconds // 60}:{seconds % 60:02d}"


@dataclass(frozen=True)
class DemoPlan:
    """Where the demo works and how long it trains."""

    out: Path
    minutes: float
    quick: bool

    @property
    def shards(self) -> Path:
        """Packed text."""
        return self.out / "shards"

    @property
    def run(self) -> Path:
        """The training run."""
        return self.out / "train"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.run / "model"

    def compressed(self, bits: int) -> Path:
        """A compressed model."""
        return self.out / f"bcq{bits}"

    @property
    def models(self) -> list[tuple[str, Path]]:
        """(label, directory) of all models, full precision first."""
        return [("full", self.model), *((f"{bits} bit", self.compressed(bits)) for bits in BITS)]

    @property
    def max_documents(self) -> int | None:
        """Held-out documents per language that are scored."""
        return 8 if self.quick else None


def build_data(plan: DemoPlan) -> None:
    """The shipped text and the standard library, tokenized and packed."""
    from hcx.config import load_config
    from hcx.data import DataRecipe
    from hcx.data.build import build_shards

    if not is_complete(plan.shards):
        build_shards(load_config(DataRecipe, find_resource("launch/data/demo.yaml")), plan.shards, overwrite=True)


def train(plan: DemoPlan) -> None:
    """As many steps as fit the time, at the speed measured on this machine; then the run is like any other."""
    from hcx.recipe import load_train_recipe
    from hcx.recipe.run import run_training

    if is_complete(plan.model):
        return
    saved = plan.run / "recipe.yaml"
    if saved.is_file():
        recipe = load_train_recipe(saved)  # interrupted: the same number of steps, or the schedule would change
    else:
        overrides = [f"out={plan.run}", f"data.shards={plan.shards}", "tracking.wandb=disabled"]
        if plan.quick:
            overrides += ["validation.max_documents=8"]
        recipe = load_train_recipe(find_resource("launch/train/demo.yaml"), overrides)
        step_s, validation_s = _speed(recipe)
        validations = 6
        steps = max(40, int((60 * plan.minutes - validations * validation_s) / step_s))
        log.info("%.2f s per step, %.1f s per validation: %d steps", step_s, validation_s, steps)
        every = -(-steps // (validations - 1))
        warmup = min(20, steps // 4)
        recipe = load_train_recipe(
            find_resource("launch/train/demo.yaml"),
            [
                *overrides,
                f"train.steps={steps}",
                f"train.validate_every={every}",
                f"train.checkpoint_every={every}",
                f"optim.schedule.warmup_steps={warmup}",
            ],
        )
    result = run_training(recipe)
    if not result.finished:
        raise LaunchError(f"training was interrupted at step {result.step}; run the same command again to go on")


def _speed(recipe: Any) -> tuple[float, float]:
    """Seconds of a training step and of a validation, measured on a model that is thrown away."""
    from hcx.data import PackedLoader, ShardSet
    from hcx.engine.base import StepBatch
    from hcx.engine.build import build_engine
    from hcx.model.weights import InitWeights
    from hcx.recipe.data import validation_sets
    from hcx.train import NextToken
    from hcx.train.validation import bits_per_byte

    shards = ShardSet.open(recipe.data.shards)
    engine = build_engine(recipe.engine, recipe.model, recipe.optim, (), InitWeights(recipe.model, 0), 0)
    loader = PackedLoader(shards, "train", recipe.data.seq_len, recipe.seed, recipe.data.shares)
    times = []
    for step in range(10):
        begun = time.perf_counter()
        batch = loader.step_batch(step, recipe.train.global_batch, recipe.train.micro_batch)
        engine.train_step(StepBatch(step, batch), NextToken(), 0.1)
        times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    bits_per_byte(engine, validation_sets(recipe, shards))
    return sum(times[3:]) / len(times[3:]), time.perf_counter() - begun


def compress(plan: DemoPlan) -> None:
    """One directory for each number of bits."""
    from hcx.compress import CompressPlan, ModulePlan, compress_model

    for bits in BITS:
        if not is_complete(plan.compressed(bits)):
            settings = ModulePlan(bits=bits, group_size=GROUP_SIZE)
            compress_model(plan.model, plan.compressed(bits), CompressPlan(default=settings))


def measure(plan: DemoPlan) -> None:
    """Bits per byte and divergence in each language, beside the trigram, and the bars they decide."""
    from hcx.data import ShardSet
    from hcx.data.kneser_ney import kneser_ney_baseline
    from hcx.recipe.quality import Estimate, measure_quality

    if is_complete(plan.out / "quality"):
        return
    figures = measure_quality(plan.models, plan.shards, SEQ_LEN, max_documents=plan.max_documents)
    baseline = kneser_ney_baseline(ShardSet.open(plan.shards), plan.max_documents)
    baselines = {
        "trigram, own language": {language: found["own"] for language, found in baseline.items()},
        "trigram, all text": {language: found["joint"] for language, found in baseline.items()},
    }

    def measures(found: dict[str, Estimate]) -> dict[str, Measure]:
        return {name: Measure(value=e.value, low=e.low, high=e.high) for name, e in found.items()}

    models = []
    for model, bits in zip(figures.models, (None, *BITS), strict=True):
        files = list(model.directory.glob("*.safetensors"))
        counts = read_manifest(model.directory).counts
        models.append(
            ModelQuality(
                label=model.label,
                digest=digest_file(model.directory / "manifest.json"),
                bits=bits,
                bits_per_weight=float(counts.get("bits_per_weight", 32.0)),
                file_bytes=sum(path.stat().st_size for path in files),
                bits_per_byte=measures(model.bits_per_byte),
                kl=measures(model.kl),
                top1=measures(model.top1),
            )
        )
    quality = Quality(
        protocol=(
            "Held-out documents, whole files that no training text came from, end of document included; rows of "
            f"{SEQ_LEN} tokens; KL divergence in nats per token from full precision; 95 % intervals over rows."
        ),
        held_out={
            language: HeldOut(
                documents=figures.documents[language],
                tokens=figures.tokens[language],
                bytes=figures.num_bytes[language],
                description=REGISTER if language != "code" else "Python standard library",
            )
            for language in figures.documents
        },
        baselines=baselines,
        models=tuple(models),
        verdicts=_verdicts(models, baselines),
    )
    inputs = [artifact_input("shards", plan.shards)]
    inputs += [artifact_input("model", directory) for _, directory in plan.models]
    _write(plan.out / "quality", "quality", "quality.json", quality, inputs)


def _verdicts(models: list[ModelQuality], baselines: dict[str, dict[str, float]]) -> tuple[Verdict, ...]:
    full = models[0].bits_per_byte
    best = {language: min(kind[language] for kind in baselines.values()) for language in full}
    learned = Verdict(
        name="below the better Kneser-Ney trigram in every language",
        met=all(full[language].value < best[language] for language in full),
        detail=", ".join(f"{language} {full[language].value:.3f} against {best[language]:.3f}" for language in full),
    )
    by_bits = models[1:]  # from more to fewer bits
    falls = all(
        more.kl[language].value < fewer.kl[language].value
        for more, fewer in itertools.pairwise(by_bits)
        for language in full
    )
    told = "; ".join(
        f"{language} " + " > ".join(f"{model.kl[language].value:.3f}" for model in reversed(by_bits))
        for language in full
    )
    return learned, Verdict(
        name="divergence falls with every bit from 1 to 4, in every language", met=falls, detail=told
    )


def evaluate(plan: DemoPlan) -> None:
    """The demo's suite on the full model and on 4 bits."""
    from hcx.evals import evaluate as run_evaluation

    limit = 8 if plan.quick else None
    for label, directory in (("full", plan.model), ("bcq4", plan.compressed(4))):
        out = plan.out / f"eval-{label}"
        if not is_complete(out):
            run_evaluation(directory, suite="demo", out=out, limit=limit, overwrite=True)


def sample(plan: DemoPlan) -> None:
    """Continuations of the same prompts by every model, greedy, so that only the weights differ."""
    from hcx.generate import Generator, SamplingParams
    from hcx.model.load import load_model

    if is_complete(plan.out / "samples"):
        return
    outputs: list[dict[str, str]] = [{} for _ in PROMPTS]
    params = SamplingParams(max_tokens=16 if plan.quick else 48, repetition_penalty=1.1)
    for label, directory in plan.models:
        generator = Generator(load_model(directory), max_batch=len(PROMPTS), max_seq=128)
        eos = generator.loaded.tokenizer.eos_id if generator.loaded.tokenizer else 0
        # A document begins after an end of text: that is the context that training knows.
        prompts = [[eos, *generator.encode(prompt)] for _, prompt in PROMPTS]
        for found, completion in zip(outputs, generator.generate(prompts, params), strict=True):
            found[label] = completion.text
    samples = Samples(
        protocol=f"Greedy, at most {params.max_tokens} tokens, repetition penalty 1.1; a base model, no instructions.",
        samples=tuple(
            Sample(language=language, prompt=prompt, outputs=found)
            for (language, prompt), found in zip(PROMPTS, outputs, strict=True)
        ),
    )
    inputs = [artifact_input("model", directory) for _, directory in plan.models]
    _write(plan.out / "samples", "samples", "samples.json", samples, inputs)


def serve(plan: DemoPlan) -> None:
    """Starts `hcx serve` on the 4-bit model and talks to it as a client would."""
    if is_complete(plan.out / "serving"):
        return
    directory = plan.compressed(4)
    requests = []
    with running_server(directory, plan.out / "serve.log") as port:
        described = get(port, "/v1/models")["data"][0]
        body = {"model": described["id"], "prompt": PROMPTS[0][1], "max_tokens": 40}
        begun = time.perf_counter()
        answer = post(port, "/v1/completions", body)
        requests.append(
            ServedRequest(
                title="completion",
                prompt=PROMPTS[0][1],
                text=answer["choices"][0]["text"],
                tokens=answer["usage"]["completion_tokens"],
                seconds=time.perf_counter() - begun,
            )
        )
        message = "문서를 저장하는 방법을 알려 주세요."
        chat = {
            "model": described["id"],
            "messages": [{"role": "user", "content": message}],
            "max_tokens": 40,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        requests.append(_stream(port, chat, message))
    serving = Serving(
        model="4 bit",
        numerics=str(described["numerics"]),
        backend=", ".join(described["kernels"]),
        requests=tuple(requests),
    )
    _write(plan.out / "serving", "serving", "serving.json", serving, [artifact_input("model", directory)])


def _stream(port: int, body: dict[str, Any], message: str) -> ServedRequest:
    begun = time.perf_counter()
    first: float | None = None
    text, events, tokens = "", 0, 0
    for line in request(port, "POST", "/v1/chat/completions", body):
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        chunk = json.loads(line[len(b"data: ") :])
        if chunk.get("usage"):
            tokens = int(chunk["usage"]["completion_tokens"])
        for choice in chunk.get("choices", []):
            piece = choice["delta"].get("content") or ""
            if piece:
                first = first if first is not None else time.perf_counter()
                text, events = text + piece, events + 1
    return ServedRequest(
        title="streamed chat completion",
        prompt=message,
        text=text,
        tokens=tokens,
        seconds=time.perf_counter() - begun,
        ttft_ms=None if first is None else 1000 * (first - begun),
        events=events,
    )


def read_quality(plan: DemoPlan) -> Quality:
    """What `measure` wrote."""
    return Quality.model_validate_json((plan.out / "quality" / "quality.json").read_text(encoding="utf-8"))


def _write(directory: Path, kind: str, name: str, value: BaseModel, inputs: list[Any]) -> None:
    with new_artifact(directory, kind, {}, inputs, overwrite=True) as artifact:
        text = json.dumps(value.model_dump(mode="json"), ensure_ascii=False, indent=1)
        (artifact.path / name).write_text(text + "\n", encoding="utf-8")
