"""The paper's baselines are rows: this writes what each of them trains on, from a judged pool.

    python tests/experiments/baselines.py --baseline step_by_step --paths pool.jsonl --out rows.jsonl
    python tests/experiments/baselines.py --baseline revthink --paths pool.jsonl \\
        --teacher MODEL@URL --out rows.jsonl
    python distill.py --route all --mutual_weight 0 --paths rows.jsonl

step_by_step (Hsieh et al. 2023) trains on the bare answer under the student's own prompt and on the
rationale under another one. revthink (Chen et al. 2025) trains on the forward path and, where the
teacher finds the two consistent, on a backward question and its reasoning. rephrased and generated
train on a new question, with paths of the one answer that most samples agree on. Rows made from
another question carry its id in `made_from`, so that both stand on one side of the split.
"""
import argparse
import functools
import os
import sys
from collections import Counter, defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import eval as tasks
import judge

NAMES = ("step_by_step", "revthink", "rephrased", "generated")
RATIONALE = "{question}\n\nExplain how to solve this."
PROMPTS = {  # of the teacher, but backward_question is the student's as well
    "backward_reasoning": "{question}\n\nLet us think step by step. End with one line that states "
                          "the answer.",
    "backward_question": "Question: {question}\nAnswer: {answer}\n\nWrite the reverse question: "
                         "take one quantity or fact of the question as the unknown and state the "
                         "answer above as known. Write the reverse question only.",
    "consistency": "Question: {question}\nAnswer: {answer}\n\nReverse question: {reverse}\nIts "
                   "solution: {solution}\n\nDoes this solution agree with the facts of the first "
                   "question? End with one line that is exactly VERDICT: VALID or VERDICT: "
                   "INVALID.",
    "rephrased": "Rephrase this question in other words, so that its answer stays the same. Write "
                 "the new question only.\n\n{question}",
    "generated": "Write one new question of the same kind and difficulty as this one, with another "
                 "story and other numbers or facts. Write the new question only.\n\n{question}",
}


def baseline_rows(name, rows, args, spent):
    """The rows that a baseline trains on, from the kept rows of a pool (a list), as a list that
    needs no further grading. args: the flags below, spent: a judge.Spending; step_by_step asks no
    teacher and needs neither. The teacher's replies are kept in OUT.replies.jsonl."""
    first = list({row["id"]: row for row in reversed(rows)}.values())  # one path of each question
    if name == "step_by_step":
        return step_by_step(rows, first)
    teacher = judge.split_spec(args.teacher[0])[0]
    stage = functools.partial(ask_stage, teacher, args, spent)
    plain = {}
    for row in first:
        new_id = f"{row['id']}~{name}"
        plain[new_id] = {**row, "id": new_id, "question": tasks.question_of(row)}
    new = stage("backward_question" if name == "revthink" else name, plain.values())
    if args.dry_run:
        return []
    made = {}  # the new questions, as rows without a path
    for key, reply in new.items():
        if key in plain:
            fields = ("task", "answer", "choices", "level")
            kept = {field: plain[key][field] for field in fields if field in plain[key]}
            made[key] = {**kept, "id": key, "question": reply["path"].strip(), "teacher": teacher,
                         "made_from": key.removesuffix(f"~{name}")}
    if name == "revthink":
        return [*rows, *revthink(first, plain, made, stage, teacher)]
    return agreed_paths(name, made, args, spent)


def ask_stage(teacher, args, spent, style, rows):
    """Ask the teacher the prompt `style` about rows -> {id: its reply}, of whole replies only."""
    def jobs():
        for row in rows:
            job = {"id": row["id"], "style": style, "teacher": teacher}
            yield job, judge.fill(PROMPTS[style], **row)

    log = args.out + ".replies.jsonl"
    judge.ask_all(args.teacher[0], jobs, log, args, spent, args.temperature)
    return {reply["id"]: reply for reply in judge.replies_in(log) if reply["style"] == style
            and judge.ending(reply) == "whole" and reply["path"].strip()}


