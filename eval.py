"""Tasks and evaluation: rows, the student's prompt, answers, grading, generation.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl

A row is a flat dict {"id", "task", "question", "answer"} and, where there are any, "choices"
{"A": text, ...} and "prompt", which a student sees instead of the question. """
import argparse
import ast
import contextlib
import itertools
import json
import math
import operator
import os
import re
import sys
import zlib
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import torch
from mpmath import MPContext
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationConfig
from transformers.utils import cached_file

# Task -> its kind of answer; no more is needed for a new one.
TASKS = {"gsm8k": "number", "demo": "number", "math": "math", "strategyqa": "yesno",
         "arc": "choice", "commonsense_qa": "choice", "anli": "choice", "date": "choice"}
# Kind of answer -> how a student's prompt ends (a teacher's: judge.END), and an answer's pattern.
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


# ---------------------------------------------------------------- commands: how they end
def stop(message):
    """End the program with one sentence on stderr and exit code 2 (raises SystemExit)."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    raise SystemExit(2)


def in_a_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def within(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) from low to high."""
    def number(text):  # argparse says "invalid number value: 'x'"
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    return number


# ---------------------------------------------------------------- rows: one door for every file
def read_jsonl(path):
    """The rows of a file as a list; see numbered_rows."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path):
    """Yield ("FILE:LINE", row) of a JSON Lines file, or of a JSON list or BIG-bench's "examples",
    whatever the file's name. Stops with the place at anything but an object."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        stop(f"cannot read {path} ({in_a_line(e)})")
    try:
        value = parse_json(text)
        value = value.get("examples", value) if isinstance(value, dict) else value
        rows = enumerate(value if isinstance(value, list) else [value], 1)
    except ValueError:  # more than one line; U+2028 ends none
        rows = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in rows:
        try:
            row = parse_json(row) if isinstance(row, str) else row
        except ValueError as e:
            stop(f"{path}:{number}: not valid JSON ({e})")
        if not isinstance(row, dict):
            stop(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row


def parse_json(text):
    """A JSON text's value: what is null or NaN is absent, half a surrogate pair is "?"."""
    value = json.loads(text, parse_constant=lambda name: None, object_hook=without_nulls)
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def without_nulls(row):
    return {key: value for key, value in row.items() if value is not None}


def require_text(row, keys, where):
    """Stop with FILE:LINE unless each row[key] is a string that is not blank."""
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            stop(f"{where}: field {key!r} is missing, empty or not a string")


def as_text(value):
    """A string as it is, a number as text (18.0, as pandas writes 18, is "18"), else ""."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value).removesuffix(".0")
    return value if isinstance(value, str) else ""


def clean_row(row, where):
    """Bring the fields that questions and paths share into canonical form, in place -> the row.
    Ids and answers may be numbers, choices a list. Stops with FILE:LINE at the rest."""
    task = row.get("task")
    if task not in [*TASKS]:
        stop(f"{where}: unknown task {task!r}; known are {', '.join(TASKS)} (or --task)")
    row["id"] = as_text(row.get("id"))
    require_text(row, ["id", "question"] + ["prompt"] * ("prompt" in row), where)
    choices = row.pop("choices", {})
    if isinstance(choices, list):
        choices = dict(zip(LETTERS, choices))
    if not isinstance(choices, dict) or not choices.keys() <= {*LETTERS}:
        stop(f"{where}: field 'choices' is not an object of letters and texts, nor a list of texts")
    choices = {c: as_text(text) for c, text in choices.items() if text not in (None, "")}
    require_text(choices, choices, where)
    if choices:
        row["choices"] = choices
    given = row.get("answer")
    row["answer"] = canonical_answer(TASKS[task], given, choices)
    if not row["answer"]:
        stop(f"{where}: field 'answer' is {str(given)[:80]!r}, no answer of task {task} (kind "
             f"{TASKS[task]}; a choice needs two or more)")
    return row


def canonical_answer(kind, given, choices):
    """A gold answer as the grader knows it, or None where it is none of its kind."""
    text = as_text(given).strip()
    if kind == "number":
        return text if number_in(text) is not None else None
    if kind == "yesno":
        return YESNO.get(str(given).strip().lower())
    if kind == "choice":
        by_text = {choice: letter for letter, choice in choices.items()}
        letter = text.strip("()")
        if letter not in choices:
            letter = by_text.get(text)
        return letter if len(choices) > 1 else None
    return text


# ---------------------------------------------------------------- readers: published questions
def read_questions(path, task=None):
    """The clean rows, each id once, of a published format (GSM8K, MATH, BIG-bench, BBH, ARC, ANLI,
    CommonsenseQA, StrategyQA), flat rows or a path pool. `task` overrides what the file says."""
    stem = os.path.splitext(os.path.basename(path))[0]
    guess = next((t for t in TASKS if re.search(rf"(?<![a-z]){t}(?![a-z])", stem.lower())), None)
    questions = {}
    for i, (where, record) in enumerate(numbered_rows(path)):
        try:
            row = without_nulls(flatten(record, guess))
        except (KeyError, TypeError, AttributeError) as e:
            stop(f"{where}: not a question in a format that I know ({in_a_line(e)})")
        ids = [record[key] for key in ("id", "qid", "uid") if key in record]
        row["id"] = [*ids, f"{stem}-{i:05d}"][0]
        row = clean_row({**row, "task": task or row.get("task")}, where)
        first = questions.setdefault(row["id"], row)
        if question_of(first) != question_of(row):
            stop(f"{where}: the id {row['id']!r} belongs to another question already")
    if not questions:
        stop(f"{path}: no questions in it")
    return list(questions.values())


def flatten(r, guess):
    """A published record as a flat row without id; `guess` is the task that its file's name has."""
    if "problem" in r:  # MATH
        last_box = in_braces(r.get("solution", "").rpartition("\\boxed")[2].lstrip())[0]
        return {"task": "math", "question": r["problem"],
                "answer": r.get("answer", last_box)}
    if "target_scores" in r:  # BIG-bench; it may list the right choice first, so we sort by texts
        scores = r["target_scores"]
        right = max(scores, key=scores.get)
        if {t.lower() for t in scores} == {"yes", "no"}:
            return {"task": guess or "strategyqa", "question": r["input"], "answer": right}
        texts = sorted(scores, key=lambda text: zlib.crc32(f"{r['input']} {text}".encode()))
        return {"task": guess, "question": r["input"], "answer": right, "choices": texts}
    if "input" in r and "target" in r:  # BIG-Bench Hard
        question, _, options = r["input"].partition("\nOptions:\n")
        choices = dict(re.findall(r"\(([A-Z])\) (.+)", options))
        return {"task": guess, "question": question, "answer": r["target"], "choices": choices}
    if "hypothesis" in r:  # ANLI
        answer = {"e": "A", "n": "B", "c": "C", 0: "A", 1: "B", 2: "C"}[r["label"]]
        question = (f"Premise: {r.get('premise') or r['context']}\nHypothesis: {r['hypothesis']}\n"
                    "What is the hypothesis, given the premise?")
        return {"task": "anli", "question": question, "answer": answer, "choices": ANLI}
    if "answerKey" in r:  # CommonsenseQA and ARC, as published and as on the Hugging Face hub
        stem = r["question"] if isinstance(r["question"], dict) else {**r, "stem": r["question"]}
        choices = stem["choices"]
        if isinstance(choices, list):
            choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
        letters = dict(zip(choices["label"], LETTERS))  # some labels of ARC are 1, 2, 3, 4
        task = guess or ("commonsense_qa" if "question_concept" in stem else "arc")
        return {"task": task, "question": stem["stem"], "answer": letters[r["answerKey"]],
                "choices": choices["text"]}
    row = {key: r.get(key) for key in ("task", "question", "answer", "choices", "prompt")}
    if isinstance(r["answer"], bool):
        guess = guess or "strategyqa"
    elif "####" in str(r["answer"]):  # GSM8K
        row["answer"], guess = r["answer"].rsplit("####", 1)[1].strip(), guess or "gsm8k"
    return {**row, "task": row["task"] or guess}


# ---------------------------------------------------------------- prompts: what a student reads
def question_of(row):
    """The question with its choices, a line "(A) text" each."""
    choices = row.get("choices") or {}
    return row["question"] + "".join(f"\n({letter}) {text}" for letter, text in choices.items())


def student_prompt(row):
    """What a student sees of a row: its own `prompt`, or the question and how an answer ends."""
    if row.get("prompt"):
        return row["prompt"]
    if row["task"] == "demo":  # tiny students with a word-level vocabulary: the question alone
        return f"Question: {row['question']}\nAnswer:\n"
    end, _ = KINDS[TASKS[row["task"]]]
    return (f"Answer the question.\n\n{question_of(row)}\n\n"
            f"Reason step by step and end with {end}\n")


# Set before a chat template (a macro, for lack of a function), so that it writes no day's date.
FIXED_DATE = ("{% macro strftime_now(format) %}{{ format | replace('%Y', '2024')"
              " | replace('%B', 'July') | replace('%b', 'Jul') | replace('%m', '07')"
              " | replace('%d', '26') }}{% endmacro %}\n")


@lru_cache  # many paths share a prompt
def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, in which control tokens' names are text: one user turn and what a chat
    template writes before any answer; without a template the text, its own BOS, never an EOS."""
    if tokenizer.chat_template:
        return os.path.commonprefix(two_chats(tokenizer, prompt.strip()))
    ids = list(tokenizer(prompt, split_special_tokens=True)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_token(tokenizer):
    """Id of the first special token that the chat template writes after any answer, or of EOS."""
    if tokenizer.chat_template:
        backwards = [ids[::-1] for ids in two_chats(tokenizer, "Q")]
        for token in reversed(os.path.commonprefix(backwards)):
            added = tokenizer.added_tokens_decoder.get(token)
            if added and added.special:
                return token
    if tokenizer.eos_token_id is None:
        stop(f"{tokenizer.name_or_path}: the tokenizer needs an eos_token, which ends a response")
    return tokenizer.eos_token_id


def two_chats(tokenizer, prompt):
    """Token ids of a user's turn and an answer's, for two answers that have no token in common."""
    chats = [list(tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        chat_template=FIXED_DATE + tokenizer.get_chat_template(),
        sanitize_control_tokens=True, return_dict=False)) for answer in ("The", "9")]
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
    (?P<closes> [<[◁]/(?:\w+:)?(?:think|thinking|thoughts?|reasoning)[]>▷] | <\|end_thinking\|>
      | <\|channel\|>final(?:<\|message\|>)? | assistantfinal )
    | [<[◁](?:\w+:)?(?:think|thinking|thoughts?|reasoning)[]>▷]
    | <\|(?:start_thinking|channel)\|> | \A(?-i:analysis(?=[A-Z]))""")
