"""Morpheme-aware BPE: lossless, deterministic, and the same ids in every reader of the files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

pytest.importorskip("sentencepiece", reason="sentencepiece (extra korean) is not installed")
pytest.importorskip("kiwipiepy", reason="kiwipiepy (extra korean) is not installed")

from hcx.errors import DataError
from hcx.testing.tokenizers import AWKWARD, VOCAB_SIZE, mixed_lines, tokenizer_of
from hcx.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from hcx.tokenizer.alphabet import BYTE_OF, to_alphabet, to_bytes
from hcx.tokenizer.patterns import PATTERNS
from hcx.tokenizer.pieces import DELIMITER, count_pieces, soften
from hcx.tokenizer.recipe import MorphemeBpe
from hcx.tokenizer.sentencepiece_bpe import SENTENCEPIECE_FILE, learn, merges_of

any_text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        st.text(st.sampled_from(" \t\n-=_0a가각ㄱ"), max_size=40),
        st.sampled_from([*AWKWARD, *SPECIAL_TOKENS]),
    ),
    max_size=5,
).map("".join)


def coarse() -> Tokenizer:
    return tokenizer_of("coarse")


@settings(max_examples=500, deadline=None)
@given(any_text)
def test_every_text_comes_back_without_any_unknown_or_special_token(text: str) -> None:
    ids = coarse().encode(text)
    assert coarse().decode(ids) == text
    assert b"".join(coarse().token_bytes(i) for i in ids) == text.encode()
    assert not set(ids) & set(coarse().special_tokens.values())


def test_every_byte_is_a_token_even_those_that_no_text_had() -> None:
    single = {coarse().token_bytes(i) for i in range(VOCAB_SIZE)}
    assert {bytes([byte]) for byte in range(256)} <= single


def sentencepiece_tokens(tokenizer: Tokenizer, texts: Sequence[str], pattern: str = "llama3") -> list[list[bytes]]:
    """What SentencePiece itself makes of the pattern's pieces of each text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.companions[SENTENCEPIECE_FILE])
    split = Split(Regex(PATTERNS[pattern].regex), "isolated")
    pieces = [[piece for piece, _ in split.pre_tokenize_str(text)] for text in texts]
    unique = list(dict.fromkeys(piece for row in pieces for piece in row))
    rows = processor.encode([to_alphabet(piece) for piece in unique], out_type=str)
    tokens = {piece: [to_bytes(token) for token in row] for piece, row in zip(unique, rows, strict=True)}
    return [[token for piece in row for token in tokens[piece]] for row in pieces]


def as_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in ids]


