"""IFEval-Ko's checks on answers written by hand: for each kind some that follow and some that nearly do."""

import unicodedata

import pytest

from hcx.errors import EvalError
from hcx.evals.korean_instructions import (
    CHECKERS,
    checked_rows,
    follows,
    loose_forms,
    score,
    sentences,
    share_followed,
)

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}

CASES = {
    "keywords:existence": [
        (
            {"keywords": ["한강", "KTX"]},
            ["한강을 따라 ktx가 달린다.", "KTX를 타고 한강으로."],
            ["한강을 걸었다.", "KTX만 탔다."],
        ),
        # A keyword is text: its full stop is no wildcard.
        ({"keywords": ["3.5"]}, ["금리는 3.5퍼센트다."], ["길이는 375미터다."]),
    ],
    "keywords:frequency": [
        (
            {"keyword": "바다", "frequency": 3, **AT_LEAST},
            ["바다, 바다가 보인다. 바다!"],
            ["바다, 바다가 보인다.", "산"],
        ),
        ({"keyword": "바다", "frequency": 2, **LESS}, ["바다를 본다.", "산을 본다."], ["바다와 바다"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["사과"]}, ["배를 먹었다."], ["사과를 먹었다.", "풋사과", "사과"]),
        # Latin words are whole words, Korean particles behind them apart.
        ({"forbidden_words": ["art"]}, ["party에 갔다."], ["art를 보았다.", "Art."]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 4, **AT_LEAST}, ["나는 어제 집에 갔다"], ["나는 집에 갔다", "나는어제집에갔다"]),
        ({"num_words": 4, **LESS}, ["나는 집에 갔다"], ["나는 어제 집에 갔다"]),
    ],
    "length_constraints:number_sentences": [
        (
            {"num_sentences": 3, **AT_LEAST},
            ["비가 온다. 우산이 있니? 없다!", "비가 온다. 춥다. 집에 가고 싶다", "“가자.” 그가 말했다. 우리는 갔다."],
            ["비가 온다. 춥다.", "물가가 3.5 퍼센트 올랐다. 그렇다.", "1. 우유를 산다. 2. 빵을 산다."],
        ),
        ({"num_sentences": 2, **LESS}, ["U.S. 시장은 3.5% 올랐다.", "그는 Dr. Kim이다…"], ["올랐다. 내렸다."]),
    ],
    "length_constraints:number_paragraphs": [
        (
            {"num_paragraphs": 2},
            ["첫째 문단\n***\n둘째 문단", "***\n첫째\n***\n둘째\n***", "**굵게** 첫째\n\n여전히 첫째\n***\n둘째"],
            ["첫째\n\n둘째", "첫째\n***\n\n***\n둘째", "첫째\n***\n둘째\n***\n셋째", "첫째\n******\n둘째"],
        ),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "회사"},
            ["처음이다.\n\n회사는 크다.", "처음이다.\n\n“회사” 이야기다.", "처음이다.\n \n**회사의** 이야기"],
            ["회사는 크다.\n\n처음이다.", "처음이다.\n\n그 회사는 크다.", "하나\n\n회사\n\n셋"],
        ),
        (
            {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "weekend"},
            ["Weekend에는 쉰다."],
            ["weekends are short"],
        ),
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[이름]님, [날짜]에 뵙겠습니다."], ["[이름]님, 내일 뵙겠습니다.", "[]와 [이름]"]),
    ],
    "detectable_content:postscript": [
        (
            {"postscript_marker": "P.S."},
            ["안녕.\nP.S. 또 보자.", "안녕.\np. s. 또 보자.", "안녕.\n**P.S.** 또 보자."],
            ["안녕. 또 보자.", "안녕.\nP.S.", "그는 P.S.라고 썼다."],
        ),
        ({"postscript_marker": "P.P.S"}, ["안녕.\nP.P.S 또 보자."], ["안녕.\nP.S. 또 보자."]),
        ({"postscript_marker": "추신"}, ["안녕.\n추신: 또 보자."], ["안녕. 추신은 없다."]),
    ],
    "detectable_format:number_bullet_lists": [
        (
            {"num_bullets": 2},
            ["* 하나\n* 둘", "- 하나\n  - 둘\n\n***\n끝", "* **하나**: 좋다\n* 둘"],
            ["* 하나", "* 하나\n* 둘\n* 셋", "**하나**\n**둘**", "1. 하나\n2. 둘", "* * *\n- - -"],
        ),
    ],
    "detectable_format:number_highlighted_sections": [
        (
            {"num_highlights": 2},
            ["*하나* 그리고 *둘*", "**하나** 그리고 *둘*", "* 목록에 *하나*\n* 목록에 *둘*"],
            ["*하나*뿐이다", "* 하나 * 둘 * 셋 *", "****", "* 목록\n* 목록\n* 목록"],
        ),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "섹션", "num_sections": 3},
            ["섹션 1\n가\n섹션 2\n나\n섹션 3\n다", "## 섹션1\n## 섹션2\n## 섹션3\n## 섹션4"],
            ["섹션 1\n가\n섹션 2\n섹션 1에서 말했듯", "첫 섹션\n둘째 섹션\n셋째 섹션"],
        ),
    ],
    "detectable_format:title": [
        ({}, ["<<가을의 노래>>\n낙엽이", "제목은 <<시>>이다"], ["<가을>", "<< >>", "<<가을\n노래>>"]),
    ],
    "detectable_format:json_format": [
        (
            {},
            ['{"이름": "서울"}', '```json\n{"이름": "서울"}\n```', "```\n[1, 2]\n```"],
            ["{이름: 서울}", '답은 다음과 같습니다. {"이름": "서울"}', "```json\n{,}\n```"],
        ),
    ],
    "detectable_format:constrained_response": [
        (
            {},
            ["제 답변은 예입니다.", "글쎄요. 제 답변은 아마도입니다."],
            ["예", "제 답변은 예입니다", "내 답변은 예입니다."],
        ),
    ],
    "combination:two_responses": [
        (
            {},
            ["첫 답\n******\n둘째 답", "******\n첫 답\n******\n둘째 답\n******"],
            ["첫 답", "같다\n******\n같다", "하나\n******\n둘\n******\n셋", "하나\n***\n둘", "하나\n******\n"],
        ),
    ],
    "combination:repeat_prompt": [
        (
            {"prompt_to_repeat": "가을에 관한 시를 써라."},
            ["가을에 관한 시를 써라.\n낙엽이 진다", "  가을에 관한 시를 써라. 낙엽이"],
            ["네. 가을에 관한 시를 써라.", "가을에 관한 시를 쓰라."],
        ),
    ],
    "startend:end_checker": [
        (
            {"end_phrase": "더 도와드릴까요?"},
            ["다 했습니다. 더 도와드릴까요?", '"다 했습니다. 더 도와드릴까요?"', "더 도와드릴까요?\n"],
            ["더 도와드릴까요? 네.", "더 도와드릴까요"],
        ),
    ],
    "startend:quotation": [
        ({}, ['"안녕하세요."', " “안녕하세요.”\n"], ['안녕하세요."', "'안녕하세요.'", '그가 "안녕"이라고 했다', '""']),
    ],
    "punctuation:no_comma": [
        ({}, ["비가 온다. 춥다."], ["비가 오고, 춥다.", "1,000원", "비가 오고，춥다."]),
    ],
    "language:response_language": [
        (
            {"language": "ko"},
            ["이 문장은 한국어로 쓰였습니다. 오늘은 날씨가 좋습니다."],
            ["This sentence is English.", "12345"],
        ),
        ({"language": "hi"}, ["यह वाक्य हिंदी में लिखा गया है और यह बहुत सरल है।"], ["이 문장은 한국어입니다."]),
    ],
}


