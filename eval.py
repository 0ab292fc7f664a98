"""Tasks and evaluation: rows, the student's prompt, answers, grading, generation, pictures.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl
    python eval.py --plot out/run_a out/run_b

A row is a flat dict {"id", "task", "question", "answer"} and, where there are any, "choices"
{"A": text, ...}, "level" and "prompt" (which overrides the student prompt).
"""
import argparse
import ast
import contextlib
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import re
import sys
import zlib
from collections import defaultdict
from fractions import Fraction
from functools import lru_cache, partial
from types import SimpleNamespace

from mpmath import MPContext

# One line per task, and no more is needed for a new one: which kind of answer it has.
TASKS = {
    "gsm8k": "number",
    "math": "math",
    "strategyqa": "yesno",
    "arc": "choice",
    "commonsense_qa": "choice",
    "anli": "choice",
    "date": "choice",
    "demo": "number",
}
# Kind of answer -> how a student's prompt ends, and what a text says that does as it is asked.
KINDS = {
    "number": ('"The answer is N." where N is a number.', r"[$€£]?-?\d(?:[\d,.]{0,29}\d)?"),
    "math": ('"The answer is $\\boxed{X}$." where X is the result.', r"\$[^$\n]+\$"),
    "yesno": ('"The answer is yes." or "The answer is no."', r"yes|no"),
    "choice": ('"The answer is (X)." where X is the letter of one choice.', r"\([A-Z]\)"),
}
# That sentence (not "If the answer is (B), then"), once something follows it: it may end there.
ASKED = {kind: re.compile(r"(?im)(?:^|(?<=[.!>]))\W{0,9}(?:(?:so|thus|therefore|hence)\W{1,9})?"
                          rf"the answer is (?:{answer})(?!\w)[^\n]{{0,300}}?(?:\.(?=\s)|(?=\n))")
         for kind, (_, answer) in KINDS.items()}
LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
YESNO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
ANLI = {"A": "entailment", "B": "neutral", "C": "contradiction"}


# ---------------------------------------------------------------- commands
def stop(message):
    """End the program with one sentence on stderr and exit code 2 (raises SystemExit)."""
    from tqdm import tqdm

    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    raise SystemExit(2)


def in_a_line(error):
    """An exception as a part of such a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def within(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    # argparse says "invalid whole number value: 'x'"
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def nonempty(text):
    """An argparse type: text that is not blank, as an unset shell variable would make it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def check_output(path):
    """Stop, before any work is done, where no file can be written at `path`; leaves no trace."""
    existed = os.path.lexists(path)  # a link to a file that is not there stays
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except OSError as e:
        stop(f"cannot write {path} ({e.strerror}): choose another place")


def run_command(main):
    """Run a script's main(): what a terminal can't show is escaped, a closed pipe ends it."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# ---------------------------------------------------------------- rows: the one door
# Whoever wrote a file (our own commands, pandas, datasets, a hand), it comes in here. What has
# passed numbered_rows and clean_row (for paths: judge.pool_rows) is not checked further in.
def read_jsonl(path):
    """The rows of a JSON Lines file as a list; see numbered_rows."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path):
    """Yield ("FILE:LINE", row) for each JSON object of a JSON Lines file; blank lines are skipped.

    A field that is null or NaN is absent, and half a surrogate pair is replaced, at every depth.
    Stops with FILE:LINE at anything but a JSON object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                row = parse_json(line, where)
                if not isinstance(row, dict):
                    stop(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield where, row
    except OSError as e:
        stop(f"cannot read {path}: {e.strerror}")


def parse_json(data, where):
    """The value of a JSON text (bytes), cleaned as numbered_rows says; stops with `where`."""
    def clean(value, depth=0):
        if depth > 50:
            raise ValueError("nested more than 50 deep")
        match value:
            case str():
                return re.sub("[\ud800-\udfff]", "\ufffd", value)
            case list():
                return [clean(item, depth + 1) for item in value]
            case dict():
                return {clean(key): clean(item, depth + 1)
                        for key, item in value.items() if item is not None}
        return value

    def finite(text):
        return float(text) if math.isfinite(float(text)) else None

    try:  # Infinity becomes null, too, and what is as large (1e999)
        return clean(json.loads(data.decode("utf-8-sig"), parse_float=finite,
                                parse_constant=lambda name: None))
    except (ValueError, RecursionError) as e:  # ValueError: no JSON, no UTF-8, or 5,000 digits
        stop(f"{where}: not valid JSON ({str(e)[:200]}); a .jsonl file has one object a line")


def read_json(path):
    """The value of a JSON file, cleaned as numbered_rows says."""
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(), path)
    except OSError as e:
        stop(f"cannot read {path}: {e.strerror}")


def require_text(row, keys, where):
    """Stop with FILE:LINE unless each row[key] is a string that is not blank."""
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            stop(f"{where}: field {key!r} is missing, empty or not a string")


def as_text(value):
    """A string as it is, a number as text (18.0, as pandas writes 18, is "18"), else None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def clean_row(row, where):
    """Check the fields that questions and paths share and bring them into canonical form.

    Changes the row in place and returns it. A number may be an id or an answer, one user turn a
    prompt, and choices may have any form of read_choices. Stops with FILE:LINE at the rest.
    """
    if str(row.get("task")) not in TASKS:
        stop(f"{where}: unknown task {row.get('task')!r}; known are {', '.join(TASKS)} "
             "(--task names the task of a file of questions)")
    row["id"] = as_text(row.get("id"))
    require_text(row, ("id", "question"), where)
    if "level" in row:
        level = row["level"]
        row["level"] = str(level) if isinstance(level, bool) else as_text(level)
        require_text(row, ("level",), where)
    match row.pop("prompt", ""):
        case str(text) | [{"role": "user", "content": str(text)}]:
            if text.strip():
                row["prompt"] = text
        case _:
            stop(f"{where}: field 'prompt' is neither a string nor one user turn")
    labels = read_choices(row, where)
    if "baseline" in row:  # graded when it was made from other rows: its answer may be "unknown"
        row["answer"] = as_text(row.get("answer"))
        require_text(row, ("answer",), where)
    else:
        row["answer"] = clean_answer(row, labels, where)
    return row


def read_choices(row, where):
    """Make row["choices"] {"A": text, ...} -> {label in the file: letter}; without any, no field.

    In a file they are {label: text}, [text, ...], [{"label", "text"}, ...] or {"label": [...],
    "text": [...]}. Those without text go; labels that are no capital letters are replaced.
    """
    match row.pop("choices", None) or []:
        case {"label": [*labels], "text": [*texts]}:
            pairs = [*zip(labels, texts)]
        case {**fields}:
            pairs = [*fields.items()]
        case [*items] if all(isinstance(item, dict) for item in items):
            pairs = [(item.get("label"), item.get("text")) for item in items]
        case [*texts] if len(texts) <= len(LETTERS):
            pairs = [*zip(LETTERS, texts)]
        case _:
            pairs = [(None, None)]
    pairs = [(as_text(label), as_text(text)) for label, text in pairs if text not in (None, "")]
    labels = [label for label, text in pairs if label is not None and text is not None]
    if len(set(labels)) < len(pairs) or len(pairs) > len(LETTERS):
        stop(f"{where}: field 'choices' is not an object of letters and texts, nor a list of texts")
    if len(pairs) < 2 and TASKS[row["task"]] == "choice" and "baseline" not in row:
        stop(f"{where}: task {row['task']} needs 'choices', two or more")
    kept = all(label in LETTERS for label in labels)
    letters = dict(zip(labels, labels if kept else LETTERS))
    if pairs:
        row["choices"] = {letters[label]: text for label, text in pairs}
    return letters


def clean_answer(row, letters, where):
    """The canonical gold answer of a row; stops where it is none of the row's task."""
    given, kind, choices = row.get("answer"), TASKS[row["task"]], row.get("choices", {})
    if isinstance(given, bool):
        given = "yes" if given else "no"
    answer = right = (as_text(given) or "").strip()
    if kind == "choice":
        right = letters.get(answer) or letters.get(answer.strip("()"))
        right = right or next((c for c, text in choices.items() if text == answer), None)
    elif kind == "yesno":
        right = YESNO.get(answer.lower())
    elif kind == "number" and number_in(answer) is None:
        right = None
    if not right:
        of = f"choices {', '.join(choices)}" if kind == "choice" else f"kind {kind}"
        stop(f"{where}: field 'answer' is {str(given)[:80]!r}, no answer of task {row['task']} "
             f"({of})")
    return right


