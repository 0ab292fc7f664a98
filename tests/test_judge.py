"""Claims about the path pool: the demo, reading, grading, the rule judge, the filter, the command line."""
import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_pool import run, write

import judge

JUDGE = os.path.abspath(judge.__file__)
ROW = {"id": "q1", "task": "gsm8k", "question": "What is 1 + 1?", "answer": "2", "style": "vanilla", "teacher": "t",
       "path": "1 + 1 = 2.\nThe answer is 2"}


@pytest.fixture(scope="module")
def demo():
    questions = judge.demo_questions(600, 0)
    return questions, judge.grade_paths(judge.demo_paths(questions, 0))


# ------------------------------------------------------------------------------------------------ the demo
def arithmetic_oracle(question):
    """Solve a demo question from its text alone, template by template, independent of the generator's own solver."""
    n = [int(x) for x in re.findall(r"\d+", question)]
    for words, solve in (("bags with", lambda a, b, c: a + b * c), ("and finds", lambda p, b, c: p + b - c),
                         ("equal boxes", lambda p, b, c: p / b - c), ("times as many", lambda a, b: a + a * b),
                         ("each bag", lambda p, a, b, c: (p + a - b) / c), ("packs with", lambda a, b, c, d: a * b - c + d),
                         ("each day", lambda a, b, c, d: a * b + c - d)):
        if words in question:
            return solve(*n)


def test_answers_of_the_demo_are_right(demo):
    for question in demo[0]:
        assert arithmetic_oracle(question["question"]) == int(question["answer"]), question["question"]


def test_demo_has_seven_templates_of_two_and_three_steps(demo):
    assert set(Counter(q["template"] for q in demo[0])) == set(range(7))
    assert set(Counter(q["level"] for q in demo[0])) == {2, 3}


