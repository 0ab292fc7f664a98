r"""Does the router follow its students? Runs of the demo in which a style turns bad, or good, halfway.

    python tests/experiments/turn.py --seeds 20 21 22        # two minutes a seed and core

leave: from step 75 of 150 on, the paths of the style that a student is on are scrambled for it; how
often is it still given them, 15 to 25 steps later? find: the paths of one style, by default vanilla,
the shortest, are scrambled for both students in the first 30 steps; how often are they given it in
the last 30? told: the same, but from step 30 on only that style's paths are left, and the questions
that have one: what would finding be worth? harm: they are scrambled for student 1 alone, in the whole
run; how often is each student given them in the first tenth and in the last fifth? This one can be run
on real students, too:

    python tests/experiments/turn.py --kinds harm --style fact_retrieval --steps 30 --seeds 0 1 2 \
        --more --students A B --paths POOL.jsonl --eval_questions TEST.jsonl --batch_size 4 --encoder MINILM

A line for each run is added to results/turn.jsonl.
"""
import argparse
import contextlib
import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
STEPS, LEAVE_AT, FIND_AT = 150, 75, 30
# For whom a style's paths are scrambled from the first step on, and in which runs they are restored.
SCRAMBLED_FOR = {"leave": [], "find": [0, 1], "told": [0, 1], "harm": [1]}
RESTORED = ["find", "told"]


class Stage:
    """The paths of a run: it scrambles and restores them, and notes what each student is given."""

    def __init__(self, distill, kind, style):
        self.kind, self.style, self.rates, self.rows, self.whole = kind, style, [], [], []
        self.plain = {name: getattr(distill, name) for name in ("encode", "step_paths", "step_numbers")}

    def encode(self, *args):
        self.rows = self.plain["encode"](*args)
        self.whole = [[tokens.copy() for tokens in row["responses"]] for row in self.rows]
        for s in SCRAMBLED_FOR[self.kind]:
            self.scramble(s, self.style)
        return self.rows

    def scramble(self, s, style):
        """Shuffle the tokens of a style's paths for student s; the end token stays."""
        for row in self.rows:
            if row["style"] == style:
                tokens = row["responses"][s]
                order = list(range(len(tokens) - 1))
                random.Random(row["id"]).shuffle(order)
                tokens[:-1] = tokens[order]

    def step_paths(self, questions, step, args):
        if self.kind == "leave" and step == LEAVE_AT:
            self.styles = [self.favourite(s) for s in range(2)]
            for s, style in enumerate(self.styles):
                self.scramble(s, style)
        if self.kind in RESTORED and step == FIND_AT:
            self.restore()
        if self.kind == "told" and step >= FIND_AT:
            questions = [self.of_style(paths) for paths in questions]
            questions = [paths for paths in questions if paths]
        return self.plain["step_paths"](questions, step, args)

    def restore(self):
        """Every path is whole again."""
        for row, whole in zip(self.rows, self.whole):
            for tokens, before in zip(row["responses"], whole):
                tokens[:] = before

    def of_style(self, paths):
        """Of a question's paths, as numbers of rows, those of the style."""
        return [i for i in paths if self.rows[i]["style"] == self.style]

    def step_numbers(self, *args):
        numbers = self.plain["step_numbers"](*args)
        self.rates.append(numbers["rate_style"])
        return numbers

    def favourite(self, s):
        """The style that student s was given most in the last ten steps."""
        return max(self.rates[-1] | self.rates[-2] | self.rates[-3], key=lambda style: self.rate(style, s, -10, None))

    def rate(self, style, s, start, end):
        """The share of a style's paths that student s was given, a mean over steps."""
        return mean(rates[style][s] for rates in self.rates[start:end] if style in rates)


def run(job):
    """One run -> its line."""
    import distill

    kind, style, steps, seed, more, out = job
    names = [Path(word).name for word in more]
    stage, folder = Stage(distill, kind, style), out / "_".join(["turn", kind, style, str(seed), *names])
    for name in stage.plain:
        setattr(distill, name, getattr(stage, name))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
                contextlib.redirect_stderr(nowhere):
            distill.main(["--seed", str(seed), "--max_steps", str(steps), "--out_dir", str(folder), *more])
    finally:
        for name, function in stage.plain.items():
            setattr(distill, name, function)
    if kind == "leave":
        rates = [stage.rate(style, s, LEAVE_AT + 15, LEAVE_AT + 25) for s, style in enumerate(stage.styles)]
        before = [stage.rate(style, s, LEAVE_AT - 10, LEAVE_AT) for s, style in enumerate(stage.styles)]
    elif kind in RESTORED:
        before = [stage.rate(style, s, FIND_AT - 10, FIND_AT) for s in range(2)]
        rates = [stage.rate(style, s, -30, None) for s in range(2)]
    else:
        before = [stage.rate(style, s, 0, steps // 10) for s in range(2)]
        rates = [stage.rate(style, s, -(steps // 5), None) for s in range(2)]
    results = json.loads((folder / "results.json").read_text())
    return {"kind": kind, "style": style if kind != "leave" else stage.styles, "steps": steps,
            "seed": seed, "more": " ".join(names), "before": [round(x, 3) for x in before],
            "after": [round(x, 3) for x in rates], "accuracy": results["after"]["accuracy"],
            "questions": results["after"]["questions"], "versions": results["versions"]}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22], help="(20 to 22)")
    p.add_argument("--kinds", nargs="+", choices=[*SCRAMBLED_FOR],
                   default=["leave", "find"], help="(leave and find)")
    p.add_argument("--style", default="vanilla", help="of all but leave (vanilla)")
    p.add_argument("--steps", type=int, default=STEPS, help="of harm (150)")
    p.add_argument("--out", type=Path, default=Path("out/experiments"), help="run folders (out/experiments)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once (one a core)")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further flags of every run")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    jobs = [(kind, args.style, args.steps if kind == "harm" else STEPS, seed, args.more, args.out)
            for seed in args.seeds for kind in args.kinds]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool, \
            open(HERE / "results" / "turn.jsonl", "a") as file:
        for line in pool.map(run, jobs):
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"seed {line['seed']}, {line['kind']}: given {line['before']} before, {line['after']} after, "
                  f"% right {[round(100 * x, 1) for x in line['accuracy']]}")


if __name__ == "__main__":
    main()
