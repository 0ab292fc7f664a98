"""The tables as data: which rows each has, and what a row changes."""
import dataclasses
import re

FULL = "QR-Distill"
PAST = None  # the flags of a row whose code is gone: its lines name the commit that made them


@dataclasses.dataclass
class Row:
    """One row of a table. STYLE in its fields makes a row for each style of the pool."""
    name: str
    flags: str | None = ""  # of distill.py, beside seed, steps, questions a step and data
    against: str = FULL     # the reference: a row of the same table
    compared: tuple = None  # numbers of the students that are compared (all)
    shuffle: str = None     # the tokens of this style's paths are shuffled for student 1


ALL = Row("all paths to both", "--route all")
RANDOM = Row("a random path", "--route random")
SHORT = Row("the shortest path", "--route short")
LIKELIEST = Row("the likeliest path", "--route nll")
CONTROLLED = [Row(FULL), ALL, RANDOM, SHORT, LIKELIEST]
MAIN = [
    *CONTROLLED,
    Row("only STYLE", "--route all --styles STYLE"),
    Row("no collaboration", "--mutual_weight 0"),
]
HARMFUL = [Row(f"{row.name}, STYLE shuffled", row.flags, f"{FULL}, STYLE shuffled", (1,), "STYLE")
           for row in CONTROLLED]
SAMPLES = [Row(FULL), ALL]
for fewer in (", 50% of the questions", ", 25% of the questions", ", 10% of the questions"):
    SAMPLES += [Row(FULL + fewer, PAST), Row(ALL.name + fewer, PAST, FULL + fewer)]
TABLES = {
    "main": MAIN,
    "real": [
        *MAIN,
        Row("no losses in the router's input", PAST),
        Row("length penalty 0.5", "--length_penalty 0.5"),
        Row("length penalty 0, no losses in the input", PAST),
        Row("products in float32", "--dtype float32"),
    ],
    "paper": [
        Row(FULL),
        Row("one path of a question (SKD)",
            "--route all --mutual_weight 0 --styles chain_of_thought"),
        Row("distilling step-by-step", PAST),
        Row("no filter", "--filter none"),
        Row("answer filter only", "--filter answer"),
        Row("student 0 frozen", "--lr 0 2e-3", compared=(1,)),
        Row("student 1 frozen", "--lr 2e-3 0", compared=(0,)),
    ],
    "ablation": [
        Row(FULL),
        Row("all as printed", "--as_printed all"),
        Row("gates as printed",
            "--as_printed eq1 --gate binary --reward loss --probe 0 --router_lr 0.1"),
        Row("binary gates", "--gate binary --reward sum --router_lr 0.1"),
        Row("reward: total loss through the gates (Eq 9)", "--reward sum --router_lr 0.1"),
        Row("reward: mean loss through the gates (Eq 9)", "--reward loss --router_lr 0.1"),
        Row("the student's choice at temperature 4", PAST),
        Row("length penalty 1", "--length_penalty 1"),
        Row("length penalty 0.5", "--length_penalty 0.5"),
        Row("losses in the router's input", PAST),
        Row("no style input", "--as_printed eq1"),
        Row("MLP router", "--as_printed eq2 --gate categorical"),
        Row("probe half of the questions", "--probe 0.5"),
        Row("products in bfloat16", "--dtype bf16"),
    ],
    "competence": [
        Row(FULL),
        Row("no collaboration", "--mutual_weight 0"),
        Row("ten times the mutual loss", "--mutual_weight 1"),
        Row("competence from Eq 8", "--as_printed eq6"),
        Row("trained projections", "--as_printed eq5"),
        ALL,
        Row("all paths to both, no collaboration", "--route all --mutual_weight 0"),
    ],
    "harmful": HARMFUL,
    "rescue": [
        Row(FULL, PAST),
        Row("rescue: the peer's answer", PAST),
        Row("control: the student's own answers", PAST),
        Row("control: the teacher's path", PAST),
    ],
    "samples": SAMPLES,
}


def rows_of(table, styles, only=None):
    """The rows of a table that today's code has, one for each style where they say STYLE; of these
    the rows named `only` and the rows that they are compared with."""
    rows = []
    for row in TABLES[table]:
        if row.flags is PAST:
            continue
        for style in styles if "STYLE" in row.name else [""]:
            texts = {key: value.replace("STYLE", style)
                     for key, value in vars(row).items() if isinstance(value, str)}
            rows.append(dataclasses.replace(row, **texts))
    chosen = [row for row in rows if not only or row.name in only]
    wanted = {name for row in chosen for name in (row.name, row.against)}
    return [row for row in rows if row.name in wanted]


def place(table, name):
    """Where a row stands in its table: the number of its entry, for sorting."""
    patterns = [re.escape(row.name).replace("STYLE", ".+") for row in TABLES[table]]
    found = [i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, name)]
    return found[0] if found else len(patterns)
