"""The tables and the picture of the experiments, made again from results/*.jsonl alone.

    python tests/experiments/tables.py        # writes results/TABLE.md and results/router.png

A line of results/TABLE.jsonl is one run, written by grid.py. A gain is the accuracy of a row's
reference (QR-Distill) less that of the row, in points, the mean over the students compared: positive
is better for QR-Distill. It is taken seed by seed; all intervals are Student's t over the seeds.
"""
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from rows import CONTROLLED, TABLES, place

RESULTS = Path(__file__).resolve().parent / "results"
BEST = "best single style in hindsight"
SAME_TOKENS = 0.15  # a row whose tokens differ by less than this share needs no second run
# Student's t at 97.5 %, for 2 to 20 seeds; more take the last one, which is a little wide
T975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23,
        2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09]

LEGEND = """Percent of the test questions that are right, and the gain of QR-Distill in points, each a mean with its 95 %
interval over the seeds; bold: the interval leaves zero out. First at as many optimiser steps as QR-Distill, then, where
a row trains on other amounts (by 15 %), at as many trained response tokens; paths that the router reads by its probe
are not among these. mean: over the students that the row compares. A gain is over the seeds that both have."""


# ---------------------------------------- lines
def read_lines(table):
    """The runs of a table (list of dicts), in the order in which they were made."""
    file = RESULTS / f"{table}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_line(table, line):
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
    """{setting: {row: {budget: {seed: line}}}} of a table's lines, in the order of its rows; budget
    is steps or tokens."""
    lines = read_lines(table)
    lines.sort(key=lambda line: (place(table, line["row"]), line["row"]))
    settings = defaultdict(lambda: defaultdict(lambda: {"steps": {}, "tokens": {}}))
    for line in lines:
        settings[line["setting"]][line["row"]][line["budget"]][line["seed"]] = line
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
        reference = {**references[seed], "compared": runs[seed]["compared"]}
        differences.append(accuracy(reference) - accuracy(runs[seed]))
    return interval(differences) if differences else None


def with_extremes(rows):
    """The rows of a setting, the untrained students before and the best single style behind them."""
    full = next(iter(rows.values()))["steps"]
    untrained = {seed: {**line, **line["before"]} for seed, line in full.items()}
    found = {"untrained": {"steps": untrained, "tokens": {}}, **rows}
    single = [row for row in rows if row.startswith("only ")]
    if len(single) > 1:
        best = max(single, key=lambda row: statistics.mean(
            accuracy(line) for line in rows[row]["steps"].values()))
        found[f"{BEST} ({best.removeprefix('only ')})"] = rows[best]
    return found


# ---------------------------------------- markdown
def text_of(mean_and_half, sign=""):
    """'7.8 ± 3.2'; sign '+': a gain, bold where the interval leaves zero out."""
    if mean_and_half is None:
        return ""
    mean, half = mean_and_half
    if math.isnan(half):
        return f"{mean:{sign}.1f}"
    text = f"{mean:{sign}.1f} ± {half:.1f}"
    return f"**{text}**" if sign and abs(mean) > half else text


def cells_of(runs, references):
    """'mean', 'tokens' and 'gain' of a row's runs; nothing where there is none."""
    if not runs:
        return ["", "", ""]
    tokens = statistics.mean(sum(line["tokens"]) for line in runs.values())
    difference = None if runs is references else gain(runs, references)
    return [text_of(interval([accuracy(line) for line in runs.values()])), f"{tokens / 1e3:.0f}k",
            text_of(difference, "+")]


