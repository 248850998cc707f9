"""The base of every typed configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, keyword-only model that forbids unknown keys and refuses silent type coercion.

    Subclasses document every field with a docstring below it; `describe_fields` turns those into the
    field reference, so defaults and meanings are written once.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        strict=True,
        protected_namespaces=(),
    )


def describe_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (key path, type, default, meaning) for every field, nested models included."""
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        path = f"{prefix}{name}"
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield path, annotation.__name__, "", field.description or ""
            yield from describe_fields(annotation, prefix=f"{path}.")
        else:
            type_name = getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
            yield path, type_name, default, field.description or ""
