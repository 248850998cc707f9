"""Fill in the middle: every clause of acceptance item 9, against a parser of its own."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.data import FimConfig, PackedLoader, ShardSet, infill_prompt
from hcx.data.fim import Draw, Fim, cut_points, draw
from hcx.errors import ConfigError, DataError
from hcx.testing.shards import tiny_shards
from hcx.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer, train_tokenizer

SEQ = 96
SIGMAS = 3
"""The bar of the specification; seeds are fixed, so a pass stays a pass."""

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    ["", "가", "def f():\n    return 1\n", "한국어 문장입니다. ㅋㅋ 👩‍👩‍👧", "\u1112\u1161\u11ab", "<|fim_prefix|>"]
)
CUTS = st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(): return 한국어 문장을 이어서 씁니다 the words of a document"] * 3, 512)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_shards(tmp_path_factory.mktemp("fim"), documents=120)


def parse(ids: list[int], tokenizer: Tokenizer) -> tuple[str, str, str, str]:
    """(order, prefix, middle, suffix); with variant 2 of SPM the prefix is part of the middle."""
    names = {tokenizer.special_tokens[name]: name for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)}
    places = [(names[token], place) for place, token in enumerate(ids) if token in names]
    assert len(places) == 3
    assert places[0][1] == 0
    bounds = [place for _, place in places] + [len(ids)]
    parts = {
        name: tokenizer.decode(ids[begin + 1 : end])
        for (name, _), (begin, end) in zip(places, pairwise(bounds), strict=True)
    }
    order = [name for name, _ in places]
    if order == [FIM_SUFFIX, FIM_PREFIX, FIM_MIDDLE]:
        kind = "spm1"
    else:
        assert order == [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]
        kind = "spm2" if places[1][1] == 1 else "psm"
    return kind, parts[FIM_PREFIX], parts[FIM_MIDDLE], parts[FIM_SUFFIX]


@settings(deadline=None)
@given(
    text=TEXTS,
    cuts=CUTS,
    psm=st.booleans(),
    variant=st.sampled_from([1, 2]),
    split=st.sampled_from([("random", None), ("random", 5), ("thirds", None)]),
)
def test_every_order_inverts_to_the_text_and_has_each_sentinel_once(tokenizer, text, cuts, psm, variant, split) -> None:
    fim = Fim(FimConfig(spm_variant=variant, split=split[0], longest_middle=split[1]), tokenizer)
    kind, prefix, middle, suffix = parse(fim.rearranged(text, Draw(True, psm, cuts)), tokenizer)
    assert prefix + middle + suffix == text
    begin, end = cut_points(len(text), cuts, *split)
    if psm:
        assert (prefix, middle, suffix) == (text[:begin], text[begin:end], text[end:])
    else:
        assert kind == f"spm{variant}"
        assert suffix == text[end:]


@settings(deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_with_an_empty_prefix_psm_and_the_second_variant_of_spm_are_the_same(tokenizer, text, cuts) -> None:
    fim = Fim(FimConfig(), tokenizer)
    empty_prefix = (0.0, cuts[1])
    assert fim.rearranged(text, Draw(True, True, empty_prefix)) == fim.rearranged(text, Draw(True, False, empty_prefix))


@given(length=st.integers(0, 10_000), cuts=CUTS)
def test_thirds_differ_by_at_most_one_character_and_random_cuts_are_in_order(length, cuts) -> None:
    begin, end = cut_points(length, cuts, "thirds")
    sizes = (begin, end - begin, length - end)
    assert max(sizes) - min(sizes) <= 1
    begin, end = cut_points(length, cuts, "random")
    assert 0 <= begin <= end <= length


def test_each_part_can_be_empty_and_each_is_a_third_on_average() -> None:
    generator = np.random.default_rng(0)
    found = [cut_points(3, draw(generator, 1, 0.5).cuts, "random") for _ in range(500)]
    assert {(0, 0), (0, 3), (3, 3)} <= set(found)
    sizes = np.asarray(
        [(b, e - b, 300 - e) for b, e in (cut_points(300, draw(generator, 1, 0.5).cuts, "random") for _ in range(4000))]
    )
    # A part's size has a standard deviation of 300 / sqrt(18).
    assert np.all(abs(sizes.mean(axis=0) - 100) < SIGMAS * 300 / math.sqrt(18 * 4000))


@given(length=st.integers(0, 100), longest=st.integers(1, 150), cuts=CUTS)
def test_a_longest_middle_is_kept_and_is_never_empty_where_there_is_text(length, longest, cuts) -> None:
    begin, end = cut_points(length, cuts, "random", longest)
    assert 0 <= begin <= end <= length
    assert min(1, length) <= end - begin <= longest


def test_sizes_and_places_of_short_middles_are_uniform() -> None:
    generator = np.random.default_rng(0)
    found = [cut_points(20, draw(generator, 1, 0.5).cuts, "random", 4) for _ in range(8000)]
    sizes = np.bincount([end - begin for begin, end in found])[1:]
    assert len(sizes) == 4
    assert np.all(abs(sizes - 2000) < 4 * math.sqrt(8000 * 0.25 * 0.75))
    places = np.bincount([begin for begin, end in found if end - begin == 1])
    assert len(places) == 20
    assert np.all(abs(places - sizes[0] / 20) < 4 * math.sqrt(sizes[0] / 20))


def test_thirds_have_no_longest_middle() -> None:
    with pytest.raises(ValueError, match="leave one of the two out"):
        FimConfig(split="thirds", longest_middle=32)


def test_rates_are_met_within_three_sigmas() -> None:
    generator = np.random.default_rng(1)
    draws = [draw(generator, 0.3, 0.7) for _ in range(6000)]
    chosen = [d for d in draws if d.chosen]
    assert abs(len(chosen) - 6000 * 0.3) < SIGMAS * math.sqrt(6000 * 0.3 * 0.7)
    assert abs(sum(d.psm for d in chosen) - len(chosen) * 0.7) < SIGMAS * math.sqrt(len(chosen) * 0.7 * 0.3)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=6),
    skip=st.integers(0, 5),
    size=st.integers(1, 80),
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_rearranged_row_is_never_longer_and_every_piece_is_whole_text(
    tokenizer, texts, skip, size, seed, rate
) -> None:
    """Rows that begin and end anywhere, inside characters too."""
    eos = tokenizer.eos_id
    stream = [token for text in texts for token in (*tokenizer.encode(text), eos)]
    row = np.asarray(stream[min(skip, len(stream) - 1) :][:size], np.int64)
    out, first = Fim(FimConfig(), tokenizer).row(row, rate, np.random.default_rng(seed))
    assert len(out) <= len(row)
    if rate == 0:
        assert np.array_equal(out, row)
        assert not first
        return
    pieces = [piece.tolist() for piece in np.split(out, np.flatnonzero(out == eos) + 1) if len(piece)]
    original = ["".join(texts)]
    for piece in pieces:
        if piece[0] in tokenizer.special_tokens.values() and piece[0] != eos:
            assert piece[-1] == eos
            _, prefix, middle, suffix = parse(piece[:-1], tokenizer)
            assert prefix + middle + suffix in original[0]
            assert "\ufffd" not in prefix + middle + suffix or "\ufffd" in original[0]


@pytest.mark.parametrize("level", ["context", "document"])
def test_rows_have_their_exact_length_and_only_whole_characters_between_sentinels(shards, level) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=2, fim=FimConfig(rate=1.0, level=level))
    batch = loader.rows(range(120))
    assert batch.tokens.shape == batch.labels.shape == (120, SEQ)
    assert bool((batch.tokens[:, 1:] == batch.labels[:, :-1])[batch.weights[:, 1:] > 0].all())
    pre = shards.tokenizer.special_tokens[FIM_PREFIX]
    whole = 0
    for labels, weights in zip(batch.labels, batch.weights, strict=True):
        counted = labels[weights > 0].numpy()
        for piece in np.split(counted, np.flatnonzero(counted == shards.eos_id) + 1):
            if level == "context" and len(piece) > 8:
                assert piece[0] == pre
                assert piece[-1] == shards.eos_id
            if len(piece) and piece[0] == pre and piece[-1] == shards.eos_id:
                _, prefix, middle, suffix = parse(piece[:-1].tolist(), shards.tokenizer)
                assert "\ufffd" not in prefix + middle + suffix
                whole += 1
    assert whole > 40


def test_a_row_loses_at_most_a_few_tokens_to_padding(shards) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=2, fim=FimConfig(rate=1.0))
    plain = PackedLoader(shards, "train", SEQ, seed=2).rows(range(300))
    filled = loader.rows(range(300))
    missing = (plain.weights.sum() - filled.weights.sum()) / plain.weights.sum()
    assert 0 <= float(missing) < 0.03
    # What has no room is taken from the end of the text; nothing is ever added to a row.
    assert bool((plain.weights.sum(1) >= filled.weights.sum(1)).all())


def test_the_realised_share_of_rearranged_pieces_is_the_rate_of_each_language(shards) -> None:
    fim = FimConfig(rate=0.25, rates={"code": 0.9}, level="document")
    loader = PackedLoader(shards, "train", 4096, seed=5, fim=fim)
    for language, rate in (("ko", 0.25), ("code", 0.9)):
        stream = loader._streams[language]
        batch = [stream.row(n) for n in range(12 * stream.rows_per_epoch)]
        labels = np.concatenate([row.labels[row.weights > 0] for row in batch])
        documents = int((labels == shards.eos_id).sum())
        chosen = int((labels == shards.tokenizer.special_tokens[FIM_MIDDLE]).sum())
        assert abs(chosen - documents * rate) < SIGMAS * math.sqrt(documents * rate * (1 - rate))
        first = labels[np.flatnonzero(labels == shards.tokenizer.special_tokens[FIM_PREFIX]) + 1]
        psm = int((first != shards.tokenizer.special_tokens[FIM_SUFFIX]).sum())
        # Where the prefix is empty both orders look the same: at most one document in a dozen here.
        assert psm < chosen * 0.5 + SIGMAS * math.sqrt(chosen * 0.25)
        assert psm > chosen * 0.4 - SIGMAS * math.sqrt(chosen * 0.25)


def test_rate_zero_changes_nothing(shards) -> None:
    plain = PackedLoader(shards, "train", SEQ, seed=3).rows(range(60))
    for level in ("context", "document"):
        fim = FimConfig(rate=0.0, level=level)
        other = PackedLoader(shards, "train", SEQ, seed=3, fim=fim).rows(range(60))
        for name in ("tokens", "labels", "weights", "positions", "document_ids"):
            assert torch.equal(getattr(plain, name), getattr(other, name))


@pytest.mark.parametrize("level", ["context", "document"])
def test_the_same_seed_gives_the_same_bytes_at_any_number_of_workers_and_ranks(shards, level) -> None:
    fim = FimConfig(level=level)
    expected = PackedLoader(shards, "train", SEQ, seed=3, fim=fim).rows(range(48))
    for threads in (0, 1, 3):
        batches = list(PackedLoader(shards, "train", SEQ, seed=3, fim=fim).batches(0, 4, 12, 4, threads=threads))
        tokens = torch.cat([batch.tokens for step in batches for batch in step])
        assert torch.equal(tokens, expected.tokens)
    ranks = [PackedLoader(shards, "train", SEQ, seed=3, fim=fim).step_batch(1, 12, 2, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([b.tokens for rank in ranks for b in rank]), expected.tokens[12:24])
    backwards = PackedLoader(shards, "train", SEQ, seed=3, fim=fim)
    for sample in reversed(range(48)):
        assert torch.equal(backwards.rows([sample]).labels[0], expected.labels[sample])
    assert not torch.equal(PackedLoader(shards, "train", SEQ, seed=4, fim=fim).rows(range(48)).tokens, expected.tokens)


def test_the_next_epoch_rearranges_anew(shards) -> None:
    loader = PackedLoader(shards, "train", 100_000, seed=3, shares={"ko": 1}, fim=FimConfig(rate=1.0, level="document"))
    assert not torch.equal(loader.rows([0]).tokens, loader.rows([1]).tokens)


def test_a_rearranged_piece_that_opens_a_row_stands_after_end_of_text(shards) -> None:
    batch = PackedLoader(shards, "train", 16, seed=3, fim=FimConfig(rate=1.0)).rows(range(200))
    opened = batch.labels[:, 0] == shards.tokenizer.special_tokens[FIM_PREFIX]
    assert int(opened.sum()) > 100
    assert bool((batch.tokens[opened, 0] == shards.eos_id).all())


def test_a_prompt_is_the_beginning_of_what_training_shows(tokenizer) -> None:
    prefix, middle, suffix = "def f(", "): return", " 1"
    text = prefix + middle + suffix
    # The middle of the interval that gives each cut.
    cuts = tuple((cut + 0.5) / (len(text) + 1) for cut in (len(prefix), len(prefix + middle)))
    for psm, variant, order in ((True, 2, "psm"), (False, 2, "spm2"), (False, 1, "spm1")):
        ids = Fim(FimConfig(spm_variant=variant), tokenizer).rearranged(text, Draw(True, psm, cuts))
        assert ids == infill_prompt(tokenizer, prefix, suffix, order) + tokenizer.encode(middle)


def test_settings_are_part_of_what_a_run_resumes_with(shards) -> None:
    state = PackedLoader(shards, "train", SEQ, seed=1, fim=FimConfig()).state_dict()
    PackedLoader(shards, "train", SEQ, seed=1, fim=FimConfig()).load_state_dict(state)
    with pytest.raises(DataError, match="fim was"):
        PackedLoader(shards, "train", SEQ, seed=1, fim=FimConfig(rate=0.9)).load_state_dict(state)
    with pytest.raises(DataError, match="fim was"):
        PackedLoader(shards, "train", SEQ, seed=1).load_state_dict(state)


def test_rates_of_unknown_languages_and_tokenizers_without_sentinels_are_refused(shards, tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"fim\.rates\.kor: no such language; did you mean 'ko'"):
        PackedLoader(shards, "train", SEQ, fim=FimConfig(rates={"kor": 0.5}))
    with pytest.raises(ConfigError, match=r"fim\.rates\.ko = 1\.5"):
        PackedLoader(shards, "train", SEQ, fim=FimConfig(rates={"ko": 1.5}))
    bare = Tokenizer(tokenizer.tokenizer_json.replace("<|fim_", "<|other_"), {"eos_token": "<|endoftext|>"})
    with pytest.raises(ConfigError, match=r"no <\|fim_prefix\|>"):
        Fim(FimConfig(), bare)
