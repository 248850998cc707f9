"""Small item files, so that these tests need nothing that is shipped."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

DOCUMENTS = {
    "ko": [
        "문서를 열려면 파일 메뉴에서 열기를 누르십시오.",
        "저장하려면 저장을 누르십시오. 취소하려면 취소를 누르십시오.",
        "서울.",
    ],
    "en": ["To open a document, choose Open from the File menu.", "To save it, choose Save.", "Seoul is a city."],
    "code": ["def add(left, right):\n    return left + right\n", "for number in range(10):\n    print(number)\n"],
}
PAIRS = [
    ("파일을 엽니다.", "Opens the file."),
    ("파일을 닫습니다.", "Closes the file."),
    ("연결할 수 없습니다.", "Cannot connect."),
]


@pytest.fixture(scope="session")
def item_files(tmp_path_factory):
    """A folder for `--data`."""
    folder = tmp_path_factory.mktemp("items")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    for language, texts in DOCUMENTS.items():
        write(f"held_out_{language}.jsonl", [{"text": text} for text in texts])
    write("translation_pairs.jsonl", [{"ko": ko, "en": en} for ko, en in PAIRS])
    questions = [
        {"subject": "수도", "question": f"{n}번째 도시는?", "choices": ["서울", "부산", "대구", "광주"], "gold": n % 4}
        for n in range(12)
    ]
    write("kmmlu-dev225.jsonl", questions)
    write("mmlu-dev282.jsonl", [{**row, "choices": [*row["choices"], "Seoul"]} for row in questions])
    return folder
