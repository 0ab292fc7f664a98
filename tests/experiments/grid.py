"""The runs behind the tables: rows over seeds, one JSON line per run in results/TABLE.jsonl.

    python tests/experiments/grid.py --table main --seeds 20 21 22        # the demo
    python tests/experiments/grid.py --table real --students A B --paths POOL.jsonl \\
        --eval_questions TEST.jsonl --steps 100 --batch_size 4 --seeds 0 1 2 --more --encoder MINILM

Every run is `python distill.py` with the flags of its line. A run whose line stands in any file of
results/ is not repeated: delete the lines that a change of the code has made old.

A row is compared with its reference (QR-Distill, where it names no other) seed by seed, on the same
questions, split and untrained students: once at equal optimiser steps with equally many questions a
step, once at equal trained response tokens. For that, the questions of a step and then the steps are
scaled until the row trains on as many tokens as its reference did.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import tables
from rows import TABLES, place, rows_of
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import eval as tasks
import judge


# ---------------------------------------- which runs
def job_of(args, row, budget, seed, steps, batch_size):
    """A run to be made: its flags, and the beginning of its line, which names no folder."""
    flags = []  # none: the demo
    if args.students:
        flags = ["--students", *args.students, "--paths", args.paths,
                 "--eval_questions", args.eval_questions]
    flags += ["--seed", str(seed), "--max_steps", str(steps), "--batch_size", str(batch_size),
              *args.more, *row.flags.split()]
    data = hashlib.sha256()
    for flag, value in itertools.pairwise(flags):
        if flag in ("--paths", "--eval_questions"):
            data.update(Path(value).read_bytes())
    words = [Path(word).name if os.path.exists(word) else word for word in flags]
    return flags, {"row": row.name, "against": row.against, "budget": budget, "seed": seed,
            "flags": " ".join(words), "data": data.hexdigest()[:8], "shuffled": row.shuffle,
            "compared": row.compared, "setting": setting_of(args)}


def setting_of(args):
    """What all rows of one table share, in words: only runs of one setting are compared."""
    data = "the demo"
    if args.students:
        students = " and ".join(Path(name).name for name in args.students)
        data = f"{students} on {Path(args.paths).name}"
    more = "".join(f" {Path(flag).name}" for flag in args.more)
    return f"{data}, {args.steps} steps of {args.batch_size} questions" + (more and "," + more)


def key_of(line):
    """What makes two runs the same run."""
    return json.dumps([line["flags"], line["data"], line["shuffled"]])


# ---------------------------------------- one run, in a process of its own
def shuffled(encode, style):
    """distill.encode with the tokens of one style's paths shuffled, for student 1 alone."""
    def encode_and_shuffle(*args):
        rows = encode(*args)
        for row in rows:
            if row["style"] == style:
                shuffle_tokens(row, 1)
        return rows
    return encode_and_shuffle


def shuffle_tokens(row, s):
    """Shuffle, in place, the tokens of a path as student s reads them; the end token stays."""
    response = row["responses"][s]
    order = list(range(len(response) - 1))
    random.Random(row["id"]).shuffle(order)
    response[:-1] = response[order]


def read_rates(folder):
    """What log.jsonl holds so far: for each step {(style, student): share of the style's paths that
    the student was given}."""
    steps = []
    for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        names = [name.split("/", 1)[1] for name in line if name.startswith("rate_style/")]
        steps.append({(name[:-2], int(name[-1])): line[f"rate_style/{name}"] for name in names})
    return steps


def curves(steps):
    """{style: for each student its mean rate in every ten steps}."""
    tens = [steps[i:i + 10] for i in range(0, len(steps), 10)]
    found = {}
    for style, s in sorted({pair for step in steps for pair in step}):
        means = [statistics.mean(step[style, s] for step in ten if (style, s) in step) for ten in tens]
        found.setdefault(style, []).append([round(mean, 4) for mean in means])
    return found


