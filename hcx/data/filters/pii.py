"""Masks personal data: e-mail addresses, Korean telephone numbers, resident registration numbers.

The HyperCLOVA X report (arXiv 2404.01954, section 2.1) removes addresses but keeps their domain. What is masked:

- **E-mail**: the local part becomes `****`; `git@host` (an address of a program) and names of pictures such as
  `icon@2x.png` stay.
- **Telephone**: mobile (01x), Seoul (02), area (0xx), internet and virtual numbers (070, 050x), free call (080), with
  hyphens, dots, spaces, brackets or none, and all of them after +82 or 0082. Service numbers of companies (1588-1234)
  are not personal and stay.
- **Resident registration number** (also of foreigners): six digits of birth, a digit of sex and century (1-8), six
  more. The date must exist. Numbers issued before October 2020 end in a check digit, which must be right. Since then
  the last six digits are random, so there is nothing to check: such a number is masked when its date of birth is
  later than that, or when a word such as the number's Korean name stands shortly before it. One that was issued later
  to an older person and stands without such a word is not told from an order number, and stays.

Dates, versions and order numbers that have such a form only in part stay: a match may not be the middle of a longer
chain of digits.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import date

from hcx.config import Config

EMAIL_FILLER = "****"
PHONE_FILLER = "***-****-****"
RESIDENT_FILLER = "******-*******"

RANDOM_SINCE = date(2020, 10, 5)
"""The day from which new resident registration numbers have no check digit."""
LATEST_BIRTH_YEAR = 2030
"""A later date of birth is another kind of number."""
_CONTEXT_CHARACTERS = 24
"""How far before the number its name may stand."""

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])(?P<local>[A-Za-z0-9][A-Za-z0-9._%+-]{0,63})"
    r"@(?P<domain>(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}(?P<top>[A-Za-z]{2,24}))(?![A-Za-z0-9])"
)
_NOT_DOMAINS = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "ico", "css", "js", "json", "html", "py"})
_PROGRAMS = frozenset({"git", "hg", "svn"})

_BEFORE = r"(?<![0-9A-Za-z_+])(?<![0-9][-._])"
_AFTER = r"(?![0-9A-Za-z_])(?![-._][0-9])"
_AREA = r"(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70|80|50[2-8]|1[016-9])"
_PHONE = re.compile(
    rf"{_BEFORE}(?:"
    # +82 10 1234 5678, +82-(0)2-123-4567, 0082 ...
    rf"(?:\(?\+82\)?|0082)[-. ]?(?:\(0\)|0)?{_AREA}[-. )]{{0,2}}[0-9]{{3,4}}[-. ]?[0-9]{{4}}"
    # 010-1234-5678, (02) 123-4567, 02)123-4567
    rf"|\(?0{_AREA}(?:\)[-. ]?|[-. ])[0-9]{{3,4}}[-. ][0-9]{{4}}"
    # 01012345678
    rf"|0{_AREA}[0-9]{{7,8}}"
    rf"){_AFTER}"
)  # fmt: skip

_RESIDENT = re.compile(
    rf"{_BEFORE}(?P<birth>[0-9]{{6}})(?P<separator>[ ]?[-\u2010-\u2013][ ]?|)(?P<rest>[1-8][0-9]{{6}}){_AFTER}"
)
_RESIDENT_NAMES = re.compile(
    "\uc8fc\ubbfc|\uc678\uad6d\uc778\\s*\ub4f1\ub85d|\uac70\uc18c\uc2e0\uace0|resident registration|\\brrn\\b",
    re.IGNORECASE,
)
"""`jumin` (resident), `oegugin deungnok` (registration of foreigners), `geoso singo` (report of residence)."""
_WEIGHTS = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)


class PiiConfig(Config):
    """Which personal data is masked."""

    email: bool = True
    """Mask the local part of e-mail addresses; the domain stays."""
    phone: bool = True
    """Mask Korean telephone numbers."""
    resident: bool = True
    """Mask Korean resident registration numbers."""


def birth_date(digits: str) -> date | None:
    """The date of birth in a resident registration number; None if there is no such day."""
    century = 1900 if digits[6] in "1256" else 2000
    try:
        born = date(century + int(digits[:2]), int(digits[2:4]), int(digits[4:6]))
    except ValueError:
        return None
    return born if born.year <= LATEST_BIRTH_YEAR else None


def has_check_digit(digits: str) -> bool:
    """Whether the last of 13 digits follows from the others (11 minus the weighted sum mod 11; foreigners: plus 2)."""
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, digits, strict=False))
    offset = 13 if digits[6] in "5678" else 11
    return (offset - total % 11) % 10 == int(digits[12])


def mask_pii(text: str, config: PiiConfig | None = None) -> tuple[str, Counter[str]]:
    """The text with personal data masked, and how much of each kind there was; doing it again changes nothing."""
    config = PiiConfig() if config is None else config
    counts: Counter[str] = Counter()

    def email(match: re.Match[str]) -> str:
        if match["top"].lower() in _NOT_DOMAINS or match["local"].lower() in _PROGRAMS:
            return match[0]
        counts["email"] += 1
        return f"{EMAIL_FILLER}@{match['domain']}"

    def phone(match: re.Match[str]) -> str:
        counts["phone"] += 1
        return PHONE_FILLER

    def resident(match: re.Match[str]) -> str:
        if not _is_resident(match):
            return match[0]
        counts["resident"] += 1
        return RESIDENT_FILLER

    while True:
        before = text
        if config.resident:
            text = _RESIDENT.sub(resident, text)
        if config.email and "@" in text:
            text = _EMAIL.sub(email, text)
        if config.phone:
            text = _PHONE.sub(phone, text)
        # What is masked no longer touches its neighbours, so they may show now.
        if text == before:
            return text, counts


def _is_resident(match: re.Match[str]) -> bool:
    digits = match["birth"] + match["rest"]
    born = birth_date(digits)
    if born is None:
        return False
    if has_check_digit(digits) or (born >= RANDOM_SINCE and match["separator"]):
        return True
    start = match.start()
    return _RESIDENT_NAMES.search(match.string, max(0, start - _CONTEXT_CHARACTERS), start) is not None
