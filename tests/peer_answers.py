"""Peer teaching across tokenizers: the right answers of one student join the paths of the other (the demo).

    python tests/peer_answers.py [--seeds 20 21 22 23 24]        # two minutes a seed and core; resumes

QR-Distill for 100 steps; then each student goes on alone for 75: on its pool, on that and the other's right greedy
answers to the training questions, or on that and its own. They pass the same filter and are routed as a style "peer".
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import experiments
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as tasks

ARMS = {"pool": "the pool", "other": "and the other's answers", "own": "and its own answers"}


def right_answers(student, questions):
    """Pool rows of the questions that a saved student answers rightly."""
    answered = tasks.evaluate([tasks.load_student(str(student))], questions, 96, 100)["predictions"]
    return [{**row, "style": "peer", "teacher": student.name, "path": p["responses"][0][0]["text"].strip()}
            for row, p in zip(questions, answered) if p["responses"][0][0]["correct"]]


def run_seed(job):
    """-> {arm: [accuracy of student 0, of student 1]} of one seed."""
    seed, args = job
    experiments.prepare(seed, args)
    source, out = args.out / "demo" / str(seed), args.out / f"peer_answers_{seed}"
    pool = tasks.read_jsonl(source / "pool.jsonl")
    common = ["--eval_questions", str(source / "test.jsonl"), *experiments.DEMO, "--seed", str(seed)]

    def train(name, students, paths, steps):
        flags = ["--students", *map(str, students), "--paths", str(paths), "--max_steps", str(steps), *common]
        line = experiments.run((out / name, {}, flags, None))
        return line if "failed" not in line else tasks.stop(f"{out / name} failed: {line['failed']}")

    train("first", [source / f"student_{s}" for s in range(2)], source / "pool.jsonl", 100)
    students = [out / "first" / f"student_{s}" for s in range(2)]
    questions = list({row["id"]: {k: row[k] for k in ("id", "task", "question", "answer")} for row in pool}.values())
    answers = [right_answers(student, questions) for student in students]
    result = {arm: [] for arm in ARMS}
    for s, student in enumerate(students):
        for arm, more in (("pool", []), ("other", answers[1 - s]), ("own", answers[s])):
            paths = out / f"{arm}_{s}.jsonl"
            paths.write_text("".join(json.dumps(row) + "\n" for row in pool + more))
            result[arm].append(train(f"{arm}_{s}", [student], paths, 75)["accuracy"][0])
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24], help="two or more (20 to 24)")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="(out/experiments)")
    args = p.parse_args()
    if len(args.seeds) < 2:
        tasks.stop("--seeds: an interval needs two or more")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"),
                             initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(pool.map(run_seed, [(seed, args) for seed in args.seeds]))
    print("\n| trained on | student 0 | student 1 | less the pool alone, 95 %: student 0 | student 1 | both |\n|---" + "|---" * 5 + "|")
    for arm, label in ARMS.items():
        shares = [[r[arm][s] for r in results] for s in range(2)]
        gains = [[100 * (r[arm][s] - r["pool"][s]) for r in results] for s in range(2)]
        cells = [experiments.interval(x) for x in (*gains, [statistics.mean(x) for x in zip(*gains)])]
        print(f"| {label} | " + " | ".join([*map(experiments.mean_sd, shares), *(cells if arm != "pool" else [""] * 3)]) + " |")
    print(f"\nseeds: {', '.join(map(str, args.seeds))}")


if __name__ == "__main__":
    main()
