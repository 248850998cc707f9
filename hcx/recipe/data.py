"""What a run trains on and is scored on, for either kind of data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hcx.artifacts import Input, artifact_input, find_file
from hcx.data import PackedLoader, ShardSet, validation_batches, validation_bytes
from hcx.data.chat_rows import ChatSource, Conversation, chat_files, read_conversations
from hcx.data.chat_samples import encode_conversations, split_held_out
from hcx.data.shards import TOKENIZER_FOLDER
from hcx.data.token_budget import TokenBudgetLoader, held_out_batches
from hcx.engine.base import StepStats
from hcx.errors import ConfigError, DataError, HcxError
from hcx.obs import get_logger
from hcx.recipe.convert import save_chat_format
from hcx.recipe.train import ChatSection, DataSection, TrainRecipe
from hcx.tokenizer import Tokenizer
from hcx.train.loader import Loader
from hcx.train.stages import StagedLoader
from hcx.train.trainer import Callback
from hcx.train.validation import ValidationSet

log = get_logger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        loader: makes the batches.
        validation: what is held out.
        inputs: what the data was made from, for the ledger.
        vocab_size: of the tokenizer.
        tokenizer_of: a directory with the tokenizer's files.
        tokenizer_digest: of its `tokenizer.json`.
        chat_format: the tokenizer whose chat format the run trains, where that is not the directory's own.
        callbacks: report on the data.
        counts: what became of the conversations that were read; empty for text.
    """

    loader: Loader
    validation: Sequence[ValidationSet]
    inputs: Sequence[Input]
    vocab_size: int
    tokenizer_of: Path
    tokenizer_digest: str
    chat_format: Tokenizer | None = None
    callbacks: Sequence[Callback] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def write_tokenizer(self, directory: Path) -> None:
        """Replaces the chat format in a directory that has the tokenizer's files, if the run trained another."""
        if self.chat_format is not None:
            save_chat_format(self.chat_format, directory)


def open_data(recipe: TrainRecipe) -> RunData:
    """Opens the data that a recipe names.

    Raises:
        DataError: it is missing or damaged.
        ConfigError: it does not suit the recipe.
    """
    if isinstance(recipe.data, ChatSection):
        return _chat(recipe, recipe.data)
    return _packed(recipe, recipe.data)


def _packed(recipe: TrainRecipe, data: DataSection) -> RunData:
    shards, stages = ShardSet.open(data.shards), recipe.stages
    loaders = [
        PackedLoader(shards, "train", stage.seq_len, recipe.seed, data.shares, data.upsample, data.fim)
        for stage in stages
    ]
    return RunData(
        loader=StagedLoader(stages, loaders) if recipe.train.stages else loaders[0],
        validation=validation_sets(recipe, shards),
        inputs=[artifact_input("shards", data.shards)],
        vocab_size=shards.vocab_size,
        tokenizer_of=shards.directory / TOKENIZER_FOLDER,
        tokenizer_digest=shards.tokenizer_digest,
    )


def validation_sets(recipe: TrainRecipe, shards: ShardSet) -> list[ValidationSet]:
    """The held-out rows of every language that has some."""
    seq_len = recipe.validation.seq_len or recipe.data.seq_len
    sets = []
    for language in shards.languages:
        limit = recipe.validation.max_documents
        if shards.shard(language, "validation").num_documents == 0:
            continue
        rows = list(validation_batches(shards, language, seq_len, recipe.validation.micro_batch, limit))
        sets.append(ValidationSet(language, rows, validation_bytes(shards, language, limit)))
    return sets


def _chat(recipe: TrainRecipe, data: ChatSection) -> RunData:
    directory = data.tokenizer or recipe.init_from
    if directory is None:
        raise ConfigError("data.tokenizer: conversations need a tokenizer; name its directory, or a model by init_from")
    tokenizer = Tokenizer.load(directory)
    chat_format = tokenizer.with_preamble(data.preamble) if data.preamble else None
    speaker = chat_format or tokenizer
    every_token = recipe.loss.kind == "next_token"
    inputs: list[Input] = []

    def read(sources: Iterable[ChatSource], role: str) -> list[Conversation]:
        found: list[Conversation] = []
        for source in sources:
            placed = _shipped_if_not_here(source)
            inputs.extend(artifact_input(role, path) for path in chat_files(placed, Path()))
            found += read_conversations(placed, Path())
        return found

    train, held_out = split_held_out(read(data.sources, "text"), 0.0 if data.validation else data.validation_fraction)
    held_out += read(data.validation, "validation text")
    samples = encode_conversations(train, speaker, data.seq_len, data.too_long, every_token)
    log.info("conversations: %s", ", ".join(f"{count:,} {reason}" for reason, count in samples.counts.items()))
    loader = TokenBudgetLoader(
        samples, recipe.train.global_batch, recipe.train.micro_batch, recipe.seed, data.window, data.multiple
    )
    log.info(
        "an epoch: %d conversations, %d trained tokens, %d steps, %.1f %% filling",
        len(samples),
        samples.num_trained,
        len(loader.epoch_plan(0)),
        100 * loader.epoch_padding(),
    )
    return RunData(
        loader=loader,
        validation=_held_out_sets(recipe, data, held_out, speaker),
        inputs=inputs,
        vocab_size=_vocab_size(recipe, tokenizer),
        tokenizer_of=Path(directory),
        tokenizer_digest=tokenizer.digest,
        chat_format=chat_format,
        callbacks=[ChatProgress(loader)],
        counts=samples.counts,
    )


def _shipped_if_not_here(source: ChatSource) -> ChatSource:
    """A file of the user's own first, else one that ships with hcx."""
    if Path(source.path).is_absolute() or any(character in source.path for character in "*?["):
        return source
    try:
        return source.model_copy(update={"path": str(find_file(source.path))})
    except HcxError:
        return source  # named as missing by what reads it


def _vocab_size(recipe: TrainRecipe, tokenizer: Tokenizer) -> int:
    # Published models have more rows than their tokenizer has entries.
    if recipe.init_from is not None and recipe.model.vocab_size > tokenizer.vocab_size:
        return recipe.model.vocab_size
    return tokenizer.vocab_size


def _held_out_sets(
    recipe: TrainRecipe, data: ChatSection, held_out: Sequence[Conversation], speaker: Tokenizer
) -> list[ValidationSet]:
    """Held-out conversations by source, always scored on the assistant's turns."""
    sets = []
    for name in dict.fromkeys(conversation.source for conversation in held_out):
        chosen = [conversation for conversation in held_out if conversation.source == name]
        try:
            samples = encode_conversations(
                chosen[: recipe.validation.max_documents], speaker, data.seq_len, data.too_long
            )
        except DataError as error:
            # Training conversations were read with the same settings: only these few do not fit.
            log.warning("held-out conversations of %s are not scored: %s", name, error)
            continue
        batches = list(held_out_batches(samples, recipe.train.micro_batch, data.multiple))
        sets.append(ValidationSet(name, batches, None))
    return sets


class ChatProgress(Callback):
    """Adds the epoch and the filling of each step to its metrics."""

    def __init__(self, loader: TokenBudgetLoader) -> None:
        self._loader = loader

    def after_step(self, step: int, stats: StepStats, metrics: dict[str, float]) -> None:
        """See `Callback.after_step`."""
        metrics["data/epoch"] = self._loader.samples_before(step) / len(self._loader.samples)
        metrics["data/padding"] = self._loader.padding(step - 1)
