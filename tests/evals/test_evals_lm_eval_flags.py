"""`hcx eval` in lm-eval's form: its flags with its meaning under the model `hcx`, or refused with what to use."""

import functools
import json
import re

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

import typer

from hcx.cli.main import build_app, main
from hcx.evals.bundle import Recorder
from hcx.evals.lm_eval_flags import INSTEAD, LM_EVAL_FLAGS, SHARED_FLAGS, is_lm_eval_line
from hcx.testing.evaluation import evaluable_directory

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"

LETTERS = """\
task: local_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}\\n정답:"
doc_to_choice: ["가", "나", "다"]
doc_to_target: "{{{{gold}}}}"
metadata: {{version: 1}}
"""
ANSWERS = """\
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 64}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = evaluable_directory(tmp_path_factory.mktemp("model"), "hyperclovax", max_seq_len=512)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("test", 8), ("train", 6)):
        rows = [{"question": f"{n}번째 {name} 도시의 이름은?", "gold": n % 3} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(LETTERS.format(folder=folder))
    (folder / "answers.yaml").write_text(ANSWERS.format(folder=folder))
    return folder


@pytest.fixture(autouse=True)
def without_lm_evals_own_tasks(monkeypatch):
    """Reading their thousands of files takes longer than all of this."""
    import lm_eval.tasks

    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)


def ended(words):
    with pytest.raises(SystemExit) as end:
        main(["eval", *map(str, words)])
    return end.value.code


def results(folder):
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def samples(folder, task):
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])


def test_the_list_of_flags_is_that_of_lm_evals_parser():
    from lm_eval._cli import HarnessCLI

    theirs = {flag for action in HarnessCLI()._subparsers.choices["run"]._actions for flag in action.option_strings}
    assert theirs == LM_EVAL_FLAGS | SHARED_FLAGS


def test_every_flag_of_ours_is_shared_or_has_an_answer_in_their_form():
    command = typer.main.get_command(build_app()).commands["eval"]
    ours = {flag for param in command.params for flag in param.opts if flag.startswith("--")}
    assert ours - SHARED_FLAGS - {"--data"} == set(INSTEAD)
    assert not ours & LM_EVAL_FLAGS


def test_a_line_is_told_by_its_flags_and_its_first_word(tmp_path, monkeypatch):
    assert is_lm_eval_line(["--model", "hf", "--tasks", "x"])
    assert is_lm_eval_line(["--tasks", "x", "--num_fewshot=5"])
    assert is_lm_eval_line(["ls", "tasks"])
    assert not is_lm_eval_line(["--list"])
    assert not is_lm_eval_line(["MODEL", "--tasks", "x", "--limit", "3"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert not is_lm_eval_line(["run", "--suite", "demo"])


LINES = {
    "letters": ["--tasks", "local_letters", "--num_fewshot", "2"],
    "letters as dialogue": [
        *("--tasks", "local_letters", "--num_fewshot", "2", "--apply_chat_template", "--fewshot_as_multiturn"),
        *("--system_instruction", "짧게 답하라."),
    ],
    "letters in one turn": [
        *("--tasks", "local_letters", "--num_fewshot", "2", "--apply_chat_template", "--fewshot_as_multiturn", "false"),
        *("--seed", "1,2,3,9"),
    ],
    "answers": ["--tasks", "local_answers", "--gen_kwargs", "max_gen_toks=6,until=['\\n\\n']"],
}


@pytest.mark.parametrize("line", LINES, ids=str)
def test_the_same_line_gives_the_same_prompts_answers_and_numbers_as_under_hf(line, model, tasks, tmp_path):
    for name in ("hcx", "hf"):
        code = ended(
            [
                *("--model", name, "--model_args", f"pretrained={model},dtype=float32", "--include_path", tasks),
                *("--batch_size", "3", "--limit", "5", "--device", "cpu", "--log_samples"),
                *("--output_path", tmp_path / name, *LINES[line]),
            ]
        )
        assert code == 0
    ours, theirs = results(tmp_path / "hcx"), results(tmp_path / "hf")
    (task,) = ours["results"]
    assert ours["results"] == theirs["results"]
    for part in ("n-shot", "versions", "n-samples", "configs", "chat_template", "fewshot_as_multiturn"):
        left, right = ours.get(part), theirs.get(part)
        if part == "configs":
            left, right = ({k: v for k, v in c[task].items() if k != "metadata"} for c in (left, right))
        assert left == right, part
    left, right = samples(tmp_path / "hcx", task), samples(tmp_path / "hf", task)
    assert len(left) == 5
    for a, b in zip(left, right, strict=True):
        assert a["arguments"] == b["arguments"]
        assert a["doc_hash"] == b["doc_hash"]
        if task == "local_answers":
            assert a["filtered_resps"] == b["filtered_resps"]
        else:
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                assert float(x[0]) == pytest.approx(float(y[0]), abs=1e-4)
                assert str(x[1]) == str(y[1])


def test_the_seed_decides_what_is_sampled(model, tasks, tmp_path):
    found = {}
    for run, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        line = ["--model", "hcx", "--model_args", f"pretrained={model}", "--include_path", tasks, "--log_samples"]
        line += ["--tasks", "local_answers", "--gen_kwargs", "do_sample=true,temperature=1.0,max_gen_toks=8"]
        assert ended([*line, "--seed", seed, "--output_path", tmp_path / run]) == 0
        found[run] = [row["resps"] for row in samples(tmp_path / run, "local_answers")]
    assert found["a"] == found["b"] != found["c"]


def test_data_come_from_the_bundle_that_is_named_and_from_nowhere_else(model, tmp_path, capsys):
    tasks, bundle = tmp_path / "tasks", tmp_path / "bundle"
    tasks.mkdir()
    text = ANSWERS.format(folder=".").splitlines()
    text[1:3] = ["dataset_path: maker/cities"]
    (tasks / "answers.yaml").write_text("\n".join(text) + "\n")
    bundle.mkdir()
    recorder = Recorder(bundle, lambda path: None)
    recorder.add("maker/cities", None, {"test": [{"question": "수도는?", "gold": "서울"}]}, None)
    recorder.finish()
    (bundle / "manifest.json").write_text("{}")
    line = ["--model", "hcx", "--model_args", f"pretrained={model}", "--include_path", tasks]
    line += ["--tasks", "local_answers", "--gen_kwargs", "max_gen_toks=4"]
    assert ended([*line, "--data", bundle, "--output_path", tmp_path / "out"]) == 0
    assert results(tmp_path / "out")["n-samples"]["local_answers"]["effective"] == 1
    assert ended([*line, "--data", tmp_path]) == 2
    assert "maker/cities: not in the bundle" in capsys.readouterr().err


REFUSED = [
    (["--batch_size", "auto"], r"batch_size = 'auto'; the hcx model takes a number of rows"),
    (["--max_batch_size", "8"], r"max_batch_size = 8.*batch_size=N"),
    (["--trust_remote_code"], r"trust_remote_code = True.*--model hf"),
    (["--gen_kwargs", "num_beams=4"], r"num_beams = 4.*supported: until, max_gen_toks"),
    (["--model_args", "pretrained=X,peft=adapter"], r"peft = 'adapter'.*adapter=DIR"),
    (["--model_args", "pretrained=X,numeric=fast"], r"numeric = 'fast': .*numerics"),
    (["--model_args", "dtype=float32"], r"pretrained=DIR"),
    (["--confirm_run_unsafe_code"], r"sandbox only.*hcx_humaneval"),
    (["--check_integrity"], r"hcx eval --check"),
    (["--tasks", "no_such_task"], r"lm-eval: Tasks not found: no_such_task"),
    (["--tasks", "hcx_mt_bench"], r"scored by a judge: hcx eval MODEL --tasks hcx_mt_bench"),
    (["--log_samples"], r"lm-eval: Specify --output_path"),
    (["--apply_chat_template", "tool_use"], r"--apply_chat_template tool_use: no such template"),
    (["--suite", "korean"], r"--suite is not a flag of lm-eval.*--tasks"),
    (["--numerics=fast"], r"--numerics is not.*numerics=NAME"),
    (["--check"], r"hcx eval validate"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_cannot_be_honoured_is_refused_with_what_to_use(words, message, model, tasks, tmp_path, capsys):
    line = ["--model", "hcx", "--model_args", f"pretrained={model}", "--include_path", str(tasks)]
    if words[0] == "--model_args":
        line = ["--model", "hcx", "--include_path", str(tasks)]
    if words[0] != "--tasks":
        line += ["--tasks", "local_answers"]
    assert ended([*line, *words]) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_a_model_directory_with_a_flag_of_theirs_is_told_both_ways_out(capsys):
    assert ended(["MODEL", "--tasks", "x", "--batch_size", "4"]) == 2
    message = capsys.readouterr().err
    assert "--batch-size" in message
    assert "--model_args pretrained=MODEL" in message


def test_a_model_without_a_template_is_told_so(tasks, tmp_path, capsys):
    plain = evaluable_directory(tmp_path / "plain", max_seq_len=512)
    line = [
        "--model",
        "hcx",
        "--model_args",
        f"pretrained={plain}",
        "--include_path",
        tasks,
        "--tasks",
        "local_answers",
    ]
    assert ended([*line, "--apply_chat_template"]) == 2
    assert "has no chat template" in capsys.readouterr().err
