"""Small shard directories."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hcx.data.build import build_shards
from hcx.data.recipe import DataRecipe, JsonlSource, LanguageConfig, TrainedTokenizer
from hcx.data.shards import ShardSet

WORDS = {
    "ko": "문서 파일 열기 저장 사용자 설정 언어 모델 바다 하늘 구름 서울 한강 사람 시간 학교".split(),  # noqa: SIM905
    "en": "document file open save user setting language model sea sky cloud city river person time".split(),  # noqa: SIM905
    "code": "def return for in range print value index self import class if else None True (x) = + :".split(),  # noqa: SIM905
}


def random_texts(language: str, count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 120 words, no two alike."""
    generator = random.Random(f"{language}-{seed}")
    return [
        f"{number} " + " ".join(generator.choices(WORDS[language], k=generator.randint(1, 120)))
        for number in range(count)
    ]


def tiny_shards(
    path: str | Path, documents: int = 40, vocab_size: int = 512, shares: dict[str, float] | None = None
) -> ShardSet:
    """Shards of random Korean, English and code words, with a tokenizer trained on them, in `path / "shards"`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    languages = {}
    for language, share in (shares or {"ko": 0.5, "en": 0.3, "code": 0.2}).items():
        rows = [
            {"text": text, "file": f"{number}.txt"} for number, text in enumerate(random_texts(language, documents))
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (path / f"{language}.jsonl").write_text(text, encoding="utf-8")
        languages[language] = LanguageConfig(share=share, sources=(JsonlSource(path=f"{language}.jsonl"),))
    recipe = DataRecipe(languages=languages, tokenizer=TrainedTokenizer(vocab_size=vocab_size), validation_fraction=0.2)
    return build_shards(recipe, path / "shards", path)
