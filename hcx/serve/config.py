"""What a server is told: where it listens, and how much anyone may ask of it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from hcx.config import Config
from hcx.errors import ConfigError


class ServeConfig(Config):
    """Address and caps of a server."""

    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach demands API keys."""
    port: int = 8000
    """TCP port; 0 lets the system choose one."""
    model_name: str = "hcx"
    """Name of the model in requests and answers."""
    max_batch: int = 8
    """Requests that generate at the same time."""
    max_seq: int | None = None
    """Tokens of prompt and answer together; the model's own limit, but not above 4096, if not given."""
    prefill_tokens: int = 512
    """Prompt tokens read between two generated tokens of the other requests."""
    max_queue: int = 256
    """Choices that may wait for a row; more are refused with status 429."""
    max_body_bytes: int = 4 * 2**20
    """Size of a request's body; more is refused with status 413."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt; the context if not given."""
    max_choices: int = 128
    """Prompts times `n` in one request."""
    max_logprobs: int = 20
    """Alternatives per token."""
    max_stop: int = 16
    """Stop strings per request."""
    max_connections: int = 1024
    """Open connections."""
    request_timeout_s: float = 300.0
    """Seconds that a request may take altogether."""
    body_timeout_s: float = 30.0
    """Seconds within which a request's body must arrive."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(path: Path | None, host: str) -> tuple[str, ...]:
    """The keys of a file, one per line; lines that are empty or begin with `#` are skipped.

    Raises:
        ConfigError: an address that others can reach without a key file; a file that cannot be read or has no keys.
    """
    if path is None:
        if not is_loopback(host):
            raise ConfigError(
                f"--host {host} can be reached from other machines, so it needs --api-key-file FILE "
                "(one key per line); or listen on 127.0.0.1"
            )
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key; write one key per line")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigError(f"--api-key-file {path}: keys must be printable ASCII, as they travel in a header")
    return keys
