"""The tables and the picture of the experiments, made again from results/*.jsonl alone.

    python tests/experiments/tables.py               # all: results/TABLE.md, results/router.png
    python tests/experiments/tables.py --table main

A line of results/TABLE.jsonl is one run, written by grid.py. A gain is the accuracy of a row's
reference (QR-Distill) less that of the row, in points, the mean over the students compared: positive
is better for QR-Distill. It is taken seed by seed; all intervals are Student's t over the seeds.
"""
import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from rows import FULL, TABLES, place

RESULTS = Path(__file__).resolve().parent / "results"
BEST = "best single style in hindsight"
SAME_TOKENS = 0.15  # a row whose tokens differ by less than this share needs no second run
# Student's t at 97.5 %, for 2 to 20 seeds; more take the last one, which is a little wide
T975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23,
        2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09]

LEGEND = """Percent of the test questions, mean ± 95 % interval over the seeds; any right: at least one student. equal:
the row was given as many optimiser steps, or trained response tokens (to within 15 %), as QR-Distill. The gain of
QR-Distill is in points, over the seeds that both have, with its 95 % interval; bold: the interval leaves zero out.
Paths that the router reads by its probe are not among the trained tokens. seconds: of training, on one core, with what
the route looks at beforehand; the median, since other runs shared the machine."""


# ---------------------------------------- lines
def read_lines(table):
    """The runs of a table (list of dicts), in the order in which they were made."""
    file = RESULTS / f"{table}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_line(table, line):
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{table}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def token_share(line, reference):
    """The reference's trained tokens as a share of a run's, over the students that the run trains."""
    trained = [s for s, tokens in enumerate(line["tokens"]) if tokens]
    return sum(reference["tokens"][s] for s in trained) / sum(line["tokens"])


def equal_tokens(pairs):
    """Whether runs and references, [(line, reference)], trained on about the same tokens anyway."""
    return abs(statistics.mean(token_share(*pair) for pair in pairs) - 1) < SAME_TOKENS


def settings_of(table):
    """{setting: {(row, budget): {seed: line}}} of a table's lines, in the order of its rows."""
    lines = read_lines(table)
    lines.sort(key=lambda line: (place(table, line["row"]), line["row"], line["budget"]))
    settings = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        settings[line["setting"]][line["row"], line["budget"]][line["seed"]] = line
    return settings


# ---------------------------------------- numbers
def accuracy(line):
    """Mean accuracy of the students that a row compares, in percent."""
    students = line["compared"] or range(len(line["accuracy"]))
    return 100 * statistics.mean(line["accuracy"][s] for s in students)


