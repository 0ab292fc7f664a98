"""The tables of README.md, run by run: a named grid over seeds, resumed where it stopped.

    python tests/experiments.py --table main                                       # the demo, an hour on two cores
    python tests/experiments.py --table routing --students A B --paths POOL.jsonl --steps 60 --seeds 0 1

Every run is a `distill.py` run in OUT/, and one JSON line in OUT/runs.jsonl; a run whose line is there is not repeated.
A row is compared with QR-Distill seed by seed (the same questions, split and untrained students): once at equal steps
with equally many questions a step, once at equal trained response tokens, for which first the questions per step and then
the steps are scaled ("both": its tokens are within 15 % anyway). The difference is the mean over the students that the
row trains, in table harmful that of the student whose paths were scrambled; its interval is Student's t.
"""
import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import eval as tasks
import judge

FULL = "QR-Distill"
DEMO = ["--lora_rank", "0", "--lr", "2e-3", "--eval_max_new_tokens", "96", "--eval_batch_size", "100"]
ALL, RANDOM = {"all paths to both": "--route all"}, {"random path": "--route random"}
TABLES = {
    "main": {
        FULL: "", "one path (SKD)": "--route all --mutual_weight 0 --styles ONE",
        "distilling step-by-step": "--route all --mutual_weight 0 --paths STEP_BY_STEP",
        **ALL, **RANDOM, "no filter": "--filter none", "answer filter only": "--filter answer",
        "no collaboration": "--mutual_weight 0", "student 0 frozen": "--freeze 0", "student 1 frozen": "--freeze 1",
        "student 0 alone": "--alone 0", "student 1 alone": "--alone 1"},
    "routing": {
        FULL: "", **ALL, **RANDOM, "only STYLE": "--route all --styles STYLE",
        **{f"--route {name}": f"--route {name}" for name in ("nll", "lalp", "rsr", "lark")}},
    # one style is scrambled for student 1 and for no other: a router must find it
    "harmful": {FULL: "--scramble", **{name: f"--scramble {flags}" for name, flags in (ALL | RANDOM).items()}},
    "ablation": {
        FULL: "", "gates as in the paper": "--gate binary --reward loss --no-style_input --explore 0",
        "binary gates": "--gate binary --explore 0", "reward: mean loss": "--reward loss",
        "no style input": "--no-style_input", "MLP router": "--router_hidden 256 --router_lr 0.01",
        **{f"first phase {share}": f"--explore {share}" for share in (0.05, 0.1, 0.5)}},
    "samples": {FULL: "", **ALL, **{f"{name}, {share:.0%} of the questions": f"{flags} --train_frac {share}"
                                    for share in (0.5, 0.25, 0.1) for name, flags in ((FULL, ""), *ALL.items())}},
    "competence": {
        FULL: "", "no collaboration": "--mutual_weight 0", "ten times the mutual loss": "--mutual_weight 1",
        "competence from Eq 8": "--competence eq8", "trained projections": "--projection trained",
        **ALL, "all paths to both, no collaboration": "--route all --mutual_weight 0"},
}


