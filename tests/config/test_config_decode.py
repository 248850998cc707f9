"""YAML 1.2, overrides, extends, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from hcx.config import Config, apply_overrides, decode, describe_fields, dump_yaml, load_config, load_yaml
from hcx.config.decode import parse_yaml
from hcx.errors import ConfigError


class Plain(Config):
    kind: Literal["plain"] = "plain"
    workers: int = 1
    """Worker threads."""


class Sharded(Config):
    kind: Literal["sharded"] = "sharded"
    stage: int = 1


class Optim(Config):
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)


class Recipe(Config):
    engine: Annotated[Plain | Sharded, Field(discriminator="kind")] = Plain()
    optim: Optim = Optim()
    languages: tuple[str, ...] = ("ko", "en")
    name: str = ""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_exponent_without_dot_is_a_number_and_no_is_a_language(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "optim: {lr: 6e-4}\nlanguages: [no, ko]\n")
    recipe = load_config(Recipe, path)
    assert recipe.optim.lr == 6e-4
    assert recipe.languages == ("no", "ko")


def test_override_sets_nested_value_and_replaces_another_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "engine: {kind: plain, workers: 3}\n")
    recipe = load_config(Recipe, path, ["engine.kind=sharded", "optim.betas=[0.8, 0.9]"])
    assert recipe.engine == Sharded()
    assert recipe.optim.betas == (0.8, 0.9)


def test_unknown_key_names_path_suggestion_and_valid_names() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lrr: unknown key; did you mean 'lr'\? valid: betas, lr"):
        decode(Recipe, {"optim": {"lrr": 1}}, "r.yaml")


def test_unknown_key_inside_a_kind_shows_the_path_that_the_user_wrote() -> None:
    with pytest.raises(ConfigError, match=r"r\.yaml: engine\.worker: unknown key; did you mean 'workers'"):
        decode(Recipe, {"engine": {"kind": "plain", "worker": 1}}, "r.yaml")


def test_text_where_a_number_belongs_is_refused_with_value_and_path() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr = 'fast'"):
        decode(Recipe, {"optim": {"lr": "fast"}}, "r.yaml")


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Recipe, {"nam": "x", "optim": {"lr": "fast"}}, "r.yaml")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("engine", [{"kind": "fast"}, {"workers": 2}])
def test_wrong_or_missing_kind_lists_the_valid_ones(engine: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="'plain', 'sharded'"):
        decode(Recipe, {"engine": engine}, "r.yaml")


def test_extends_merges_deeply_and_a_cycle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "optim: {lr: 0.5, betas: [0.1, 0.2]}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\noptim: {lr: 0.25}\n")
    assert load_config(Recipe, child).optim == Optim(lr=0.25, betas=(0.1, 0.2))
    write(tmp_path / "base.yaml", "extends: child.yaml\n")
    with pytest.raises(ConfigError, match="cycle"):
        load_config(Recipe, child)


def test_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    with pytest.raises(ConfigError, match="aliases expand"):
        load_yaml(write(tmp_path / "bomb.yaml", "\n".join(lines)))


def test_alias_to_an_enclosing_node_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_yaml("a: &a [1, *a]\n", "x")


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "mapping"), ("a: [1\n", "not valid YAML"), ("a: 1\na: 2\n", "a")]
)
def test_damaged_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path / "r.yaml", text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_yaml(tmp_path / "absent.yaml")


def test_override_without_equals_sign_shows_the_form() -> None:
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        apply_overrides({}, ["optim.lr"])


def test_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe(optim=Optim(lr=6e-4), name="no", languages=("ko", "코드"))
    assert load_config(Recipe, write(tmp_path / "r.yaml", dump_yaml(recipe))) == recipe


def test_field_reference_carries_the_docstrings() -> None:
    described = {path: meaning for path, _, _, meaning in describe_fields(Recipe)}
    assert described["optim.lr"] == "Peak learning rate."
