"""Claims about the rows that the paper's baselines train on (tests/experiments/baselines.py)."""
import os
import re
import sys
from collections import Counter

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(HERE, "experiments")]
import baselines
from test_pool import fault_server, pool, run  # noqa: F401 (the fixture `server`)

import judge


def test_step_by_step_rows_have_the_label_under_the_students_own_prompt(tmp_path):
    run("--paths", pool(tmp_path / "p.jsonl", 3), "--baseline", "step_by_step", "--out", "b.jsonl", cwd=tmp_path, main=baselines.main)
    rows = judge.read_pool(tmp_path / "b.jsonl")
    labels, rationales = [[r for r in rows if r["style"] == s] for s in ("label", "rationale")]
    assert len(labels) == len(rationales) == 3
    assert all("prompt" not in r and r["path"] == "The answer is 2" for r in labels)
    assert all(r["question"] in r["prompt"] and "1 + 1 = 2" in r["path"] for r in rationales)
    assert len(judge.filter_pool(judge.grade_paths(rows), "full")) == 6


def test_revthink_rows_need_a_consistent_backward_question(tmp_path, server):
    def reply(model, prompt):
        if "Reverse question:" in prompt:
            return "VERDICT: INVALID" if "time 0" in prompt else "VERDICT: VALID"
        return f"Backward of {re.search('time ([0-9])', prompt)[0]}?" if "Write the reverse" in prompt else "2 - 1 = 1. The answer is 1"
    server.reply = reply
    run("--paths", pool(tmp_path / "p.jsonl", 3), "--baseline", "revthink", "--teacher", f"m@{server.url}", "--out", "b.jsonl", cwd=tmp_path, main=baselines.main)
    rows = judge.read_pool(tmp_path / "b.jsonl")
    assert Counter(r["style"] for r in rows) == {"vanilla": 3, "backward_question": 2, "backward_reasoning": 2}
    assert all(r["prompt"] and r["path"].startswith("Backward of") for r in rows if r["style"] == "backward_question")
    back = [r for r in rows if r["style"] == "backward_reasoning"]
    assert {r["made_from"] for r in back} == {"q1", "q2"}
    assert all(r["question"].startswith("Backward") and r["answer"] == "1" for r in back)
    assert len(judge.filter_pool(judge.grade_paths(rows), "full")) == 7


@pytest.mark.parametrize("name", ["rephrased", "generated"])
def test_new_questions_need_an_answer_that_samples_agree_on_and_never_test(tmp_path, server, name):
    sampled = Counter()

    def reply(model, prompt):
        k = re.search("time ([0-9])", prompt)[1]
        if "new question" in prompt:
            return f"New, time {k}?"
        sampled[k] += 1
        return f"We add the two. The answer is {2 if k == '0' else 5 if k == '1' else sampled[k]}"
    server.reply = reply
    run("--paths", pool(tmp_path / "p.jsonl", 3), "--baseline", name, "--teacher", f"m@{server.url}", "--samples", 3, "--styles",
        "chain_of_thought", "--out", "b.jsonl", cwd=tmp_path, main=baselines.main)
    rows = judge.read_pool(tmp_path / "b.jsonl")
    kept = {"q0": "2"} if name == "rephrased" else {"q0": "2", "q1": "5"}  # q1 agrees on a wrong answer, q2 on none
    assert {r["made_from"]: r["answer"] for r in rows} == kept and len(rows) == 3 * len(kept)
    assert all(r["question"].startswith("New") and r["id"] != r["made_from"] for r in rows)


def test_an_unrelated_file_is_never_written_to_and_bad_flags_are_one_sentence(tmp_path):
    paths = pool(tmp_path / "p.jsonl", 2)
    (tmp_path / "o.jsonl").write_text("my thesis\n")
    for more in (("--baseline", "step_by_step"), ("--baseline", "revthink"), ("--baseline", "chess"), ()):
        err = run("--paths", paths, *more, "--out", "o.jsonl", cwd=tmp_path, main=baselines.main, code=2)[1]
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert (tmp_path / "o.jsonl").read_text() == "my thesis\n"
