"""Text out of unpacked software packages: help pages, documentation and translation catalogues.

A package is a directory into which a Debian package or a wheel was unpacked. Everything is found by pattern below one
directory, so it does not matter how the packages were laid side by side.
"""

from __future__ import annotations

import gettext
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

_BLOCKS = frozenset(
    (
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "li",
        "td",
        "th",
        "dt",
        "dd",
        "pre",
        "div",
        "section",
        "table",
        "tr",
        "ul",
        "ol",
        "dl",
        "br",
    )
)
_SKIPPED = frozenset(("script", "style", "head", "nav", "footer"))
_FURNITURE = frozenset(("navheader", "navfooter", "sphinxsidebar", "related", "footer", "debug"))
"""Classes of elements that frame a page."""
_HANGUL = re.compile("[\uac00-\ud7a3]")
_LETTER = re.compile("[A-Za-z\uac00-\ud7a3]")
_PROPERTY_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")


@dataclass(frozen=True)
class ExtractedFile:
    """The lines of one file, each with the key that its translation shares.

    Attributes:
        file: path that identifies the file, the same in both languages.
        lines: (key, text); the key is empty where there is no translation to join.
    """

    file: str
    lines: tuple[tuple[str, str], ...]


class _Lines(HTMLParser):
    """Block elements as lines of text; preformatted blocks keep their line breaks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[tuple[str, str]] = []
        self._parts: list[str] = []
        self._key = ""
        self._skipped: list[str] = []
        self._preformatted = 0

    def flush(self) -> None:
        text = "".join(self._parts)
        # Inside <pre> the layout is the content.
        text = text.strip("\n").rstrip() if self._preformatted else " ".join(text.split())
        if text.strip():
            self.lines.append((self._key, text))
        self._parts = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        kind = (values.get("class") or "").split(" ")[0]
        if tag in _SKIPPED or kind in _FURNITURE or (self._skipped and tag == self._skipped[-1]):
            self._skipped.append(tag)
        if tag in _BLOCKS:
            self.flush()
            self._key = values.get("id") or ""
            self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipped and tag == self._skipped[-1]:
            self._skipped.pop()
        if tag in _BLOCKS:
            self.flush()
            self._key = ""
            if tag == "pre":
                self._preformatted = max(0, self._preformatted - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._parts.append(data)


def html_lines(page: str) -> list[tuple[str, str]]:
    """(id attribute or "", text) of every block of a page, in order."""
    parser = _Lines()
    parser.feed(page.replace("\u00b6", ""))  # Sphinx's mark for links to headings
    parser.close()
    parser.flush()
    return parser.lines


def _html_files(root: Path, pattern: str) -> Iterator[ExtractedFile]:
    for path in sorted(root.glob(pattern)):
        lines = [line for line in html_lines(path.read_text(encoding="utf-8")) if len(line[1]) > 3]
        yield ExtractedFile(path.name, tuple(lines))


def libreoffice_help(root: Path, language: str) -> Iterator[ExtractedFile]:
    """LibreOffice help pages: the paragraphs that have an `id`, which both languages share."""
    code = {"ko": "ko", "en": "en-US"}[language]
    base = f"usr/share/libreoffice/help/{code}/text/"
    for path in sorted(root.glob(f"**/{base}**/*.html")):
        seen: set[str] = set()
        lines = []
        for key, text in html_lines(path.read_text(encoding="utf-8")):
            if key and not key.startswith("bm_") and len(text) > 3 and text not in seen:
                seen.add(text)
                lines.append((key, text))
        yield ExtractedFile(path.as_posix().rsplit(base, 1)[-1], tuple(lines))


def homeassistant(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Home Assistant translations, one file per component; keys are JSON paths."""

    def leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from leaves(item, f"{path}/{key}")
        elif isinstance(value, str):
            yield path, value

    pattern = f"translations/{language}.json"
    for path in sorted(root.glob(f"**/homeassistant/components/*/{pattern}")):
        content = json.loads(path.read_text(encoding="utf-8"))
        yield ExtractedFile(path.parent.parent.name, tuple(leaves(content, "")))


def mo_lines(path: Path) -> list[tuple[str, str]]:
    """(English message, translation) of every entry of a compiled gettext catalogue."""
    with open(path, "rb") as file:
        # gettext offers no public way to list a catalogue.
        catalog: dict[object, str] = vars(gettext.GNUTranslations(file))["_catalog"]
    return [(key if isinstance(key, str) else "", text) for key, text in catalog.items() if key]


def postgresql_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """PostgreSQL's message catalogues; keys are the English messages."""
    for path in sorted(root.glob(f"**/usr/share/locale/{language}/LC_MESSAGES/*-[0-9][0-9].mo")):
        yield ExtractedFile(path.name, tuple(mo_lines(path)))


def tomcat_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Apache Tomcat's `LocalStrings_ko.properties`, inside its jar files."""
    for path in sorted(root.glob(f"**/usr/share/java/tomcat10-i18n-{language}-*.jar")):
        if path.is_symlink():
            continue
        with zipfile.ZipFile(path) as jar:
            for name in sorted(jar.namelist()):
                if name.endswith(f"LocalStrings_{language}.properties"):
                    yield ExtractedFile(name, tuple(parse_properties(jar.read(name).decode("utf-8"))))


def parse_properties(content: str) -> Iterator[tuple[str, str]]:
    """(key, text) of a Java `.properties` file."""
    for line in re.sub(r"\\\r?\n\s*", "", content).splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            yield key.strip(), _PROPERTY_ESCAPE.sub(_unescape, value.strip()).replace("''", "'")


def _unescape(match: re.Match[str]) -> str:
    escape = match.group(1)
    return chr(int(escape[1:], 16)) if len(escape) == 5 else {"n": "\n", "t": "\t"}.get(escape, escape)


def jupyterlab_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """JupyterLab's language pack; keys are the English messages."""
    for path in sorted(root.glob(f"**/jupyterlab_language_pack_{language}_*/locale/**/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = [(key, value[0]) for key, value in content.items() if isinstance(value, list) and value]
        yield ExtractedFile(path.name, tuple(lines))


def postgresql_docs(root: Path, language: str) -> Iterator[ExtractedFile]:
    """The PostgreSQL manual (English)."""
    yield from _html_files(root, "**/usr/share/doc/postgresql-doc-*/html/*.html")


def python_docs(root: Path, language: str) -> Iterator[ExtractedFile]:
    """The Python manual (English): tutorial, how-tos, library and language reference, FAQ."""
    for folder in ("faq", "howto", "library", "reference", "tutorial", "using"):
        # The package holds the same folder a second time, as a link.
        for file in _html_files(root, f"**/doc/python3.[0-9]*[0-9]/html/{folder}/*.html"):
            yield ExtractedFile(f"{folder}/{file.file}", file.lines)


def hangul_share(text: str) -> float:
    """Hangul syllables per letter (Latin or Hangul); 0 without letters."""
    letters = len(_LETTER.findall(text))
    return len(_HANGUL.findall(text)) / letters if letters else 0.0
