"""From YAML files and `key=value` overrides to typed models, with errors a user can act on."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from hcx.errors import ConfigError, did_you_mean

T = TypeVar("T", bound=BaseModel)

MAX_YAML_BYTES = 4 << 20
MAX_YAML_NODES = 100_000
"""Nodes after alias expansion: nine nested aliases of nine must not become a billion values."""


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # the pure reader follows YAML 1.2: 6e-4 is a number, `no` is a string
    yaml.default_flow_style = False
    yaml.allow_duplicate_keys = False
    return yaml


def _expanded_size(node: Node | None, known: dict[int, int], path: tuple[int, ...]) -> int:
    if node is None or isinstance(node, ScalarNode):
        return 1
    if id(node) in path:
        raise ConfigError("an alias refers to the node that contains it; write the values out")
    if id(node) not in known:
        path = (*path, id(node))
        children: list[Node] = []
        if isinstance(node, MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            children = list(node.value)
        known[id(node)] = 1 + sum(_expanded_size(child, known, path) for child in children)
    return known[id(node)]


def parse_yaml(text: str, source: str) -> Any:
    """Parses YAML 1.2 text; `source` names it in errors."""
    if len(text.encode()) > MAX_YAML_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_YAML_BYTES} bytes; a recipe is a short file")
    try:
        size = _expanded_size(_yaml().compose(io.StringIO(text)), {}, ())
        if size > MAX_YAML_NODES:
            raise ConfigError(f"{source}: aliases expand to {size} values, at most {MAX_YAML_NODES} are allowed")
        return _yaml().load(io.StringIO(text))
    except YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, a YAML file is expected") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    value = parse_yaml(text, str(path))
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, found {type(value).__name__}")
    return value


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else (lists too) is replaced.

    A mapping with another `kind` replaces the base whole: the fields of one kind mean nothing to another.
    """
    if "kind" in over and "kind" in base and over["kind"] != base["kind"]:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def resolve_extends(path: str | Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML file and merges it over the files it `extends:` (a path or a list, relative to the file)."""
    path = Path(path).resolve()
    if path in _chain:
        raise ConfigError("extends makes a cycle: " + " -> ".join(str(p) for p in (*_chain, path)))
    own = load_yaml(path)
    parents = own.pop("extends", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends = {parents!r}; write a path or a list of paths")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = deep_merge(merged, resolve_extends(path.parent / parent, (*_chain, path)))
    return deep_merge(merged, own)


_OVERRIDE = re.compile(r"^([A-Za-z_][\w-]*(?:\.[\w-]+)*)=(.*)$", re.DOTALL)


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets `a.b.c=value` in nested mappings; the value is YAML (`optim.lr=6e-4`, `data.languages=[ko, en]`)."""
    result = deep_merge({}, values)
    for override in overrides:
        match = _OVERRIDE.match(override)
        if match is None:
            raise ConfigError(f"override {override!r}: write key.path=value, for example optim.lr=3e-4")
        keys = match.group(1).split(".")
        value = parse_yaml(match.group(2), f"override {override!r}")
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        where: Any = result
        for depth, key in enumerate(keys[:-1]):
            where = where.get(key, {})
            if isinstance(where, list):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(keys[: depth + 1])} is a list; give the whole list instead"
                )
            if not isinstance(where, Mapping):
                break
        result = deep_merge(result, nested)
    return result


def _walk(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str | int], type[BaseModel] | None]:
    """The key path as the user wrote it (union tags left out) and the innermost model class on it."""
    current: Any = model
    owner: type[BaseModel] | None = model
    written: list[str | int] = []
    for part in location:
        models = [leaf for leaf in _flatten(current) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        tagged = [leaf for leaf in models if "kind" in leaf.model_fields and leaf.model_fields["kind"].default == part]
        if tagged and len(models) > 1:
            current = owner = tagged[0]
            continue
        written.append(part)
        if isinstance(part, int):
            continue  # an item of a list: the item types are among the leaves already
        holder = next((leaf for leaf in models if part in leaf.model_fields), None)
        if models:
            owner = holder or models[0]
        current = holder.model_fields[part].annotation if holder is not None else None
    return written, owner


def _flatten(annotation: Any) -> list[Any]:
    if get_origin(annotation) is None:
        return [annotation]
    return [leaf for arg in get_args(annotation) for leaf in _flatten(arg)]


def _tags(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The kinds that are valid at a key."""
    current: Any = model
    for part in location:
        models = [leaf for leaf in _flatten(current) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        holder = next((leaf for leaf in models if part in leaf.model_fields), None)
        if holder is not None:
            current = holder.model_fields[str(part)].annotation
    kinds = [leaf.model_fields.get("kind") for leaf in _flatten(current) if hasattr(leaf, "model_fields")]
    return sorted(repr(field.default) for field in kinds if field is not None)


def _explain(model: type[BaseModel], source: str, error: Any) -> str:
    location = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    written, owner = _walk(model, location)
    key = ".".join(str(part) for part in written)
    kind = error["type"]
    if kind == "extra_forbidden":
        valid = owner.model_fields if owner is not None else []
        return f"{source}: {key}: unknown key; {did_you_mean(str(location[-1]), valid)}"
    if kind == "missing":
        return f"{source}: {key}: required, but not given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = error.get("ctx", {}).get("tag")
        shown = "is not given" if given is None else f"= {given!r}"
        return f"{source}: {key}.kind {shown}; valid: {', '.join(_tags(model, location))}"
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return f"{source}: {message}"
    return f"{source}: {key} = {error['input']!r}: {message}"


def decode(model: type[T], values: Mapping[str, Any], source: str) -> T:
    """Validates plain values as `model`; every problem becomes a line of one `ConfigError`."""
    try:
        return model.model_validate_json(_to_json(values, source))
    except ValidationError as error:
        lines = [_explain(model, source, item) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def _to_json(values: Mapping[str, Any], source: str) -> str:
    # Strict validation from JSON lets lists become tuples and integers become floats, but not text become numbers.
    import json

    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}; only text, numbers, booleans, lists and mappings are allowed") from None


def load_config(model: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads, extends, overrides and validates: the way every recipe becomes typed."""
    values = apply_overrides(resolve_extends(path), overrides)
    return decode(model, values, str(path))


def dump_yaml(value: BaseModel | Mapping[str, Any]) -> str:
    """The resolved configuration as YAML, to print or to save beside an output."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else dict(value)
    stream = io.StringIO()
    yaml = _yaml()
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(plain, stream)
    return stream.getvalue()