# ---------------------------------------------------------------- readers of questions
def read_questions(path, task=None):
    """Rows of a file of questions, each id once, clean (see clean_row).

    The file is in a published format (GSM8K, MATH, BIG-bench, BBH, CommonsenseQA, ARC, ANLI,
    StrategyQA), flat JSONL, or a path pool. `task` overrides what the file says.
    """
    if task not in (None, *TASKS):
        stop(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    stem = os.path.splitext(os.path.basename(path))[0]
    guess = next((t for t in TASKS if re.search(rf"(?<![a-z]){t}(?![a-z])", stem.lower())), None)
    questions = {}
    for i, (where, record) in enumerate(records(str(path))):
        try:
            row = flatten(record, guess)
            given = [record[k] for k in ("id", "qid", "uid") if k in record]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
            stop(f"{where}: not a question in a format that I know ({type(e).__name__}: {e})")
        row = {"id": given[0] if given else f"{stem}-{i:05d}", **row, "task": task or row["task"]}
        row = clean_row({k: v for k, v in row.items() if v is not None}, where)
        if questions.setdefault(row["id"], row)["question"] != row["question"]:
            stop(f"{where}: the id {row['id']!r} belongs to another question already; give each "
                 "question its own")
    if not questions:
        stop(f"{path}: no questions in it")
    return list(questions.values())


def records(path):
    """(place, record) for a JSONL file's lines, or a .json file's list or BIG-bench "examples"."""
    if not path.endswith(".json"):
        yield from numbered_rows(path)
        return
    data = read_json(path)
    data = data.get("examples") if isinstance(data, dict) else data
    if not isinstance(data, list):
        stop(f"{path}: expected a list of questions or an object with 'examples'")
    yield from ((f"{path}, example {i}", record) for i, record in enumerate(data))


def flatten(r, guess):
    """A published record as a flat row without id; `guess` is the task that its file's name has."""
    if "problem" in r:  # MATH
        answer = r["answer"] if "answer" in r else extract_answer("math", r["solution"])
        return {"task": "math", "question": r["problem"], "level": r.get("level"), "answer": answer}
    if "target_scores" in r:  # BIG-bench
        scores = r["target_scores"]
        right = max(scores, key=scores.get)
        if {t.lower() for t in scores} == {"yes", "no"}:
            return {"task": guess or "strategyqa", "question": r["input"], "answer": right}
        # it may list the right choice first: our order hangs on the texts alone
        texts = sorted(scores, key=lambda text: zlib.crc32(f"{r['input']} {text}".encode()))
        return {"task": guess, "question": r["input"], "answer": right, "choices": texts}
    if "input" in r and "target" in r:  # BIG-Bench Hard
        question, _, options = r["input"].partition("\nOptions:\n")
        choices = dict(re.findall(r"\(([A-Z])\) (.+)", options))
        return {"task": guess, "question": question, "answer": r["target"], "choices": choices}
    if "hypothesis" in r:  # ANLI
        answer = {"e": "A", "n": "B", "c": "C", 0: "A", 1: "B", 2: "C"}[r["label"]]
        premise = r["premise"] if "premise" in r else r["context"]
        question = ("Premise: " + premise + "\nHypothesis: " + r["hypothesis"]
                    + "\nWhat is the hypothesis, given the premise?")
        return {"task": "anli", "question": question, "answer": answer, "choices": ANLI}
    if "answerKey" in r:  # CommonsenseQA and ARC, as published and as on the Hugging Face hub
        stem = r["question"] if isinstance(r["question"], dict) else {"stem": r["question"], **r}
        known = "commonsense_qa" if "question_concept" in stem else "arc"
        return {"task": guess or known, "question": stem["stem"], "answer": r["answerKey"],
                "choices": stem["choices"]}
    answer, task = r["answer"], r.get("task") or guess
    if isinstance(answer, bool):
        task = task or "strategyqa"
    elif "####" in str(answer):  # GSM8K
        answer, task = answer.rsplit("####", 1)[1].strip(), task or "gsm8k"
    more = {k: r.get(k) for k in ("choices", "level", "prompt")}
    return {"task": task, "question": r.get("question"), "answer": answer, **more}


# ---------------------------------------------------------------- prompts
def question_of(row):
    """The question with its choices, a line "(A) text" each."""
    choices = row.get("choices") or {}
    return row["question"] + "".join(f"\n({letter}) {text}" for letter, text in choices.items())


def student_prompt(row):
    """What a student sees of a row: its own `prompt`, which questions held out of a pool lose, or
    one that is the same in training and at test time (open point 11)."""
    if row.get("prompt"):
        return row["prompt"]
    if row["task"] == "demo":  # tiny students with a word-level vocabulary: the question alone
        return f"Question: {row['question']}\nAnswer:\n"
    end, _ = KINDS[TASKS[row["task"]]]
    return (f"Answer the question.\n\n{question_of(row)}\n\n"
            f"Reason step by step and end with {end}\n")


# Set before a chat template, so that one that writes today's date writes the same tomorrow. It is a
# macro, since transformers hands no function of ours to a template.
FIXED_DATE = ("{% macro strftime_now(format) %}{{ format | replace('%Y', '2024')"
              " | replace('%B', 'July') | replace('%b', 'Jul') | replace('%m', '07')"
              " | replace('%d', '26') }}{% endmacro %}\n")


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, in which the names of control tokens are text.

    With a chat template: one user turn, then what the template writes before any answer (a header,
    an empty thought). Without: the text with the tokenizer's own BOS, never a trailing EOS.
    """
    if tokenizer.chat_template:
        return os.path.commonprefix(two_chats(tokenizer, prompt.strip()))
    ids = list(tokenizer(prompt, split_special_tokens=True)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_token(tokenizer):
    """Id of the token that ends a response: the first special token that the chat template writes
    after any answer, else eos_token_id. Stops if there is none."""
    if tokenizer.chat_template:
        backwards = [ids[::-1] for ids in two_chats(tokenizer, "Q")]
        for token in reversed(os.path.commonprefix(backwards)):
            added = tokenizer.added_tokens_decoder.get(token)
            if added and added.special:
                return token
    if tokenizer.eos_token_id is None:
        stop(f"{tokenizer.name_or_path}: the tokenizer has no token that ends a response; give it "
             "an eos_token")
    return tokenizer.eos_token_id


def two_chats(tokenizer, prompt):
    """Token ids of a user's turn and an answer's, for two answers that have no token in common."""
    answers = ["The", "9"]
    if tokenizer(answers[0])["input_ids"] == tokenizer(answers[1])["input_ids"]:  # both unknown
        answers = sorted(filter(str.isalnum, tokenizer.get_vocab()))[:2]
    try:
        chats = [list(tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            sanitize_control_tokens=True, return_dict=False)) for answer in answers]
    except Exception as e:  # noqa: BLE001 (a template is a program and may raise what it likes)
        stop(f"{tokenizer.name_or_path}: its chat template can't write a question and an answer "
             f"({in_a_line(e)})")
    if chats[0] == chats[1]:
        stop(f"{tokenizer.name_or_path}: its chat template does not write what the assistant says")
    return chats


# ---------------------------------------------------------------- answers: what a text says
# Thoughts are cut off. What the text announces last counts (a box, ####, "the answer is",
# "Answer:"), and it must be one value. A number, and only a number, may be read from the end of a
# text that announces nothing. All else is unparsed: rather lose an answer than take a wrong one.
LONGEST = 5000  # characters, from a text's end; so no pattern takes more than milliseconds
# The marks of thoughts in the families' outputs; a decoder may leave <|channel|> and the like out.
THOUGHT = re.compile(r"""(?ix)
    (?P<closes> </(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[/think\] | ◁/think▷
      | <\|end_(?:thinking|of_thought)\|> | <\|channel\|>final(?:<\|message\|>)? | assistantfinal )
    | <(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[think\] | ◁think▷
    | <\|(?:start_thinking|begin_of_thought|channel)\|> | \A(?-i:analysis(?=[A-Z]))""")
# Answer: 5, {"answer": 5}, <answer>5 and "the answer (in eggs) is 5", but neither "the answer is
# correct" nor "the other answers are wrong".
ANNOUNCED = re.compile(r"""(?ix) \#{4} | (?P<box>\\(?:boxed|fbox)\b)
    | (?<!/)(?<!other\ )\b(?:answers?|(?:correct|right|best)\ (?:option|choice))\b
      (?: ["'`]?\s?[:=>] | \s*\n
        | [^.:=?!\n]{0,80}? (?:\b(?:is|are|was|were|be|equals?)\b | n['’]t\b) (?!\ correct) )""")
CLAUSE_END = re.compile(r"[.,:;!?\n]|\b(?:so|thus|therefore|hence)\b")
SENTENCE_END = re.compile(r"[!\n]|</|\.(?!\s?\d)(?=\s|$)")  # not that of "4 hrs. 30 min"
# Such a clause announces nothing: it is denied, asked, or supposed ("If the answer is 4, then").
DENIED = re.compile(r"(?i)\?|n['’]t\b|\b(?:not|never|neither|nor|cannot|wrong|false|incorrect"
                    r"|unlikely|least likely|if|suppose|assum\w+|whether|unless|might|either)\b")
# What may stand between an announcement and its value.
LEAD = re.compile(r"""(?ix) (?: [\s:*"'`“>] | -\ | \.\s | \b(?: (?!hardly|unlikely|nearly)\w+ly
    | most | about | therefore | thus | hence | indeed | it['’]s | it\ is | is | option )\b )*""")
# -1234.5, .5 or 3/4, but neither 2nd nor a part of x2 or 1.2.3
NUMBER = re.compile(r"""(?x) (?<![\w.,/^]) (?:(?<![)}%])-)?
    (?:\d{1,30} (?:\ ?/\ ?[1-9]\d{0,29} | \.\d{1,30})? | \.\d{1,30})
    (?! \d | \.\d | \ ?/\ ?\d | st\b | nd\b | rd\b | th\b)""")
# Beside a number it says that this is not the whole value: 5 million, 3 quarters, 5 or more, 2π.
UNREAD = re.compile(r"""(?ix) \b(?: (?:hundred|thousand|[mbtr]+illion|dozen|third|quarter|fourth
      |fifth|sixth|eighth|tenth)s? | hal(?:f|ves) | squared | cubed | plus | minus | negative
    | times | than | or | and | multiplied | divided | added | equals )\b
    | \d(?:[KMB]\b|e[-+]?\d|[:,]\d) | [²³½⅓⅔¼¾√π^×÷+*|(] | [-/]\s
    | \\(?:sqrt|frac|pi|times|cdot|div)""")
# A box beside it holds a part of an answer: -\boxed{3}, 2\boxed{3}, \frac{1}{\boxed{3}},
# \boxed{2} and \boxed{3}, \boxed{3}^2, \boxed{3} million.
BEFORE_PART = re.compile(r"""(?x) (?: (?<![-\w})])[-−–] | [$=(\[]\ ?[-−–]\ | \d(?:\ ?[*/]\ ?)? | \^
    | \\(?:sqrt|cdot|times|div|pm)\ ? )\{?\Z | \\[dtc]?frac(?:\{[^$=)\n]{1,60}\})?\{\Z
    | \\boxed\{[^{}]{1,50}\}[\s$,;&]*(?:and|or)?[\s$]*(?:[A-Za-z]\ ?=\ ?)?\Z""")
AFTER_PART = re.compile(r"[\s$]*(?:[*/]|\^(?!\{?\\circ)|\\(?:sqrt|cdot|times|div|frac|pi)|\}\{|or\b"
                        r"|hundred|thousand|[mbtr]+illion)")


def after_thought(text):
    """What a text says after its thoughts: all that follows the last </think> or the like, or the
    mark of the final channel. A thought that is not closed leaves nothing ("")."""
    marks = list(THOUGHT.finditer(text))
    if not marks:
        return text
    return text[marks[-1].end():] if marks[-1]["closes"] else ""


def extract_answer(task, text, choices=None):
    """The answer that a text states, or None where it states none or more than one.

    It is a number ("-1234.5", "3/4"), LaTeX, a letter of `choices`, "yes" or "no".
    """
    kind = TASKS[task]
    text = re.sub(r"[ \t\xa0\u2009\u202f]+", " ", after_thought(text)[-LONGEST:])
    text = re.sub(r"(?<!\w)\*{2,3}|\*{2,3}(?!\w)", "", text)  # bold, but not Python's 2**3
    announced = list(ANNOUNCED.finditer(text))
    if not announced:
        return last_number(text) if kind == "number" else None
    last = announced[-1]
    before, statement = text[:last.start()][-80:], text[last.end():][:1000]
    clause = CLAUSE_END.split(before)[-1] + last[0]
    if last["box"]:
        statement, after = in_braces(statement)
        clause = before[-16:]  # "It cannot be $"
        if BEFORE_PART.search(before) or AFTER_PART.match(after):
            return None
    if DENIED.search(clause):
        return None
    if kind == "math" and last["box"]:
        return statement.strip() or None
    if kind != "math":
        statement = without_latex(statement)
    statement = statement[LEAD.match(statement).end():]
    claim = SENTENCE_END.split(statement, maxsplit=1)[0]
    if kind == "yesno":
        m = re.match(r"(yes|no|true|false)\b(?:[^\w?]*$|[,.;:)](?! (?:or |and )?(?:yes|no)\b)| - )",
                     claim.lower())
        return m and YESNO[m[1]]
    if DENIED.search(claim):
        return None
    if kind == "math":
        formula = re.fullmatch(r"\$*([^$]+?)\$*\s*", claim)  # $5$ or 5, but not "$5$ or $6$"
        return formula and formula[1]
    return number_in(claim) if kind == "number" else read_choice(statement, claim, choices or {})


def in_braces(text):
    """(content, rest) of a text that begins with {...}; two "" if they never close: it was cut."""
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in text))
    end = depths.index(0) if 0 in depths else 0
    return text[1:end], text[end + 1:]


def without_latex(text):
    """A text with plain numbers: without currency, LaTeX's marks and thousands separators."""
    text = re.sub(r"[−–]", "-", text.replace("{,}", ","))
    text = re.sub(r"\\(?:text\w*|math\w+|[()\[\]$%!, ])|(?<=\d)\$", " ", text)
    return re.sub(r"[{}]|[$€£]\s?|(?<=\d)[, ](?=\d{3}\b)", "", text)


def number_in(text):
    """The one number that a text gives, or that its equation comes to ("18", "2.5", "1/3"); None
    for several, for open arithmetic and for a scale or a measure that is not read."""
    text = without_latex(text)
    if "=" in text and re.search(r"[,;]\s|\b(?:and|or|because|since)\b", text):  # x = 3, y = 5
        return None
    value = text.rsplit("=", 1)[-1]
    m = NUMBER.match(value, LEAD.match(value).end())
    others = {other[0] for other in NUMBER.finditer(value)}
    if not m or len(others) > 1 or UNREAD.search(value):
        return None
    return m[0].replace(" ", "")


def last_number(text):
    """The number that a text which announces nothing ends with, or None."""
    text = without_latex(text)
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    before, after = text[:numbers[-1].start()][-80:], text[numbers[-1].end():][:80]
    several = re.search(r"\d(?: ?[A-Za-z]+,?)? (?:(?:or|to|and) )?$", before)  # 4 hours 30
    if several or DENIED.search(CLAUSE_END.split(before)[-1]) or UNREAD.match(after.lstrip()):
        return None
    return numbers[-1][0].replace(" ", "")


def read_choice(statement, claim, choices):
    """The letter of the one choice that a claim names by letter or by exact text, or None."""
    choices = {letter: without_latex(text).lower() for letter, text in choices.items()}
    m = re.match(r"[(\[]?([A-Z])(?:[)\].,:;\"'”]|$)", claim)
    if not m or m[1] not in choices:
        hits = [letter for letter, text in choices.items()
                if re.match(rf"(?i)(?:the |an? )?{re.escape(text)}\W*(?:$|\n)", statement)]
        return hits[0] if len(hits) == 1 else None
    letters = {*re.findall(r"(?<![\w'’])[A-Z](?!\w)", claim)} & {*choices}
    rest = SENTENCE_END.split(statement[m.end():].lstrip(" .):"))[0].lower()
    texts = [text for text in choices.values() if text in rest and text not in choices[m[1]]]
    several = letters != {m[1]} or texts or rest.startswith(("or ", "and "))  # "B. or C", "B: bank"
    return None if several else m[1]


def grade(task, prediction, answer):
    """True if a prediction means the same as the answer; None (unparsed) is wrong."""
    if prediction is None or max(len(prediction), len(answer)) > 500:
        return False
    if TASKS[task] == "math":
        return same_math(spelled(prediction), spelled(answer))
    if TASKS[task] != "number":
        return prediction.strip("() .").lower() == answer.strip("() .").lower()
    a, b = number_in(prediction), number_in(answer)
    if a is None or b is None:
        return False
    a, b = Fraction(a), Fraction(b)
    # a program's 137.99999999999997 is 138, but 1000001 isn't 1000000
    return a == b or (a.denominator > 1 and abs(a - b) <= abs(b) / 10**6)


# ---------------------------------------------------------------- mathematical equality
# Two formulas are equal in one spelling, or part by part, or if their values agree to 80 digits
# wherever we put their letters. No eval() runs and nothing can hang, in whatever thread.
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    # layout, thousands, currency, degrees, an approximation behind a value
    (r"\\\\(?!\s*\\end)", "),("), (r"\\(?:left|right|[bB]igg?[lr]?|q?quad)(?![a-z])|\\[;: ]", " "),
    (r",\s*\\!\s*|\{,\}|\\[!,]|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\\[()\[\]]|°", ""),
    (r"(?<=[\d}])\s*\\approx.*", ""), (r"[−–]", "-"), (r"\\(?:cdot|times)(?![a-z])|[×·]", "*"),
    # \frac12 and 3\frac12, \sqrt2 and sqrt(2), \mathbf{i}, x_{1}
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\w.^}])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}", r"(\1+\2/\3)"),
    (r"\\?\bsqrt\s*(?:\((\w+)\)|(\w))", r"\\sqrt{\1\2}"), (r"\\math\w+\s*\{(\w)\}", r"\1"),
    (r"_\s*\{\s*(?:\\text\s*\{\s*)?(\w+)\s*\}+", r"_\1"),
    # lists, sets, and matrices as tuples of their rows
    (r"\\cup(?![a-z])|(?:\\text\s*\{)?,?\s(?:and|or)\s\}?(?![^,]*[<>])", ","), (r",\s*,", ","),
    (r"^\s*[A-Za-z]\s*\\in(?![a-z])", ""), (r"^\s*\\\{(.*)\\\}\s*$", r"\1"),
    (r"\[?\s*\\begin\{(?:[pb]matrix|array)\}\s*(?:\{[clr|]*\})?", "(("), ("&", ","),
    (r"(?:\\\\)?\s*\\end\{(?:[pb]matrix|array)\}\s*\]?", "))"))]
TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|[mh]box|math(?:rm|bf))\s*\{([^{}]*)\}(?:\^\{?\d\}?)?")
# Units behind a number go ("10 cm", "5 apples"), but not the words that change its value.
UNITS = re.compile(r"(?<=[\d})i])(?:\s*\b(?:[a-z]{4,}|[ckm]m|kg|ft|mph|sq)\b)+(?:\^\{?\d\}?)?\s*$")
VALUED = re.compile(r"(?i)\b(?:hundred|[mb]illion|thousand|dozen|not|negative|minus|than|more|less"
                    r"|fewer|at|[ap]\.?m)\b")
THOUSANDS = re.compile(r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?![\d,])")  # (1,000) is a pair
# x = 5, f(x) = 5, (a, b) = (2, 9)
NAMED = re.compile(r"(?:[A-Za-z](?:_\w+)?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))=([^=]+)")
# Fractions, powers and roots of what has no braces inside
BRACES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\\sqrt\{([^{}]*)\}", r"((\1)^(1/2))"), (r"\\sqrt\[(\w+)\]\{([^{}]*)\}", r"((\2)^(1/\1))"))]
# A word is a name of its own: "east" is not "seat".
TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\?[A-Za-z]{3,}|\\[a-z]+|[A-Za-z](?:_\w+)?|.")
SYMBOL = re.compile(r"[A-Za-z]\w*|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|infty)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow}


def spelled(s):
    """A formula in one spelling: without layout, currency, units and thousands separators."""
    for pattern, new in SPELLINGS:
        s = pattern.sub(new, s)
    bare = TEXT.sub(" ", s)
    keep_words = VALUED.search(s) or not re.search(r"\w", bare)
    s = TEXT.sub(r" \1 ", s) if keep_words else UNITS.sub("", bare)
    s = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", s).rstrip(".")  # "1 2" is not 12
    return THOUSANDS.sub(lambda m: m[0].replace(",", ""), s)


def same_math(a, b):
    """Whether two formulas, as spelled() writes them, are equal: sets and lists in any order,
    tuples, intervals, matrices and equations part by part; "x=5" is 5."""
    if a == b or (a.isalpha() and len(a) > 2 and a.lower() == b.lower()):
        return a != ""
    a_is, b_is = NAMED.fullmatch(a), NAMED.fullmatch(b)
    if bool(a_is) != bool(b_is):
        return same_math(a_is[1] if a_is else a, b_is[1] if b_is else b)
    (kind, parts), (kind_b, others) = parts_of(a), parts_of(b)
    if kind != kind_b or len(parts) != len(others) or len(parts) > 20:
        return False
    if kind == "formula":
        x, y = values(a), values(b)
        return bool(x and y) and all(abs(p - q) * 10**80 <= abs(p) for p, q in zip(x, y))
    if kind != "list":
        return all(map(same_math, parts, others))
    for part in parts:
        twin = next((other for other in others if same_math(part, other)), None)
        if twin is None:
            return False
        others.remove(twin)
    return True


def parts_of(s):
    """(kind, parts) of a formula: a list, set or union, the sides of an equation, a tuple, interval
    or matrix, or the formula alone."""
    if "\\pm" in s:
        s = s.replace("\\pm", "+") + "," + s.replace("\\pm", "-")
    for kind, separator in (("list", ","), ("equation", "=")):
        if len(parts := split_top(s, separator)) > 1:
            return kind, parts
    if s[:1] in ("(", "[") and s[-1] in ")]" and len(parts := split_top(s[1:-1], ",")) > 1:
        return s[0] + s[-1], parts
    return "formula", [s]


def split_top(s, separator):
    """Split at the separators outside of all brackets."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in s)
    marked = ["\n" if c == separator and depth == 0 else c for c, depth in zip(s, depths)]
    return "".join(marked).split("\n")


@lru_cache(maxsize=4096)
def values(formula):
    """A formula's values with its letters at three arbitrary points; None if it can't be read.

    Python's parser reads it with n0, a1, ... for its numbers and letters, by their place among the
    tokens: 2x(x+1) is n0 * a1 * ( a3 + n5 ).
    """
    for _ in range(9):  # from the innermost braces outwards
        for pattern, new in BRACES:
            formula = pattern.sub(new, formula)
    tokens = TOKEN.findall(formula)
    names = [*tokens]
    for i, token in enumerate(tokens):
        if token not in "+-*/()^":
            names[i] = f"n{i}" if token[0].isdigit() else f"a{i}"
    expression = re.sub(r"(?<=[\w)]) (?=[a(])", " * ", " ".join(names)).replace("^", "**")
    mp = MPContext()  # our own: threads would share the precision of mpmath.mp
    mp.dps = 100
    try:
        tree = ast.parse(expression, mode="eval").body
        return [value_of(mp, tree, tokens, point) for point in range(3)]
    except (ValueError, SyntaxError, ArithmeticError, AttributeError, LookupError, RecursionError,
            MemoryError):  # the last two: too deep
        return None


def value_of(mp, node, tokens, point):
    """The value of a tree of names, signs and OPERATORS; some error for all others."""
    if isinstance(node, ast.Name):
        token = tokens[int(node.id[1:])]
        if token in ("e", "i", "\\pi"):
            return {"e": mp.e, "i": mp.j, "\\pi": mp.pi}[token] * 1
        if SYMBOL.fullmatch(token):  # > 0, where sqrt(1/n) is 1/sqrt(n)
            return mp.mpf(zlib.crc32(f"{token} {point}".encode())) / 2**32 + 0.5
        return mp.mpf(token)
    if isinstance(node, ast.UnaryOp):
        x = value_of(mp, node.operand, tokens, point)
        return -x if isinstance(node.op, ast.USub) else x
    x = value_of(mp, node.left, tokens, point)
    y = value_of(mp, node.right, tokens, point)
    if isinstance(node.op, ast.Pow) and abs(y) > 10**4:  # nobody computes 9^(9^9)
        raise ValueError("too large")
    return OPERATORS[type(node.op)](x, y)


# ---------------------------------------------------------------- students
def load_student(name, device="cpu", dtype=None, **more):
    """(model, tokenizer) of a Hugging Face causal LM, or of a folder with a LoRA adapter in PEFT's
    format (merged). dtype: of the weights (None: float32); `more` goes to from_pretrained. Code
    that comes with a model is never run. Stops with one sentence at what is no such model, at
    weights that are missing, left over or not finite, and at what check_model finds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of missing weights: the sentence names one of them
    try:
        adapter = read_adapter(name)
        base = adapter[0]["base_model_name_or_path"] if adapter else name
        own_tokenizer = os.path.isfile(os.path.join(name, "tokenizer_config.json"))
        tokenizer = AutoTokenizer.from_pretrained(name if own_tokenizer else base,
                                                  trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **more)  # reported, not ignored
        check_weights(model, report)
        if adapter:
            merge_adapter(model, *adapter)
    except Exception as e:  # noqa: BLE001 (whatever libraries raise at a folder that is no model)
        stop(f"{name}: not a causal language model that can be loaded from safetensors "
             f"({in_a_line(e)})")
    finally:
        logging.set_verbosity(loud)
    if not tokenizer.is_fast:
        stop(f"{name}: its tokenizer is not a fast one (tokenizer.json), and only those give "
             "character offsets")
    # No text becomes a special token, so some need no embedding (Gemma 3's <image_soft_token>).
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {*tokenizer.get_vocab().values()} - special
    used.update(encode_prompt(tokenizer, "Q"), [end_token(tokenizer)])
    if max(used) >= len(model.get_input_embeddings().weight):
        stop(f"{name}: its tokenizer has more tokens than the model has embeddings")
    model = model.to(device).eval()
    for module in model.modules():
        # bitsandbytes on some CPUs: the first answer would repack 4-bit weights for good, and they
        # give no gradient then.
        module.support_avx512bf16_for_cpu = False
    check_model(model, name)
    return model, tokenizer


def check_weights(model, report):
    """Raise ValueError where from_pretrained's report or a weight that isn't finite shows that the
    checkpoint is not whole or not this model's. (A renamed weight is missing and left over.)"""
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape of"),
                       ("unexpected_keys", "has what the model of its config.json has not,")):
        names = sorted(map(str, report[kind]))
        if names:
            raise ValueError(f"the checkpoint {what} {names[0]}, {len(names)} such weights in all")
    for name, weight in model.named_parameters():
        check_finite(name, weight)


