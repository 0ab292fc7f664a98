"""The path pool of QR-Distill: teacher paths in several styles, graded (filter step 1) and judged (filter step 2).

    python judge.py --demo 400 --out pool.jsonl                              # a pool from the embedded demo teacher
    python judge.py --paths pool.jsonl --judge rule --out judged.jsonl       # grade, judge, and say what was kept

A pool is a JSON Lines file, one path a line: id, task, question, answer, style, teacher, path, and optionally
choices, level, prompt, sample, finish_reason, usage. Judging adds prediction, correct, valid, verdict.
"""
import argparse
import hashlib
import json
import operator
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict

from filelock import FileLock, Timeout
from tqdm import tqdm

import eval as tasks

STYLES = ("vanilla", "chain_of_thought", "tree_of_thought", "program", "backward", "fact_retrieval")
FIELDS = ("id", "task", "question", "answer", "style", "teacher")  # a path may be empty: recorded, never trains

# ------------------------------------------------------------------------------------------------ the embedded demo
NAMES = ("Tom", "Anna", "Ben", "Mia", "Leo", "Eva", "Sam", "Zoe", "Max", "Ida")
THINGS = ("apples", "pears", "books", "coins", "cards", "shells", "pens", "eggs", "nuts", "stars")
OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
VERBS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
CONFUSED = {"+": "-", "-": "+", "*": "+", "/": "-"}  # the operation that the demo teacher takes by mistake
# (question, steps): a..d are numbers 2..9, p is 12..60; the results of the steps are x, y, z
TEMPLATES = (
    ("{n} has {a} {t}. {n} buys {b} bags with {c} {t} each. How many {t} does {n} have now?", "b * c, a + x"),
    ("{n} has {p} {t} and finds {b} more. {n} gives {c} {t} to {m}. How many {t} are left?", "p + b, x - c"),
    ("{n} puts {p} {t} into {b} equal boxes. {n} takes {c} {t} out of one box. How many {t} are left in this box?",
     "p / b, x - c"),
    ("{n} has {a} {t}. {m} has {b} times as many. How many {t} do {n} and {m} have together?", "a * b, a + x"),
    ("{n} has {p} {t} and gets {a} more. {m} takes {b} {t} away. {n} packs {c} {t} into each bag. How many bags are full?",
     "p + a, x - b, y / c"),
    ("{n} buys {a} packs with {b} {t} each. {m} buys {c} boxes with {d} each. How many {t} do {n} and {m} have together?",
     "a * b, c * d, x + y"),
    ("{n} gets {a} {t} each day for {b} days. {n} finds {c} more. {n} gives {d} {t} to {m}. How many {t} are left?",
     "a * b, x + c, y - d"),
)
SEEDS = 16  # a question's text decides which seed (modulo this) may ask it: seeds never share a question


def _solve(steps, numbers, at=None, confuse=False, shift=0, recover=False):
    """Work the steps out: [(left, op, right, result)]. At step `at` take the confused operation and/or add `shift`
    to the result; with `recover` the later results are the true ones again (right answer, wrong step)."""
    said, true, out = dict(numbers), dict(numbers), []
    for k, (step, name) in enumerate(zip(steps.split(", "), "xyz")):
        left, op, right = step.split()
        true[name] = OPS[op](true[left], true[right])
        used = CONFUSED[op] if confuse and k == at else op
        said[name] = true[name] if recover and k > at else OPS[used](said[left], said[right])
        said[name] += shift if k == at else 0
        out.append((said[left], used, said[right], said[name]))
    return out


def _sane(solution):
    return all(0 < r < 200 and (op != "/" or a % b == 0 and a > b) for a, op, b, r in solution)