def section(setting, rows):
    """The table of one setting, and the sentences below it."""
    first = next(iter(next(iter(rows.values()))["steps"].values()))
    names = [f"student {s}" for s in range(len(first["accuracy"]))]
    heads = ["", "seeds", *names, "mean", "tokens", "gain", "equal tokens: mean", "tokens", "gain"]
    text = [f"### {setting}\n", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    seeds = set()
    for name, budgets in with_extremes(rows).items():
        lines = list(budgets["steps"].values())
        references = rows[lines[0]["against"]]["steps"]
        shares = zip(*(line["accuracy"] for line in lines))
        scores = [text_of(interval([100 * x for x in values])) for values in shares]
        cells = [name, str(len(lines)), *scores, *cells_of(budgets["steps"], references),
                 *cells_of(budgets["tokens"], references)]
        text.append(f"| {' | '.join(cells)} |")
        seeds |= budgets["steps"].keys()
    text.append(f"\nSeeds {', '.join(map(str, sorted(seeds)))}; {first['questions']} test questions.")
    return "\n".join(text)


def markdown(table):
    """The whole text of results/TABLE.md."""
    commits = sorted({line["versions"]["commit"][:12] for line in read_lines(table)})
    sections = [section(*setting) for setting in settings_of(table).items()]
    return f"## Table {table}\n\n{LEGEND}\n\n" + "\n\n".join(sections) + f"\n\nCommits: {', '.join(commits)}.\n"


# ---------------------------------------- the picture
# The styles that matter: color and line. The others are thin and grey.
STRONG = {"vanilla": ("black", "-"), "program": ("0.4", "--"), "tree_of_thought": ("0.55", ":")}


def picture(shuffled="vanilla"):
    """The router where one style is shuffled for student 1: the rate of each style over the steps for
    each student (results/rates.jsonl), and student 1's accuracies (table harmful)."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.5), dpi=200, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 0.85])
    runs = [line for line in read_lines("rates") if line["shuffled"] == shuffled]
    for s, ax in enumerate(panels[:2]):
        draw_rates(ax, [run["curves"] for run in runs], s)
        ax.set_title(f"student {s}, {shuffled} {['whole', 'shuffled'][s]}", fontsize=10)
    panels[0].set_ylabel("share of a style's paths\nthat the student is given")
    rows = next(iter(settings_of("harmful").values()))
    names = [row.name for row in CONTROLLED]
    accuracies = {name: rows[f"{name}, {shuffled} shuffled"]["steps"].values() for name in names}
    draw_accuracies(panels[2], {name: interval([accuracy(line) for line in lines])
                                for name, lines in accuracies.items()})
    panels[2].set_title("student 1, right answers, %", fontsize=10)
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_rates(ax, runs, s):
    """A line for each style: what student s is given of it, mean and interval over the runs."""
    for style in sorted(runs[0], key=STRONG.__contains__):
        tens = zip(*(run[style][s] for run in runs))  # of ten steps each the rates of all runs
        mean, half = map(np.array, zip(*map(interval, tens)))
        steps = 10 * np.arange(len(mean)) + 5
        color, dashes = STRONG.get(style, ("0.75", "-"))
        ax.plot(steps, mean, dashes, color=color, linewidth=2 if style in STRONG else 1)
        if style in STRONG:
            ax.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
            label = style.replace("_of_", " of\n")
            ax.annotate(label, (steps[-1], mean[-1]), (4, -4), textcoords="offset points", fontsize=9)
    ax.set_xlabel("step")
    ax.set_ylim(-0.03, 1.03)


def draw_accuracies(ax, rows):
    """{row: (mean, half)} as points with their intervals."""
    for y, (name, (mean, half)) in enumerate(rows.items()):
        ax.errorbar(mean, -y, xerr=half, fmt="o", color="black", capsize=3)
        ax.annotate(f"{name}: {mean:.0f} ± {half:.0f}", (0, -y), (4, 8), textcoords="offset points")
    ax.set_yticks([])
    ax.set_ylim(-len(rows) + 0.5, 0.8)
    ax.set_xlim(0)


def main():
    for table in TABLES:
        if read_lines(table):
            (RESULTS / f"{table}.md").write_text(markdown(table))
    picture().savefig(RESULTS / "router.png")


if __name__ == "__main__":
    main()
