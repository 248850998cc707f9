"""More text out of unpacked packages: message catalogues of LibreOffice, Chromium, Firefox and Thunderbird; WordNet's
glosses; and source code. The other half of `hcx.data.extract`."""

from __future__ import annotations

import itertools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from hcx.data.extract import ExtractedFile, mo_lines, parse_properties
from hcx.errors import DataError

_CHUNK = 200
"""Messages or glosses of a large catalogue that count as one file: whole files go to one split."""
_FLUENT = re.compile(r"^\s*(?:\.?[A-Za-z-][\w-]*\s*=|\*?\[[^\]]*\])\s*(.*)$")
_FLUENT_PLACEABLE = re.compile(r"^\{[^}]*->$|^\}$")


def _chunks(name: str, lines: Iterable[tuple[str, str]]) -> Iterator[ExtractedFile]:
    whole = [(key, text) for key, text in lines if len(text) > 3]
    for start in range(0, len(whole), _CHUNK):
        yield ExtractedFile(f"{name}.{start // _CHUNK}", tuple(whole[start : start + _CHUNK]))


def libreoffice_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """LibreOffice's own messages; accelerator marks (`~`) are taken out."""
    for path in sorted(root.glob(f"**/usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES/*.mo")):
        lines = [(key.split("\x04")[-1], text.replace("~", "")) for key, text in mo_lines(path)]
        yield from _chunks(path.stem, lines)


def pak_strings(data: bytes) -> list[tuple[int, str]]:
    """(resource id, text) of a Chromium locale pack, format version 5.

    Layout (Chromium, tools/grit/grit/format/data_pack.py): u32 version, u8 encoding, 3 bytes, u16 entries, u16
    aliases; then entries + 1 times u16 id and u32 offset.

    Raises:
        DataError: not such a file.
    """
    header = struct.calcsize("<IBxxxHH")
    if len(data) < header:
        raise DataError("not a Chromium locale pack: too short")
    version, encoding, entries, _ = struct.unpack_from("<IBxxxHH", data)
    if version != 5 or encoding not in (1, 2) or len(data) < header + 6 * (entries + 1):
        raise DataError(f"not a Chromium locale pack of version 5 (version {version}, encoding {encoding})")
    index = [struct.unpack_from("<HI", data, header + 6 * number) for number in range(entries + 1)]
    codec = "utf-8" if encoding == 1 else "utf-16-le"
    found = []
    for (number, begin), (_, end) in itertools.pairwise(index):
        try:
            found.append((number, data[begin:end].decode(codec)))
        except UnicodeDecodeError:
            continue  # a few resources are bytes, not text
    return found


def chromium_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Chromium's messages; keys are resource numbers."""
    for path in sorted(root.glob(f"**/usr/lib/chromium/locales/{language}.pak")):
        lines = [(str(number), " ".join(text.split())) for number, text in pak_strings(path.read_bytes())]
        yield from _chunks(path.stem, lines)


def fluent_lines(content: str) -> Iterator[tuple[str, str]]:
    """The texts of a Fluent file (`.ftl`), line by line: values, attributes and variants."""
    for line in content.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        match = _FLUENT.match(line)
        text = (match[1] if match else line).strip()
        if text and not _FLUENT_PLACEABLE.match(text) and "->" not in text:
            yield "", text


def mozilla_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Messages in the language packs of Firefox and Thunderbird."""
    for path in sorted(root.glob(f"**/langpack-{language}@*.xpi")):
        with zipfile.ZipFile(path) as pack:
            for name in sorted(pack.namelist()):
                lines: Iterable[tuple[str, str]]
                if name.endswith(".ftl"):
                    lines = fluent_lines(pack.read(name).decode("utf-8"))
                elif name.endswith(".properties"):
                    lines = parse_properties(pack.read(name).decode("utf-8"))
                else:
                    continue
                yield ExtractedFile(f"{path.stem}/{name}", tuple(line for line in lines if len(line[1]) > 3))


def firefox_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Firefox's messages."""
    return (file for file in mozilla_messages(root, language) if "firefox" in file.file.split("/")[0])


def thunderbird_messages(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Thunderbird's messages."""
    return (file for file in mozilla_messages(root, language) if "thunderbird" in file.file.split("/")[0])


def wordnet_glosses(root: Path, language: str) -> Iterator[ExtractedFile]:
    """WordNet: the words of each sense with its gloss and examples, by lexicographer file."""
    for part in ("noun", "verb", "adj", "adv"):
        for path in sorted(root.glob(f"**/usr/share/wordnet/data.{part}")):
            by_file: dict[str, list[tuple[str, str]]] = {}
            for line in path.read_text(encoding="utf-8").splitlines():
                head, bar, gloss = line.partition(" | ")
                if bar and not line.startswith(" "):
                    cells = head.split()
                    # offset, lexicographer file, type, number of words (hexadecimal), then word and sense number.
                    words = [cells[4 + 2 * n].replace("_", " ").split("(")[0] for n in range(int(cells[3], 16))]
                    by_file.setdefault(cells[1], []).append((cells[0], f"{', '.join(words)}: {gloss.strip()}"))
            for number, lines in sorted(by_file.items()):
                yield from _chunks(f"{part}.{number}", lines)


def homeassistant_code(root: Path, language: str) -> Iterator[ExtractedFile]:
    """Home Assistant's Python files."""
    for path in sorted(root.glob("**/homeassistant/**/*.py")):
        text = path.read_bytes().decode("utf-8", errors="replace")
        yield ExtractedFile(path.as_posix().rsplit("/homeassistant/", 1)[-1], (("", text),))
