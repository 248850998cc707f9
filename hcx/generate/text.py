"""Tokens to text as they come: never half a UTF-8 sequence, half a Hangul syllable or half a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_PROBE = " a b"
# Conjoining jamo: leading consonants, vowels and trailing consonants that combine to one syllable (Unicode 3.12).
_JAMO = ((0x1100, 0x11FF), (0xA960, 0xA97F), (0xD7B0, 0xD7FF))


class Detokenizer:
    """Makes text streams for one tokenizer.

    A byte-level tokenizer's text is the concatenation of its tokens' bytes, so streaming costs a constant per token.
    Others (which for example drop a leading space) are decoded over a window.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.special_tokens.values())
        probe = tokenizer.encode(_PROBE)
        joined = b"".join(tokenizer.token_bytes(token) for token in probe).decode("utf-8", errors="replace")
        self.is_bytes = joined == tokenizer.decode(probe) == _PROBE
        self.vocab_size = tokenizer.vocab_size

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A stream for one answer, which ends at any of the stop strings."""
        return TextStream(self, stop)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, all at once."""
        stream = self.stream()
        return "".join(stream.push(token) for token in tokens) + stream.finish()

    def visible(self, token: int) -> bool:
        """Whether a token stands for text: special tokens and embedding rows beyond the vocabulary do not."""
        return token not in self.special and token < self.vocab_size

    def token_text(self, token: int) -> str:
        """A name for one token: its text, or `bytes:\\xNN...` where its bytes alone are no text."""
        if token >= self.vocab_size:
            return f"<|unused_{token}|>"
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token."""
        return self.tokenizer.token_bytes(token) if token < self.vocab_size else b""


class TextStream:
    """Text of one answer.

    Attributes:
        text: what has been released; after `finish` it is the whole answer, without the stop string.
        stopped: the stop string that was met, or None.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._held = ""
        self._assembly: _Bytes | _Window = _Bytes(detokenizer) if detokenizer.is_bytes else _Window(detokenizer)
        self._visible = detokenizer.visible

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain, often empty."""
        if self.stopped is not None or not self._visible(token):
            return ""
        self._held += self._assembly.push(token)
        return self._release(final=False)

    def finish(self) -> str:
        """Ends the answer; returns what was held back. An incomplete sequence of bytes becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        self._held += self._assembly.finish()
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            place, self.stopped = min(found)
            ready, self._held = self._held[:place], ""
        else:
            keep = 0 if final else max(_tail_of_stop(self._held, self._stop), _open_syllable(self._held))
            cut = len(self._held) - keep
            ready, self._held = self._held[:cut], self._held[cut:]
        self.text += ready
        return ready


def _tail_of_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def _open_syllable(text: str) -> int:
    """Length of the run of conjoining jamo at the end, which the next character may continue."""
    size = 0
    while size < len(text) and any(low <= ord(text[-1 - size]) <= high for low, high in _JAMO):
        size += 1
    return size


class _Bytes:
    """Complete characters out of a sequence of bytes."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._token_bytes = detokenizer.tokenizer.token_bytes

    def push(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Differences of the decoded text of the last few tokens."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._decode = detokenizer.tokenizer.decode
        self._tokens: list[int] = []
        self._start = self._read = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._difference(final=False)

    def finish(self) -> str:
        return self._difference(final=True)

    def _difference(self, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        now = self._decode(self._tokens[self._start :])
        if not final and (now.endswith(REPLACEMENT) or len(now) <= len(before)):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return now[len(before) :]