def test_same_seed_gives_the_same_bytes_in_another_process(tmp_path, demo):
    code = "import json, judge; q = judge.demo_questions(40, 3); print(json.dumps([q, judge.demo_paths(q, 3), " \
           "judge.demo_sentences(40, 3)]))"
    outs = {subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(JUDGE), capture_output=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": str(s)}).stdout for s in (1, 2)}
    assert len(outs) == 1
    assert demo[0][:40] == judge.demo_questions(40, 0)  # the first questions do not depend on how many are asked for


def test_no_question_is_shared_between_seeds_or_repeated():
    texts = [q["question"] for seed in range(8) for q in judge.demo_questions(700, seed)]
    assert len(set(texts)) == len(texts)


def test_each_question_has_one_path_per_style_that_ends_with_the_answer(demo):
    questions, paths = demo
    assert Counter((p["id"], p["style"]) for p in paths) == {(q["id"], s): 1 for q in questions for s in judge.STYLES}
    for path in paths:
        assert re.search(r"\nThe answer is \d+$", path["path"]) and 15 <= len(path["path"].split()) <= 60
        if path["style"] == "program":
            ast.parse(path["path"].rsplit("\n", 1)[0])


def test_words_and_numbers_form_a_small_closed_vocabulary(demo):
    sentences = judge.demo_sentences(3000, 0)
    words = Counter(w for text in [q["question"] for q in demo[0]] + [p["path"] for p in demo[1]] + sentences
                    for w in re.findall(r"\d+|\w+", text))
    numbers = {int(w) for w in words if w.isdigit()}
    assert max(numbers) <= 200 and len(words) - len(numbers) < 120
    for sentence in sentences:  # the warm start teaches no wrong fact
        for a, op, b, r in re.findall(r"(\d+) ([-+*/]) (\d+)\s+[=#]\s(\d+)", sentence):
            assert eval(f"{a} {op} {b}") == int(r), sentence


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_of_errors_are_realistic_and_concentrated(seed):
    paths = judge.demo_paths(judge.demo_questions(1000, seed), seed)
    wrong = [p for p in paths if not p["source_correct"]]
    slips = [p for p in paths if p["source_correct"] and not p["source_valid"]]
    assert 0.15 < len(wrong) / len(paths) < 0.20 and 0.06 < len(slips) / len(paths) < 0.08
    styles = Counter(p["style"] for p in wrong)
    assert styles["tree_of_thought"] + styles["fact_retrieval"] > 0.5 * len(wrong)


def test_grading_the_demo_agrees_with_the_generators_own_truth(demo):
    assert all(p["correct"] == p["source_correct"] and p["prediction"] is not None for p in demo[1])


# ------------------------------------------------------------------------------------------------ the rule judge
def test_rule_judge_catches_every_wrong_step_and_passes_every_clean_path(demo):
    for path in demo[1]:
        valid, verdict = judge.rule_judge(path)
        if path["source_correct"]:  # among the right answers it tells sound from unsound without an error
            assert valid == path["source_valid"], (path["path"], verdict)


def test_rule_judge_needs_derived_numbers_in_order(demo):
    row = {"task": "demo", "question": "Tom has 3 eggs and finds 4 more. Tom gives 2 eggs to Mia. How many are left?"}
    for path, valid in (("3 + 4 = 7. 7 - 2 = 5.\nThe answer is 5", True), ("7 - 2 = 5. 3 + 4 = 7.\nThe answer is 5", False),
                        ("3 + 5 = 8. 8 - 2 = 6.\nThe answer is 6", False), ("The answer is 5", False), ("", False),
                        ("3 + 4 = 7. 7 - 2 = 5.\nThe answer is 3", False), ("VALID\nVERDICT: VALID", False)):
        assert judge.rule_judge({**row, "path": path})[0] == valid, path


def test_rule_judge_refuses_tasks_it_knows_nothing_about(tmp_path):
    pool = write(tmp_path / "p.jsonl", [ROW])
    assert "gsm8k" in run("--paths", pool, "--judge", "rule", "--out", "o.jsonl", cwd=tmp_path, code=2)[1]


# ------------------------------------------------------------------------------------------------ filter
@pytest.mark.parametrize("change, full, answer, none", [
    ({}, "kept", "kept", "kept"),
    ({"path": "The answer is 3"}, "wrong", "wrong", "kept"),
    ({"path": "I do not know"}, "unparsed", "unparsed", "kept"),
    ({"path": " \n"}, "empty", "empty", "empty"),
    ({"finish_reason": "length"}, "cut", "cut", "cut"),
    ({"finish_reason": "content_filter"}, "refused", "refused", "refused"),
    ({"path": "I'm sorry, but I can't help with that."}, "refused", "refused", "refused"),
    ({"valid": False, "verdict": {"j": "invalid: step 1"}}, "invalid", "kept", "kept"),
    ({"valid": False, "verdict": {"j": "unparsed: hm"}}, "no verdict", "kept", "kept"),
    ({"valid": None, "verdict": None}, "kept", "kept", "kept")])
def test_filter_says_what_happens_to_a_row(change, full, answer, none):
    row = judge.grade_paths([{**ROW, "valid": True, "verdict": {"j": "valid"}, **change}])[0]
    for mode, expected in (("full", full), ("answer", answer), ("none", none)):
        assert judge.fate(row, mode) == expected
        assert judge.filter_pool([row], mode) == ([row] if expected == "kept" else [])


def test_table_counts_every_row_once_per_style_and_teacher(capsys, demo):
    rows = [{**r, "valid": v, "verdict": {"rule": w}} for r in demo[1] for v, w in [judge.rule_judge(r)]]
    judge.filter_table(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [[int(x.replace("-", "0")) for x in line[-9:]] for line in lines[1:]]
    assert all(sum(n[1:]) == n[0] for n in numbers) and numbers[-1] == [sum(c) for c in zip(*numbers[:-1])]
    assert numbers[-1][0] == len(rows) and numbers[-1][1] == sum(r["source_valid"] for r in rows)


# ------------------------------------------------------------------------------------------------ bad input
BAD = [("{", "not valid JSON"), ("[1]", "JSON object"), ('{"a": "\\xff"', "not valid JSON"),
       ({**ROW, "style": ""}, "'style'"), ({k: v for k, v in ROW.items() if k != "answer"}, "'answer'"),
       ({k: v for k, v in ROW.items() if k != "path"}, "'path'"), ({**ROW, "path": 5}, "'path'"),
       ({**ROW, "task": "chess"}, "chess"), ({**ROW, "task": "date", "choices": {"A": "x"}, "answer": "B"}, "choices"),
       ({**ROW, "answer": "3"}, "q1"), ({**ROW, "question": "What is 2?"}, "q1")]


@pytest.mark.parametrize("line, names", BAD)
def test_a_bad_line_ends_with_its_place(tmp_path, capsys, line, names):
    path = write(tmp_path / "p.jsonl", [ROW, "", line])
    with pytest.raises(SystemExit) as error:
        judge.read_pool(path)
    message = capsys.readouterr().err
    assert error.value.code == 2 and f"{path}:3:" in message and names in message and message.count("\n") == 1


def test_bad_input_on_the_command_line_is_one_sentence_and_code_2(tmp_path):
    pool = write(tmp_path / "p.jsonl", [ROW, "{"])
    for args in (("--paths", pool, "--out", "o.jsonl"), ("--paths", "nowhere.jsonl", "--out", "o.jsonl"),
                 ("--out", "o.jsonl"), ("--demo", 3, "--out", "no/folder/o.jsonl")):
        err = run(*args, cwd=tmp_path, code=2)[1]
        assert err.startswith("error: ") and err.count("\n") == 1, err
    done = subprocess.run([sys.executable, JUDGE, "--paths", pool, "--out", "o.jsonl"], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and "p.jsonl:2:" in done.stderr and "Traceback" not in done.stderr


def test_an_empty_path_is_data(tmp_path):
    assert judge.read_pool(write(tmp_path / "p.jsonl", [{**ROW, "path": ""}]))[0]["path"] == ""


@pytest.mark.parametrize("sample", ["1e999", "-1e999", "Infinity", "NaN", "null", "1.0", "1.5"])
def test_a_sample_of_any_number_is_read_and_the_run_may_be_repeated(tmp_path, sample):
    line = json.dumps({**ROW, "sample": 0}).replace('"sample": 0', f'"sample": {sample}')
    pool = write(tmp_path / "p.jsonl", [line])
    for _ in range(2):
        run("--paths", pool, "--out", "o.jsonl", cwd=tmp_path)
    assert "Infinity" not in (tmp_path / "o.jsonl").read_text()  # which is no JSON


# ------------------------------------------------------------------------------------------------ the annotated pool
def test_command_annotates_every_row_and_may_be_repeated(tmp_path):
    for judge_name in ("none", "rule", "rule"):
        run("--demo", 30, "--judge", judge_name, "--out", "a.jsonl", cwd=tmp_path)
        rows = judge.read_pool(tmp_path / "a.jsonl")
        assert len(rows) == 180 and all({"prediction", "correct", "valid", "verdict"} <= set(row) for row in rows)
        assert all((row["valid"] is None) == (judge_name == "none" or not row["correct"]) for row in rows)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", "a.jsonl.lock"}


def test_an_unrelated_file_is_never_written_to(tmp_path):
    pool = write(tmp_path / "p.jsonl", [ROW])
    for content in ("my thesis\n", json.dumps(ROW) + "\n", json.dumps({**ROW, "id": "x", "verdict": None}) + "\n",
                    "no newline at its end"):
        (tmp_path / "o.jsonl").write_text(content)
        run("--paths", pool, "--out", "o.jsonl", cwd=tmp_path, code=2)
        assert (tmp_path / "o.jsonl").read_text() == content
    run("--paths", pool, "--out", pool, cwd=tmp_path, code=2)
