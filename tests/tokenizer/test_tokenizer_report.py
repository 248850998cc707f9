"""The comparison of tokenizers, and the shipped recipes."""

from __future__ import annotations

import json

import pytest

from hcx.artifacts import find_resource, resource_names
from hcx.cli.main import main
from hcx.config import load_config
from hcx.data.recipe import DataRecipe
from hcx.errors import DataError
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import train_tokenizer
from hcx.tokenizer.recipe import TokenizerRecipe
from hcx.tokenizer.report import tokenizer_report


def test_bytes_per_token_are_bytes_by_tokens_for_each_pair_of_tokenizer_and_text(tmp_path) -> None:
    for size in (384, 512):
        train_tokenizer(TINY_TEXT, size).save(tmp_path / str(size))
    rows = tokenizer_report([tmp_path / "384", tmp_path / "512"], [("ko", TINY_TEXT[0]), ("code", TINY_TEXT[4])])
    assert [(row.vocab_size, row.text) for row in rows] == [(384, "ko"), (384, "code"), (512, "ko"), (512, "code")]
    for row in rows:
        assert row.bytes_per_token == row.num_bytes / row.tokens
        assert row.lossless
    assert rows[0].num_bytes == len(TINY_TEXT[0].encode())
    assert rows[2].bytes_per_token > rows[0].bytes_per_token  # more merges, fewer tokens
    assert rows[0].bytes_per_token > rows[0].characters_per_token


def test_an_empty_text_is_refused(tmp_path) -> None:
    train_tokenizer(TINY_TEXT, 384).save(tmp_path)
    with pytest.raises(DataError, match="empty text"):
        tokenizer_report([tmp_path], [("nothing", "")])


def test_the_command_measures_held_out_text_of_each_language(tmp_path, capsys) -> None:
    train_tokenizer(TINY_TEXT, 384).save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "report", str(tmp_path), "--text", "held-out:ko", "--text", "held-out:code", "--json"])
    assert not stop.value.code
    korean, code = json.loads(capsys.readouterr().out)
    assert (korean["text"], code["text"]) == ("held-out:ko", "held-out:code")
    assert korean["lossless"]
    assert code["lossless"]
    assert korean["num_bytes"] > 100_000
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "report", str(tmp_path), "--text", "held-out:jp"])
    assert stop.value.code == 2
    assert "valid: held-out:ko" in capsys.readouterr().err


@pytest.mark.parametrize("name", resource_names("tokenizer"))
def test_every_shipped_tokenizer_recipe_loads_and_names_a_data_recipe(name: str) -> None:
    recipe = load_config(TokenizerRecipe, find_resource(name))
    load_config(DataRecipe, find_resource(recipe.data))
    assert recipe.vocab_size % 128 == 0
