"""Does the router follow its students? Runs of the demo in which a style turns bad, or good, halfway.

    python tests/experiments/turn.py --seeds 20 21 22        # two minutes a seed and core

leave: from step 75 of 150 on, the tokens of the style that a student is on are shuffled for it; how
often is it still given that style, 15 to 25 steps later? find: the tokens of vanilla, the shortest
style, are shuffled for both students in the first 30 steps; how often are they given it in the last
30? A line for each run is added to results/turn.jsonl.
"""
import argparse
import contextlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import tables
from grid import commit, read_rates, shuffle_tokens

STEPS, LEAVE_AT, FIND_AT = 150, 75, 30
# Between which steps a student's rate is looked at, before and after; below 0: from the end.
LOOKED_AT = {"leave": [(LEAVE_AT - 10, LEAVE_AT), (LEAVE_AT + 15, LEAVE_AT + 25)],
             "find": [(FIND_AT - 10, FIND_AT), (-30, None)]}


class Stage:
    """The paths of a run: it shuffles and restores them."""

    def __init__(self, distill, kind, folder):
        self.encode_rows, self.choose_paths = distill.encode, distill.step_paths
        self.kind, self.styles, self.folder = kind, ["vanilla", "vanilla"], folder

    def encode(self, *args):
        self.rows = self.encode_rows(*args)
        self.whole = [[tokens.clone() for tokens in row["responses"]] for row in self.rows]
        if self.kind == "find":
            self.shuffle()
        return self.rows

    def step_paths(self, questions, step, *more):
        if self.kind == "leave" and step == LEAVE_AT:
            rates = read_rates(self.folder)[-10:]
            self.styles = [favourite(rates, s) for s in range(2)]
            self.shuffle()
        if self.kind == "find" and step == FIND_AT:
            self.restore()
        return self.choose_paths(questions, step, *more)

    def shuffle(self):
        """Shuffle the tokens of each student's style for it."""
        for row in self.rows:
            for s in range(2):
                if row["style"] == self.styles[s]:
                    shuffle_tokens(row, s)

    def restore(self):
        """Every path is whole again."""
        for row, whole in zip(self.rows, self.whole):
            for tokens, before in zip(row["responses"], whole):
                tokens[:] = before


def favourite(rates, s):
    """The style of which student s was given most."""
    styles = {style for step in rates for style, _ in step}
    return max(sorted(styles), key=lambda style: rate(rates, style, s))


def rate(rates, style, s):
    """The share of a style's paths that student s was given, a mean over the steps that have one."""
    return mean(step[style, s] for step in rates if (style, s) in step)


def run(job):
    """One run, in a process of its own -> its line."""
    import distill

    kind, seed, out = job
    folder = out / f"turn_{kind}_{seed}"
    stage = Stage(distill, kind, folder)
    distill.encode, distill.step_paths = stage.encode, stage.step_paths
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        distill.main(["--seed", str(seed), "--max_steps", str(STEPS), "--out_dir", str(folder)])
    rates, results = read_rates(folder), json.loads((folder / "results.json").read_text())
    before, after = [[round(rate(rates[start:end], stage.styles[s], s), 3) for s in range(2)]
                     for start, end in LOOKED_AT[kind]]
    return {"kind": kind, "style": stage.styles, "steps": STEPS, "seed": seed, "before": before, "after": after,
            "accuracy": results["after"]["accuracy"], "questions": results["after"]["questions"],
            "versions": {**results["versions"], "commit": commit()}}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22], help="(20 to 22)")
    p.add_argument("--kinds", nargs="+", choices=LOOKED_AT, default=[*LOOKED_AT], help="(both)")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="run folders")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    jobs = [(kind, seed, args.out) for seed in args.seeds for kind in args.kinds]
    with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for line in pool.map(run, jobs):
            tables.append_line("turn", line)
            print(f"seed {line['seed']}, {line['kind']}: given {line['before']} before, {line['after']} "
                  f"after, % right {[round(100 * x, 1) for x in line['accuracy']]}")


if __name__ == "__main__":
    main()