# Answer: 5, {"answer": 5}, the answer (in eggs) is 5; but not: the other answer is, is correct
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
UNREAD = re.compile(r"""(?ix) \b(?: (?:hundred|thousand|[mbtr]+illion|dozen|third|quarter|half)s?
    | squared | cubed | plus | minus | times | than | or | and | multiplied | divided | added )\b
    | \d(?:[KMB]\b|e[-+]?\d|[:,]\d) | [²³½⅓⅔¼¾√π^×÷+*|(] | [-/]\s
    | \\(?:sqrt|frac|pi|times|cdot|div)""")
# A box there holds a part of an answer: -\boxed{3}, \frac{1}{\boxed{3}}, \boxed{2} and \boxed{3}
BEFORE_PART = re.compile(r"""(?x) (?: (?<![-\w})])[-−–] | [$=(\[]\ ?[-−–]\ | \d(?:\ ?[*/]\ ?)? | \^
    | \\(?:sqrt|cdot|times|div|pm)\ ? )\{?\Z | \\[dtc]?frac(?:\{[^$=)\n]{1,60}\})?\{\Z
    | \\boxed\{[^{}]{1,50}\}[\s$,;&]*(?:and|or)?[\s$]*(?:[A-Za-z]\ ?=\ ?)?\Z""")