def run(flags, line, out):
    """Make a run, whose text goes to a file -> its whole line, or what went wrong. A process makes one
    run, since distill.encode may have changed. Of a shuffled style results/rates.jsonl keeps the rates."""
    import distill  # here, so that only the workers load torch

    folder = out / hashlib.sha256(key_of(line).encode()).hexdigest()[:16]
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if line["shuffled"]:
        distill.encode = shuffled(distill.encode, line["shuffled"])
    with open(f"{folder}.txt", "w") as text, contextlib.redirect_stdout(text), \
            contextlib.redirect_stderr(text):
        try:
            distill.main([*flags, "--out_dir", str(folder)])
        except (Exception, SystemExit):  # noqa: BLE001 (one run that fails does not end the grid)
            traceback.print_exc()
            return f"{line['row']} failed, see {folder}.txt"
    results = json.loads((folder / "results.json").read_text(),
                         parse_float=lambda number: round(float(number), 4))
    line |= {"accuracy": results["after"]["accuracy"],
             "before": {"accuracy": results["before"]["accuracy"]}}
    line |= {"questions": results["after"]["questions"], "tokens": results["tokens_trained"],
             "seconds": results["seconds"], "rate": results["selection_rate"],
             "versions": {**results["versions"], "commit": commit()}}
    if line["shuffled"]:
        tables.append_line("rates", {**line, "curves": curves(read_rates(folder))})
    return line


def commit():
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# ---------------------------------------- the grid
def run_all(jobs, args):
    """Make the runs that have no line yet, and write each line when it comes -> all their lines."""
    known = {}
    for name in TABLES:
        for line in tables.read_lines(name):
            if place(name, line["row"]) < len(TABLES[name]):  # else other code made it
                known[key_of(line)] = line
    here = {(key_of(line), line["row"]) for line in tables.read_lines(args.table)}
    # A line of another table gets the names of this one.
    lines = [{**known[key_of(line)], **line} for _, line in jobs if key_of(line) in known]
    for line in lines:
        if (key_of(line), line["row"]) not in here:
            tables.append_line(args.table, line)
    new = [(flags, line) for flags, line in jobs if key_of(line) not in known]
    with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = [pool.submit(run, *job, args.out) for job in new]
        for done in tqdm(as_completed(waiting), total=len(new), desc="runs", disable=not new):
            line = done.result()
            if isinstance(line, str):
                print(line, file=sys.stderr)
                continue
            tables.append_line(args.table, line)
            lines.append(line)
    return lines


def scaled_jobs(args, rows, lines):
    """The runs at equal tokens: steps and questions a step from the tokens of the equal steps."""
    by = {(line["row"], line["seed"]): line for line in lines}
    references = {row.against for row in rows}
    jobs = []
    for row in rows:
        pairs = {seed: (by[row.name, seed], by[row.against, seed]) for seed in args.seeds
                 if (row.name, seed) in by and (row.against, seed) in by}
        if row.name in references or not pairs or tables.equal_tokens(pairs.values()):
            continue
        for seed, (line, reference) in pairs.items():
            share = tables.token_share(line, reference)
            batch_size = max(1, round(args.batch_size * share))
            steps = max(1, round(args.steps * share * args.batch_size / batch_size))
            jobs.append(job_of(args, row, "tokens", seed, steps, batch_size))
    return jobs


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", choices=TABLES, required=True, help="which rows")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these, and their references (all)")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(20, 35)), help="(20 to 34)")
    p.add_argument("--budgets", nargs="+", default=["steps", "tokens"], help="equal what (both)")
    p.add_argument("--steps", type=int, default=152, help="optimiser steps of QR-Distill (152)")
    p.add_argument("--batch_size", type=int, default=8, help="its questions a step (8)")
    p.add_argument("--students", nargs="+", metavar="MODEL", help="pretrained ones (the demo's)")
    p.add_argument("--paths", metavar="POOL", help="their pool")
    p.add_argument("--eval_questions", metavar="FILE", help="their test questions")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="run folders")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once (one a core)")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further flags of every run")
    args = p.parse_args()
    if len({bool(x) for x in (args.students, args.paths, args.eval_questions)}) > 1:
        tasks.stop("pretrained students need --students, --paths and --eval_questions together")
    return args


def main():
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: a sum in another order is another run
    styles = judge.STYLES
    if args.paths:
        styles = sorted({row["style"] for row in judge.read_pool(args.paths)})
    rows = rows_of(args.table, styles, args.rows)
    lines = run_all([job_of(args, row, "steps", seed, args.steps, args.batch_size)
                     for seed in args.seeds for row in rows], args)
    if "tokens" in args.budgets:
        run_all(scaled_jobs(args, rows, lines), args)
    print(tables.markdown(args.table))


if __name__ == "__main__":
    main()
