r"""Does the router follow its students? Runs of the demo in which a style turns bad, or good, halfway.

    python tests/experiments/turn.py --seeds 20 21 22        # two minutes a seed and core

leave: from step 75 of 150 on, the tokens of the style that a student is on are shuffled for it; how
often is it still given that style, 15 to 25 steps later? find: the tokens of one style, by default
vanilla, the shortest, are shuffled for both students in the first 30 steps; how often are they given
it in the last 30? told: the same, but from step 30 on only that style's paths are left, and the
questions that have one: what would finding be worth? A line for each run is added to
results/turn.jsonl.

harm: they are shuffled for student 1 alone, in the whole run; how often is each student given them in
the first tenth and in the last fifth? A second line, in results/rates.jsonl, keeps the rates of all
styles over the steps, of which tables.py draws the picture. Pretrained students can do this, too:

    python tests/experiments/turn.py --kinds harm --style fact_retrieval --steps 30 --seeds 0 1 2 \
        --more --students A B --paths POOL.jsonl --eval_questions TEST.jsonl --batch_size 4
"""
import argparse
import contextlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import tables
from grid import shuffle_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
STEPS, LEAVE_AT, FIND_AT = 150, 75, 30
# For whom a style is shuffled from the first step on, and in which runs it is restored.
SHUFFLED_FOR = {"leave": [], "find": [0, 1], "told": [0, 1], "harm": [1]}
RESTORED = ["find", "told"]
# Between which steps a student's rate is looked at, before and after; below 0: from the end.
LOOKED_AT = {"leave": [(LEAVE_AT - 10, LEAVE_AT), (LEAVE_AT + 15, LEAVE_AT + 25)],
             "find": [(FIND_AT - 10, FIND_AT), (-30, None)],
             "told": [(FIND_AT - 10, FIND_AT), (-30, None)]}


class Stage:
    """The paths of a run: it shuffles and restores them."""

    def __init__(self, distill, kind, style, folder):
        self.encode_rows, self.choose_paths = distill.encode, distill.step_paths
        self.kind, self.styles, self.folder = kind, [style, style], folder

    def encode(self, *args):
        self.rows = self.encode_rows(*args)
        self.whole = [[tokens.copy() for tokens in row["responses"]] for row in self.rows]
        for s in SHUFFLED_FOR[self.kind]:
            self.shuffle(s)
        return self.rows

    def shuffle(self, s):
        """Shuffle the tokens of student s's style for it."""
        for row in self.rows:
            if row["style"] == self.styles[s]:
                shuffle_tokens(row, s)

    def step_paths(self, questions, step, *more):
        if self.kind == "leave" and step == LEAVE_AT:
            rates = read_rates(self.folder)
            self.styles = [favourite(rates[-10:], s) for s in range(2)]
            for s in range(2):
                self.shuffle(s)
        if self.kind in RESTORED and step == FIND_AT:
            self.restore()
        if self.kind == "told" and step >= FIND_AT:
            questions = [self.of_style(paths) for paths in questions]
            questions = [paths for paths in questions if paths]
        return self.choose_paths(questions, step, *more)

    def restore(self):
        """Every path is whole again."""
        for row, whole in zip(self.rows, self.whole):
            for tokens, before in zip(row["responses"], whole):
                tokens[:] = before

    def of_style(self, paths):
        """Of a question's paths, as numbers of rows, those of the style."""
        return [i for i in paths if self.rows[i]["style"] == self.styles[0]]


def read_rates(folder):
    """What log.jsonl holds so far: of each step {(style, student): share of the style's paths that
    the student was given}."""
    steps = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        names = [name.split("/") for name in (line := json.loads(text))]
        steps.append({(name[1], int(name[2])): line["/".join(name)] for name in names
                      if name[0] == "rate_style"})
    return steps


def favourite(steps, s):
    """The style of which student s was given most."""
    return max({style for step in steps for style, _ in step}, key=lambda style: rate(steps, style, s))


def rate(steps, style, s):
    """The share of a style's paths that student s was given, a mean over the steps that have one."""
    return mean(step[style, s] for step in steps if (style, s) in step)


def curve(steps, students):
    """{style: for each student its mean rate in every ten steps}."""
    tens = [steps[i:i + 10] for i in range(0, len(steps), 10)]
    styles = sorted({style for step in steps for style, _ in step})
    return {style: [[round(rate(ten, style, s), 3) for ten in tens] for s in range(students)]
            for style in styles}


def run(job):
    """One run -> its line, and the rates of all styles over the steps."""
    import distill

    kind, style, steps, seed, more, out = job
    names = [Path(word).name for word in more]
    folder = out / "_".join(["turn", kind, style, str(seed), *names])
    stage = Stage(distill, kind, style, folder)
    distill.encode, distill.step_paths = stage.encode, stage.step_paths
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
                contextlib.redirect_stderr(nowhere):
            distill.main(["--seed", str(seed), "--max_steps", str(steps), "--out_dir", str(folder), *more])
    finally:
        distill.encode, distill.step_paths = stage.encode_rows, stage.choose_paths
    rates = read_rates(folder)
    looked_at = LOOKED_AT.get(kind, [(0, steps // 10), (-(steps // 5), None)])
    before, after = [[round(rate(rates[start:end], stage.styles[s], s), 3) for s in range(2)]
                     for start, end in looked_at]
    results = json.loads((folder / "results.json").read_text())
    line = {"kind": kind, "style": stage.styles if kind == "leave" else style, "steps": steps,
            "seed": seed, "more": " ".join(names), "before": before, "after": after,
            "accuracy": results["after"]["accuracy"], "questions": results["after"]["questions"],
            "versions": results["versions"]}
    return line, curve(rates, len(line["accuracy"]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22], help="(20 to 22)")
    p.add_argument("--kinds", nargs="+", choices=[*SHUFFLED_FOR], default=["leave", "find"],
                   help="(leave and find)")
    p.add_argument("--style", default="vanilla", help="of all but leave (vanilla)")
    p.add_argument("--steps", type=int, default=STEPS, help="of harm (150)")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="run folders (out/experiments)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once (one a core)")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further flags of every run")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    jobs = [(kind, args.style, args.steps if kind == "harm" else STEPS, seed, args.more, args.out)
            for seed in args.seeds for kind in args.kinds]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for line, rates in pool.map(run, jobs):
            tables.append_line("turn", line)
            if line["kind"] == "harm":
                kept = ("style", "steps", "seed", "more", "versions")
                tables.append_line("rates", {**{key: line[key] for key in kept}, "curve": rates})
            print(f"seed {line['seed']}, {line['kind']}: given {line['before']} before, {line['after']} "
                  f"after, % right {[round(100 * x, 1) for x in line['accuracy']]}")


if __name__ == "__main__":
    main()
