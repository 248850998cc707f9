"""Strict configuration: YAML 1.2 decoded to frozen typed models, with overrides by dotted path."""

from hcx.config.decode import apply_overrides, decode, dump_yaml, load_config, load_yaml, resolve_extends
from hcx.config.model import Config, describe_fields

__all__ = [
    "Config",
    "apply_overrides",
    "decode",
    "describe_fields",
    "dump_yaml",
    "load_config",
    "load_yaml",
    "resolve_extends",
]
