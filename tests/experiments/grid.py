"""The runs behind the tables: rows over seeds, one JSON line per run in results/TABLE.jsonl.

    python tests/experiments/grid.py --table main --seeds 20 21 22        # the demo
    python tests/experiments/grid.py --table real --students A B --paths POOL.jsonl \\
        --eval_questions TEST.jsonl --steps 100 --batch_size 4 --seeds 0 1 2 --more --encoder MINILM
    python tests/experiments/tables.py                                    # tables and pictures

Every run is `python distill.py` with the flags of its line. A run whose line stands in any file of
results/ is not repeated: delete the lines that a change of the code has made old. A run that was
killed goes on from its last checkpoint in --out.

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
import multiprocessing
import os
import random
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import tables
from rows import TABLES, place, rows_of
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as tasks
import judge


# ---------------------------------------- which runs
def data_flags(args):
    """The flags of distill.py that say on what is trained and tested; none: the demo."""
    if not args.students:
        return []
    return ["--students", *args.students, "--paths", args.paths,
            "--eval_questions", args.eval_questions]


def job_of(args, row, budget, seed, steps, batch_size):
    """A run to be made: its flags, and the beginning of its line, which names no folder."""
    flags = [*data_flags(args), "--seed", str(seed), "--max_steps", str(steps),
             "--batch_size", str(batch_size), *args.more, *row.flags.split()]
    data = hashlib.sha256()
    for flag, value in itertools.pairwise(flags):
        if flag in ("--paths", "--eval_questions"):
            data.update(Path(value).read_bytes())
    line = {"row": row.name, "against": row.against, "budget": budget, "seed": seed,
            "flags": " ".join(Path(flag).name if os.path.exists(flag) else flag
                              for flag in flags),
            "data": data.hexdigest()[:8], "shuffled": row.shuffle, "compared": row.compared,
            "setting": setting_of(args)}
    return flags, line


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


def first_test_once(evaluate, file):
    """eval.evaluate, the first call of which, the test of the untrained students, is read from
    `file` if a run before made it: their greedy answers hang on no row and no seed."""
    tests = itertools.count()

    def evaluate_or_read(*args, **more):
        first = next(tests) == 0
        if first and file.exists():
            return json.loads(file.read_text())
        found = evaluate(*args, **more)
        if first:
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(found))
            part.replace(file)
        return found
    return evaluate_or_read


def train(flags, folder, shuffle=None, first_test=None):
    """One run of distill.py in `folder`, or the rest of it -> its results.json. What it prints goes
    to FOLDER.txt; first_test: the file of first_test_once. Raises what distill.main raises,
    SystemExit included."""
    import distill  # here, so that only the workers load torch
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").exists():
        begun = (folder / "checkpoint.pt").exists()
        encode, evaluate = distill.encode, tasks.evaluate
        if shuffle:
            distill.encode = shuffled(encode, shuffle)
        if first_test and not begun:
            tasks.evaluate = first_test_once(evaluate, first_test)
        try:
            with open(f"{folder}.txt", "a") as text, contextlib.redirect_stdout(text), \
                    contextlib.redirect_stderr(text):
                distill.main(["--resume", str(folder)] if begun
                             else [*flags, "--out_dir", str(folder)])
        finally:
            distill.encode, tasks.evaluate = encode, evaluate
    return json.loads((folder / "results.json").read_text())


def rounded(x):
    """Numbers to four digits after the point, in lists and objects too."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x


def run(flags, line, out):
    """Make a run -> its whole line, or (row, what went wrong) if it failed."""
    folder = out / hashlib.sha256(key_of(line).encode()).hexdigest()[:16]
    first_test = None
    if "--students" in flags:  # the demo's students hang on the seed
        first_test = out / f"before_{hashlib.sha256(line['setting'].encode()).hexdigest()[:16]}.json"
    try:
        results = train(flags, folder, line["shuffled"], first_test)
    except (Exception, SystemExit):  # noqa: BLE001 (one run that fails does not end the grid)
        with open(f"{folder}.txt", "a") as text:
            traceback.print_exc(file=text)
        return line["row"], f"see {folder}.txt"
    scores = ("accuracy", "ensemble", "upper_bound")
    return line | rounded({
        **{key: results["after"][key] for key in scores},
        "before": {key: results["before"][key] for key in scores},
        "questions": results["after"]["questions"], "tokens": results["tokens_trained"],
        "seconds": results["seconds"], "rate": results["selection_rate"],
        "versions": results["versions"]})


# ---------------------------------------- the grid
def run_all(jobs, args):
    """Make the runs that have no line yet, and write each line when it comes -> all their lines."""
    # A line of a row that is gone was made by other code, which its commit has.
    known = {}
    for name in TABLES:
        for line in tables.read_lines(name):
            if place(name, line["row"]) < len(TABLES[name]):
                known[key_of(line)] = line
    here = {(key_of(line), line["row"]) for line in tables.read_lines(args.table)}
    lines, new = [], []

    def keep(line):
        lines.append(line)
        if (key_of(line), line["row"]) not in here:
            tables.append_line(args.table, line)

    for flags, line in jobs:
        if key_of(line) in known:  # its names are those of this table
            keep({**known[key_of(line)], **line})
        else:
            new.append((flags, line))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        waiting = [pool.submit(run, *job, args.out) for job in new]
        for done in tqdm(as_completed(waiting), total=len(new), desc="runs", disable=not new):
            result = done.result()
            if isinstance(result, dict):
                keep(result)
            else:
                print("failed:", *result, file=sys.stderr)
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
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--table", choices=TABLES, required=True, help="which rows")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these, and their references (all)")
    p.add_argument("--styles", nargs="+", help="for rows of a style: only these styles (the pool's)")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(20, 35)), help="(20 to 34)")
    p.add_argument("--budgets", nargs="+", choices=["steps", "tokens"], default=["steps", "tokens"],
                   help="equal what (both)")
    p.add_argument("--steps", type=int, default=152, help="optimiser steps of QR-Distill (152)")
    p.add_argument("--batch_size", type=int, default=8, help="its questions a step (8)")
    p.add_argument("--students", nargs="+", metavar="MODEL", help="real students (the demo's)")
    p.add_argument("--paths", metavar="POOL", help="their pool")
    p.add_argument("--eval_questions", metavar="FILE", help="their test questions")
    p.add_argument("--out", type=Path, default=Path("out/experiments"),
                   help="run folders (out/experiments)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once (one a core)")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further flags of every run")
    args = p.parse_args()
    if len({bool(x) for x in (args.students, args.paths, args.eval_questions)}) > 1:
        tasks.stop("real runs need --students, --paths and --eval_questions together")
    if args.table == "real" and not args.students:
        tasks.stop("--table real needs --students, --paths and --eval_questions")
    return args


def main():
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: a sum in another order is another run
    styles = args.styles or judge.STYLES
    if args.paths and not args.styles:
        styles = sorted({row["style"] for row in judge.read_pool(args.paths)})
    try:
        rows = rows_of(args.table, styles, args.rows)
    except ValueError as error:
        tasks.stop(f"--rows: {error}")
    lines = run_all([job_of(args, row, "steps", seed, args.steps, args.batch_size)
                     for seed in args.seeds for row in rows], args)
    if "tokens" in args.budgets:
        run_all(scaled_jobs(args, rows, lines), args)
    tables.write(args.table)


if __name__ == "__main__":
    main()