def cases(want):
    for kind, rows in CASES.items():
        for given, good, bad in rows:
            for response in good if want else bad:
                yield pytest.param(kind, given, response, id=f"{kind.split(':')[1]}: {response[:24]!r}")


def asks_langdetect(kind):
    if kind == "language:response_language":
        pytest.importorskip("langdetect")


def test_every_kind_has_answers_of_both_sorts():
    assert set(CASES) == set(CHECKERS)
    assert all(good and bad for rows in CASES.values() for _, good, bad in rows)


@pytest.mark.parametrize(("kind", "given", "response"), cases(True))
def test_an_answer_that_follows_is_counted(kind, given, response):
    asks_langdetect(kind)
    assert follows(kind, given, response)


@pytest.mark.parametrize(("kind", "given", "response"), cases(False))
def test_an_answer_that_does_not_follow_is_not_counted(kind, given, response):
    asks_langdetect(kind)
    assert not follows(kind, given, response)


def test_an_empty_answer_follows_nothing():
    assert not follows("punctuation:no_comma", {}, " \n")
    assert not follows("keywords:frequency", {"keyword": "바다", "frequency": 2, **LESS}, "")


def test_conjoining_letters_are_the_syllables_that_they_look_like():
    response = unicodedata.normalize("NFD", "한강을 따라 걸었다.")
    assert "한강" not in response
    assert follows("keywords:existence", {"keywords": ["한강"]}, response)


