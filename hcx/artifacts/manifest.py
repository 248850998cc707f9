"""`manifest.json`: written last and atomically, so that its presence means the artifact is complete.

Together the manifests form the ledger: each names its inputs by digest, so a served model leads back through
checkpoints and shards to the raw text.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

import hcx
from hcx.artifacts.digest import digest_file, digest_json
from hcx.artifacts.durable import write_atomically
from hcx.config import Config
from hcx.errors import HcxError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_SECRET_KEY = re.compile(r"(api[_-]?key|token|secret|password|passwd|credential)$", re.IGNORECASE)


class Input(Config):
    """One input of an artifact."""

    role: str
    """What it was used as: `text`, `tokenizer`, `shards`, `checkpoint`, `model`."""
    kind: str
    """The kind that its own manifest states, or `file`."""
    path: str
    """Where it lay, for people; only the digest identifies it."""
    digest: str
    """The digest of its manifest (a directory) or of its bytes (a file)."""


class Manifest(Config):
    """What an artifact directory is and what it was made from."""

    kind: str
    """`text`, `tokenizer`, `shards`, `checkpoint`, `model`, `eval`, `report`, ..."""
    format_version: int = FORMAT_VERSION
    """Version of the directory's layout."""
    producer: dict[str, str]
    """The hcx version and, in a checkout, the commit that wrote it."""
    created: str
    """UTC time of completion, ISO 8601."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration, secrets removed."""
    config_digest: str
    """Digest of `config`."""
    inputs: tuple[Input, ...] = ()
    """The artifacts and files it was made from."""
    files: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Every file in the directory: `size_bytes` and `digest`."""
    counts: dict[str, Any] = Field(default_factory=dict)
    """What a reader wants to know at once: tokens, documents, parameters, steps."""
    seal: str | None = None
    """Digest of all the rest of this manifest, where damage to the manifest itself must show (checkpoints)."""


@cache
def producer() -> dict[str, str]:
    """The version of hcx and the commit of its checkout, if it runs from one."""
    found = {"name": "hcx", "version": hcx.__version__}
    root = Path(hcx.__file__).resolve().parent.parent
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
            )
            if answer.returncode == 0:
                found["commit"] = answer.stdout.strip()
    return found


def scrub_secrets(value: Any) -> Any:
    """Replaces the values of keys that name a secret."""
    if isinstance(value, dict):
        return {
            k: "(removed)" if isinstance(k, str) and _SECRET_KEY.search(k) and isinstance(v, str) else scrub_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub_secrets(item) for item in value]
    return value


class NewerFormat(HcxError):
    """A whole artifact of a later hcx: nothing is wrong with it, and it must not be passed over or overwritten."""


def is_complete(directory: str | Path) -> bool:
    """Whether the directory holds a finished artifact."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path, kind: str | Iterable[str] | None = None) -> Manifest:
    """Reads the manifest and, if asked, checks the kind.

    Raises:
        HcxError: no manifest (never finished), damaged, or of another kind.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise HcxError(f"{directory}: no such directory")
    if not path.is_file():
        raise HcxError(f"{directory}: no {MANIFEST}: not an hcx artifact, or one whose writing was interrupted")
    try:
        text = path.read_text(encoding="utf-8")
        stated = json.loads(text)
        # Before all else: a newer format may have fields that are unknown here.
        version = stated.get("format_version") if isinstance(stated, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: format version {version} is newer than this hcx reads (up to {FORMAT_VERSION}); upgrade hcx"
            )
        manifest = Manifest.model_validate_json(text)
    except ValueError as error:
        raise HcxError(f"{path}: damaged manifest: {error}") from None
    if manifest.seal is not None and manifest.seal != _seal(manifest):
        raise HcxError(f"{path}: damaged manifest: it does not match its own digest")
    wanted = (kind,) if isinstance(kind, str) else tuple(kind or ())
    if wanted and manifest.kind not in wanted:
        raise HcxError(f"{directory}: a {manifest.kind!r} artifact, expected {' or '.join(map(repr, wanted))}")
    return manifest


def verify(directory: str | Path) -> Manifest:
    """Checks every file against the manifest's sizes and digests.

    Raises:
        HcxError: naming the first file that is missing or differs.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise HcxError(f"{path}: listed in the manifest but missing; rebuild the artifact or copy it again")
        if path.stat().st_size != entry["size_bytes"] or digest_file(path) != entry["digest"]:
            raise HcxError(f"{path}: does not match its digest; the file is damaged or was edited")
    return manifest