AFTER_PART = re.compile(r"[\s$]*(?:[*/]|\^(?!\{?\\circ)|\\(?:sqrt|cdot|times|div)|or\b|\w+illion)")


def after_thought(text):
    """What follows a text's last </think> or the like; a thought that never closes leaves ""."""
    start = 0
    for mark in THOUGHT.finditer(text):
        start = mark.end() if mark["closes"] else len(text)
    return text[start:]


def extract_answer(task, text, choices=None):
    """The answer that a text states: a number ("-1234.5", "3/4"), LaTeX, a letter of `choices`,
    "yes" or "no"; None where it states none or more than one."""
    kind = TASKS[task]
    text = re.sub(r"[ \t\xa0\u2009\u202f]+", " ", after_thought(text)[-LONGEST:])
    text = re.sub(r"(?<!\w)\*{2,3}|\*{2,3}(?!\w)", "", text)  # bold, but not Python's 2**3
    announced = list(ANNOUNCED.finditer(text))
    if not announced:
        return last_number(text) if kind == "number" else None
    last = announced[-1]
    before = text[:last.start()]
    statement = text[last.end():]
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
    others = list(NUMBER.finditer(value))
    if not m or len(others) > 1 or UNREAD.search(value):
        return None
    return m[0].replace(" ", "")


