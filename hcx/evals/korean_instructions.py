"""IFEval-Ko: whether a Korean answer follows instructions that a program can check, one function for each kind.

The kinds and their arguments are those of the data set `allganize/IFEval-Ko`, which translates IFEval (Zhou et al.
2023) and leaves out what Korean does not have: capitals and counts of a letter. The functions are written for this
project from the instructions' meaning. They differ on purpose where the published ones, made for English, pass an
answer that breaks its instruction, or fail one that keeps it:

- A forbidden word is found with a particle behind it, and a paragraph may begin with its word and a particle.
- A keyword is text and not a regular expression.
- An answer whose language cannot be told is not in the language that was asked for; the detection is seeded.
- Quotation marks and commas count in their typographic form too.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from hcx.errors import EvalError, MissingExtra

Row = dict[str, Any]
Arguments = dict[str, Any]

CONSTRAINED = ("제 답변은 예입니다.", "제 답변은 아니요입니다.", "제 답변은 아마도입니다.")
"""The answers that a constrained response chooses from."""

DIVIDER = re.compile(r"(?<!\*)\*{3}(?!\*)")
"""Three asterisks between paragraphs, and not the six between two responses."""

HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,2})(?![\s*])[^*\n]*(?<!\s)\1(?!\*)")
"""`*text*` or `**text**` within a line; the marks touch the text, or a bullet would open one."""

BULLET = re.compile(r"^[ \t]*[*-][ \t]+(?=\S)(?![*\s-]*$)", re.MULTILINE)
"""A Markdown item; a line of nothing but marks is a divider."""

SENTENCE_END = re.compile(r"[.?!。？！…]+[\"'”’」』)\]*_]*(?=\s|$)")

NO_END = re.compile(r"(?:^|[\s(])(?:\d+|[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc)\.$")
"""What ends with a full stop and is no sentence: a number of a list, an initial, an English abbreviation."""


def _compare(count: int, relation: str, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


def _contains(text: str, word: str) -> bool:
    """Korean words carry particles and stand in compounds, so they are looked for anywhere; Latin ones as words."""
    return re.search(_whole(re.escape(word.strip()), word.strip()), text, re.IGNORECASE) is not None


def _whole(pattern: str, word: str) -> str:
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", word) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", word) else ""
    return before + pattern + after


def existing_keywords(text: str, given: Arguments) -> bool:
    """Every one of `keywords` occurs."""
    return all(word.strip().lower() in text.lower() for word in given["keywords"])


def keyword_frequency(text: str, given: Arguments) -> bool:
    """`keyword` occurs less than, or at least, `frequency` times."""
    return _compare(text.lower().count(given["keyword"].strip().lower()), given["relation"], given["frequency"])


def forbidden_words(text: str, given: Arguments) -> bool:
    """None of `forbidden_words` occurs."""
    return not any(_contains(text, word) for word in given["forbidden_words"])


def number_of_words(text: str, given: Arguments) -> bool:
    """Words between blanks (eojeol) are less than, or at least, `num_words`."""
    return _compare(len(text.split()), given["relation"], given["num_words"])


def sentences(text: str) -> list[str]:
    """A text's sentences: what ends with a full stop, a question or an exclamation mark, and what is left over."""
    found: list[str] = []
    start = 0
    for end in SENTENCE_END.finditer(text):
        piece = text[start : end.end()].strip()
        if NO_END.search(piece) or not any(c.isalnum() for c in piece):
            continue
        found.append(piece)
        start = end.end()
    rest = text[start:].strip()
    return [*found, rest] if any(c.isalnum() for c in rest) else found


def number_of_sentences(text: str, given: Arguments) -> bool:
    """Sentences are less than, or at least, `num_sentences`."""
    return _compare(len(sentences(text)), given["relation"], given["num_sentences"])


def number_of_paragraphs(text: str, given: Arguments) -> bool:
    """Exactly `num_paragraphs` between dividers `***`, none empty; a divider at an end divides nothing."""
    parts = [part.strip() for part in DIVIDER.split(text)]
    inner = parts[1 if not parts[0] else 0 : len(parts) - (len(parts) > 1 and not parts[-1])]
    return all(inner) and len(inner) == given["num_paragraphs"]