@pytest.mark.parametrize(("granularity", "pattern"), [("coarse", "llama3"), ("fine", "llama3"), ("coarse", "qwen2")])
def test_the_converted_file_cuts_10000_mixed_lines_as_sentencepiece_itself_does(granularity: str, pattern: str) -> None:
    tokenizer = tokenizer_of(granularity, pattern=pattern)
    lines = mixed_lines()
    theirs = sentencepiece_tokens(tokenizer, lines, pattern)
    ours = [as_bytes(tokenizer, ids) for ids in tokenizer.encode_batch(lines)]
    differing = [line for line, a, b in zip(lines, ours, theirs, strict=True) if a != b]
    assert not differing, f"{len(differing)} lines, such as {differing[0]!r}"


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_tiktoken_joins_the_same_tokens_on_10000_mixed_lines(pattern: str) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken (extra peers) is not installed")
    tokenizer = tokenizer_of("coarse", pattern=pattern)
    special = set(tokenizer.special_tokens.values())
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in special}
    encoding = tiktoken.Encoding("x", pat_str=PATTERNS[pattern].regex, mergeable_ranks=ranks, special_tokens={})
    assert [encoding.encode_ordinary(line) for line in mixed_lines()] == tokenizer.encode_batch(mixed_lines())


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(" \n-=*#_/aAx0가다"), min_size=2, max_size=80))
def test_runs_and_repetitions_are_merged_in_sentencepieces_order(text: str) -> None:
    assert [as_bytes(coarse(), coarse().encode(text))] == sentencepiece_tokens(coarse(), [text])


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_transformers_gives_the_same_ids_on_10000_mixed_lines(tmp_path, pattern: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of("coarse", pattern=pattern)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    lines = list(mixed_lines())
    assert theirs(lines, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(lines)
    assert theirs.decode(tokenizer.encode(AWKWARD[0])) == AWKWARD[0]


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_llama_cpp_gives_the_same_ids_on_10000_mixed_lines(tmp_path, pattern: str) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: ids were not compared with llama.cpp")
    pytest.importorskip("gguf", reason="gguf is not installed: no vocabulary file can be written for llama.cpp")
    from llama_cpp import Llama

    from hcx.tokenizer.gguf_vocab import write_gguf_vocab

    tokenizer = tokenizer_of("coarse", pattern=pattern)
    write_gguf_vocab(tokenizer, tmp_path / "vocab.gguf")
    theirs = Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    # The C API takes a zero byte, its Python wrapper's tokenize passes the length along; nothing needs leaving out.
    for line, ids in zip(mixed_lines(), tokenizer.encode_batch(mixed_lines()), strict=True):
        assert theirs.tokenize(line.encode(), add_bos=False, special=False) == ids, line


def test_threads_processes_and_repetition_change_nothing() -> None:
    program = (
        "from hcx.testing.tokenizers import texts_of; from hcx.tokenizer import train_tokenizer\n"
        "from hcx.tokenizer.recipe import MorphemeBpe; from hcx.tokenizer.morphemes import KiwiAnalyser\n"
        "import hashlib, sys\n"
        "t = train_tokenizer(texts_of('ko')[0][:40], 1024, algorithm=MorphemeBpe(), "
        "analyser=KiwiAnalyser(int(sys.argv[1])))\n"
        "print(t.digest, hashlib.sha256(t.companions['hcx_bpe.model']).hexdigest())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, workers], stdout=subprocess.PIPE, text=True)
        for workers in ("1", "3")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert first == second


def test_the_sentencepiece_model_is_kept_beside_the_file_and_survives_saving(tmp_path) -> None:
    coarse().save(tmp_path)
    assert (tmp_path / "hcx_bpe.model").is_file()
    assert not (tmp_path / "tokenizer.model").exists()
    loaded = Tokenizer.load(tmp_path)
    assert loaded.companions == coarse().companions
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "hcx_bpe.model").read_bytes() == coarse().companions[SENTENCEPIECE_FILE]


def test_runs_of_spaces_are_single_tokens_up_to_the_length_asked_for() -> None:
    for length in range(2, 17):
        assert len(coarse().encode("x\n" + " " * length)) == len(coarse().encode("x\n")) + 1
    assert len(coarse().encode(" " * 17)) > 1


def test_digits_are_alone_only_under_the_pattern_that_says_so() -> None:
    assert [
        tokenizer_of("coarse", pattern="qwen2").token_bytes(i)
        for i in tokenizer_of("coarse", pattern="qwen2").encode("2024")
    ] == [b"2", b"0", b"2", b"4"]
    assert max(len(coarse().token_bytes(i)) for i in coarse().encode("2024")) > 1


def test_no_token_crosses_a_boundary_that_every_occurrence_has() -> None:
    _, tokens = learn({f"ab{DELIMITER}cd": 50, "abc": 1}, 6)
    assert "abcd" not in tokens
    assert {"ab", "cd"} <= set(tokens)


def test_a_pair_across_a_boundary_counts_its_share_and_one_inside_counts_whole() -> None:
    counts = {f"ab{DELIMITER}cd": 7, "ef": 3}
    assert soften(counts, 0.25) == {f"ab{DELIMITER}cd": 525, "abcd": 175, "ef": 300}
    assert soften(counts, 0) == {f"ab{DELIMITER}cd": 700, "ef": 300}
    assert soften(counts, 1) == {"abcd": 700, "ef": 300}
    # "ab|cd" occurs 100 times: at a tenth it is merged after what occurs 11 times, and before what occurs 9 times.
    text = {f"ab{DELIMITER}cd": 100, "xy": 11, "zw": 9}
    _, tokens = learn(soften(text, 0.1), 6)
    assert tokens == ["ab", "cd", "xy", "abcd", "zw"]


def test_merges_are_all_splits_of_a_token_in_learned_order_and_overlapping_ones_leftmost_first() -> None:
    merges = merges_of(["ab", "aba", "ba", "ababa"])
    assert [left + right for left, right in merges] == sorted(
        (left + right for left, right in merges), key=["ab", "aba", "ba", "ababa"].index
    )
    # "ab" + "aba" and "aba" + "ba" overlap in ab|aba|ba: SentencePiece joins the first two.
    assert merges.index(("ab", "aba")) < merges.index(("aba", "ba"))


def test_no_token_is_learnt_that_the_text_does_not_have() -> None:
    text = "abab cdcd 학교에서"
    tokenizer = train_tokenizer([text], 1024, algorithm=MorphemeBpe(granularity="none"))
    special = set(tokenizer.special_tokens.values())
    learnt = [tokenizer.token_bytes(i) for i in range(1024) if i not in special]
    assert all(token in text.encode() for token in learnt if len(token) > 1)
    assert len(tokenizer.encode(text)) == 3
    assert len(special) > len(SPECIAL_TOKENS)


def test_text_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(DataError, match="no text to learn"):
        train_tokenizer([], 1024, algorithm=MorphemeBpe(granularity="none"))


def test_pieces_concatenate_to_the_text_and_count_every_occurrence() -> None:
    split = Split(Regex(PATTERNS["llama3"].regex), "isolated")

    class EveryCharacter:
        name = "test"

        def morphemes(self, lines):
            from hcx.tokenizer.morphemes import Morpheme

            return ([Morpheme(n, n + 1, False) for n in range(len(line))] for line in lines)

    text = "가나  다\r\n\r\nab 한국abc\n" + AWKWARD[7]
    counts = count_pieces([text, text], split, EveryCharacter(), "fine")
    assert set(counts.values()) <= {2, 4, 6, 8}
    assert counts[f"{to_alphabet('가')}{DELIMITER}{to_alphabet('나')}"] == 2
    assert (
        counts[f"{to_alphabet(' ')}{to_alphabet('한')}{DELIMITER}{to_alphabet('국')}{DELIMITER}{to_alphabet('abc')}"]
        == 2
    )
    plain = count_pieces([text, text], split)
    whole = Counter()
    for piece, count in counts.items():
        whole[piece.replace(DELIMITER, "")] += count
    assert whole == plain
    assert sum(len(piece) * count for piece, count in plain.items()) == 2 * len(text.encode())


def test_the_byte_alphabet_is_that_of_the_tokenizers_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(BYTE_OF) == sorted(ByteLevel.alphabet())
    text = "".join(AWKWARD)
    theirs = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert to_alphabet(text) == "".join(piece for piece, _ in theirs)
    assert to_bytes(to_alphabet(text)) == text.encode()