def interval(values):
    """-> (mean, half of the 95 % interval or nan for one value)."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    t = T975[min(len(values) - 2, len(T975) - 1)]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def gain(runs, references):
    """Gain of the reference over a row, both {seed: line} -> (mean, half), None without a common seed."""
    differences = []
    for seed in runs.keys() & references.keys():
        compared = runs[seed]["compared"]
        reference = {**references[seed], "compared": compared}
        differences.append(accuracy(reference) - accuracy(runs[seed]))
    return interval(differences) if differences else None


def untrained_of(runs):
    """{seed: line} with what the students could do before the run."""
    return {seed: {**line, **line["before"]} for seed, line in runs.items()}


def comparisons(cells):
    """[(row, budget, runs, gain)] of one setting {(row, budget): runs}; budget is steps, tokens or
    both; the gain of a reference over itself is None. The untrained students come first, the best
    single style last."""
    found = []
    for (row, budget), runs in cells.items():
        references = cells.get((next(iter(runs.values()))["against"], "steps"), {})
        pairs = [(runs[seed], references[seed]) for seed in runs.keys() & references.keys()]
        if runs is references:
            found.append((row, "", runs, None))
            continue
        if budget == "steps" and pairs and equal_tokens(pairs):
            budget = "both"
        found.append((row, budget, runs, gain(runs, references)))
    for budget in ("steps", "tokens"):
        single = [x for x in found if x[0].startswith("only ") and x[1] in (budget, "both")]
        if len(single) > 1:
            row, _, runs, difference = max(single, key=lambda x: statistics.mean(
                accuracy(line) for line in x[2].values()))
            style = row.removeprefix("only ")
            found.append((f"{BEST} ({style})", budget, runs, difference))
    full = found[0][2]
    untrained = untrained_of(full)
    over = gain(untrained, full) if found[0][0].startswith(FULL) else None
    return [("untrained", "", untrained, over), *found]


# ---------------------------------------- markdown
def text_of(difference, sign=""):
    """'7.8 ± 3.2' of (mean, half); sign '+': a gain, bold where the interval leaves zero out."""
    if difference is None:
        return ""
    mean, half = difference
    if math.isnan(half):
        return f"{mean:{sign}.1f}"
    text = f"{mean:{sign}.1f} ± {half:.1f}"
    return f"**{text}**" if sign and abs(mean) > half else text


def percent(shares):
    return text_of(interval([100 * share for share in shares]))


def row_text(name, budget, runs, difference):
    """A row of the table."""
    lines = list(runs.values())
    scores = [text_of(interval([accuracy({**line, "compared": None}) for line in lines]))]
    scores += [percent(shares) for shares in zip(*(line["accuracy"] for line in lines))]
    scores += [percent([line[key] for line in lines]) for key in ("ensemble", "upper_bound")]
    tokens = statistics.mean(sum(line["tokens"]) for line in lines)
    seconds = statistics.median(line["seconds"] for line in lines)
    cost = ["", ""] if name == "untrained" else [f"{tokens / 1e3:.0f}k", f"{seconds:.0f}"]
    return " | ".join(["", name, budget, str(len(lines)), *scores, *cost, text_of(difference, "+")]).strip() + " |"


def section(setting, cells):
    """The table of one setting, and the sentences below it."""
    rows = comparisons(cells)
    lines = list(rows[0][2].values())
    students = range(len(lines[0]["accuracy"]))
    names = " | ".join(f"student {s}" for s in students)
    text = [
        f"### {setting}\n",
        f"| | equal | seeds | mean | {names} | ensemble | any right | tokens | seconds | gain of QR-Distill |",
        "|---" * (len(students) + 9) + "|",
        *(row_text(*row) for row in rows),
    ]
    seeds = sorted({seed for _, _, runs, _ in rows for seed in runs})
    halves = [x[1] for _, _, _, x in rows[1:] if x and not math.isnan(x[1])]
    text.append(f"\nSeeds {', '.join(map(str, seeds))}; {lines[0]['questions']} test questions.")
    if halves:
        text.append(f"Half of the intervals are wider than ± {statistics.median(halves):.1f} points: "
                    "what is smaller is not seen here.")
    text.append("Selection rates of QR-Distill in its last epoch, a value for each student:")
    return "\n".join(text + rate_texts(cells))


def rate_texts(cells):
    """A line for each reference of a setting: its rates by style, means over the seeds."""
    texts = []
    for (row, _), runs in cells.items():
        lines = list(runs.values())
        if row != lines[0]["against"]:
            continue
        rates = []
        for style in sorted({style for line in lines for style in line["rate"]}):
            shares = zip(*(line["rate"][style] for line in lines if style in line["rate"]))
            rates.append(f"{style} {', '.join(f'{statistics.mean(share):.2f}' for share in shares)}")
        texts.append(f"- {row}: {'; '.join(rates)}")
    return texts


def markdown(table):
    """The whole text of results/TABLE.md."""
    commits = sorted({line["versions"]["commit"][:12] for line in read_lines(table)})
    head = f"## Table {table}\n\n{LEGEND}\n\n"
    sections = [section(*setting) for setting in settings_of(table).items()]
    return head + "\n\n".join(sections) + f"\n\nCommits: {', '.join(commits)}.\n"


# ---------------------------------------- the picture
STYLES = {"vanilla": "black", "program": "0.45"}  # drawn strongly; the others are thin
PANEL = {FULL: "QR-Distill", "all paths to both": "all paths", "a random path": "a random path",
         "the shortest path": "the shortest path", "the likeliest path": "the likeliest path"}


def picture():
    """The router where vanilla is shuffled for student 1: rates of the styles over the steps for each
    student (results/rates.jsonl), and student 1's accuracies (table harmful)."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.9), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.05])
    runs = read_lines("rates")
    draw_rates(left, runs, 0, "student 0: every style is whole")
    draw_rates(middle, runs, 1, "student 1: vanilla's tokens are shuffled")
    draw_accuracies(right)
    return figure


def draw_rates(ax, runs, s, title):
    """One panel: how much of each style student s is given, mean over the runs and its interval."""
    for style in sorted(runs[0]["curve"]):
        curves = list(zip(*(run["curve"][style][s] for run in runs)))  # ten steps -> its runs
        steps = [10 * i + 5 for i in range(len(curves))]
        mean, half = zip(*map(interval, curves))
        color = STYLES.get(style, "0.7")
        ax.plot(steps, mean, color=color, linewidth=2.2 if style in STYLES else 1)
        ax.fill_between(steps, [m - h for m, h in zip(mean, half)],
                        [m + h for m, h in zip(mean, half)], color=color, alpha=0.15, linewidth=0)
        if style in STYLES:
            ax.annotate(style, (steps[-1], mean[-1]))
    ax.set_title(title)


def draw_accuracies(ax):
    """One panel: student 1's accuracy in each row, with its interval."""


def write(table):
    """Write results/TABLE.md, and print it."""
    text = markdown(table)
    (RESULTS / f"{table}.md").write_text(text)
    print(text)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [table for table in TABLES if (RESULTS / f"{table}.jsonl").exists()]
    p.add_argument("--table", nargs="+", choices=there, default=there, help="which (all with lines)")
    for table in p.parse_args().table:
        write(table)



if __name__ == "__main__":
    main()
