"""Text to token ids and back, for our own tokenizers and any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from hcx.artifacts import digest_bytes
from hcx.errors import DataError
from hcx.tokenizer import chat
from hcx.tokenizer.alphabet import BYTE_OF, to_bytes
from hcx.tokenizer.sentencepiece_bpe import SENTENCEPIECE_FILE
from hcx.tokenizer.special import ASSISTANT, END_OF_TEXT, END_OF_TURN, USER, chat_template, preamble_of

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Newer Hugging Face directories keep the template in this file rather than in the config."""

_BYTE_FALLBACK = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Tokenizer:
    """A codec with its special tokens and chat template.

    Special strings inside ordinary text (`<|endoftext|>` typed by a user) are ordinary characters unless the caller
    allows them. No beginning-of-text token is ever added by `encode`.

    Args:
        tokenizer_json: the content of `tokenizer.json`.
        config: the content of `tokenizer_config.json`.
        source: where it was read from, for errors.
        companions: file name -> content of what is kept beside it and never read for encoding: the SentencePiece model
            that it was made from.
    """

    def __init__(
        self,
        tokenizer_json: str,
        config: Mapping[str, Any],
        source: str = "tokenizer",
        companions: Mapping[str, bytes] | None = None,
    ) -> None:
        self.tokenizer_json = tokenizer_json
        self._config = dict(config)
        self.companions: dict[str, bytes] = dict(companions or {})
        try:
            self._backend = Backend.from_str(tokenizer_json)
            # A second codec of the same file: the property below is not safe to flip while other threads encode.
            self._plain = Backend.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{source}: not a tokenizer.json that the tokenizers library reads: {error}") from None
        self._plain.encode_special_tokens = True
        for backend in (self._backend, self._plain):
            backend.no_padding()
            backend.no_truncation()
        self.special_tokens: dict[str, int] = {
            token.content: number
            for number, token in sorted(self._backend.get_added_tokens_decoder().items())
            if token.special
        }
        self._special_ids = frozenset(self.special_tokens.values())
        eos = self._named("eos_token")
        if eos is None:
            eos = self.special_tokens.get(END_OF_TEXT)
        if eos is None:
            raise DataError(
                f"{source}: no end-of-text token; set eos_token in {TOKENIZER_CONFIG} to one of the tokenizer's tokens"
            )
        pad = self._named("pad_token")
        self.eos_id: int = eos
        self.bos_id: int | None = self._named("bos_token")
        self.pad_id: int = eos if pad is None else pad
        self.digest: str = digest_bytes(tokenizer_json.encode())

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads a directory with a `tokenizer.json`; the other files of a Hugging Face directory may be absent.

        Raises:
            DataError: the file is missing or damaged, or no end-of-text token can be found.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_JSON
        if not path.is_file():
            raise DataError(f"{directory}: no {TOKENIZER_JSON}; train one with: hcx tokenizer train RECIPE --out DIR")
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        config = _read_json(directory / TOKENIZER_CONFIG)
        template = directory / CHAT_TEMPLATE_FILE
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        if config.get("eos_token") is None:
            _eos_from_model(directory, text, config)
        beside = directory / SENTENCEPIECE_FILE
        companions = {SENTENCEPIECE_FILE: beside.read_bytes()} if beside.is_file() else {}
        return cls(text, config, str(directory), companions)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` (byte for byte what was loaded), `tokenizer_config.json` and the companions."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_JSON).write_bytes(self.tokenizer_json.encode())
        text = json.dumps(self._config, ensure_ascii=False, indent=1)
        (directory / TOKENIZER_CONFIG).write_bytes((text + "\n").encode())
        for name, content in self.companions.items():
            (directory / name).write_bytes(content)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs (padding tokens included)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the directory, if it has one."""
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default", next(iter(named.values()), None))
        return template

    @cached_property
    def prompt_prefix(self) -> tuple[int, ...]:
        """What the directory's own rules put before every text: a beginning-of-text token, or (ours) nothing."""
        text = "a"
        whole = self._backend.encode(text, add_special_tokens=True).ids
        plain = self.encode(text)
        places = [n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain]
        return tuple(whole[: places[0]]) if places else ()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text; nothing is added at either end.

        Args:
            text: any text without lone surrogates.
            allow_special: whether special strings in the text become special tokens. Never for text from users.

        Raises:
            DataError: the text cannot be written as UTF-8.
        """
        backend = self._backend if allow_special else self._plain
        return backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on several threads."""
        encodings = self._plain.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; an incomplete UTF-8 sequence becomes U+FFFD.

        Raises:
            DataError: an id lies outside the vocabulary.
        """
        self._check_ids(ids)
        if self._byte_level:
            return b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self._special_ids)).decode(
                "utf-8", errors="replace"
            )
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (special tokens: their name).

        The concatenation over the ids of a text is the text's UTF-8 form, for byte-level tokenizers.
        """
        self._check_ids([token_id])
        return self._bytes_of(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        cache = self._token_bytes
        if token_id not in cache:
            token = self._backend.id_to_token(token_id)
            if token is None:  # a hole in a foreign vocabulary
                value = b""
            elif token_id in self._added_ids:
                value = token.encode()
            elif self._byte_level and all(character in BYTE_OF for character in token):
                value = to_bytes(token)
            elif match := _BYTE_FALLBACK.match(token):
                value = bytes([int(match.group(1), 16)])
            else:
                value = token.replace("\u2581", " ").encode()
            cache[token_id] = value
        return cache[token_id]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Messages (`role`, `content`) as ids in this tokenizer's chat format.

        Contents are ordinary text: no user can write a role token. Foreign templates run in a Jinja sandbox under a
        time limit.

        Raises:
            DataError: the tokenizer has no chat format, or the messages do not fit it.
        """
        chat.check_messages(messages)
        preamble = self._own_preamble()
        if preamble is not None:
            return chat.render_own(self, _opened(messages, preamble), add_generation_prompt)
        return self._render_foreign(messages, add_generation_prompt)

    def render_training(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """A conversation to learn from: the ids of `render_chat`, and which of them the assistant has to produce.

        Trained are an answer's text and the token that closes its turn, not the header before it.

        Raises:
            DataError: as `render_chat`; or a foreign template has no place where an answer begins.
        """
        chat.check_messages(messages)
        preamble = self._own_preamble()
        if preamble is not None:
            return chat.trained_own(self, _opened(messages, preamble))
        return chat.trained_foreign(self._render_foreign, messages, self._special_ids)

    def with_preamble(self, preamble: str) -> Tokenizer:
        """This tokenizer with a text that opens every conversation which has no system text of its own.

        Raises:
            DataError: the tokenizer has a foreign chat template.
        """
        if self._own_preamble() is None:
            raise DataError(
                "a preamble belongs to our own chat format, and this tokenizer has another; put the text into the "
                "conversations, as a message with the role system"
            )
        config = {**self._config, "chat_template": chat_template(preamble)}
        return Tokenizer(self.tokenizer_json, config, companions=self.companions)

    def _own_preamble(self) -> str | None:
        """The preamble of our own chat format, empty for none; None if the tokenizer has another format or no one."""
        if not all(token in self.special_tokens for token in (USER, ASSISTANT, END_OF_TURN)):
            return None
        return "" if self.chat_template is None else preamble_of(self.chat_template)

    def _render_foreign(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[int]:
        if self.chat_template is None:
            raise DataError(
                "this tokenizer has no chat template and no role tokens; prompt the model with plain text instead"
            )
        variables = {name: self._text_of(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return chat.render_foreign(self, self.chat_template, messages, add_generation_prompt, variables)

    def _text_of(self, name: str) -> str | None:
        value = self._config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _named(self, name: str) -> int | None:
        text = self._text_of(name)
        return None if text is None else self._backend.token_to_id(text)

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise DataError(f"token id {token_id}: outside the vocabulary of {self.vocab_size}")

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.tokenizer_json).get("decoder"))


def _opened(messages: Sequence[Mapping[str, Any]], preamble: str) -> Sequence[Mapping[str, Any]]:
    if not preamble or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": preamble}, *messages]


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text with a lone surrogate at character {error.start} is not UTF-8; mend the source"
        ) from None
    return text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return value


def _eos_from_model(directory: Path, tokenizer_json: str, config: dict[str, Any]) -> None:
    """Some directories name the end token only by id, in the model's own configuration."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(directory / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int):
            token = Backend.from_str(tokenizer_json).id_to_token(eos)
            if token is not None:
                config["eos_token"] = token
                return