def test_sentences_of_korean_prose():
    text = "서울의 인구는 약 9.4백만 명이다(2023. 12. 기준).\n정말 많다!!! 그렇지 않은가? “그렇다.” 끝"
    assert sentences(text) == [
        "서울의 인구는 약 9.4백만 명이다(2023. 12. 기준).",
        "정말 많다!!!",
        "그렇지 않은가?",
        "“그렇다.”",
        "끝",
    ]


def item(*instructions):
    return {
        "key": 7,
        "prompt": "?",
        "instruction_id_list": [kind for kind, _ in instructions],
        # The data set's columns: every argument of every kind, None where it has none.
        "kwargs": [{"keywords": None, "num_words": None, **given} for _, given in instructions],
    }


def test_an_item_counts_when_all_its_instructions_are_followed():
    doc = item(("punctuation:no_comma", {}), ("detectable_format:title", {}))
    assert score(doc, ["<<제목>>\n본문"])["prompt_level_strict_acc"] == 1.0
    found = score(doc, ["<<제목>>\n본문, 끝"])
    assert found["prompt_level_strict_acc"] == 0.0
    assert found["inst_level_strict_acc"] == [False, True]
    assert share_followed([found["inst_level_strict_acc"], [True, True]]) == 0.75


def test_loose_forgives_a_polite_line_and_asterisks_and_nothing_else():
    doc = item(("startend:end_checker", {"end_phrase": "끝."}), ("startend:quotation", {}))
    found = score(doc, ['네, 알겠습니다.\n"이야기가 끝."\n도움이 되었기를 바랍니다.'])
    assert found["inst_level_strict_acc"] == [False, False]
    assert found["inst_level_loose_acc"] == [True, True]
    assert score(doc, ['네.\n네.\n"이야기가 끝."'])["inst_level_loose_acc"] == [True, False]
    assert len(set(loose_forms("가*\n나\n다"))) == 6


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (("change_case:english_capital", {}), r"item 7: no check for 'change_case:english_capital'"),
        (("keywords:existence", {}), r"item 7: keywords:existence without keywords"),
        (("length_constraints:number_words", {"num_words": 3, "relation": "equal to"}), r"relation = 'equal to'"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_refused_before_anything_is_generated(instruction, message):
    with pytest.raises(EvalError, match=message):
        checked_rows([item(("punctuation:no_comma", {}), instruction)])
    rows = [item(("punctuation:no_comma", {}))]
    assert checked_rows(rows) is rows
