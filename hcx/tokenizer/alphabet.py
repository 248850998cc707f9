"""One printable character for each byte, as GPT-2 chose them: the alphabet of byte-level vocabularies."""

from __future__ import annotations

_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_REST = tuple(byte for byte in range(256) if byte not in frozenset(_PRINTABLE))

BYTE_OF: dict[str, int] = {
    **{chr(byte): byte for byte in _PRINTABLE},
    **{chr(256 + number): byte for number, byte in enumerate(_REST)},
}
"""Character -> byte."""

_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def to_alphabet(text: str) -> str:
    """The UTF-8 bytes of a text, one character each; a space becomes U+0120."""
    return "".join(map(_CHARACTER_OF.__getitem__, text.encode()))


def to_bytes(mapped: str) -> bytes:
    """The inverse of `to_alphabet`, for any run of mapped characters, whole UTF-8 sequences or not.

    Raises:
        KeyError: a character outside the alphabet.
    """
    return bytes(map(BYTE_OF.__getitem__, mapped))