def artifact_input(role: str, path: str | Path) -> Input:
    """Describes a directory with a manifest, or a plain file or directory, as an input."""
    path = Path(path)
    if path.is_file():
        return Input(role=role, kind="file", path=str(path), digest=digest_file(path))
    if is_complete(path):
        kind = read_manifest(path).kind
        return Input(role=role, kind=kind, path=str(path), digest=digest_file(path / MANIFEST))
    # Made elsewhere (a Hugging Face directory): its identity is that of all its files.
    files = {str(p.relative_to(path)): digest_file(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return Input(role=role, kind="directory", path=str(path), digest=digest_json(files))


class ArtifactWriter:
    """What `new_artifact` yields: the directory to fill, and the counts and inputs that its manifest will state."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Any] = {}
        self.inputs: list[Input] = []


@contextlib.contextmanager
def new_artifact(
    out: str | Path,
    kind: str,
    config: Config | dict[str, Any] | None = None,
    inputs: Iterable[Input] = (),
    overwrite: bool = False,
) -> Iterator[ArtifactWriter]:
    """Fills a hidden sibling directory, writes its manifest last, and renames it into place.

    An exception leaves nothing behind and what was there untouched.

    Raises:
        HcxError: `out` exists and is not empty, and `overwrite` is false.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise HcxError(f"{out}: already exists; choose another directory or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    writer = ArtifactWriter(partial)
    writer.inputs.extend(inputs)
    try:
        yield writer
        write_manifest(partial, kind, config, writer.inputs, writer.counts)
        if out.exists():
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            os.replace(out, old)
            os.replace(partial, out)
            shutil.rmtree(old)
        else:
            os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(
    directory: Path,
    kind: str,
    config: Config | dict[str, Any] | None,
    inputs: Iterable[Input],
    counts: dict[str, Any],
    files: Mapping[str, dict[str, Any]] | None = None,
    sealed: bool = False,
) -> Manifest:
    """Writes the manifest of a directory, atomically.

    Args:
        directory: holds the files.
        kind: of artifact.
        config: resolved; secrets are removed here.
        inputs: what it was made from.
        counts: what a reader wants to know at once.
        files: name -> `size_bytes` and `digest` where the writer knows them; else every file is digested here.
        sealed: state the manifest's own digest in it.
    """
    stated = config.model_dump(mode="json") if isinstance(config, Config) else dict(config or {})
    stated = scrub_secrets(stated)
    if files is None:
        files = {
            str(path.relative_to(directory)): {"size_bytes": path.stat().st_size, "digest": digest_file(path)}
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
    manifest = Manifest(
        kind=kind,
        producer=producer(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        config=stated,
        config_digest=digest_json(stated),
        inputs=tuple(inputs),
        files=dict(files),
        counts=counts,
    )
    if sealed:
        manifest = manifest.model_copy(update={"seal": _seal(manifest)})
    plain = manifest.model_dump(mode="json", exclude=None if sealed else {"seal"})
    text = json.dumps(plain, ensure_ascii=False, indent=1)
    write_atomically(directory / MANIFEST, (text + "\n").encode())
    return manifest


def _seal(manifest: Manifest) -> str:
    return digest_json(manifest.model_dump(mode="json", exclude={"seal"}))
