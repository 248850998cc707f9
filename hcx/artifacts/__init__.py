"""Artifact directories: complete or absent, described by a manifest, linked to their inputs by digest."""

from hcx.artifacts.digest import digest_bytes, digest_file, digest_json
from hcx.artifacts.manifest import (
    Input,
    Manifest,
    NewerFormat,
    artifact_input,
    is_complete,
    new_artifact,
    read_manifest,
    verify,
)
from hcx.artifacts.resources import find_file, find_resource, resource_names

__all__ = [
    "Input",
    "Manifest",
    "NewerFormat",
    "artifact_input",
    "digest_bytes",
    "digest_file",
    "digest_json",
    "find_file",
    "find_resource",
    "is_complete",
    "new_artifact",
    "read_manifest",
    "resource_names",
    "verify",
]