def demo_questions(n, seed):
    """n arithmetic word problems of two or three steps (`level`) with small numbers, every answer in 1..199. The
    first questions do not depend on n; question sets of seeds that differ modulo SEEDS share no text."""
    rng, seen, rows = random.Random(f"questions {seed}"), set(), []
    k = rng.randrange(len(TEMPLATES))
    for _ in range(2000 * n + 1):
        if len(rows) == n:
            return rows
        text, steps = TEMPLATES[k]
        numbers = {**{v: rng.randint(2, 9) for v in "abcd"}, "p": rng.randint(12, 60)}
        (name, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
        question = text.format(n=name, m=other, t=thing, **numbers)
        solution = _solve(steps, numbers)
        if question in seen or not _sane(solution) or zlib.crc32(question.encode()) % SEEDS != seed % SEEDS:
            continue
        seen.add(question)
        rows.append({"id": f"demo-{seed}-{len(rows):05d}", "task": "demo", "question": question,
                     "answer": str(solution[-1][3]), "level": len(solution), "template": k, "numbers": numbers})
        k = rng.randrange(len(TEMPLATES))  # only now: templates that are hard to fill are as frequent as the others
    tasks.stop(f"the demo has fewer than {n} questions for one seed: ask for fewer")


def _write(style, question, solution):
    """One path in one style: 15 to 60 words, visibly different in form, ends with 'The answer is N'."""
    said = [f"{a} {op} {b} = {r}" for a, op, b, r in solution]
    if style == "vanilla":
        body = "We get " + " and ".join(said) + "."
    elif style == "chain_of_thought":
        words = ("First", "Next", "Then")
        body = "Let us think step by step. " + " ".join(
            f"{words[k]} we {VERBS[op]} {a} and {b}: {said[k]}." for k, (a, op, b, r) in enumerate(solution))
    elif style == "tree_of_thought":
        body = " ".join(f"Do we {VERBS[CONFUSED[op]]} or {VERBS[op]}? We {VERBS[op]}, so {said[k]}."
                        for k, (a, op, b, r) in enumerate(solution))
    elif style == "program":
        body = "def solve():\n" + "".join(f"    {v} = {a} {op} {b}  # {r}\n" for v, (a, op, b, r)
                                          in zip("xyz", solution)) + f"    return {'xyz'[len(solution) - 1]}"
    elif style == "backward":
        undo = {"+": ("-", 2), "-": ("+", 0), "*": ("/", 2), "/": ("*", 0)}
        checks = []
        for step in reversed(solution):
            op, back = undo[step[1]]
            checks.append(f"{step[3]} {op} {step[2 - back]} = {step[back]}")
        body = "Forward: " + ". ".join(said) + ". Check backward: " + ". ".join(checks) + ". This is right."
    else:
        body = "Facts: " + question[:question.rindex(". ") + 1] + " So " + ". So ".join(said) + "."
    return f"{body}\nThe answer is {solution[-1][3]}"


def demo_paths(questions, seed):
    """The demo teacher: one path per question and style. 15 to 20 % of its answers are wrong (a wrong operation or a
    wrong result) and 6 to 8 % are right after a wrong step, concentrated on two templates and two styles. Its own
    truth stands in `source_correct` (the answer) and `source_valid` (every step)."""
    rows = []
    for question in questions:
        steps, numbers, true = TEMPLATES[question["template"]][1], question["numbers"], question["answer"]
        for style in STYLES:
            rng = random.Random(f"paths {seed} {question['id']} {style}")
            weak = (question["template"] in (4, 6)) + (style in ("tree_of_thought", "fact_retrieval"))
            u, p_wrong, p_slip = rng.random(), (0.07, 0.22, 0.50)[weak], (0.03, 0.09, 0.16)[weak]
            kind = "wrong" if u < p_wrong else "slip" if u < p_wrong + p_slip else "clean"
            solution, confuse = _solve(steps, numbers), False
            while kind != "clean":
                confuse = kind == "wrong" and rng.random() < 0.5
                at = rng.randrange(len(solution) - (kind == "slip"))
                shift = 0 if confuse else rng.choice((-10, -2, -1, 1, 2, 10))
                solution = _solve(steps, numbers, at, confuse, shift, recover=kind == "slip")
                right = str(solution[-1][3]) == true
                if right == (kind == "slip") and all(0 < r < 200 for *_, r in solution) and (
                        kind == "slip" or _sane(solution[:at] + solution[at + 1:])):
                    break
                solution = _solve(steps, numbers)
            rows.append({**{k: question[k] for k in ("id", "task", "question", "answer", "level")}, "style": style,
                         "teacher": "demo-teacher", "path": _write(style, question["question"], solution),
                         "source_correct": kind != "wrong", "source_valid": kind == "clean"})
    return rows


def demo_sentences(n, seed):
    """n clean arithmetic sentences in the paths' phrasing, about no question: the students' warm start."""
    rng, out = random.Random(f"sentences {seed}"), []
    while len(out) < n:
        op = rng.choice("+-*/")
        a, b = rng.randint(2, 60) if op in "+-" else rng.randint(2, 9), rng.randint(2, 9)
        a = a * b if op == "/" else a
        if op == "+" and rng.random() < 0.3:
            b = rng.randint(2, 60)
        name, thing, v, step = rng.choice(NAMES), rng.choice(THINGS), rng.choice("xyz"), (a, op, b, OPS[op](a, b))
        if step[3] > 0:
            said = f"{a} {op} {b} = {step[3]}"
            word, other = rng.choice(("First", "Next", "Then")), VERBS[CONFUSED[op]]
            out.append(rng.choice((
                f"We get {said}.", f"{word} we {VERBS[op]} {a} and {b}: {said}.", f"    {v} = {a} {op} {b}  # {step[3]}",
                f"Do we {other} or {VERBS[op]}? We {VERBS[op]}, so {said}.", f"So {said}.", f"Check backward: {said}.",
                f"{name} has {step[3]} {thing}.\nThe answer is {step[3]}", f"Forward: {said}.\nThe answer is {step[3]}",
                f"Let us think step by step. {word} we {VERBS[op]} {a} and {b}: {said}.\nThe answer is {step[3]}",
                f"def solve():\n    {v} = {a} {op} {b}  # {step[3]}\n    return {v}\nThe answer is {step[3]}",
                f"Facts: {name} has {step[3]} {thing}. So {said}. This is right.")))
    return out


# ---------------------------------------------------------------------------------------------------------- the pool
def pool_rows(path):
    """Yield the rows of a pool one by one, validated; stop() with FILE:LINE on the first bad one."""
    questions = {}  # id -> digest of (question, answer): 100,000 questions fit in some 20 MB
    if not os.path.isfile(path):
        tasks.stop(f"cannot read the pool {path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                tasks.stop(f"{where}: not valid JSON ({error}); expected one JSON object a line")
            if not isinstance(row, dict):
                tasks.stop(f"{where}: expected a JSON object, found {type(row).__name__}")
            for field in FIELDS:
                if not isinstance(row.get(field), str) or not row[field].strip():
                    tasks.stop(f"{where}: field '{field}' is missing, empty or not a string")
            if not isinstance(row.get("path"), str):
                tasks.stop(f"{where}: field 'path' is missing or not a string")
            if row["task"] not in tasks.TASKS:
                tasks.stop(f"{where}: unknown task '{row['task']}' (one of {', '.join(tasks.TASKS)})")
            choices = row.get("choices")
            if choices is not None and (not isinstance(choices, dict) or row["answer"] not in choices):
                tasks.stop(f"{where}: the answer '{row['answer']}' is not a letter among the row's choices")
            content = hashlib.blake2b(repr((row["question"], row["answer"])).encode(),
                                      digest_size=8).digest()
            if questions.setdefault(row["id"], content) != content:
                tasks.stop(f"{where}: id '{row['id']}' stood earlier with another question or answer")
            yield row


def read_pool(path):
    """All rows of a pool (list of dicts), validated; stop() with FILE:LINE on the first bad one."""
    return list(pool_rows(path))


def grade_paths(rows):
    """Filter step 1: add `prediction` (None: unparsed) and `correct` to every row of a list, in place; returns it."""
    for row in rows:
        row["prediction"] = tasks.extract_answer(row["task"], row["path"], row.get("choices"))
        row["correct"] = tasks.grade(row["task"], row["prediction"], row["answer"], row.get("choices"))
    return rows


def rule_judge(row):
    """The demo's judge: every statement 'a + b = c' holds, every number comes from the question or from an earlier
    statement, the last number is a result. Returns (valid, verdict); stop() on another task, where it knows nothing."""
    if row["task"] != "demo":
        tasks.stop(f"the rule judge knows the demo's arithmetic only, not task '{row['task']}': "
                   "pass --judge MODEL@URL, a model's name, or none")
    known, results, text = set(re.findall(r"\d+", row["question"])), set(), row["path"]
    for statement in re.finditer(r"(\d+) ([-+*/]) (\d+)\s+[=#]\s+(\d+)|\d+", text):
        a, op, b, result = statement.groups()
        if a is None:
            a = b = statement.group()
        elif (int(a) != int(b) * int(result) if op == "/" else OPS[op](int(a), int(b)) != int(result)):
            return False, f"invalid: {statement.group()}"
        if not {a, b} <= known:
            return False, f"invalid: {a if a not in known else b} comes from nowhere"
        if result:
            known.add(result), results.add(result)
    if not results or re.findall(r"\d+", text)[-1] not in results:
        return False, "invalid: the answer was not derived"
    return True, "valid"


REFUSAL = re.compile(r"\W*(i'?m sorry|i am sorry|sorry,|i apologi[sz]e|(i|we) (can(no|')t|am unable|'m unable|won't)\b"
                     r"|as an ai\b)", re.IGNORECASE)
FATES = ("kept", "wrong", "unparsed", "invalid", "no verdict", "empty", "cut", "refused")


def fate(row, mode="full"):
    """One of FATES: 'kept', or why a graded and judged row does not train. mode full = right answer and judged valid
    (a row that nobody judged, valid None, passes on its answer), answer = right answer, none = no filter. Rows that
    are empty, cut at the length limit or refused never train, whatever the mode."""
    if not row["path"].strip():
        return "empty"
    if row.get("finish_reason") == "length":
        return "cut"
    if row.get("finish_reason") in ("content_filter", "refusal", "safety"):
        return "refused"
    if REFUSAL.match(row["path"].replace("\u2019", "'")) and not row.get("correct"):
        return "refused"
    if mode != "none" and not row["correct"]:
        return "unparsed" if row["prediction"] is None else "wrong"
    if mode == "full" and row.get("valid") is False:
        return "invalid" if any(v.startswith("invalid") for v in (row["verdict"] or {}).values()) else "no verdict"
    return "kept"


def filter_pool(rows, mode):
    """The rows that train under mode full | answer | none (see fate)."""
    return [row for row in rows if fate(row, mode) == "kept"]


def filter_table(rows, mode="full"):
    """Print paths, kept and why the rest went, per style and teacher."""
    counts = defaultdict(Counter)
    for row in rows:
        for key in ((row["style"], row["teacher"]), ("all", "")):
            counts[key][fate(row, mode)] += 1
    wide = max(len(f"{style} {teacher}") for style, teacher in counts) + 2
    print(f"{'style, teacher':{wide}}{'paths':>8}" + "".join(f"{name:>11}" for name in FATES))
    for (style, teacher), count in sorted(counts.items(), key=lambda item: (item[0][0] == "all", item[0])):
        print(f"{f'{style} {teacher}':{wide}}{sum(count.values()):>8}"
              + "".join(f"{count[name] or '-':>11}" for name in FATES))


# ------------------------------------------------------------------------------------- files that survive everything
def row_key(row, *more):
    """8 bytes that name a row: question, style, teacher, sample (and more)."""
    key = [row["id"], row["style"], row["teacher"], row.get("sample", 0), *more]
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()


def open_pool(path):
    """Open a pool for appending whole lines; a last line that a kill tore is completed or cut off. stop() if another
    process writes to it. Returns (file, lock); the lock is released by the system even on kill -9."""
    lock = FileLock(os.path.realpath(path) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tasks.stop(f"another process is writing to {path}: wait for it, or choose another --out")
    file = open(path, "a+b")  # noqa: SIM115 (stays open)
    size = back = file.seek(0, os.SEEK_END)
    tail = b""
    while back and b"\n" not in tail:  # the last line may be longer than a block
        back = max(0, back - 65536)
        file.seek(back)
        tail = file.read(size - back)
    tail = tail[tail.rfind(b"\n") + 1:]
    try:
        torn = bool(tail) and not isinstance(json.loads(tail), dict)
    except ValueError:
        torn = True
    if torn and not tail.startswith(b"{"):
        tasks.stop(f"{path} exists and is not a pool: choose another --out")
    if torn:
        print(f"{path}: cut off a last line that was torn ({len(tail)} bytes)", file=sys.stderr)
        file.truncate(size - len(tail))
    elif tail:
        append(file, None)
    return file, lock


def append(file, row):
    """Write one row as one line and flush it to the system; None ends a line that lacks its newline."""
    file.write(b"\n" if row is None else json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    file.flush()


# ---------------------------------------------------------------------------------------------------------- the command
def annotate(rows, total, out, judge):
    """Grade and judge rows and append them to the pool `out` one by one; rows that are there already are not done
    again. stop() if `out` holds anything else."""
    file, lock = open_pool(out)
    done = Counter()
    for row in pool_rows(out):
        if "verdict" not in row or set(row["verdict"] or {}) != {judge} - {"none"}:
            tasks.stop(f"{out} exists and was not made by --judge {judge}: choose another --out")
        done[row_key(row, row["path"])] += 1
    if done and not done <= Counter(row_key(row, row["path"]) for row in rows()):
        tasks.stop(f"{out} exists and holds rows of another pool: choose another --out")
    for row in tqdm(rows(), total=total, desc="judge", unit="path", leave=False):
        key = row_key(row, row["path"])
        if done[key]:
            done[key] -= 1
            continue
        grade_paths([row])
        row["valid"], row["verdict"] = None, None
        if judge == "rule":
            row["valid"], verdict = rule_judge(row)
            row["verdict"] = {"rule": verdict}
        append(file, row)
    file.close()
    lock.release()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input")
    group.add_argument("--paths", metavar="POOL", help="a pool to grade and judge")
    group.add_argument("--demo", type=int, metavar="N", help="the demo teacher's pool on N questions instead")
    group.add_argument("--seed", type=int, default=0, help="seed of the demo")
    group = parser.add_argument_group("filter")
    group.add_argument("--judge", default="none", help="step 2 of the filter: none, or rule (the demo's tasks only)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="POOL", help="the pool to write; an unfinished one is continued")
    args = parser.parse_args()
    if (args.paths is None) == (args.demo is None):
        tasks.stop("pass one of --paths POOL and --demo N")
    if args.judge not in ("none", "rule"):
        tasks.stop(f"unknown judge '{args.judge}': none or rule")
    if args.demo is not None:
        demo = demo_paths(demo_questions(args.demo, args.seed), args.seed)
        annotate(lambda: demo, len(demo), args.out, args.judge)
    else:
        if os.path.realpath(args.paths) == os.path.realpath(args.out):
            tasks.stop("--out must not be the file of --paths")
        total = sum(1 for _ in pool_rows(args.paths))  # also finds every bad line before anything is written
        annotate(lambda: pool_rows(args.paths), total, args.out, args.judge)
    filter_table(pool_rows(args.out))
    if args.judge == "none":
        print("step 2 of the filter (a judge) was not run: kept means that the answer is right")


if __name__ == "__main__":
    main()
