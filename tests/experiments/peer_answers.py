"""Peer teaching across tokenizers: one student's right answers join the other's paths (the demo).

    python tests/experiments/peer_answers.py [--seeds 20 21 22 23 24]   # minutes a seed; resumes

QR-Distill for 100 steps; then each student goes on alone for 75: on its pool, on that and the other's
right greedy answers to the training questions, or on that and its own. The answers pass the same
filter as a teacher's path and are routed as a style "peer". One line a seed in
results/peer_answers.jsonl; a seed whose line is there is not repeated.
"""
import argparse
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import grid
import tables

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as tasks

NAME = "peer_answers"
ARMS = {"pool": "the pool", "other": "and the other's answers", "own": "and its own answers"}


def right_answers(student, questions):
    """Pool rows of the questions that a saved student answers rightly."""
    students = [tasks.load_student(str(student))]
    answered = tasks.evaluate(students, questions, 96, 100)["predictions"]
    return [{**row, "style": "peer", "teacher": student.name,
             "path": answer["responses"][0][0]["text"].strip()}
            for row, answer in zip(questions, answered) if answer["responses"][0][0]["correct"]]


def run_seed(seed, out):
    """-> the line of one seed: {"seed", arm: [accuracy of student 0, of student 1]}."""
    pool, test = grid.demo_files(out / "demo", seed)
    out = out / f"{NAME}_{seed}"
    first = grid.train(["--seed", str(seed), "--max_steps", "100"], out / "first")
    rows = tasks.read_jsonl(pool)
    fields = ("id", "task", "question", "answer")
    questions = list({row["id"]: {key: row[key] for key in fields} for row in rows}.values())
    students = [out / "first" / f"student_{s}" for s in range(2)]
    answers = [right_answers(student, questions) for student in students]
    line = {"seed": seed, "versions": first["versions"], **{arm: [] for arm in ARMS}}
    for s, student in enumerate(students):
        for arm, more in (("pool", []), ("other", answers[1 - s]), ("own", answers[s])):
            paths = out / f"{arm}_{s}.jsonl"
            grid.write_rows(paths, rows + more)
            flags = ["--students", str(student), "--paths", str(paths), "--eval_questions", str(test),
                     "--lora_rank", "0", "--lr", "2e-3", "--eval_max_new_tokens", "96",
                     "--seed", str(seed), "--max_steps", "75"]
            results = grid.train(flags, out / f"{arm}_{s}")
            line[arm].append(round(results["after"]["accuracy"][0], 4))
    return line


def markdown(lines):
    """The table of all seeds: accuracy, and the gain over the pool alone."""
    head = "| trained on | student 0 | student 1 | gain over the pool alone: student 0 | student 1 | both |"
    text = [head, "|---" * 6 + "|"]
    for arm, label in ARMS.items():
        shares = [tables.mean_sd([line[arm][s] for line in lines]) for s in range(2)]
        gains = [[100 * (line[arm][s] - line["pool"][s]) for line in lines] for s in range(2)]
        gains.append([statistics.mean(pair) for pair in zip(*gains)])
        cells = ["", "", ""] if arm == "pool" else \
            [tables.gain_text(tables.interval(gain)) for gain in gains]
        text.append(f"| {' | '.join([label, *shares, *cells])} |")
    seeds = ", ".join(str(line["seed"]) for line in lines)
    return "\n".join([*text, f"\nPercent of 300 test questions; seeds {seeds}.\n"])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(20, 28)), help="(20 to 27)")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="(out/experiments)")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    known = {line["seed"] for line in tables.read_lines(NAME)}
    new = [seed for seed in args.seeds if seed not in known]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(run_seed, new, [args.out] * len(new)):
            tables.append_line(NAME, line)
    text = markdown(tables.read_lines(NAME))
    (tables.RESULTS / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