def last_number(text):
    """The number that a text which announces nothing ends with, or None."""
    text = without_latex(text)
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    before = text[:last.start()]
    after = text[last.end():]
    several = re.search(r"\d(?: ?[A-Za-z]+,?)? (?:(?:or|to|and) )?$", before)  # 4 hours 30
    if several or DENIED.search(CLAUSE_END.split(before)[-1]) or UNREAD.match(after.lstrip()):
        return None
    return last[0].replace(" ", "")


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
        return prediction == answer
    a = number_in(prediction)
    b = number_in(answer)
    if a is None or b is None:
        return False
    a, b = Fraction(a), Fraction(b)
    # a program's 137.99999999999997 is 138, but 1000001 isn't 1000000
    return a == b or (a.denominator > 1 and abs(a - b) <= abs(b) / 10**6)


# ---------------------------------------------------------------- mathematical equality
# Two formulas are equal in one spelling, or part by part, or if their values agree to 80 digits
# wherever we put their letters. No eval() runs and nothing can hang, in whatever thread.
SPELLINGS = [
    # layout, thousands, currency, degrees, an approximation behind a value
    (r"\\\\(?!\s*\\end)", "),("),
    (r"\\(?:left|right|[bB]igg?[lr]?|q?quad)(?![a-z])|\\[;: ]", " "),
    (r",\s*\\!\s*|\{,\}|\\[!,]|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\\[()\[\]]|°", ""),
    (r"(?<=[\d}])\s*\\approx.*", ""),
    (r"[−–]", "-"), (r"\\(?:cdot|times)(?![a-z])|[×·]", "*"),
    # \frac12 and 3\frac12, \sqrt2 and sqrt(2), \mathbf{i}, x_{1}
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\w.^}])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}", r"(\1+\2/\3)"),
    (r"\\?\bsqrt\s*(?:\((\w+)\)|(\w))", r"\\sqrt{\1\2}"),
    (r"\\math\w+\s*\{(\w)\}", r"\1"),
    (r"_\s*\{\s*(?:\\text\s*\{\s*)?(\w+)\s*\}+", r"_\1"),
    (r"^(.*)\\pm(.*)$", r"\1+\2,\1-\2"),
    # lists, sets, and matrices as tuples of their rows
    (r"\\cup(?![a-z])|(?:\\text\s*\{)?,?\s(?:and|or)\s\}?(?![^,]*[<>])", ","),
    (r",\s*,", ","),
    (r"^\s*[A-Za-z]\s*\\in(?![a-z])", ""),
    (r"^\s*\\\{(.*)\\\}\s*$", r"\1"),
    (r"\[?\s*\\begin\{(?:[pb]matrix|array)\}\s*(?:\{[clr|]*\})?", "(("), ("&", ","),
    (r"(?:\\\\)?\s*\\end\{(?:[pb]matrix|array)\}\s*\]?", "))")]
TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|[mh]box|math(?:rm|bf))\s*\{([^{}]*)\}(?:\^\{?\d\}?)?")
# Units behind a number go ("10 cm", "5 apples"), but not the words that change its value.
UNITS = re.compile(r"(?<=[\d})i])(?:\s*\b(?:[a-z]{4,}|[ckm]m|kg|ft|mph|sq)\b)+(?:\^\{?\d\}?)?\s*$")
VALUED = re.compile(r"(?i)\b(?:hundred|[mb]illion|thousand|dozen|not|negative|minus|than|more|less"
                    r"|fewer|at|[ap]\.?m)\b")
THOUSANDS = re.compile(r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?![\d,])")  # (1,000) is a pair
# x = 5, f(x) = 5, (a, b) = (2, 9)
NAMED = re.compile(r"(?:[A-Za-z](?:_\w+)?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))=([^=]+)")
# Fractions, powers and roots of what has no braces inside
BRACES = [
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\\sqrt\{([^{}]*)\}", r"((\1)^(1/2))"), (r"\\sqrt\[(\w+)\]\{([^{}]*)\}", r"((\2)^(1/\1))")]
# A word is a name of its own: "east" is not "seat".
TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\?[A-Za-z]{3,}|\\[a-z]+|[A-Za-z](?:_\w+)?|.")
SYMBOL = re.compile(r"[A-Za-z]\w*|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|infty)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
             ast.UAdd: operator.pos}
MP = MPContext()  # our own: nobody else changes its precision
MP.dps = 100
CONSTANTS = {"e": MP.e * 1, "i": MP.j, "\\pi": MP.pi * 1}


def spelled(s):
    """A formula in one spelling: without layout, currency, units and thousands separators."""
    for pattern, new in SPELLINGS:
        s = re.sub(pattern, new, s)
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
    a_is = NAMED.fullmatch(a)
    b_is = NAMED.fullmatch(b)
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
    """(kind, parts): of a list, set or union, equation, tuple, interval, matrix, or one formula."""
    for kind, separator in (("list", ","), ("equation", "=")):
        if len(parts := split_top(s, separator)) > 1:
            return kind, parts
    if re.fullmatch(r"[(\[].*[)\]]", s) and len(parts := split_top(s[1:-1], ",")) > 1:
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
    Python's parser reads 2x(x+1) as n0 * a1 * ( a3 + n5 ): numbers and letters by their place."""
    for pattern, new in BRACES * 9:  # from the innermost braces outwards
        formula = re.sub(pattern, new, formula)
    tokens = TOKEN.findall(formula)
    names = [*tokens]
    for i, token in enumerate(tokens):
        if token not in "+-*/()^":
            names[i] = f"n{i}" if token[0].isdigit() else f"a{i}"
    expression = re.sub(r"(?<=[\w)]) (?=[a(])", " * ", " ".join(names)).replace("^", "**")
    try:
        tree = ast.parse(expression, mode="eval").body
        return [value_of(tree, tokens, point) for point in range(3)]
    except Exception:  # noqa: BLE001 (no formula, too deep, too large, a division by zero, ...)
        return None


def value_of(node, tokens, point):
    """The value of a tree of names, signs and OPERATORS; some error for all others."""
    if isinstance(node, ast.Name):
        token = tokens[int(node.id[1:])]
        if SYMBOL.fullmatch(token) and token not in CONSTANTS:  # > 0: sqrt(1/n) is 1/sqrt(n)
            return MP.mpf(zlib.crc32(f"{token} {point}".encode())) / 2**32 + 0.5
        return CONSTANTS.get(token) or MP.mpf(token)
    operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    xs = [value_of(operand, tokens, point) for operand in operands]
    if isinstance(node.op, ast.Pow) and abs(xs[1]) > 10**4:  # nobody computes 9^(9^9)
        raise ValueError("too large")
    return OPERATORS[type(node.op)](*xs)


# ---------------------------------------------------------------- students: load, merge adapters
def load_student(name, device="cpu", dtype=None, **more):
    """(model, tokenizer) of a Hugging Face causal LM, or of a LoRA adapter in PEFT's format
    (merged), by folder or name; `more` is for from_pretrained. Stops with one sentence at what is
    no such model, lacks weights, is saved quantised, or is an adapter without its base."""
    base, revision, adapter = name, "main", None
    try:
        if file := file_of(name, "adapter_config.json"):
            adapter = json.loads(Path(file).read_text(encoding="utf-8"))
            base, revision = adapter["base_model_name_or_path"], adapter.get("revision") or "main"
            if not file_of(base, "config.json", revision):
                stop(f"{name}: the base in its adapter_config.json, {base}, is not there")
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            stop(f"{name}: LoRA can't go into quantised weights: take the model that was quantised")
        has_own = file_of(name, "tokenizer_config.json")
        where, version = (name, "main") if has_own else (base, revision)
        tokenizer = AutoTokenizer.from_pretrained(where, revision=version, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype or torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **more)
        if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            stop(f"{name}: {len(wrong)} weights are missing or left over, as {wrong[0]}")
        if adapter:
            merge_adapter(model, adapter, load_file(file_of(name, "adapter_model.safetensors")))
        model.to(device)
    except Exception as e:  # noqa: BLE001 (whatever libraries raise at a folder that is no model)
        stop(f"{name}: can't be loaded as a causal language model ({in_a_line(e)})")
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack weights for good
    return model.eval(), tokenizer


def file_of(name, file, revision=None):
    """Path of a file of a model, in its folder or from the hub; None where there is none."""
    try:
        return cached_file(name, file, revision=revision)
    except (OSError, ValueError):  # no such file, no such repository
        return None


def merge_adapter(model, config, weights):
    """W += scale B A for every pair of an adapter; ValueError at more (pissa changes the base)."""
    is_plain = config.get("init_lora_weights", True) in (True, False, None, "gaussian")
    ends = (".lora_A.weight", ".lora_B.weight")
    strange = [key for key in weights if not key.endswith(ends)]
    if strange or not is_plain or config.get("alpha_pattern") or config.get("fan_in_fan_out"):
        raise ValueError("only plain LoRA can be merged, see adapter_config.json")
    for name in {key.rpartition(".lora_")[0] for key in weights}:
        A, B = (weights[name + end].float() for end in ends)  # (rank, in), (out, rank)
        scale = config["lora_alpha"] / len(A) ** (0.5 if config.get("use_rslora") else 1)
        weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
        weight.data += (scale * (B @ A)).to(weight)


def logit_factor(config):
    """What a family multiplies its logits with (Cohere, Falcon-H1; Granite divides)."""
    config = config.get_text_config()
    factor = 1 / (getattr(config, "logits_scaling", None) or 1.0)
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor *= getattr(config, key, None) or 1.0
    return factor


def context_of(model):
    """How many tokens a model can read; infinity where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


# ---------------------------------------------------------------- generation: answers to prompts
def generate(model, tokenizer, prompts, max_new_tokens, batch_size=None, temperature=0.0,
             until=None, desc=None):
    """One response to each prompt (a list of token ids), in their order: {"text", "tokens": their
    number, "stopped": it ended by itself}. Greedy at temperature 0. It ends with an end token
    (which counts, but is not in the text), after max_new_tokens, where the context does, or with
    the first match of `until`, a pattern for each prompt. batch_size: None is 64, of a toy 256."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = max(map(len, prompts), default=0)
    context = context_of(model)
    if longest >= context:
        stop(f"a prompt of {longest} tokens leaves no room in the model's context of {context}")
    own_ends = model.generation_config.eos_token_id
    if not isinstance(own_ends, list):
        own_ends = [own_ends]
    ends = list({end_token(tokenizer), tokenizer.eos_token_id, *own_ends} - {None})
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    size = batch_size or (64 if is_large(model) else 256)
    results = [None] * len(prompts)
    with answering(model), tqdm(total=len(order), desc=desc, disable=not desc, leave=False) as bar:
        for start in range(0, len(order), size):
            batch = order[start:start + size]
            ids = [torch.tensor(prompts[i], device=model.device) for i in batch]
            left = {"batch_first": True, "padding_side": "left"}
            mask = pad_sequence([torch.ones_like(row) for row in ids], **left)
            ids = pad_sequence(ids, padding_value=ends[0], **left)  # (batch, width)
            width = ids.shape[1]
            patterns = [until[i] if until else None for i in batch]
            ids = model.generate(
                ids, attention_mask=mask, max_new_tokens=min(max_new_tokens, context + 1 - width),
                eos_token_id=ends, pad_token_id=ends[0], **sampling,
                stopping_criteria=[partial(answer_said, tokenizer, width, patterns)])
            for i, tokens, pattern in zip(batch, ids[:, width:].tolist(), patterns):
                results[i] = response(tokenizer, tokens, ends, pattern)
            bar.update(len(batch))
    return results


def answer_said(tokenizer, width, patterns, ids, scores, **kwargs):
    """A stopping criterion of `generate`: the responses of a batch, from column `width` of ids on,
    in which their patterns match. Looks every 16 tokens."""
    found = [False] * len(patterns)
    if (ids.shape[1] - width) % 16 == 0:
        texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        found = [bool(said(*pair)) for pair in zip(patterns, texts)]
    return torch.tensor(found, device=ids.device)


def said(pattern, text):
    """The first match of a pattern, if any, outside the thoughts of a text, or None."""
    return pattern and pattern.search(text, len(text) - len(after_thought(text)))


def response(tokenizer, tokens, ends, pattern):
    """What generate returns, from new tokens; what follows an end token is padding."""
    n = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(tokens[:n], skip_special_tokens=True)
    match = said(pattern, text)
    if match and match.end() < len(text):  # what follows the answer does not count
        return {"text": text[:match.end()], "tokens": n, "stopped": False}
    return {"text": text, "tokens": len(tokens[:n + 1]), "stopped": n < len(tokens)}


# ---------------------------------------------------------------- device, weights while answering
def usable_device(name):
    """The device that --device names, or the default; stop() where this machine has none such."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        stop(f"--device {name} can't be used ({in_a_line(e)})")
    return name


def has_bfloat16(device="cpu"):
    """Whether the device multiplies bfloat16 itself; emulated it is a hundred times slower."""
    kind = torch.device(device).type
    known = torch.cpu.get_capabilities()
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return kind == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def is_large(model):
    return sum(weight.numel() for weight in model.parameters()) > 10**7


@contextlib.contextmanager
def answering(model):
    """Inside, distill.LoRA is merged (but not into 4-bit weights) and generate's settings are the
    library's; afterwards all is as before, bit for bit."""
    was_training = model.training
    settings = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # some models' own penalise repetitions
    lora = [m for m in model.modules()
            if hasattr(m, "base") and hasattr(m, "A") and m.base.weight.is_floating_point()]
    kept = [module.base.weight.data.cpu() for module in lora]  # a GPU may have no room for both
    with torch.no_grad():
        try:
            for module in lora:
                delta = module.alpha / module.rank * (module.B @ module.A)
                weight = module.base.weight
                weight.data = (weight + delta).to(weight.dtype)
                module.forward = module.base.__call__
            yield
        finally:
            for module, data in zip(lora, kept):
                module.base.weight.data = data.to(module.base.weight.device)
                vars(module).pop("forward", None)
            model.train(was_training)
            model.generation_config = settings


# ---------------------------------------------------------------- evaluation
def evaluate(students, rows, max_new_tokens, batch_size=None):
    """Students [(model, tokenizer), ...] on rows, greedily -> {"questions": how many fit contexts,
    "accuracy", "unparsed", "stopped": shares of 1 per student}, [{"id", "question", "answer",
    "responses": [as of generate, with "prediction" and "correct"]}]."""
    def fits(row):
        prompt = student_prompt(row)
        return all(len(encode_prompt(tokenizer, prompt)) < context_of(model)
                   for model, tokenizer in students)
    asked = [row for row in rows if fits(row)]
    if len(asked) < len(rows):
        tqdm.write(f"{len(rows) - len(asked)} of {len(rows)} questions are left out: longer than "
                   "a context")
    until = [ASKED[TASKS[row["task"]]] for row in asked]
    responses = []  # [student][question]
    for s, (model, tokenizer) in enumerate(students):
        prompts = [encode_prompt(tokenizer, student_prompt(row)) for row in asked]
        responses.append(generate(model, tokenizer, prompts, max_new_tokens, batch_size,
                                  until=until, desc=f"student {s} answers"))
        for row, r in zip(asked, responses[s]):
            r["prediction"] = extract_answer(row["task"], r["text"], row.get("choices"))
            r["correct"] = grade(row["task"], r["prediction"], row["answer"])
    predictions = [{"id": row["id"], "question": row["question"], "answer": row["answer"],
                    "responses": given} for row, given in zip(asked, zip(*responses))]
    n = max(len(asked), 1)
    return {"questions": len(asked),
            "accuracy": [sum(r["correct"] for r in own) / n for own in responses],
            "unparsed": [sum(r["prediction"] is None for r in own) / n for own in responses],
            "stopped": [sum(r["stopped"] for r in own) / n for own in responses]}, predictions


# ---------------------------------------------------------------- the command
def main():
    p = argparse.ArgumentParser(description="Test students on a file of questions.")
    p.error = stop  # one sentence and exit code 2
    count = within(int, 1)
    p.add_argument("--students", nargs="+", required=True, help="models or PEFT LoRA adapters")
    p.add_argument("--questions", required=True, help="file of a dataset, a pool, or flat rows")
    p.add_argument("--task", choices=TASKS, help="overrides the task that the file names")
    p.add_argument("--limit", type=count, help="use only the first questions (all)")
    p.add_argument("--max_new_tokens", type=count, default=512, help="longest response (512)")
    p.add_argument("--batch_size", type=count, help="responses at a time (64; of a toy 256)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (cuda where there is one)")
    p.add_argument("--out", metavar="FILE", help="write the results and every response as JSON")
    args = p.parse_args()
    rows = read_questions(args.questions, args.task)[:args.limit]
    if args.out and os.path.exists(args.out):
        stop(f"--out {args.out} is there already: choose another file")
    device = usable_device(args.device)
    students = [load_student(name, device, "auto") for name in args.students]
    for model, _ in students:  # a toy's answers would not be those of its run
        faster = has_bfloat16(device) and is_large(model)
        model.to(torch.bfloat16 if faster else torch.float32)
    results, predictions = evaluate(students, rows, args.max_new_tokens, args.batch_size)
    n = results["questions"]
    width = max(map(len, args.students))
    print(f"\n{f'{n} questions':{width}} accuracy (s.e.) no answer   ended")
    shares = zip(results["accuracy"], results["unparsed"], results["stopped"])
    for name, (accuracy, unparsed, stopped) in zip(args.students, shares):
        error = math.sqrt(accuracy * (1 - accuracy) / max(n, 1))  # binomial
        print(f"{name:{width}} {accuracy:8.1%} {error:6.1%} {unparsed:9.1%} {stopped:7.1%}")
    if args.out:
        results |= {"args": vars(args), "predictions": predictions}
        Path(args.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
