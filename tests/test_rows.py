"""Claims about the one door for rows: whoever wrote a file of questions or paths, it comes in clean or ends with FILE:LINE."""
import copy
import json
import re

import pytest

import eval as E
import judge

PATH = {"id": "q1", "task": "arc", "question": "What melts?", "choices": {"A": "ice", "B": "air"}, "answer": "A",
        "style": "vanilla", "teacher": "t", "path": "Ice melts.\nThe answer is (A)."}
GRADED = {**PATH, "prediction": "A", "correct": True, "valid": True, "verdict": {"j": "valid"}}
WRONG = {**PATH, "path": "The answer is (B).", "prediction": "B", "correct": False, "valid": None, "verdict": None}
INVALID = {**PATH, "prediction": "A", "correct": True, "valid": False, "verdict": {"j": "invalid: step 1"}}
UNPARSED = {**PATH, "path": "Hm.", "prediction": None, "correct": False, "valid": None, "verdict": None}


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


def fates(rows):
    """What becomes of rows when training grades those that need it, as distill.py does."""
    for row in rows:
        if not {"prediction", "correct", "valid", "verdict"} <= row.keys():
            judge.grade_paths([row])
            row.update(valid=None, verdict=None)
    return [judge.fate(row) for row in rows]


def as_pandas(rows):
    """As DataFrame(rows).to_json(lines=True) writes them: every row has every column, truths with gaps are 1.0, 0.0, null."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    number = {True: 1.0, False: 0.0}
    return [{key: number.get(row.get(key), row.get(key)) if key in ("correct", "valid") else row.get(key) for key in columns}
            for row in rows]


def as_datasets(rows):
    """As datasets.Dataset.from_list(rows).to_json() writes them: also every object has the fields that it has anywhere."""
    rows = as_pandas(rows)
    for key in ("choices", "verdict"):
        fields = list(dict.fromkeys(field for row in rows for field in row.get(key) or {}))
        for row in rows:
            row[key] = {field: (row.get(key) or {}).get(field) for field in fields}
            if key in ("correct", "valid") and row.get(key) is not None:
                row[key] = bool(row[key])
    return rows


ROWS = [GRADED, WRONG, INVALID, UNPARSED, {**PATH, "id": "fresh"},
        {**PATH, "id": "six", "choices": {**PATH["choices"], "C": "tin", "D": "tea"}},
        {"id": "number", "task": "gsm8k", "question": "1 + 1?", "answer": "2", "style": "s", "teacher": "t", "path": "#### 2"}]


@pytest.mark.parametrize("rewrite", [copy.deepcopy, as_pandas, as_datasets])
def test_a_pool_has_the_same_fates_prompts_and_verdicts_whatever_wrote_it(tmp_path, rewrite):
    rows = judge.read_pool(written(tmp_path, *rewrite(ROWS)))
    assert fates(rows) == ["kept", "wrong", "invalid", "unparsed", "kept", "kept", "kept"]
    assert [E.student_prompt(row) for row in rows] == [E.student_prompt(row) for row in ROWS]
    assert [row["valid"] for row in rows] == [True, None, False, None, None, None, None]
    assert rows[2]["verdict"] == {"j": "invalid: step 1"} and "choices" not in rows[6]


def test_a_row_whose_correct_is_null_is_ungraded_and_a_graded_one_has_all_fields(tmp_path):
    fresh = {**PATH, "id": "q2", "correct": None, "prediction": None, "valid": None, "verdict": {"j": None}, "baseline": None}
    rows = judge.read_pool(written(tmp_path, fresh, {**PATH, "correct": 1}))
    assert rows[0] == {**PATH, "id": "q2"}
    assert rows[1] == {**PATH, "correct": True, "prediction": None, "valid": None, "verdict": None}


def test_a_verdict_without_a_grade_is_kept_and_the_answer_graded(tmp_path):
    [row] = judge.read_pool(written(tmp_path, {**PATH, "valid": 0}))
    assert (row["prediction"], row["correct"], row["valid"], judge.fate(row)) == ("A", True, False, "no verdict")


@pytest.mark.parametrize("value, truth", [(True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)])
def test_truth_values_are_read_as_such(tmp_path, value, truth):
    [row] = judge.read_pool(written(tmp_path, {**GRADED, "valid": value, "correct": value}))
    assert row["valid"] is row["correct"] is truth


QUESTION = {key: PATH[key] for key in ("id", "task", "question", "choices", "answer")}
READ = [  # what a row says, what comes in
    ({"id": 7}, {"id": "7"}), ({"id": 7.0}, {"id": "7"}), ({"id": "../x~1 "}, {"id": "../x~1 "}),
    ({"level": 3}, {"level": "3"}), ({"level": 3.0}, {"level": "3"}), ({"level": "Level 3"}, {"level": "Level 3"}), ({"level": True}, {"level": "True"}),
    ({"prompt": [{"role": "user", "content": "What melts?"}]}, {"prompt": "What melts?"}), ({"prompt": " "}, {}), ({"prompt": None}, {}),
    ({"choices": {"A": "ice", "B": "air", "C": None, "D": ""}}, {}), ({"choices": ["ice", "air"]}, {}),
    ({"choices": ["ice", None, "air"]}, {"choices": {"A": "ice", "C": "air"}}),
    ({"choices": {"A": 1, "B": 2.0, "C": 2.5}}, {"choices": {"A": "1", "B": "2", "C": "2.5"}}),
    ({"choices": {"1": "air", "2": "ice"}, "answer": "2"}, {"choices": {"A": "air", "B": "ice"}, "answer": "B"}),
    ({"choices": {"a": "air", "b": "ice"}, "answer": "b"}, {"choices": {"A": "air", "B": "ice"}, "answer": "B"}),
    ({"choices": {"label": ["1", "2"], "text": ["air", "ice"]}, "answer": 2}, {"choices": {"A": "air", "B": "ice"}, "answer": "B"}),
    ({"choices": [{"label": "A", "text": "air"}, {"label": "B", "text": "ice"}], "answer": "ice"},
     {"choices": {"A": "air", "B": "ice"}, "answer": "B"}),
    ({"answer": "(A)"}, {}), ({"question": "What\ud800 melts?"}, {"question": "What\ufffd melts?"}),
    ({"task": "gsm8k", "choices": None, "answer": 18}, {"task": "gsm8k", "answer": "18", "choices": None}),
    ({"task": "gsm8k", "choices": {}, "answer": 18.0}, {"task": "gsm8k", "answer": "18", "choices": None}),
    ({"task": "strategyqa", "choices": None, "answer": True}, {"task": "strategyqa", "answer": "yes", "choices": None})]


@pytest.mark.parametrize("change, expected", READ)
def test_what_can_be_read_is_read_alike_in_questions_and_paths(tmp_path, change, expected):
    expected = {key: value for key, value in {**QUESTION, **expected}.items() if value is not None}
    assert E.read_questions(written(tmp_path, {**QUESTION, **change})) == [expected]
    [row] = judge.read_pool(written(tmp_path, {**PATH, **change}))
    assert {key: value for key, value in row.items() if key not in ("style", "teacher", "path")} == expected


BAD = [  # a change to a row, what the sentence names
    ({"id": None}, "'id'"), ({"id": [1]}, "'id'"), ({"id": True}, "'id'"), ({"question": ["x"]}, "'question'"), ({"task": "chess"}, "chess"),
    ({"level": [1]}, "'level'"), ({"level": {}}, "'level'"), ({"prompt": ["x"]}, "'prompt'"), ({"prompt": 5}, "'prompt'"),
    ({"prompt": [{"role": "system", "content": "x"}]}, "'prompt'"), ({"prompt": [{"role": "user", "content": "x"}] * 2}, "'prompt'"),
    ({"choices": "ice"}, "'choices'"), ({"choices": {"A": "ice"}}, "'choices'"), ({"choices": {"A": ["ice"], "B": "air"}}, "'choices'"),
    ({"choices": {"label": ["A", "A"], "text": ["ice", "air"]}}, "'choices'"), ({"choices": [["ice"], "air"]}, "'choices'"),
    ({"choices": ["x"] * 27}, "'choices'"), ({"choices": None}, "'choices'"), ({"answer": "C"}, "'answer'"), ({"answer": ["A"]}, "'answer'"),
    ({"task": "gsm8k", "answer": "1" * 5000}, "'answer'")]
BAD_PATH = [
    ({"style": 5}, "'style'"), ({"teacher": None}, "'teacher'"), ({"path": None}, "'path'"), ({"path": ["x"]}, "'path'"), ({"correct": "yes"}, "'correct'"),
    ({"valid": 0.5}, "'valid'"), ({"valid": "false"}, "'valid'"), ({"valid": []}, "'valid'"), ({"correct": "1"}, "'correct'"),
    ({"verdict": "valid"}, "'verdict'"), ({"verdict": {"j": True}}, "'verdict'"), ({"prediction": ["A"]}, "'prediction'"),
    ({"finish_reason": ["stop"]}, "'finish_reason'"), ({"baseline": "revthink"}, "'correct'")]


def complaint(read, path, capsys):
    with pytest.raises(SystemExit) as end:
        read(path)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 600
    return said


@pytest.mark.parametrize("change, words", BAD + BAD_PATH)
def test_a_row_that_cannot_be_read_ends_with_its_place(tmp_path, capsys, change, words):
    path = written(tmp_path, {**PATH, "id": "before"}, b"", {**PATH, **change})
    said = complaint(judge.read_pool, path, capsys)
    assert f"{path}:3: " in said and words in said
    if (change, words) in BAD and change != {"id": None}:  # a question without an id gets one
        path = written(tmp_path, {**QUESTION, "id": "before"}, b"", {**QUESTION, **change})
        assert f"{path}:3: " in complaint(E.read_questions, path, capsys)


DEEP = b'{"id": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
LINES = [b"{", b"[1]", b'"x"', b"null", b'{"a": "\xff"}', DEEP, b'{"id": ' + b"[" * 60 + b"]" * 60 + b"}", b'{"id": ' + b"9" * 5000 + b"}",
         "\ufeff{".encode(), '{"a": 1}'.encode("utf-16"), b"{'a': 1}", b'{"a": 1} {"b": 2}']


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_json_object_ends_with_its_place(tmp_path, capsys, line):
    path = written(tmp_path, PATH, line)
    for read in (judge.read_pool, E.read_questions, E.read_jsonl):
        assert f"{path}:2: " in complaint(read, path, capsys)


def test_a_json_file_passes_the_same_door(tmp_path, capsys):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{**QUESTION, "choices": ["ice", None, "air"]}]))
    assert E.read_questions(path)[0]["choices"] == {"A": "ice", "C": "air"}
    for text in (DEEP.decode(), "[", '{"examples": 5}', "[5]", json.dumps([{**QUESTION, "choices": 5}])):
        path.write_text(text)
        assert str(path) in complaint(E.read_questions, path, capsys)


def test_nulls_nans_and_half_characters_are_gone_at_every_depth(tmp_path):
    [row] = E.read_jsonl(written(tmp_path, b'{"a": null, "b": {"c": NaN, "d": ["x\\udfff", {"e": null}], "\\ud800": 1}, "f": Infinity}'))
    assert row == {"b": {"d": ["x\ufffd", {}], "\ufffd": 1}}


def test_rows_made_from_other_rows_need_no_answer_of_their_task(tmp_path):
    made = {**GRADED, "baseline": "revthink", "answer": "unknown", "made_from": "q0"}
    del made["choices"]
    assert judge.read_pool(written(tmp_path, made)) == [made]


def test_a_new_task_is_one_line_of_one_table(tmp_path, monkeypatch):
    monkeypatch.setitem(E.TASKS, "trivia", "choice")
    path = written(tmp_path, {**PATH, "task": "trivia"})
    [question], [row] = E.read_questions(path), judge.grade_paths(judge.read_pool(path))
    [(_, prompt)] = judge.style_jobs([question], "t", ["vanilla"], 1)
    assert "(X)" in prompt and "(A) ice" in E.student_prompt(question) and row["correct"]


def test_real_pools_pass_the_door_unchanged(data_dir):
    for name in ("date", "strategyqa", "word"):
        raw = [json.loads(line) for line in (data_dir / "paths" / f"{name}.jsonl").read_text().splitlines()]
        assert judge.read_pool(data_dir / "paths" / f"{name}.jsonl") == raw


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys):
    good = tmp_path / "new.json"
    E.check_output(good)
    assert not good.exists()
    good.write_text("kept")
    E.check_output(good)
    assert good.read_text() == "kept"
    for path in (tmp_path, tmp_path / "none" / "x.json", tmp_path / ("x" * 300), good / "x.json"):
        assert re.match("error: cannot write .*choose another place", complaint(E.check_output, path, capsys))