def first_word_of_paragraph(text: str, given: Arguments) -> bool:
    """Exactly `num_paragraphs` between empty lines, and number `nth_paragraph` begins with `first_word`."""
    paragraphs = [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if len(paragraphs) != given["num_paragraphs"] or not 1 <= given["nth_paragraph"] <= len(paragraphs):
        return False
    word = given["first_word"].strip()
    beginning = paragraphs[given["nth_paragraph"] - 1].lstrip("\"'“‘*_#>「『 ")
    return re.match(_whole(re.escape(word), word), beginning, re.IGNORECASE) is not None


def placeholders(text: str, given: Arguments) -> bool:
    """At least `num_placeholders` times `[text]`."""
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= given["num_placeholders"]


def postscript(text: str, given: Arguments) -> bool:
    """A line begins with `postscript_marker` and has more than it; blanks after full stops are free."""
    marker = re.escape("".join(given["postscript_marker"].split())).replace(r"\.", r"\.\s?")
    return re.search(rf"^[\s*_#>]*{marker}[\s*_:]*[^\s*_:]", text, re.IGNORECASE | re.MULTILINE) is not None


def bullets(text: str, given: Arguments) -> bool:
    """Exactly `num_bullets` Markdown items."""
    return len(BULLET.findall(text)) == given["num_bullets"]


def highlights(text: str, given: Arguments) -> bool:
    """At least `num_highlights` times `*text*` or `**text**`."""
    return len(HIGHLIGHT.findall(text)) >= given["num_highlights"]


def sections(text: str, given: Arguments) -> bool:
    """At least `num_sections` different numbers behind `section_spliter`; naming one twice does not make two."""
    marker = re.escape(given["section_spliter"].strip())
    return len(set(re.findall(rf"{marker}\s?(\d+)", text, re.IGNORECASE))) >= given["num_sections"]


def title(text: str, given: Arguments) -> bool:
    """`<<text>>` occurs within a line."""
    return any(found.strip(" <>") for found in re.findall(r"<<([^\n]+?)>>", text))


def json_format(text: str, given: Arguments) -> bool:
    """The whole answer is JSON; a code fence around it is free."""
    inside = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return False
    return True


def constrained_response(text: str, given: Arguments) -> bool:
    """One of the allowed answers occurs."""
    return any(option in text for option in CONSTRAINED)


def two_responses(text: str, given: Arguments) -> bool:
    """Two different answers with `******` between them."""
    parts = [part.strip() for part in re.split(r"(?<!\*)\*{6}(?!\*)", text)]
    parts = parts[1 if not parts[0] else 0 : len(parts) - (len(parts) > 1 and not parts[-1])]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeated_prompt(text: str, given: Arguments) -> bool:
    """The answer begins with `prompt_to_repeat`."""
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def end_phrase(text: str, given: Arguments) -> bool:
    """The answer ends with `end_phrase`, nothing behind it but a closing quotation mark."""
    return text.strip().strip('"”').lower().endswith(given["end_phrase"].strip().strip('"”').lower())


def quotation(text: str, given: Arguments) -> bool:
    """The whole answer stands in double quotation marks."""
    inside = text.strip()
    return len(inside) > 2 and (inside[0], inside[-1]) in {('"', '"'), ("“", "”")}


def no_comma(text: str, given: Arguments) -> bool:
    """No comma, of half or full width."""
    return "," not in text and "，" not in text


def response_language(text: str, given: Arguments) -> bool:
    """The answer is in `language` (ISO 639-1), by langdetect with a fixed seed."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError:
        raise MissingExtra("langdetect", "eval", "telling an answer's language") from None
    # Unseeded, short texts change their language from run to run.
    DetectorFactory.seed = 0
    try:
        return str(detect(text)) == given["language"]
    except LangDetectException:
        return False


CHECKERS: dict[str, tuple[Callable[[str, Arguments], bool], tuple[str, ...]]] = {
    "keywords:existence": (existing_keywords, ("keywords",)),
    "keywords:frequency": (keyword_frequency, ("keyword", "relation", "frequency")),
    "keywords:forbidden_words": (forbidden_words, ("forbidden_words",)),
    "length_constraints:number_words": (number_of_words, ("relation", "num_words")),
    "length_constraints:number_sentences": (number_of_sentences, ("relation", "num_sentences")),
    "length_constraints:number_paragraphs": (number_of_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": (
        first_word_of_paragraph,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "detectable_content:number_placeholders": (placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (bullets, ("num_bullets",)),
    "detectable_format:number_highlighted_sections": (highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (sections, ("section_spliter", "num_sections")),
    "detectable_format:title": (title, ()),
    "detectable_format:json_format": (json_format, ()),
    "detectable_format:constrained_response": (constrained_response, ()),
    "combination:two_responses": (two_responses, ()),
    "combination:repeat_prompt": (repeated_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": (end_phrase, ("end_phrase",)),
    "startend:quotation": (quotation, ()),
    "punctuation:no_comma": (no_comma, ()),
    "language:response_language": (response_language, ("language",)),
}
"""Kind of instruction -> its check and the arguments that it needs."""

RELATIONS = ("less than", "at least")


def follows(kind: str, given: Arguments, response: str) -> bool:
    """Whether an answer follows one instruction; an empty answer follows none.

    Args:
        kind: one of `CHECKERS`.
        given: its arguments.
        response: the answer.
    """
    text = _composed(response)
    check, _ = CHECKERS[kind]
    return bool(text.strip()) and check(text, {name: _composed(value) for name, value in given.items()})


def _composed(value: Any) -> Any:
    """Hangul as whole syllables: some models write conjoining letters, which look the same."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    return [_composed(item) for item in value] if isinstance(value, list) else value


def checked_rows(dataset: Any) -> Any:
    """The data set itself, once every instruction in it can be checked: found out before answers are generated.

    Raises:
        EvalError: an instruction of an unknown kind, or one that lacks an argument.
    """
    for row in dataset:
        kinds, arguments = row["instruction_id_list"], row["kwargs"]
        if len(kinds) != len(arguments) or not kinds:
            raise EvalError(f"IFEval-Ko item {row['key']}: {len(kinds)} instructions with {len(arguments)} arguments")
        for kind, given in zip(kinds, arguments, strict=True):
            if kind not in CHECKERS:
                raise EvalError(f"IFEval-Ko item {row['key']}: no check for {kind!r}; known: {', '.join(CHECKERS)}")
            missing = [name for name in CHECKERS[kind][1] if given.get(name) in (None, "", [])]
            if missing:
                raise EvalError(f"IFEval-Ko item {row['key']}: {kind} without {', '.join(missing)}")
            if given.get("relation") not in (None, *RELATIONS):
                raise EvalError(f"IFEval-Ko item {row['key']}: relation = {given['relation']!r}; one of {RELATIONS}")
    return dataset


def loose_forms(response: str) -> list[str]:
    """The answer, and without its first line, its last and its asterisks: what a polite opening must not cost."""
    lines = response.split("\n")
    forms = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    forms[0] = response
    return [*forms, *(form.replace("*", "") for form in forms)]


def score(doc: Row, results: Sequence[str]) -> dict[str, Any]:
    """IFEval's four numbers of an item: by prompt and by instruction, strict and loose."""
    response = str(results[0])
    instructions = list(zip(doc["instruction_id_list"], doc["kwargs"], strict=True))
    strict = [follows(kind, given, response) for kind, given in instructions]
    loose = [any(follows(kind, given, form) for form in loose_forms(response)) for kind, given in instructions]
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
    }


def share_followed(items: Sequence[Sequence[bool]]) -> float:
    """Share of all instructions of all items that were followed."""
    found = [followed for item in items for followed in item]
    return sum(found) / len(found)