# ---------------------------------------------------------------- one run, in a process of its own
def prepare(seed, args):
    """The demo's untrained students, pool and test questions of one seed, on disk."""
    folder = args.out / "demo" / str(seed)
    if (folder / "done").exists():
        return
    for i, (model, tokenizer) in enumerate(distill.demo_students(seed)):
        model.save_pretrained(folder / f"student_{i}")
        tokenizer.save_pretrained(folder / f"student_{i}")
    rows = judge.demo_paths(judge.demo_questions(300, seed), seed)
    for name, part in (("pool", rows), ("test", judge.demo_questions(300, seed + 1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "done").touch()


def scrambled(encode, style):
    """distill.encode with the tokens of one style's paths shuffled, for student 1 alone."""
    def encode_and_scramble(rows, students):
        rows = encode(rows, students)
        for row in rows:
            if row["style"] == style:  # the end token stays
                order = list(range(len(row["responses"][1]) - 1))
                random.Random(row["id"]).shuffle(order)
                row["responses"][1][:-1] = row["responses"][1][order]
        return rows
    return encode_and_scramble


def run(job):
    """One run of distill.py -> its line of runs.jsonl."""
    folder, line, flags, scramble = job
    folder.parent.mkdir(parents=True, exist_ok=True)
    resumed = (folder / "args.json").exists()
    encode = distill.encode
    if scramble:
        distill.encode = scrambled(encode, scramble)
    with open(f"{folder}.txt", "a") as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            if not (folder / "results.json").exists():
                distill.main(["--resume", str(folder)] if resumed else [*flags, "--out_dir", str(folder)])
        except (Exception, SystemExit):  # noqa: BLE001 (one run that fails does not end the grid)
            traceback.print_exc()
            return {**line, "failed": f"see {text.name}"}
        finally:
            distill.encode = encode
    results = json.loads((folder / "results.json").read_text())
    after, before = results["after"], results["before"]
    return {**line, "accuracy": after["accuracy"], "ensemble": after["ensemble"], "upper_bound": after["upper_bound"],
            "before": before["accuracy"], "before_ensemble": before["ensemble"], "before_upper": before["upper_bound"],
            "tokens": results["tokens_trained"], "questions": after["questions"], "seconds": results["seconds"],
            "rate": results["selection_rate"]}


def jobs_of(args, table, seed):
    """The runs of one seed: [(name, flags, trained students, style to scramble)]."""
    source = args.out / "demo" / str(seed)
    students = args.students or [str(source / f"student_{i}") for i in range(2)]
    pool = args.paths or str(source / "pool.jsonl")
    styles = sorted({row["style"] for row in tasks.read_jsonl(pool)})
    one = "chain_of_thought" if "chain_of_thought" in styles else styles[0]
    rows = {}
    for name, flags in table.items():
        rows |= {name.replace("STYLE", style): flags.replace("STYLE", style) for style in styles} \
            if "STYLE" in name else {name: flags.replace("ONE", one)}
    for name, flags in rows.items():
        flags, trained, mine = flags.split(), list(range(len(students))), students
        if "--alone" in flags:
            trained = [int(flags[-1])]
            mine, flags = [students[trained[0]]], flags[:-2]
        if "--freeze" in flags:
            trained.remove(int(flags[-1]))
        scramble = None
        if "--scramble" in flags:
            flags.remove("--scramble")
            scramble = args.harmful
            if scramble not in styles or len(styles) == 1:
                tasks.stop(f"--harmful {scramble}: not one of several styles of the pool ({', '.join(styles)})")
        paths = pool
        if "--paths" in flags:
            if args.paths and "--eval_questions" not in args.more:  # another pool would be split otherwise
                tasks.stop("distilling step-by-step on --paths needs common test questions: --more --eval_questions FILE")
            paths = args.out / f"step_by_step{'' if args.paths else seed}.jsonl"
            flags = flags[:-2]
            kept = judge.filter_pool(judge.grade_paths(tasks.read_jsonl(pool)), "answer")
            kept = [row for row in kept if row["style"] == one]
            new = [{**row, "valid": None, "verdict": None} for row in judge.baseline_rows("step_by_step", kept, None, None)]
            paths.write_text("".join(json.dumps(row) + "\n" for row in new))
        common = ["--students", *mine, "--paths", str(paths), "--seed", str(seed), "--save_every", "1000000"]
        if not args.paths:
            common += ["--eval_questions", str(source / "test.jsonl"), *DEMO]
        yield name, [*common, *args.more, *flags], trained, scramble


# ---------------------------------------------------------------- the table
T975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09]


def mean_sd(values):
    """In percent: 'mean (standard deviation)'."""
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f}" + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")


def accuracy(line, s):
    """Of student number s, also where it was trained alone and is the run's only one."""
    return line["accuracy"][s if len(line["accuracy"]) > 1 else 0]


def interval(d):
    """'mean ± half of the 95 % interval' of differences d, by Student's t."""
    if len(d) < 2:
        return f"{d[0]:+.1f}" if d else ""
    half = T975[min(len(d) - 2, len(T975) - 1)] * statistics.stdev(d) / math.sqrt(len(d))
    return f"{statistics.mean(d):+.1f} ± {half:.1f}"


def difference(row, full):
    """Paired difference to QR-Distill in points, mean over a row's compared students, with its 95 % interval."""
    return interval([100 * statistics.mean(accuracy(line, s) - accuracy(full[seed], s)
                                           for s in line["compared"]) for seed, line in row.items() if seed in full])


