"""The tables and pictures of the experiments, made again from results/*.jsonl alone.

    python tests/experiments/tables.py               # all: results/TABLE.md, results/gains.png
    python tests/experiments/tables.py --table main

A line of results/TABLE.jsonl is one run, written by grid.py. A gain is the accuracy of a row's
reference (QR-Distill) less that of the row, in points, the mean over the students compared: positive
is better for QR-Distill. It is taken seed by seed; the interval is Student's t over the seeds.
"""
import argparse
import json
import math
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path

from rows import FULL, TABLES, is_row, place

RESULTS = Path(__file__).resolve().parent / "results"
BEST = "best single style in hindsight"
HARMED = ", vanilla scrambled"  # rows of table harmful that the picture shows
SAME_TOKENS = 0.15  # a row whose tokens differ by less than this share needs no second run
# Student's t at 97.5 %, for 2 to 20 seeds; more take the last one, which is a little wide
T975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23,
        2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09]


LEGEND = """Percent of the test questions, mean (standard deviation over seeds). equal: the row was given as many
optimiser steps, or trained response tokens (to within 15 %), as QR-Distill. The gain of QR-Distill is in points, over
the seeds that both have, with its 95 % interval over these seeds; bold: the interval leaves zero out. Paths that the
router reads by its probe are not among the trained tokens. seconds: of training, on one core, with what the route
looks at beforehand; the median, since other runs shared the machine."""


# ---------------------------------------------------------------- lines
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


# ---------------------------------------------------------------- numbers
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
    return {seed: {**line, "accuracy": line["before"]["accuracy"]} for seed, line in runs.items()}


def comparisons(cells):
    """[(row, budget, runs, gain)] of one setting {(row, budget): runs}; budget is steps, tokens or
    both; the gain of a reference over itself is None. The best single style comes last."""
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
    return found


# ---------------------------------------------------------------- markdown
def mean_sd(values):
    """'mean (standard deviation)' in percent of shares."""
    values = [100 * value for value in values]
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def gain_text(difference):
    """'+7.8 ± 3.2', bold where the interval leaves zero out."""
    if difference is None:
        return ""
    mean, half = difference
    if math.isnan(half):
        return f"{mean:+.1f}"
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def row_text(name, budget, runs, difference):
    """A row of the table."""
    lines = list(runs.values())
    students = range(len(lines[0]["accuracy"]))
    scores = [mean_sd([line["accuracy"][s] for line in lines]) for s in students]
    scores += [mean_sd([line[key] for line in lines]) for key in ("ensemble", "upper_bound")]
    tokens = statistics.mean(sum(line["tokens"]) for line in lines)
    seconds = statistics.median(line["seconds"] for line in lines)
    cells = [name, budget, str(len(lines)), *scores, f"{tokens / 1e3:.0f}k", f"{seconds:.0f}", gain_text(difference)]
    return f"| {' | '.join(cells)} |"


def section(setting, cells):
    """The table of one setting, and the sentences below it."""
    rows = comparisons(cells)
    full = rows[0][2]
    lines = list(full.values())
    students = range(len(lines[0]["accuracy"]))
    before = [line["before"] for line in lines]
    over_zero_shot = gain(untrained_of(full), full) if rows[0][0].startswith(FULL) else None
    untrained = [mean_sd([x["accuracy"][s] for x in before]) for s in students]
    untrained += [mean_sd([x[key] for x in before]) for key in ("ensemble", "upper_bound")]
    names = " | ".join(f"student {s}" for s in students)
    text = [
        f"### {setting}\n",
        f"| | equal | seeds | {names} | ensemble | any right | tokens | seconds | gain of QR-Distill |",
        "|---" * (len(students) + 8) + "|",
        f"| zero-shot | | {len(lines)} | {' | '.join(untrained)} | | | {gain_text(over_zero_shot)} |",
        *(row_text(*row) for row in rows),
    ]
    seeds = sorted({seed for _, _, runs, _ in rows for seed in runs})
    halves = [x[1] for _, _, _, x in rows if x and not math.isnan(x[1])]
    text.append(f"\nSeeds {', '.join(map(str, seeds))}; {lines[0]['questions']} test questions.")
    if halves:
        text.append(f"Half of the intervals are wider than ± {statistics.median(halves):.1f} points: "
                    "what is smaller is not seen here.")
    text += ["Selection rates of QR-Distill in its last epoch, a value for each student:",
             *rate_texts(cells)]
    return "\n".join(text)


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