def step_by_step(rows, first):
    """Labels of the questions and rationales of all their paths."""
    labels = [{**row, "style": "label", "path": f"The answer is {row['answer']}"} for row in first]
    return labels + [{**row, "style": "rationale",
                      "prompt": judge.fill(RATIONALE, question=tasks.question_of(row))}
                     for row in rows]


def revthink(first, plain, made, stage, teacher):
    """The backward questions, and the reasoning about them, that the teacher finds consistent."""
    solved = stage("backward_reasoning", made.values())
    said = stage("consistency", [{**plain[key], "reverse": made[key]["question"],
                                  "solution": reply["path"]} for key, reply in solved.items()])
    for row, key in zip(first, plain):
        if key not in said or judge.parse_verdict(said[key]) != "valid":
            continue
        prompt = judge.fill(PROMPTS["backward_question"], **plain[key])
        yield {**row, "style": "backward_question", "teacher": teacher, "prompt": prompt,
               "path": made[key]["question"]}
        answer = tasks.extract_answer(row["task"], solved[key]["path"]) or "unknown"
        back = {**made[key], "style": "backward_reasoning", "path": solved[key]["path"]}
        back.pop("choices", None)  # they belong to the forward question
        yield {**back, "answer": answer, "prediction": answer, "correct": True, "valid": True,
               "verdict": {teacher: "valid"}}


def agreed_paths(name, made, args, spent):
    """Paths to new questions whose answer more than half of the samples, and two at least, give;
    for a rephrased question it has to be the known answer."""
    log, teacher = args.out + ".replies.jsonl", judge.split_spec(args.teacher[0])[0]
    jobs = functools.partial(judge.style_jobs, made.values(), teacher, args.styles, args.samples)
    judge.ask_all(args.teacher[0], jobs, log, args, spent, args.temperature)
    paths, kept = defaultdict(list), []
    for row in judge.replies_in(log):
        if row["id"] in made and row["style"] in judge.STYLES:
            paths[row["id"]].append(judge.grade_paths([row])[0])
    for group in paths.values():
        whole = [row for row in group if judge.fate(row, "none") == "kept"]
        counts = Counter(row["prediction"] for row in whole).most_common(1)
        answer, votes = counts[0] if counts else (None, 0)
        if answer and votes >= 2 and votes * 2 > len(group):
            kept += [{**row, "answer": answer, "correct": True} for row in whole
                     if row["prediction"] == answer and (name == "generated" or row["correct"])]
    return kept


def main(argv=None):
    """The command. Bad input stops with one sentence."""
    p = argparse.ArgumentParser(description=__doc__, epilog="Defaults in brackets.",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--baseline", required=True, choices=NAMES, help="which one")
    p.add_argument("--paths", required=True, metavar="POOL", help="the pool, judged or not")
    p.add_argument("--out", required=True, metavar="ROWS", help="the file to write")
    judge.call_flags(p)
    args = p.parse_args(argv)
    if len(args.teacher) != (args.baseline != "step_by_step"):
        tasks.stop("one --teacher is needed, and for step_by_step none")
    judge.check_files(args)
    with judge.lock(args.out):
        rows = judge.read_pool(args.paths)
        judge.grade_paths([row for row in rows if "correct" not in row])
        if os.path.exists(args.out):
            for row in judge.pool_rows(args.out):
                if row.get("baseline") != args.baseline:
                    tasks.stop(f"{args.out} exists and holds something else: choose another --out")
        kept = judge.filter_pool(rows, "full")
        made = baseline_rows(args.baseline, kept, args, judge.Spending(args))
        if not args.dry_run:
            judge.write_pool(args.out, [{**row, "baseline": args.baseline} for row in made])
            judge.filter_table(made)


if __name__ == "__main__":
    tasks.run_command(main)