def print_table(lines):
    """Markdown: a line per row and budget."""
    cells = {}
    for line in lines:
        cells.setdefault((line["row"], line["budget"]), {})[line["seed"]] = line
    full = {seed: line for seed, line in cells.get((FULL, "steps"), {}).items() if "failed" not in line}
    print("\n| | equal | student 0 | student 1 | ensemble | any right | tokens | less QR-Distill, 95 % |\n|---" + "|---" * 7 + "|")
    if full:
        before = [[line["before"][s] for line in full.values()] for s in range(2)]
        print(f"| zero-shot | | {mean_sd(before[0])} | {mean_sd(before[1])} | "
              f"{mean_sd([x['before_ensemble'] for x in full.values()])} | "
              f"{mean_sd([x['before_upper'] for x in full.values()])} | | |")
    for (name, budget), row in cells.items():
        good = {seed: line for seed, line in row.items() if "failed" not in line}
        if not good:
            print(f"| {name} | {budget} | failed: {next(iter(row.values()))['failed']} |")
            continue
        trained = next(iter(good.values()))["trained"]
        students = [mean_sd([accuracy(line, s) for line in good.values()]) if s in trained else ""
                    for s in range(2)]
        both = [mean_sd([line[key] for line in good.values()]) if len(trained) > 1 else ""
                for key in ("ensemble", "upper_bound")]
        tokens = statistics.mean(sum(line["tokens"]) for line in good.values())
        print(f"| {name} | {budget} | " + " | ".join([*students, *both, f"{tokens / 1e3:.0f}k",
                                                     "" if name == FULL else difference(good, full)]) + " |")
    print(f"\nseeds: {', '.join(str(seed) for seed in sorted({line['seed'] for line in lines}))}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--table", choices=TABLES, required=True, help="which grid")
    p.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24], help="(20 to 24)")
    p.add_argument("--steps", type=int, default=150, help="optimiser steps of QR-Distill (150)")
    p.add_argument("--batch_size", type=int, default=8, help="its questions per step (8)")
    p.add_argument("--rows", nargs="+", help="only these rows of the table, by name, besides QR-Distill")
    p.add_argument("--budgets", nargs="+", choices=["steps", "tokens"], default=["steps", "tokens"], help="equal what")
    p.add_argument("--students", nargs=2, metavar="MODEL", help="real students (default: the demo's)")
    p.add_argument("--paths", metavar="POOL", help="their pool")
    p.add_argument("--harmful", default="program", metavar="STYLE", help="the scrambled style (program)")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="(out/experiments)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (one per core)")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="all that follows goes to every run")
    args = p.parse_args()
    if bool(args.students) != bool(args.paths):
        tasks.stop("real runs need --students and --paths together")
    args.out.mkdir(parents=True, exist_ok=True)
    file, table = args.out / "runs.jsonl", TABLES[args.table]
    if unknown := sorted({*(args.rows or [])} - {*table}):
        tasks.stop(f"--rows {unknown[0]!r}: the rows of {args.table} are {', '.join(map(repr, table))}")
    if args.rows:
        table = {name: flags for name, flags in table.items() if name in (FULL, *args.rows)}
    known = {line["key"]: line for line in (tasks.read_jsonl(file) if file.exists() else []) if "failed" not in line}
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    spawn = multiprocessing.get_context("spawn")

    with ProcessPoolExecutor(args.workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        def finish(jobs):
            """Run what has no line yet, write each line as it comes -> all lines."""
            new = [job for job in jobs if job[1]["key"] not in known]
            for done in distill.tqdm(as_completed([pool.submit(run, job) for job in new]), total=len(new), desc="runs",
                                     unit="run", disable=not new):
                line = known[done.result()["key"]] = done.result()
                with open(file, "a") as f:
                    f.write(json.dumps(line) + "\n")
            return [{**known[job[1]["key"]], **job[1]} for job in jobs]  # its name in this table

        def job(seed, name, flags, trained, scramble, budget, steps, batch):
            flags = [*flags, "--max_steps", str(steps), "--batch_size", str(batch)]
            key = " ".join([*flags, f"scramble {scramble}"])
            folder = args.out / hashlib.sha256(key.encode()).hexdigest()[:16]
            line = {"key": key, "row": name, "budget": budget, "seed": seed, "trained": trained,
                    "compared": [1] if scramble else trained, "steps": steps, "batch_size": batch}
            return folder, line, flags, scramble

        if not args.paths:
            list(pool.map(prepare, args.seeds, [args] * len(args.seeds)))
        rows = {seed: list(jobs_of(args, table, seed)) for seed in args.seeds}
        lines = finish([job(seed, *row, "steps", args.steps, args.batch_size) for seed in args.seeds for row in rows[seed]])
        table_names = list(dict.fromkeys(name for seed in args.seeds for name, *_ in rows[seed]))
        if "tokens" in args.budgets:
            jobs, full = [], {x["seed"]: x["tokens"] for x in lines if x["row"] == FULL and "failed" not in x}
            good = [line for line in lines if "failed" not in line and line["seed"] in full]
            for line in good:  # share: of the tokens that a step would need to have
                line["share"] = sum(full[line["seed"]][s] for s in line["trained"]) / sum(line["tokens"])
            for name in table_names:
                row = {line["seed"]: line for line in good if line["row"] == name}
                if row and abs(statistics.mean(line["share"] for line in row.values()) - 1) < 0.15:
                    for line in row.values():
                        line["budget"] = "steps" if name == FULL else "both"
                    continue
                for seed, line in row.items():
                    flags, trained, scramble = next(r[1:] for r in rows[seed] if r[0] == name)
                    batch = max(1, round(args.batch_size * line["share"]))
                    steps = round(args.steps * line["share"] * args.batch_size / batch)
                    jobs.append(job(seed, name, flags, trained, scramble, "tokens", steps, batch))
            lines += finish(jobs)
    print_table(sorted(lines, key=lambda line: (table_names.index(line["row"]), line["budget"])))


if __name__ == "__main__":
    main()