def check_finite(name, weight):
    some = weight.is_floating_point() and weight.numel()
    if some and not all(math.isfinite(end) for end in weight.detach().aminmax()):
        raise ValueError(f"{name} holds NaN or infinity")


def read_adapter(folder):
    """(config, weights, its base's fingerprint or None) of a PEFT adapter; None if it is none."""
    from safetensors import safe_open

    file = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as f:
        config = json.load(f)
    with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as f:
        keys = f.keys()
        weights = {key: f.get_tensor(key) for key in keys}
        return config, weights, (f.metadata() or {}).get("base")


def fingerprint(model):
    """Eight hex digits that tell a model's weights from others, the same in float32 and bfloat16,
    from 64 values of each; None in another type, as float16 or quantised. Called before LoRA."""
    import torch

    digest = 0
    for weight in model.parameters():
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        values = weight.detach().flatten()
        values = values[::max(1, len(values) // 64)].to("cpu", torch.bfloat16)
        digest = zlib.crc32(values.view(torch.int16).numpy().tobytes(), digest)
    return f"{digest:08x}"


def merge_adapter(model, config, weights, base=None):
    """W += scale B A for every module with a LoRA pair.

    Raises ValueError at what is more than plain LoRA, lacks a part or is not finite, and where the
    model hasn't the fingerprint `base`.
    """
    more = [key for key in ("use_dora", "alpha_pattern", "modules_to_save", "layers_to_transform",
                            "exclude_modules", "target_parameters") if config.get(key)]
    # Other initial weights (pissa, olora, corda, loftq, lora_ga) change those of the base.
    initial = config.get("init_lora_weights")
    if initial not in (None, True, False, "gaussian", "eva", "orthogonal", "mica"):
        more.append(f"init_lora_weights {initial}")
    pairs = defaultdict(dict)  # name of a module -> {"A": (rank, in), "B": (out, rank)}
    for key, weight in weights.items():
        m = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if more or not m:
            raise ValueError(f"only plain LoRA adapters can be merged {more or key}")
        check_finite(key, weight)
        pairs[m[1]][m[2]] = weight.float()
    if not pairs:
        raise ValueError("the adapter is empty")
    if base and fingerprint(model) not in (base, None):
        raise ValueError(f"its base {config['base_model_name_or_path']} has changed since")
    lacking = sorted(targets(model, config["target_modules"]) - pairs.keys())
    if lacking:
        raise ValueError(f"the adapter lacks {lacking[0]}, {len(lacking)} of its target_modules")
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"the adapter has only one of the two matrices of {name}")
        rank = len(pair["A"])
        scale = config["lora_alpha"] / (rank ** 0.5 if config.get("use_rslora") else rank)
        delta = scale * (pair["B"] @ pair["A"])
        if config.get("fan_in_fan_out"):  # GPT-2's Conv1D keeps (in, out)
            delta = delta.T
        weight = model.get_submodule(name).weight
        if delta.shape != weight.shape:
            raise ValueError(f"{name} of the base has the shape {tuple(weight.shape)}, that of the "
                             f"adapter {tuple(delta.shape)}")
        weight.data = (weight.float() + delta.to(weight.device)).to(weight.dtype).detach()


def targets(model, modules):
    """The linear layers that an adapter's target_modules name, as PEFT reads it: endings of their
    names, a pattern for the whole name, or "all-linear"."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if type(module) in (Linear, Conv1D)
              and module is not model.get_output_embeddings()}
    if modules == "all-linear":
        return linear
    if isinstance(modules, str):
        return {name for name in linear if re.fullmatch(modules, name)}
    return {name for name in linear if any(f".{name}".endswith(f".{end}") for end in modules)}


def check_model(model, name="the model"):
    """Stop unless the model is causal (a changed last token moves no earlier logits) and gives the
    same logits from the cache that generate uses as without (those of models that keep their state
    elsewhere would ignore the context)."""
    import torch

    size = model.config.get_text_config().vocab_size
    tokens = [(size // 2 + 11 * j) % size for j in range(9)]
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        with torch.no_grad():
            ids = torch.tensor([tokens[:8], tokens[:7] + tokens[8:]], device=model.device)
            whole, changed = (model(input_ids=row[None]).logits[0].float() for row in ids)  # (8, V)
            cache, reader = empty_cache(model), empty_reader(model)
            starts = [tokens[:5], tokens[:3]] if reader.can_cut else [tokens[:5]]
            new = read_prompts(model, reader, starts)
            cache = join(cache, new, starts, len(starts)) if can_join(cache) else new
            steps, wanted = [], []
            for n in range(3):
                ids = [[tokens[len(start) + n]] for start in starts]
                lengths = [len(start) + n + 1 for start in starts]
                steps.append(next_logits(model, cache, ids, lengths))
                wanted.append(whole[[length - 1 for length in lengths]])
    except Exception as e:  # noqa: BLE001 (whatever a model that is none raises)
        stop(f"{name}: does not run as a causal language model with a cache "
             f"({in_a_line(e)})")

    def differ(a, b):
        return not (a - b).norm() <= limit * (b - b.mean()).norm()  # also where one is NaN

    if differ(changed[:7], whole[:7]):
        stop(f"{name}: not a causal model: a token changes what is predicted before it")
    if differ(torch.cat(steps), torch.cat(wanted)):
        stop(f"{name}: its answers from a cache are not those without; its kind of model is not "
             "supported")


def logit_factor(config):
    """What a family multiplies its logits with (Cohere, Falcon-H1; Granite and MiniCPM3 divide)."""
    config = config.get_text_config()
    factor = 1.0
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor *= getattr(config, key, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling


# ---------------------------------------------------------------- generation
READ_TOGETHER = 16  # prompts: one pass over the weights for all of them, and room for their states


def generate(model, tokenizer, prompts, max_new_tokens, batch_size=None, samples=1,
             temperature=None, seed=0, desc=None, until=None, done=None, dtype=None):
    """Responses to prompts (lists of token ids): [prompt][sample] of {"text", "tokens": their
    number, "logprob": their mean log-probability, "stopped": it ended by itself}.

    Greedy for one sample or at temperature 0; several samples have temperature 0.8 by default. A
    sample hangs on seed, prompt and sample number, not on the batch around it. It ends with an end
    token (which counts, but is not in the text), after max_new_tokens, where the model's context
    ends, or with the first match of `until`, a pattern for each prompt, which is looked for every
    16 tokens. batch_size responses are written at a time (None: see rows_at_once); when sample k of
    prompt i ends, done(i, k, response) is called, and when an eighth has ended, others take their
    places. For `dtype` see laid_out.
    """
    import torch
    from tqdm import tqdm

    if temperature is None:
        temperature = 0.8 if samples > 1 else 0
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max(map(len, prompts), default=0)
    if longest >= context:
        stop(f"a prompt of {longest} tokens leaves no room in the model's context of {context}")
    ends = end_tokens(model, tokenizer)

    def read(row, n):
        """The text of a row's first n tokens, and the match of `until` in it, or None."""
        text = tokenizer.decode(row.tokens[:n], skip_special_tokens=True)
        thought = len(text) - len(after_thought(text))  # what is said in it is no answer yet
        return text, until[row.i].search(text, thought) if until else None

    def ended(row):
        n = len(row.tokens)
        if row.tokens[-1] in ends or n == max_new_tokens or row.length > context:
            return True
        return bool(until) and n % 16 == 0 and read(row, n)[1] is not None

    def response(row):
        n, stopped = len(row.tokens), row.tokens[-1] in ends
        text, said = read(row, n - stopped)
        if said and said.end() < len(text):  # what follows the answer does not count
            text = text[:said.end()]
            n = next(n for n in range(1, n + 1) if read(row, n)[1])
        return {"text": text, "tokens": n, "logprob": sum(row.logprobs[:n]) / n, "stopped": stopped}

    rows = [new_row(prompts[i], i, k, max_new_tokens, temperature, seed)
            for i in range(len(prompts)) for k in range(samples)]
    results = [[None] * samples for _ in prompts]
    was_training = model.training
    bar = tqdm(total=len(rows), desc=desc, disable=desc is None, leave=False)
    with torch.no_grad(), laid_out(model.eval(), dtype), bar:
        at_once = batch_size or rows_at_once(model, longest + max_new_tokens)
        for row in write(model, rows, at_once, temperature, ended):
            results[row.i][row.k] = response(row)
            bar.update()
            if done:
                done(row.i, row.k, results[row.i][row.k])
    model.train(was_training)
    return results


def rows_at_once(model, length):
    """How many responses of at most `length` tokens, prompts included, are written at a time. More
    are faster, since all weights are read once for all of them: as many, up to 256, as have their
    keys and values in 2 GB of a CPU's memory, or in a quarter of what a GPU has free."""
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 32
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    states = 2 * config.num_hidden_layers * heads * width * length  # keys and values of a row
    is_gpu = model.device.type == "cuda"
    room = torch.cuda.mem_get_info(model.device)[0] / 4 if is_gpu else 2e9
    return int(min(256, max(8, room // (states * model.dtype.itemsize))))


def end_tokens(model, tokenizer):
    """The ids that end a response: the chat template's, the tokenizer's, the model's."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return {end_token(tokenizer), tokenizer.eos_token_id, *eos} - {None}


def new_row(prompt, i, k, max_new_tokens, temperature, seed):
    """Sample k of prompt i before its first token: `length` is that of prompt and response, `noise`
    are the random numbers from which its tokens are drawn."""
    import torch

    noise = None
    if temperature:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {i} {k}".encode()))
        noise = torch.rand(max_new_tokens, generator=generator)
    return SimpleNamespace(prompt=prompt, i=i, k=k, noise=noise, length=len(prompt), tokens=[],
                           logprobs=[])


def write(model, waiting, batch_size, temperature, ended):
    """Write responses, batch_size at a time; yield each row when it has ended.

    rows[i] is row i of the cache; all end in the same column, the shorter ones begin later. """
    # Prompts with a common beginning shall follow each other; the next one is the list's last.
    waiting = sorted(waiting, key=lambda row: row.prompt, reverse=True)
    cache, reader = empty_cache(model), empty_reader(model)
    # A prompt of one token leaves a recurrent layer without a state that could join others.
    if not can_join(cache) or not (reader.can_cut or all(row.prompt[1:] for row in waiting)):
        batch_size = 1
    rows = []
    # Prompts are read together, so a few places may stay empty for some steps.
    refill_at = batch_size - max(1, batch_size // 8)
    while waiting or rows:
        while waiting and len(rows) <= refill_at:
            most = batch_size - len(rows) if reader.can_cut else 1
            group = next_group(waiting, min(most, READ_TOGETHER))
            prompts = [row.prompt[:-1] for row in group]  # the last token is part of the first step
            new = read_prompts(model, reader, prompts)
            alone = batch_size == 1 and not reader.can_cut
            cache = new if alone else join(cache, new, prompts, batch_size)
            rows += group
        last = [[row.tokens[-1] if row.tokens else row.prompt[-1]] for row in rows]
        logits = next_logits(model, cache, last, [row.length for row in rows])
        add_tokens(rows, logits, temperature)
        for place in reversed(range(len(rows))):
            if ended(rows[place]):
                yield rows[place]
                leave(cache, place, len(rows))
                rows[place] = rows[-1]
                rows.pop()
        width = max((row.length - 1 for row in rows), default=0)
        for layer in roomy(cache):  # what lies to the left belonged to longer rows
            layer.show(len(rows), layer.end - width, layer.end)


def next_group(waiting, most):
    """Take the next rows off the list, at most so many, whose prompts begin alike."""
    group, alike = [waiting.pop()], 0
    while waiting and len(group) < most:
        common = len(os.path.commonprefix([group[-1].prompt, waiting[-1].prompt]))
        if common < alike / 2:  # the next question's
            break
        alike = alike or common
        group.append(waiting.pop())
    return group


def add_tokens(rows, logits, temperature):
    """Give each row its next token, and the token's log-probability, from logits (rows, V)."""
    import torch

    if temperature:  # the token whose stretch of the cumulated probabilities holds the row's number
        noise = torch.stack([row.noise[len(row.tokens)] for row in rows]).to(logits.device)
        cumulated = (logits / temperature).softmax(-1).cumsum(-1)
        token = torch.searchsorted(cumulated, noise[:, None] * cumulated[:, -1:], right=True)
        token = token.clamp(max=logits.shape[1] - 1)  # (rows, 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    logprob = logits.gather(1, token).squeeze(1) - logits.logsumexp(-1)
    for row, t, p in zip(rows, token.squeeze(1).tolist(), logprob.tolist()):
        row.tokens.append(t)
        row.logprobs.append(p)
        row.length += 1


def next_logits(model, cache, ids, lengths):
    """Logits (rows, V) in float32 after ids, lists of the same length, which the cache takes in:
    with them the rows have `lengths` tokens, the last of which stand in the last column."""
    import torch

    lengths = torch.tensor(lengths, device=model.device)[:, None]
    width = int(lengths.max())
    position = torch.arange(width, device=model.device) - (width - lengths)  # < 0: no token
    extra = {"position_ids": position[:, -len(ids[0]):], "logits_to_keep": 1}
    accepted = inspect.signature(model.forward).parameters
    out = model(input_ids=torch.tensor(ids, device=model.device),
                attention_mask=(position >= 0).long(), past_key_values=cache, use_cache=True,
                **{key: value for key, value in extra.items() if key in accepted})
    return out.logits[:, -1].float()


def empty_reader(model):
    """What was read last: the common beginning of some prompts, and the cache of its one row."""
    cache = empty_cache(model)
    can_cut = len(roomy(cache)) == len(cache.layers)  # a recurrent state can't be cut or padded
    return SimpleNamespace(prompt=[], cache=cache, can_cut=can_cut)


def read_prompts(model, reader, prompts):
    """-> a cache with a row for each prompt. Their common beginning is read once, and what the
    prompts before began with, too, is not read again."""
    if not reader.can_cut:
        [prompt] = prompts  # write() hands over one at a time
        cache = empty_cache(model)
        if prompt:
            next_logits(model, cache, prompts, [len(prompt)])
        return cache
    begin = os.path.commonprefix(prompts)
    known = len(os.path.commonprefix([begin, reader.prompt]))
    for layer in roomy(reader.cache):
        layer.show(1, layer.first, layer.first + known)
    if known < len(begin):
        next_logits(model, reader.cache, [begin[known:]], [len(begin)])
    reader.prompt = begin

    cache = empty_cache(model)
    for layer, its in zip(roomy(cache), roomy(reader.cache)):
        layer.repeat(its, len(prompts))
    longest = max(1, *map(len, prompts))  # at least one column; join() cuts it off
    if longest > len(begin):
        # Padded on the right, where a causal model's real tokens cannot look.
        rests = [prompt[len(begin):] + [0] * (longest - len(prompt)) for prompt in prompts]
        next_logits(model, cache, rests, [longest] * len(prompts))
    return cache


# ---------------------------------------------------------------- the cache of a batch
def empty_cache(model):
    """A cache of the library's whose layers of attention, also of a window, are Roomy."""
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

    CacheLayerMixin.register(Roomy)  # and no subclass: importing this file imports no torch
    cache = DynamicCache(config=model.config)
    cache.layers = [Roomy() if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer
                    for layer in cache.layers]
    return cache


def can_join(cache):
    """Whether rows can come and go; of layers of other kinds, each row is written alone."""
    from transformers.cache_utils import DummyLayer, LinearAttentionLayer

    return all(type(layer) in (Roomy, LinearAttentionLayer, DummyLayer) for layer in cache.layers)


def join(cache, new, prompts, capacity):
    """-> a cache, of at most `capacity` rows, whose last rows are those of `new`, which read these
    prompts."""
    import torch

    for j, (layer, its) in enumerate(zip(cache.layers, new.layers)):
        if isinstance(layer, Roomy):
            for row, prompt in enumerate(prompts):
                layer.join(its, row, len(prompt), capacity)
        elif is_recurrent(layer) and not any(layer.has_previous_state.values()):
            cache.layers[j] = its
        elif is_recurrent(layer):
            for mine, other in ((layer.conv_states, its.conv_states),
                                (layer.recurrent_states, its.recurrent_states)):
                mine.update({s: torch.cat([mine[s], other[s]])
                             for s in other if other[s] is not None})
    return cache


def leave(cache, place, rows):
    """The last of so many rows takes the place of one that has ended."""
    import torch

    order = list(range(rows))
    order[place] = order[-1]
    for layer in cache.layers:
        if isinstance(layer, Roomy):
            layer.leave(place)
        elif is_recurrent(layer):
            layer.reorder_cache(torch.tensor(order[:-1], dtype=torch.long))


def is_recurrent(layer):
    """Whether a cache layer holds one state a row (linear attention, convolutions)."""
    return hasattr(layer, "conv_states")


def roomy(cache):
    """The Roomy layers of a cache."""
    return [layer for layer in cache.layers if isinstance(layer, Roomy)]


class Roomy:
    """A cache layer from which rows come and go, all of which end in the same column. Its states
    (rows, heads, columns, d) lie in buffers with room for more rows and columns: the library's own
    layers concatenate them, which copies the whole cache for every token."""

    is_sliding = is_compileable = False  # the mask sees to a window
    keys = values = None
    room = ()  # the buffers of keys and of values; used are the first rows, columns first to end
    rows = first = end = 0

    def show(self, rows, first, end):
        """Use these rows and columns of the buffers."""
        self.rows, self.first, self.end = rows, first, end
        if self.room:
            self.keys, self.values = (room[:rows, :, first:end] for room in self.room)

    def get_seq_length(self):
        return self.end - self.first

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def make_room(self, like, rows, left, right):
        """Move to new buffers of so many rows, with `left` columns before those in use and right +
        64 behind; `like` are other keys and values. Zeros, since no mask hides a NaN."""
        old, end = (self.keys, self.values), left + self.get_seq_length()
        self.room = [states.new_zeros(rows, states.shape[1], end + right + 64, states.shape[3])
                     for states in like]
        for room, states in zip(self.room, old):
            if states is not None:
                room[:self.rows, :, left:end] = states
        self.show(self.rows, left, end)

    def update(self, keys, values, *args, **kwargs):
        """Take in new columns (rows, heads, columns, d) -> all. What the model calls."""
        rows, new = len(keys), keys.shape[2]
        if not self.room or self.room[0].shape[2] < self.end + new:
            self.make_room((keys, values), len(self.room[0]) if self.room else rows, 0, new)
        self.show(rows, self.first, self.end + new)
        self.keys[:, :, -new:], self.values[:, :, -new:] = keys, values
        return self.keys, self.values

    def repeat(self, other, rows):
        """So many times another layer's one row, if it has read anything."""
        if other.get_seq_length():
            self.update(other.keys.expand(rows, -1, -1, -1), other.values.expand(rows, -1, -1, -1))

    def join(self, other, row, width, capacity):
        """The first columns, `width` of them, of another layer's row become the last row, which
        ends where all others end."""
        if not self.room or self.end < width:
            left = max(0, width - self.get_seq_length())
            self.make_room((other.keys, other.values), capacity, left, 0)
        self.show(self.rows + 1, min(self.first, self.end - width), self.end)
        start = self.get_seq_length() - width
        self.keys[-1, :, start:] = other.keys[row, :, :width]
        self.values[-1, :, start:] = other.values[row, :, :width]

    def leave(self, place):
        """The last row takes this place."""
        for states in (self.keys, self.values):
            states[place] = states[-1]
        self.show(self.rows - 1, self.first, self.end)


# ---------------------------------------------------------------- weights while answers are written
def usable_device(name):
    """The device that --device names, or the default; stop() where this machine has none such."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        stop(f"--device {name} can't be used ({str(e).splitlines()[0][:100]})")
    return name


def has_bfloat16(device="cpu"):
    """Whether the device multiplies bfloat16 itself; emulated it is a hundred times slower."""
    import torch

    if torch.device(device).type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(False)


@contextlib.contextmanager
def laid_out(model, dtype=None):
    """Inside, LoRA is merged and the weights are of type `dtype` (None: bfloat16 where has_bfloat16
    and the model is no toy); afterwards the model is what it was, bit for bit. For models in
    floating point on a CPU or a GPU; others stay as they are."""
    import torch

    device = model.device.type
    floating = all(weight.is_floating_point() for weight in model.parameters())
    if device not in ("cpu", "cuda") or not floating:
        yield
        return
    if dtype is None:
        large = sum(weight.numel() for weight in model.parameters()) > 10**7
        dtype = torch.bfloat16 if large and has_bfloat16(model.device) else model.dtype
    lora = [m for m in model.modules() if hasattr(m, "base") and hasattr(m, "A")]  # distill.LoRA
    merged = {id(module.base.weight) for module in lora}
    weights = []
    for weight in model.parameters():
        is_replaced = weight.dtype != dtype or id(weight) in merged
        # In the host's memory: beside the new ones a GPU might have no room for them.
        weights.append((weight, weight.data.cpu() if is_replaced else weight.data))
    replaced = []  # modules whose forward is another one inside
    try:
        for module in model.modules():
            if module in lora:
                merge_lora(module, dtype)
                module.forward = module.base.__call__
                replaced.append(module)
            elif type(module) is torch.nn.Linear and (device, dtype) == ("cpu", torch.bfloat16):
                module.forward = partial(weight_first, module)
                replaced.append(module)
        for weight, _ in weights:
            weight.data = weight.data.to(dtype)
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for weight, data in weights:
            weight.data = data.to(weight.device)
        for module in replaced:
            del module.forward


def merge_lora(module, dtype):
    """W + alpha / rank * B A in a LoRA of distill.py, as a new tensor in place of W's own."""
    from torch.nn import Linear

    delta = module.alpha / module.rank * (module.B.float() @ module.A.float())
    weight = module.base.weight
    merged = weight.data.float() + (delta if isinstance(module.base, Linear) else delta.T)
    weight.data = merged.to(dtype)


def weight_first(module, x):
    """A linear layer as (W x^T)^T. The processor's bfloat16 product lays its second matrix out anew
    in each call: with few rows that costs as much as the product if it is the weight."""
    from torch.nn.functional import linear

    rows = x.flatten(0, -2)
    if len(rows) > 64:
        return linear(x, module.weight, module.bias)
    y = linear(module.weight, rows).T.contiguous()
    if module.bias is not None:
        y += module.bias
    return y.view(*x.shape[:-1], -1)


# ---------------------------------------------------------------- evaluation
def evaluate(students, rows, max_new_tokens, batch_size=None, samples=1, temperature=None, seed=0):
    """Students [(model, tokenizer), ...] on rows, in shares of 1.

    -> {"questions": their number, "accuracy", "unparsed", "stopped": per student a share of its
    responses, "ensemble": accuracy of one common answer (see vote), "upper_bound": share of
    questions with any right response, "predictions": per question {"id", "question", "answer",
    "ensemble", "ensemble_correct", "responses": [student][sample] with "prediction", "correct"}}.
    """
    prompts = []  # [student][question]: all are checked before any answer is written
    for s, (model, tokenizer) in enumerate(students):
        prompts.append([encode_prompt(tokenizer, student_prompt(row)) for row in rows])
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for row, prompt in zip(rows, prompts[s]):
            if context and len(prompt) >= context:
                stop(f"question {row['id']!r}: its prompt of {len(prompt)} tokens leaves no room "
                     f"in student {s}'s context of {context}; leave out the question or student")
    responses = []  # [student][question][sample]
    asked = [ASKED[TASKS[row["task"]]] for row in rows]
    for s, (model, tokenizer) in enumerate(students):
        responses.append(generate(model, tokenizer, prompts[s], max_new_tokens, batch_size, samples,
                                  temperature, seed + s, f"student {s} answers", asked))
        for row, answers in zip(rows, responses[s]):
            for r in answers:
                r["prediction"] = extract_answer(row["task"], r["text"], row.get("choices"))
                r["correct"] = grade(row["task"], r["prediction"], row["answer"])
    predictions = []
    for row, *answers in zip(rows, *responses):  # answers: [student][sample] to this question
        common = vote(row["task"], [r for of_student in answers for r in of_student], samples > 1)
        predictions.append({"id": row["id"], "question": row["question"], "answer": row["answer"],
                            "ensemble": common,
                            "ensemble_correct": grade(row["task"], common, row["answer"]),
                            "responses": answers})

    def share(flags):
        flags = list(flags)
        return sum(flags) / max(len(flags), 1)

    def per_student(flag):
        return [share(flag(r) for answers in student for r in answers) for student in responses]

    return {"questions": len(rows),
            "accuracy": per_student(lambda r: r["correct"]),
            "unparsed": per_student(lambda r: r["prediction"] is None),
            "stopped": per_student(lambda r: r["stopped"]),
            "ensemble": share(p["ensemble_correct"] for p in predictions),
            "upper_bound": share(any(r["correct"] for student in p["responses"] for r in student)
                                 for p in predictions),
            "predictions": predictions}


def vote(task, responses, majority):
    """One common answer of responses to a question, None if none is parsed: the one with the best
    mean log-probability, or with `majority` the one given most often (ties by log-probability)."""
    votes = []  # [prediction, number of votes, best log-probability]
    for r in responses:
        if r["prediction"] is None:
            continue
        same = next((v for v in votes if grade(task, r["prediction"], v[0])), None)
        if same is None:
            votes.append(same := [r["prediction"], 0, -math.inf])
        same[1:] = same[1] + 1, max(same[2], r["logprob"])
    return max(votes, key=lambda v: (v[1] if majority else 0, v[2]), default=[None])[0]


# ---------------------------------------------------------------- pictures of run folders (--plot)
# Dashes and markers tell the lines apart in grey; the colours are those of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
LOOKS = [{"color": COLOURS[i % 7], "linestyle": ("-", "--", ":", "-.")[i % 4],
          "marker": "os^DvPX*"[i % 8], "markersize": 5} for i in range(56)]


def read_run(folder):
    """A run folder of distill.py: {"name", "args", "log": rows, "results": None before the end}.

    Stops where a file lacks something that is drawn.
    """
    run = {"name": os.path.basename(os.path.abspath(folder)), "log": [], "results": None}
    file = os.path.join(folder, "args.json")
    try:
        run["args"] = {**read_json(file)}
        if os.path.exists(file := os.path.join(folder, "results.json")):
            run["results"] = read_json(file)
            for when in ("before", "after"):
                result = run["results"][when]
                math.fsum([*result["accuracy"], result["ensemble"]])  # raises if one is no number
            math.fsum([run["results"]["counts"]["steps"]])
    except (KeyError, TypeError) as e:
        stop(f"--plot {folder}: {file} is not as distill.py writes it ({type(e).__name__}: {e})")
    for where, row in numbered_rows(os.path.join(folder, "log.jsonl")):
        try:
            per_student = [row["loss"], row["rate"], *row.get("rate_style", {}).values()]
            per_student += [row["accuracy"]] if "accuracy" in row else []
            math.fsum([row["step"], *itertools.chain(*per_student)])
            first = run["log"][0] if run["log"] else row
            if {len(values) for values in per_student} != {len(first["loss"])}:
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            stop(f"{where}: expected a step of distill.py, with a loss and a rate for each student")
        run["log"].append(row)
    return run if run["log"] else stop(f"{folder}/log.jsonl: no step in it yet")


def panels_of(run):
    """What a run's figure shows: [(title, y label, {line: (steps, values)})]. The accuracy is
    there if it was measured during the run."""
    log, results = run["log"], run["results"]
    steps = [row["step"] for row in log]
    sources = run["args"].get("students") or ["demo"] * len(log[0]["loss"])
    names = [f"student {s} ({os.path.basename(os.path.normpath(source))})"
             for s, source in enumerate(sources)]
    # in a step in which a student got no path, the log's 0 is no loss
    losses = {name: running_mean([row["loss"][s] if row["rate"][s] else None for row in log])
              for s, name in enumerate(names)}
    panels = [("loss", "nats per response token",
               {name: (steps, values) for name, values in losses.items()})]
    points = [(row["step"], row["accuracy"]) for row in log if "accuracy" in row]
    if points and results:
        last = results["counts"]["steps"]
        points = [(0, results["before"]["accuracy"]), *(p for p in points if p[0] < last),
                  (last, results["after"]["accuracy"])]
    if points:
        measured = [step for step, _ in points]
        lines = {name: (measured, [100 * shares[s] for _, shares in points])
                 for s, name in enumerate(names)}
        panels.append(("accuracy", "right answers (%)", lines))
    by_style = [row.get("rate_style", {}) for row in log]
    styles = sorted({style for rates in by_style for style in rates})
    for s, name in enumerate(names):
        lines = {style: (steps, running_mean([rates[style][s] if style in rates else None
                                              for rates in by_style])) for style in styles}
        panels.append((f"selection rates of {name}", "share of paths selected", lines))
    return panels


def running_mean(values):
    """The centred mean over a tenth of the values, without those that are None; nan where none is
    left."""
    half = len(values) // 20
    total = [0, *itertools.accumulate(value or 0 for value in values)]  # before each value
    count = [0, *itertools.accumulate(value is not None for value in values)]
    means = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(i + half + 1, len(values))
        known = count[high] - count[low]
        means.append((total[high] - total[low]) / known if known else math.nan)
    return means


def new_figure(heading, panels):
    """A figure with so many panels, two a row, and their axes."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a "$" in a name begins no formula
    rows, columns = math.ceil(panels / 2), min(2, panels)
    figure = Figure((1 + 5.5 * columns, 0.5 + 3.3 * rows), dpi=150, layout="constrained")
    figure.suptitle(heading, wrap="$" not in heading)  # to wrap a text, it is parsed after all
    axes = [figure.add_subplot(rows, columns, i) for i in range(1, panels + 1)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.92")
    return figure, axes


def draw_run(run):
    """Figure of a run: losses, accuracy if it was measured, and what the router selected."""
    panels = panels_of(run)
    figure, axes = new_figure(f"{run['name']} (route {run['args'].get('route')})", len(panels))
    for ax, (title, unit, lines) in zip(axes, panels):
        for k, (look, (label, (x, y))) in enumerate(zip(LOOKS, lines.items())):
            every = max(1, len(x) // 5)  # steps between a line's markers
            ax.plot(x, y, **look, markevery=(k * every // len(lines), every), label=label)
        ax.set(title=title, xlabel="optimiser step", ylabel=unit)
        ax.set_ylim(0, 1.02 if "rates" in title else None)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False,
                  handlelength=3)  # beside the lines, covers none
    return figure


def by_flags(runs):
    """{flags as text: runs}, by the flags in which any runs differ, seed and folder aside."""
    flags = dict.fromkeys(flag for run in runs for flag in run["args"])
    flags = [flag for flag in flags if flag not in ("seed", "out_dir")
             and len({str(run["args"].get(flag)) for run in runs}) > 1]
    groups = defaultdict(list)
    for run in runs:
        label = "\n".join(f"{flag} {run['args'].get(flag)}" for flag in flags)
        groups[label or "all runs"].append(run)
    return groups


def draw_comparison(groups):
    """Figure of the accuracy of groups of ended runs: mean and standard deviation of each group."""
    import numpy as np

    shares = [[[*run["results"]["after"]["accuracy"], run["results"]["after"]["ensemble"]]
               for run in runs] for runs in groups.values()]
    students = min(len(share) for group in shares for share in group) - 1
    figure, [ax] = new_figure("accuracy after training (mean and s.d. of runs)", 1)
    for k, look in zip(range(students + 1), LOOKS):
        name, which = (f"student {k}", k) if k < students else ("ensemble", -1)
        percent = [[100 * share[which] for share in group] for group in shares]
        spread = [np.std(x, ddof=1) if len(x) > 1 else 0 for x in percent]
        ax.errorbar([np.mean(x) for x in percent], np.arange(len(percent)) + 0.12 * (k - 1),
                    xerr=spread, **{**look, "linestyle": ""}, capsize=3, label=name)
    labels = [f"{label}\n{len(runs)} run{'s' * (len(runs) > 1)}" for label, runs in groups.items()]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlim(left=max(0, ax.get_xlim()[0]))
    ax.set_xlabel("right answers (% of test questions)")
    figure.set_figheight(2 + sum(0.4 + 0.17 * label.count("\n") for label in labels))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot(folders):
    """Draw each run into its folder (training.png) and, of several that have ended, the accuracy
    into the first (comparison.png)."""
    if not importlib.util.find_spec("matplotlib"):
        stop("--plot needs matplotlib: pip install matplotlib")
    once = {os.path.realpath(folder): folder for folder in folders}  # "a" and "a/" are one run
    runs = {folder: read_run(folder) for folder in once.values()}
    figures = {os.path.join(folder, "training.png"): draw_run(run) for folder, run in runs.items()}
    ended = [run for run in runs.values() if run["results"]]
    for run in runs.values():
        if len(runs) > 1 and not run["results"]:
            print(f"{run['name']} has no results.json yet: left out of the comparison")
    if len(ended) > 1:
        figures[os.path.join(folders[0], "comparison.png")] = draw_comparison(by_flags(ended))
    for file, figure in figures.items():
        try:
            figure.savefig(file)
        except OSError as e:
            stop(f"cannot write {file}: {e.strerror}")
        print(file)


# ---------------------------------------------------------------- the command
def parse_args():
    """The command line; bad flags stop with one sentence."""
    natural, positive = within(int, 0), within(int, 1)
    p = argparse.ArgumentParser(
        usage="python eval.py --students NAME ... --questions FILE [flags] | --plot DIR ...",
        description="Evaluate saved students on a file of questions, or draw runs.",
        epilog="Defaults in brackets.")
    p.error = stop  # one sentence and exit code 2
    g = p.add_argument_group("what")
    g.add_argument("--students", nargs="+", type=nonempty, metavar="NAME",
                   help="models or PEFT LoRA adapters, by folder or name")
    g.add_argument("--questions", type=nonempty, metavar="FILE",
                   help="a dataset's own file, a pool, or JSON Lines with id, task, question, "
                        "answer")
    g.add_argument("--task", choices=TASKS, metavar="TASK",
                   help=f"overrides the task that the file names: {', '.join(TASKS)}")
    g.add_argument("--limit", type=positive, metavar="N",
                   help="use only the first N questions (all)")
    g.add_argument("--plot", nargs="+", type=nonempty, metavar="RUN_DIR",
                   help="draw runs of distill.py instead: training.png in each folder, and of "
                        "several comparison.png in the first")
    g = p.add_argument_group("how")
    g.add_argument("--samples", type=positive, default=1, metavar="N",
                   help="responses per question, for a vote (1)")
    g.add_argument("--temperature", type=within(float, 0, 10), metavar="X",
                   help="sampling temperature (0, greedy, for one sample; else 0.8)")
    g.add_argument("--max_new_tokens", type=positive, default=512, metavar="N",
                   help="longest response in tokens (512)")
    g.add_argument("--batch_size", type=positive, metavar="N",
                   help="responses generated at a time (as many as there is room for, up to "
                        "256)")
    g.add_argument("--device", type=nonempty,
                   help="cpu, cuda, cuda:1, mps ... (cuda where there is one, else cpu)")
    g.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    g = p.add_argument_group("output")
    g.add_argument("--out", type=nonempty, metavar="FILE",
                   help="write the results and every response as JSON")
    g.add_argument("--show", type=natural, default=3, metavar="N",
                   help="responses to print per student (3)")
    args = p.parse_args()
    if not args.plot and not (args.students and args.questions):
        stop("pass --students and --questions to test students, or --plot RUN_DIR to draw runs")
    if args.samples > 1 and args.temperature == 0:
        stop(f"--samples {args.samples} would repeat one greedy response at temperature 0; pass a "
             "higher --temperature")
    return args


def main():
    """The command: evaluate saved students, or draw run folders."""
    args = parse_args()
    if args.plot:
        return plot(args.plot)
    rows = read_questions(args.questions, args.task)[:args.limit]
    if args.out:
        if os.path.exists(args.out) and os.path.samefile(args.out, args.questions):
            stop(f"--out {args.out} would overwrite the questions: choose another place")
        check_output(args.out)

    import torch

    args.device = usable_device(args.device)
    half = args.device.startswith("cuda") and has_bfloat16(args.device)
    dtype = torch.bfloat16 if half else torch.float32
    students = [load_student(name, args.device, dtype) for name in args.students]
    results = evaluate(students, rows, args.max_new_tokens, args.batch_size, args.samples,
                       args.temperature, args.seed)
    for p in results["predictions"][:args.show]:
        for name, answers in zip(args.students, p["responses"]):
            print(f"--- {p['id']}, {name}: {answers[0]['prediction']} (right: {p['answer']})")
            print(answers[0]["text"].strip())
    print_table(args.students, results)
    if args.out:
        try:
            with open(args.out, "w", encoding="utf-8") as f:
                json.dump({"args": vars(args), **results}, f, indent=1)
        except OSError as e:
            stop(f"cannot write {args.out} ({e.strerror}): what is printed above is all there is")


def print_table(names, results):
    """Print accuracy with its standard error, unparsed and stopped shares per student, ensemble
    and upper bound."""
    width = max(map(len, (*names, "upper bound (any right)")))
    heading = f"\n{results['questions']} questions".ljust(width + 1)
    print(f"{heading}  accuracy  (s.e.)  unparsed  stopped by itself")
    lines = [*zip(names, results["accuracy"], results["unparsed"], results["stopped"]),
             ("ensemble", results["ensemble"]), ("upper bound (any right)", results["upper_bound"])]
    for name, accuracy, *more in lines:
        error = math.sqrt(accuracy * (1 - accuracy) / results["questions"])  # binomial
        print(f"{name:{width}}  {accuracy:8.1%}  ({error:4.1%})"
              + "".join(f"  {x:8.1%}" for x in more))


if __name__ == "__main__":
    run_command(main)