# ---------------------------------------------------------------- the picture
LOOKS = {"steps": ("equal steps", -0.15, {"marker": "o", "color": "black"}),
         "tokens": ("equal trained tokens", 0.15,
                    {"marker": "s", "color": "0.45", "markerfacecolor": "white"})}


def picture():
    """Gains of QR-Distill over each control with 95 % intervals, a panel for each of the tables main
    and real that has lines: of the setting with most runs."""
    from matplotlib.figure import Figure

    panels = []
    for table in ("main", "real"):
        if read_lines(table):
            setting, rows = largest(table)
            panels.append((setting, controls(table, rows)))
    most = max(len(names_of(rows)) for _, rows in panels)
    figure = Figure((6.4 * len(panels), 1.5 + 0.42 * most), dpi=150, layout="constrained")
    for ax, (setting, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        seeds = {seed for _, _, runs, _ in rows for seed in runs}
        title = f"{setting.split(', --')[0]}: mean over both students, up to {len(seeds)} seeds"
        ax.set_title(textwrap.fill(title, 60), fontsize=10)
        draw_gains(ax, rows)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def controls(table, rows):
    """The rows of the picture: no training, and the controls of table main, of single styles only the
    best; for the demo those of table harmful, too, where the shortest style is scrambled. Rows of
    fewer than three seeds are left out: their intervals say nothing."""
    full = rows[0][2]
    rows = [row for row in rows[1:] if is_row("main", row[0]) or BEST in row[0]]
    rows.insert(0, ("no training", "steps", full, gain(untrained_of(full), full)))
    if any(BEST in row[0] for row in rows):
        rows = [row for row in rows if not row[0].startswith("only ")]
    if table == "main" and read_lines("harmful"):
        rows += [row for row in largest("harmful")[1] if HARMED in row[0] and row[3]]
    return [row for row in rows if len(row[2]) > 2]


def names_of(rows):
    """The names of the controls, each once, without the styles that were best."""
    return list(dict.fromkeys(row[0].split(" (")[0] for row in rows))


def draw_gains(ax, rows):
    """One panel: the gains over the controls `rows`."""
    names = names_of(rows)
    for budget, (label, shift, look) in LOOKS.items():
        some = [row for row in rows if row[1] in (budget, "both")]
        y = [names.index(row[0].split(" (")[0]) + shift for row in some]
        ax.errorbar([row[3][0] for row in some], y, xerr=[row[3][1] for row in some], label=label,
                    linestyle="", capsize=3, elinewidth=1.2, markersize=6, **look)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(names)), [label_of(name, rows) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("gain of QR-Distill in points of test accuracy\n(right of zero: QR-Distill is better)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)


def largest(table):
    """(setting, rows) of the setting of a table that has most runs."""
    setting, cells = max(settings_of(table).items(),
                         key=lambda item: sum(map(len, item[1].values())))
    return setting, comparisons(cells)


def label_of(name, rows):
    """A control's name on the axis; the best single style with the styles that were best."""
    if name != BEST:
        return textwrap.fill(name.replace(HARMED, f"{HARMED}: student 1"), 30)
    styles = dict.fromkeys(row[0].partition(" (")[2].rstrip(")") for row in rows
                           if row[0].startswith(name))
    return f"{name}\n({', '.join(styles)})"


def write(table):
    """Write results/TABLE.md and, after a change of a table that it shows, the picture; print the
    table."""
    if not read_lines(table):
        return
    text = markdown(table)
    (RESULTS / f"{table}.md").write_text(text)
    print(text)
    if table in ("main", "real", "harmful"):
        picture().savefig(RESULTS / "gains.png")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [table for table in TABLES if (RESULTS / f"{table}.jsonl").exists()]
    p.add_argument("--table", nargs="+", choices=there, default=there, help="which (all with lines)")
    for table in p.parse_args().table:
        write(table)


if __name__ == "__main__":
    main()
