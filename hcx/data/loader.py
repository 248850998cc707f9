"""Packed batches in an order that depends on nothing but the seed.

Sample i of a run is a pure function of (shards, sequence length, shares, factors, FIM settings, seed, i). Step t of
global batch G takes the samples [t*G, (t+1)*G) however many data-parallel ranks there are, however many threads
prepare them, and wherever a run was interrupted: so runs can be compared sample by sample.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hcx.data.batch import MicroBatch
from hcx.data.fim import Fim, FimConfig
from hcx.data.mixture import MAX_UPSAMPLE, Mixture, checked_shares
from hcx.data.order import next_sample, prepared_ahead
from hcx.data.shards import ShardSet
from hcx.data.stream import LanguageStream, Row, stack_rows
from hcx.data.validation import validation_batches
from hcx.errors import ConfigError, DataError, did_you_mean


class PackedLoader:
    """Rows of packed documents from shards.

    Args:
        shards: where the tokens are.
        split: `train` or `validation` (for training on; held-out documents are scored with `validation_batches`).
        seq_len: tokens per row.
        seed: orders documents and rows.
        shares: language -> share of rows; None: as the data recipe says. Languages left out get nothing.
        upsample: source -> how often its documents come in an epoch, instead of what the data recipe says.
        fim: rearranges documents for filling in the middle; None: none.

    Raises:
        ConfigError: shares, factors or the sequence length are not possible, or `fim` does not fit the shards.
        DataError: a language with a share has no tokens.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str = "train",
        seq_len: int = 512,
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
        upsample: Mapping[str, float] | None = None,
        fim: FimConfig | None = None,
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len = {seq_len}: must be at least 1")
        self.shards = shards
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self.next_sample = 0
        """The first sample that no step has taken yet."""
        self._mixture = Mixture(checked_shares(shares, shards.shares))
        self.shares = self._mixture.shares
        self.fim = fim
        self.upsample = dict(upsample or {})
        self._streams: dict[str, LanguageStream] = {}
        if fim is not None:
            fim.check_languages(shards.languages)
        rearrange = None if fim is None else Fim(fim, shards.tokenizer)
        self._check_upsample()
        for language, share in self.shares.items():
            if share > 0:
                factors = shards.factors(language, split, self.upsample)
                stream = LanguageStream(
                    shards.shard(language, split), language, seq_len, seed, shards.eos_id, factors, rearrange
                )
                if stream.num_tokens == 0:
                    raise DataError(f"{shards.directory}: language {language!r} has no {split} tokens")
                self._streams[language] = stream

    def rows(self, sample_ids: Sequence[int]) -> MicroBatch:
        """The samples with these global numbers, in this order."""
        rows: list[Row] = []
        sources = []
        for sample in sample_ids:
            language, number = self._mixture.row(sample)
            rows.append(self._streams[language].row(number, int(sample)))
            sources.append(language)
        return stack_rows(rows, tuple(int(sample) for sample in sample_ids), tuple(sources))

    def step_batch(
        self,
        step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        first_sample: int = 0,
    ) -> list[MicroBatch]:
        """This rank's micro-batches of one step.

        Args:
            step: the step's number, from 0.
            global_batch: samples per step over all ranks.
            micro_batch: samples per micro-batch.
            dp_rank: this data-parallel rank.
            dp_size: number of data-parallel ranks.
            first_sample: number of step 0's first sample; to go on after a change of `global_batch`.

        Raises:
            ConfigError: the sizes do not divide.
        """
        samples = self._step_samples(step, global_batch, micro_batch, dp_rank, dp_size, first_sample)
        self.next_sample = first_sample + (step + 1) * global_batch
        return [self.rows(group) for group in samples]

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        first_sample: int = 0,
        threads: int = 1,
    ) -> Generator[list[MicroBatch]]:
        """The micro-batches of steps `start_step` to `stop_step - 1`, in order, prepared ahead by threads.

        The number of threads (0: none) changes nothing but the waiting.
        """
        arguments = (global_batch, micro_batch, dp_rank, dp_size, first_sample)

        def prepare(step: int) -> list[MicroBatch]:
            return [self.rows(group) for group in self._step_samples(step, *arguments)]

        for step, batch in prepared_ahead(prepare, start_step, stop_step, threads):
            self.next_sample = first_sample + (step + 1) * global_batch
            yield batch

    def _step_samples(
        self, step: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int, first_sample: int
    ) -> list[range]:
        if global_batch % (dp_size * micro_batch) or min(global_batch, micro_batch, dp_size) < 1:
            raise ConfigError(
                f"global_batch = {global_batch} is not a multiple of micro_batch = {micro_batch} times "
                f"{dp_size} data-parallel ranks"
            )
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank = {dp_rank}: must be 0 to {dp_size - 1}")
        per_rank = global_batch // dp_size
        begin = first_sample + step * global_batch + dp_rank * per_rank
        return [range(start, start + micro_batch) for start in range(begin, begin + per_rank, micro_batch)]

    def _check_upsample(self) -> None:
        known = {source for language in self.shards.languages for source in self.shards.sources(language, self.split)}
        for source, factor in self.upsample.items():
            if source not in known:
                raise ConfigError(f"upsample.{source}: no such source in the shards; {did_you_mean(source, known)}")
            if not 0 < factor <= MAX_UPSAMPLE:
                raise ConfigError(f"upsample.{source} = {factor}: must be above 0, at most {MAX_UPSAMPLE:g}")

    def draws(self, sample_ids: Iterable[int]) -> dict[str, dict[str, int]]:
        """Tokens that samples take of each language's sources, as counted in the shards."""
        taken: dict[str, dict[str, int]] = {}
        for sample in sample_ids:
            language, number = self._mixture.row(sample)
            shard, names = self.shards.shard(language, self.split), self.shards.sources(language, self.split)
            counts = taken.setdefault(language, dict.fromkeys(names, 0))
            for document, tokens in self._streams[language].documents(number).items():
                counts[names[int(shard.sources[document])]] += tokens
        return taken

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How many times each language has been read after so many samples."""
        return {
            language: count / self._streams[language].rows_per_epoch
            for language, count in self._mixture.counts(num_samples).items()
        }

    def validation_batches(
        self, language: str, seq_len: int | None = None, micro_batch: int = 8, limit: int | None = None
    ) -> Iterator[MicroBatch]:
        """The held-out documents of a language, each scored whole; see `hcx.data.validation`."""
        return validation_batches(self.shards, language, seq_len or self.seq_len, micro_batch, limit)

    def state_dict(self) -> dict[str, Any]:
        """What must agree for the order to go on, and where it stands."""
        return {
            "shards": self.shards.digest,
            "split": self.split,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "shares": dict(self.shares),
            "upsample": dict(self.upsample) or None,
            "fim": None if self.fim is None else self.fim.model_dump(mode="json"),
            "next_sample": self.next_sample,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken.

        Raises:
            DataError: the loader is not the one that the state describes; the first difference is named.
        """
        self.next_sample = next_sample(state, self.state_dict())
