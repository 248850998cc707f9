"""The stages alone: seeded defects give their reason, near-misses stay, doing it twice changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hcx.data.document import Document
from hcx.data.filters import (
    NearDeduplicator,
    NearDuplicateConfig,
    NormaliseConfig,
    PiiConfig,
    QualityConfig,
    mask_pii,
    normalise,
    quality_reason,
)
from hcx.data.filters.near_duplicates import shingles
from hcx.data.filters.pii import PHONE_FILLER, RESIDENT_FILLER, birth_date, has_check_digit
from hcx.data.filters.quality import duplicate_ngram_share, longest_repeat, top_ngram_share

PROSE = (
    "한강은 서울을 가로질러 서해로 흘러드는 큰 강이다. 강가에는 공원이 이어져 있어 봄이면 많은 사람이 자전거를 탄다.\n"
    "해가 질 무렵에는 다리마다 불이 켜지고 물 위에 그 빛이 길게 비친다. 겨울에 얼음이 어는 날은 해마다 줄고 있다."
)

# -- normalise -------------------------------------------------------------------------------------------------------

WILD = st.text(
    st.sampled_from(list("ab \t\n\r\u0085\u2028\u00a0\u3000\u200b\ufeff\u00ad\x00\x0c\u1112\u1161\u11ab\u0301e가ㅋㅠ-"))
    | st.characters(exclude_categories=["Cs"]),
    max_size=60,
)


@given(
    text=WILD,
    config=st.builds(
        NormaliseConfig,
        unicode=st.sampled_from(["nfc", "none"]),
        invisible=st.booleans(),
        line_ends=st.booleans(),
        spaces=st.sampled_from(["keep", "trailing", "collapse"]),
        longest_run=st.sampled_from([None, 2, 4]),
    ),
)
def test_normalising_twice_is_normalising_once(text, config) -> None:
    once = normalise(text, config)
    assert normalise(once, config) == once


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (unicodedata.normalize("NFD", "한국어"), "한국어"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("\ufeff가\u200b나\x00", "가나"),
        ("if x:\n    y  \n\treturn\u00a0z", "if x:\n    y\n\treturn z"),
        ("\n\n a\n\n\n\n\n\nb \n", " a\n\n\nb"),
        ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"),
    ],
)
def test_text_that_looks_the_same_gets_one_spelling(before, after) -> None:
    assert normalise(before, NormaliseConfig()) == after


def test_laughter_is_shortened_and_syllables_are_not() -> None:
    assert normalise("ㅋㅋㅋㅋㅋㅋㅋ 하하하하하 ㅠㅠ", NormaliseConfig(longest_run=3)) == "ㅋㅋㅋ 하하하하하 ㅠㅠ"


# -- personal data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("메일은 hong.gil-dong@naver.com으로 주세요", "메일은 ****@naver.com으로 주세요"),
        ("a_b+c%d@mail.snu.ac.kr, x@y.kr.", "****@mail.snu.ac.kr, ****@y.kr."),
        ("ftp://user:secret@host.example.com/", "ftp://user:****@host.example.com/"),
    ],
)
def test_addresses_keep_their_domain(text, masked) -> None:
    assert mask_pii(text)[0] == masked


PHONES = [
    f"{area}{first}{number}"
    for area, first, number in [
        ("010", "-", "1234-5678"),
        ("010", "", "12345678"),
        ("010", ".", "1234.5678"),
        ("010", " ", "1234 5678"),
        ("011", "-", "123-4567"),
        ("016", "", "1234567"),
        ("02", "-", "123-4567"),
        ("02", ")", "1234-5678"),
        ("(02)", " ", "123-4567"),
        ("031", "-", "123-4567"),
        ("064", "", "1234567"),
        ("070", "-", "1234-5678"),
        ("080", "-", "123-4567"),
        ("0505", "-", "123-4567"),
        ("+82", "-", "10-1234-5678"),
        ("+82", " ", "2-123-4567"),
        ("+82", "", "1012345678"),
        ("(+82)", " ", "10 1234 5678"),
        ("+82", "-", "(0)2-123-4567"),
        ("0082", "-", "31-123-4567"),
    ]
]


@pytest.mark.parametrize("phone", PHONES)
@pytest.mark.parametrize("around", ["전화 {} 입니다", "T.{}", "{}로 연락", "☎{}/끝", "({}),", "{}"])
def test_every_form_of_telephone_number_is_masked(phone, around) -> None:
    masked, counts = mask_pii(around.format(phone))
    assert PHONE_FILLER in masked
    assert not any(character.isdigit() for character in masked)
    assert counts == {"phone": 1}


def resident_number(birth: str, sex: int, rest: str = "12345") -> str:
    """A number with its check digit, by the published rule, written out."""
    digits = [int(d) for d in f"{birth}{sex}{rest}"]
    total = 2 * digits[0] + 3 * digits[1] + 4 * digits[2] + 5 * digits[3] + 6 * digits[4] + 7 * digits[5]
    total += 8 * digits[6] + 9 * digits[7] + 2 * digits[8] + 3 * digits[9] + 4 * digits[10] + 5 * digits[11]
    check = ((13 if sex >= 5 else 11) - total % 11) % 10
    return f"{birth}-{sex}{rest}{check}"


def spoiled(number: str) -> str:
    return number[:-1] + str((int(number[-1]) + 1) % 10)


@pytest.mark.parametrize(
    ("birth", "sex"), [("900101", 1), ("851231", 2), ("010203", 3), ("040229", 4), ("770707", 5), ("030303", 8)]
)
def test_resident_numbers_with_their_check_digit_are_masked_with_and_without_hyphen(birth, sex) -> None:
    number = resident_number(birth, sex)
    assert mask_pii(f"그는 {number} 이다")[0] == f"그는 {RESIDENT_FILLER} 이다"
    assert mask_pii(number.replace("-", ""))[0] == RESIDENT_FILLER
    assert has_check_digit(number.replace("-", ""))
    # Without its check digit it is an order number, unless a word says what it is.
    wrong = spoiled(number)
    assert mask_pii(f"주문 {wrong}")[0] == f"주문 {wrong}"
    assert mask_pii(f"주민등록번호: {wrong}")[0] == f"주민등록번호: {RESIDENT_FILLER}"
    assert mask_pii(f"외국인 등록번호 {wrong}")[0] == f"외국인 등록번호 {RESIDENT_FILLER}"


def test_numbers_since_october_2020_have_nothing_to_check_and_are_masked_by_their_date() -> None:
    for number in (
        resident_number("201005", 3),
        spoiled(resident_number("201005", 3)),
        spoiled(resident_number("230401", 4)),
    ):
        assert mask_pii(number)[0] == RESIDENT_FILLER
    before = spoiled(resident_number("201004", 3))
    assert mask_pii(before)[0] == before
    # Thirteen digits in a row are too often something else.
    joined = spoiled(resident_number("230401", 4)).replace("-", "")
    assert mask_pii(joined)[0] == joined


def test_dates_that_do_not_exist_are_no_resident_numbers() -> None:
    for birth, sex in (("901301", 1), ("900230", 1), ("010229", 3), ("990101", 3)):
        assert birth_date(f"{birth}{sex}123456") is None
        number = resident_number(birth, sex)
        assert mask_pii(f"주민등록번호 {number}")[0] == f"주민등록번호 {number}"


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-02 2024.01.02 20240102 02-01-2024",
        "v1.02.345.6789 10.0.12.3 3.14.15926535",
        "주문번호 20240101-1234567, 송장 010-1234-5678-9012",
        "고객센터 1588-1234, 1544-0000",
        "1700000000000 0x0212345678 ABC0101234567 id_01012345678",
        "git@github.com:a/b.git icon@2x.png pkg@1.2.3 @decorator user@localhost",
        "ISBN 978-89-01-23456-7, 계좌 110-123-456789",
        "900101-9123456 9001011 010-12-345",
    ],
)
def test_near_misses_stay(text) -> None:
    assert mask_pii(text) == (text, {})


PIECES = st.sampled_from(
    [*PHONES, "900101-1234568", "230401-3000000", "a@b.com", "주민", "-", ".", " ", "+82", "@", "02", "_", "é", "가"]
)


@given(st.lists(PIECES | st.text("0123456789-.@ a()+*", max_size=12), max_size=10).map("".join))
@example("010-1234-5678900101-1234568@a.com")
@example("900101-1234568-010-1234-5678")
def test_masking_twice_is_masking_once(text) -> None:
    once, _ = mask_pii(text)
    again, counts = mask_pii(once)
    assert again == once
    assert set(counts) <= {"email"}  # a filler is never taken for data


def test_each_kind_can_be_switched_off() -> None:
    text = f"a@b.com 010-1234-5678 {resident_number('900101', 1)}"
    for kind in ("email", "phone", "resident"):
        _, counts = mask_pii(text, PiiConfig(**{kind: False}))
        assert counts == {other: 1 for other in ("email", "phone", "resident") if other != kind}


# -- quality ---------------------------------------------------------------------------------------------------------


def test_prose_passes_every_rule() -> None:
    strict = QualityConfig(
        mean_word_characters=(1.5, 8),
        max_word_characters=20,
        min_hangul_share=0.5,
        max_jamo_share=0.05,
        max_character_run=5,
        blocked_words=("광고",),
    )
    assert quality_reason(PROSE, strict) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n ", "no_words"),
        ("로그인\n가입하기\n로그인\n로그인", "duplicate_lines"),
        (
            "짧은 글\n다른 글\n또 글\n" + PROSE.split("\n")[0] + "\n끝\n새 글\n" + PROSE.split("\n")[0],
            "duplicate_line_characters",
        ),
        ("\n".join(f"- 항목 {n}" for n in range(20)), "bullets"),
        ("\n".join(f"{n}번째 글은 더 보기 {n * n}..." for n in range(9)) + "\n끝", "ellipses"),
        ("# # # 제목 하나 둘 셋", "symbols"),
        ("싸다 싸다 정말 싸다 싸다 정말 싸다 싸다 정말 사세요", "top_ngram"),
        (f"{PROSE} 그리고 {PROSE.split(chr(10))[1][:30]}", "duplicate_ngrams"),
        ("대박ㅋㅋㅋㅋㅋㅋㅋ ㅠㅠㅠㅠㅠㅠ 진짜 재밌다", "jamo_noise"),
        ("와아아아아아아아아 좋다 정말로", "character_run"),
        ("The quick brown fox jumps over a lazy dog 안녕", "hangul_share"),
        ("띄어쓰기가하나도없는문장은낱말을알수없다네 좋은 글", "long_words"),
        ("특가 할인 쿠폰 받으세요 오늘만 이 가격", "blocked_words"),
    ],
)
def test_a_seeded_defect_gives_its_reason(text, reason) -> None:
    config = QualityConfig(
        min_hangul_share=0.5,
        max_jamo_share=0.2,
        max_character_run=6,
        max_word_characters=15,
        blocked_words=("쿠폰", "특가"),
    )
    assert quality_reason(text, config) == reason


def test_words_of_a_wrong_length_are_found_in_both_directions() -> None:
    config = QualityConfig(mean_word_characters=(2, 6))
    assert quality_reason("a b c d e f g", config) == "word_length"
    assert quality_reason("가나다라마바사아자 차카타파하가나다라", config) == "word_length"


def test_a_long_passage_that_comes_twice_is_found_where_ngrams_are_allowed() -> None:
    config = QualityConfig(max_duplicate_ngram_share={}, max_top_ngram_share={})
    assert quality_reason(f"{PROSE} 가운데 {PROSE}", config.model_copy(update={"max_duplicate_line_share": None})) in (
        "longest_repeat",
        "duplicate_line_characters",
    )
    assert quality_reason(" ".join(f"낱말{n}" for n in [*range(20), *range(20)]), config) == "longest_repeat"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.integers(1, 4))
def test_repetition_is_counted_as_a_slow_count_says(words, n) -> None:
    ids, lengths = np.asarray(words, np.int64), np.asarray([word + 1 for word in words], np.int64)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    inside = {j for i, gram in enumerate(grams) if gram in grams[:i] for j in range(i, i + n)}
    assert duplicate_ngram_share(ids, lengths, n) == pytest.approx(sum(words[j] + 1 for j in inside) / lengths.sum())
    most = max((grams.count(gram) for gram in grams), default=0)
    sizes = {most * sum(word + 1 for word in gram) / lengths.sum() for gram in grams if grams.count(gram) == most}
    share = top_ngram_share(ids, lengths, n)
    assert share == 0 if most < 3 else any(share == pytest.approx(size) for size in sizes)
    repeats = [
        k
        for k in range(1, len(words))
        for i in range(len(words) - k + 1)
        for j in range(i)
        if words[i : i + k] == words[j : j + k]
    ]
    assert longest_repeat(ids) == max(repeats, default=0)


# -- near-duplicates -------------------------------------------------------------------------------------------------


def document(text: str, name: str = "x") -> Document:
    return Document(text, "s", name)


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_nearly_equal_documents_are_left_out_and_different_ones_kept(kind) -> None:
    config = NearDuplicateConfig(shingles=kind, shingle_size=5 if kind == "characters" else 3, threshold=0.7)
    body = " ".join(f"낱말{n} 문장{n * 7 % 31}" for n in range(120))
    near, far = body.replace("낱말60 ", "다른말 "), " ".join(f"글{n} 책{n * 5}" for n in range(120))
    one, other = shingles(body, config), shingles(near, config)
    assert len(one & other) / len(one | other) > 0.9
    kept = NearDeduplicator(config).keep([document(body, "a"), document(near, "b"), document(far, "c")])
    assert [d.name for d in kept] == ["a", "c"]


def test_korean_spacing_does_not_hide_a_near_duplicate() -> None:
    kept = NearDeduplicator(NearDuplicateConfig()).keep([document(PROSE), document(PROSE.replace(" ", ""))])
    assert len(kept) == 1


def test_what_is_near_does_not_depend_on_the_process() -> None:
    code = (
        "from hcx.data.filters import NearDeduplicator, NearDuplicateConfig\n"
        "from hcx.data.document import Document\n"
        "texts = [' '.join(str(n * n) for n in range(k, k + 60)) for k in range(40)]\n"
        "documents = [Document(text, 's', str(n)) for n, text in enumerate(texts)]\n"
        "kept = NearDeduplicator(NearDuplicateConfig(threshold=0.4)).keep(documents)\n"
        "names = [document.name for document in kept]\n"
    )
    here: dict[str, list[str]] = {}
    exec(code, here)
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    there = subprocess.run(
        [sys.executable, "-c", code + "print(*names)"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert there.split() == here["names"]
    assert 1 < len(here["names"]) < 20
