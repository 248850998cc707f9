"""Learns BPE with SentencePiece (Kudo and Richardson 2018) over the byte alphabet, and reads the merges out of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

from hcx.errors import DataError, MissingExtra
from hcx.tokenizer.alphabet import BYTE_OF, to_alphabet
from hcx.tokenizer.pieces import DELIMITER

SENTENCEPIECE_FILE = "hcx_bpe.model"
"""Not `tokenizer.model`: readers would take that for a stock SentencePiece vocabulary, and build a wrong one."""

_LONGEST_PIECE_BYTES = 1 << 16
"""Longer pieces (a picture in base64) are left out of learning."""

_RAREST = 10_000
"""One over the least share of all characters that a byte gets; far above single precision's 6e-8."""

_NUM_THREADS = 4
"""A constant: SentencePiece writes it into the model, and the same text should give the same file on any machine. The
merges do not depend on it."""


def learn(
    counts: Mapping[str, int], num_merges: int, max_piece_bytes: int = 64, space_runs: int = 0
) -> tuple[bytes, list[str]]:
    """Learns merges from counted pieces.

    Args:
        counts: pieces in the byte alphabet, `DELIMITER` where no merge may cross.
        num_merges: how many.
        max_piece_bytes: of the longest result.
        space_runs: every run of 2 to so many spaces becomes a token.

    Returns:
        The SentencePiece model, and the merged tokens in the order in which they were learnt. There may be fewer than
        asked for when the text is short.

    Raises:
        MissingExtra: sentencepiece is not installed.
        DataError: nothing can be learnt from the pieces.
    """
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("sentencepiece", "korean", "algorithm.kind = morpheme-bpe") from None
    if not counts:
        raise DataError("no text to learn a tokenizer from; check the sources of the data recipe")

    def train(num_merges: int) -> tuple[bytes, list[str]]:
        model = io.BytesIO()
        alphabet = sorted(BYTE_OF)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(counts, alphabet, space_runs),
                model_writer=model,
                input_format="tsv",
                model_type="bpe",
                vocab_size=1 + len(alphabet) + num_merges,
                hard_vocab_limit=False,
                pretokenization_delimiter=DELIMITER,
                character_coverage=1.0,
                byte_fallback=False,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_by_unicode_script=False,
                split_by_number=False,
                split_by_whitespace=False,
                max_sentencepiece_length=max_piece_bytes,
                max_sentence_length=_LONGEST_PIECE_BYTES,
                num_threads=_NUM_THREADS,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise DataError(f"SentencePiece could not learn from the text: {error}") from None
        return model.getvalue(), learned_tokens(model.getvalue())

    model, tokens = train(num_merges)
    # When no pair of the text is left, SentencePiece goes on with pairs that occur nowhere.
    taught = _taught(model, tokens, counts, space_runs)
    return (model, tokens) if taught == len(tokens) else train(taught)


def _taught(model: bytes, tokens: Sequence[str], counts: Mapping[str, int], space_runs: int) -> int:
    """How many of the tokens, from the first, the text has taught: up to the last that it is written with."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    parts = sorted({part for piece in counts for part in piece.split(DELIMITER)})
    used = {token for row in processor.encode(parts, out_type=str) for token in row}
    return max(0, space_runs - 1, *(number for number, token in enumerate(tokens, 1) if token in used))


def _sentences(counts: Mapping[str, int], alphabet: Sequence[str], space_runs: int) -> Iterator[str]:
    total = sum(len(piece) * count for piece, count in counts.items())
    # Heavier than any pair of the text, so that these runs are merged to the end before anything else.
    runs = {to_alphabet(" ") * length: total + 1 for length in range(2, space_runs + 1)}
    # Every byte must be a token, whether the text has it or not. `required_chars` does not see to that, and a coverage
    # of 1.0 leaves out what is rarer than single precision can tell from nothing; alone, a character teaches no merge.
    bytes_alone = dict.fromkeys(alphabet, 1 + (total * (1 + space_runs * space_runs)) // _RAREST)
    yield from (f"{piece}\t{count}" for piece, count in {**runs, **bytes_alone}.items())
    for piece, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield f"{piece}\t{count}"


def learned_tokens(model: bytes) -> list[str]:
    """The merged tokens of a SentencePiece model over the byte alphabet, best first."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = (processor.id_to_piece(number) for number in range(processor.get_piece_size()))
    # In the order of their scores, by construction of the trainer; single characters and <unk> are not merges.
    return [piece for number, piece in enumerate(pieces) if len(piece) > 1 and not processor.is_unknown(number)]


def merges_of(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that make `tokenizers`' BPE do what SentencePiece's does.

    SentencePiece joins two neighbours whenever the result is a token, the earliest learnt first, the leftmost of
    equals first; BPE wants the pairs. So every split of a token into two tokens is a merge, in the order of the
    results. Among the splits of one token, an order exists in which BPE's choice is the leftmost: where the right part
    of a split is the left part of another, the two can overlap in text, and the first must win.

    Args:
        tokens: merged tokens in the byte alphabet, best first.
    """
    known = {*BYTE_OF, *tokens}
    merges: list[tuple[str, str]] = []
    for token in tokens:
        splits = [
            (token[:place], token[place:])
            for place in range(1, len(token))
            if token[:place] in known and token[place:] in known
        ]
        lefts = {left for left, _ in splits}
        merges += sorted(splits, key=lambda split: (split[1] not in lefts, -len(split[0])))
    return merges
