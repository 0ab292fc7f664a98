"""Tasks and evaluation: the student's prompt, reading questions, answer extraction, grading, generation, tables.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl
    python eval.py --plot out/run_a out/run_b

A row is a flat dict {"id", "task", "question", "answer"} and, where there are any, "choices" {"A": text, ...}, "level"
and "prompt" (which overrides the student prompt).
"""
import argparse
import contextlib
import copy
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import defaultdict
from fractions import Fraction
from functools import lru_cache, partial
from types import SimpleNamespace

import mpmath
import numpy as np
import torch

# task -> kind of answer: how a prompt ends, how an answer is found in a text and when two answers are equal
TASKS = {"gsm8k": "number", "math": "math", "strategyqa": "yesno", "arc": "choice", "commonsense_qa": "choice",
         "anli": "choice", "date": "choice", "demo": "number"}
ASK = {"number": 'Reason step by step and end with "The answer is N." where N is a number.',
       "math": 'Reason step by step and end with "The answer is $\\boxed{X}$." where X is the result.',
       "yesno": 'Reason step by step and end with "The answer is yes." or "The answer is no."',
       "choice": 'Reason step by step and end with "The answer is (X)." where X is the letter of one choice.'}
# That sentence, once something follows it: a student that goes on after it need not be heard out.
ASKED = {kind: re.compile(rf"(?i)\bthe answer is (?:{answer})(?!\w)[^\n]*?(?:\.(?=\s)|(?=\n))") for kind, answer in {
    "number": r"[$€£]?-?\d[\d,.]*", "math": r"\$[^$\n]+\$", "yesno": "yes|no", "choice": r"\([A-Z]\)"}.items()}
YESNO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
ANLI = {"A": "entailment", "B": "neutral", "C": "contradiction"}


def stop(message):
    """End the program with one sentence on stderr and exit code 2 (raises SystemExit)."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def within(kind, low, high=math.inf):
    """An argparse type: a number of `kind` (int or float) from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)
    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid whole number value: 'x'"
    return parse


def read_jsonl(path, required=()):
    """Rows of a JSON Lines file; blank lines are skipped. Stops with FILE:LINE at malformed JSON, at anything but an
    object, and where a required field is missing, empty or not a string."""
    return [row for _, row in numbered_rows(path, required)]


def numbered_rows(path, required=()):
    """Yield ("FILE:LINE", row) for what read_jsonl reads, one by one."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as e:  # a ValueError: neither JSON nor UTF-8
                    stop(f"{where}: not valid JSON ({e}); expected one JSON object a line")
                if not isinstance(row, dict):
                    stop(f"{where}: expected a JSON object, found {type(row).__name__}")
                for key in required:
                    if not isinstance(row.get(key), str) or not row[key].strip():
                        stop(f"{where}: field {key!r} is missing, empty or not a string")
                yield where, row
    except OSError as e:
        stop(f"cannot read {path}: {e.strerror}")


# ---------------------------------------------------------------- prompts
def question_of(row):
    """The question with its choices, a line "(A) text" each."""
    return row["question"] + "".join(f"\n({letter}) {text}" for letter, text in (row.get("choices") or {}).items())


def student_prompt(row):
    """What a student sees of a row, the same in training and at test time (open point 11)."""
    if row.get("prompt"):
        return row["prompt"]
    if row["task"] == "demo":  # tiny students with a word-level vocabulary: nothing but the question
        return f"Question: {row['question']}\nAnswer:\n"
    return f"Answer the question.\n\n{question_of(row)}\n\n{ASK[TASKS[row['task']]]}\n"


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt. With a chat template: one user turn and the answer's beginning as far as
    the template writes it, whatever the answer is (an empty thought, a channel's header). Without:
    the plain text with the tokenizer's own BOS, never a trailing EOS. Names of control tokens in the
    prompt are read as text."""
    if tokenizer.chat_template:
        return common_beginning(*two_chats(tokenizer, prompt.strip()))
    ids = list(tokenizer(prompt, split_special_tokens=True)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_token(tokenizer):
    """Id of the token that ends a response: the first special token that the chat template writes
    after any answer, else eos_token_id. Stops if there is none."""
    if tokenizer.chat_template:
        a, b = two_chats(tokenizer, "Q")
        for token in reversed(common_beginning(a[::-1], b[::-1])):
            added = tokenizer.added_tokens_decoder.get(token)
            if added and added.special:
                return token
    if tokenizer.eos_token_id is None:
        stop(f"{tokenizer.name_or_path}: the tokenizer has no token that ends a response; give it an eos_token")
    return tokenizer.eos_token_id


def two_chats(tokenizer, prompt):
    """Token ids of a user's turn and an answer's, for two answers that have no token in common."""
    answers = ["The", "9"]
    if tokenizer(answers[0])["input_ids"] == tokenizer(answers[1])["input_ids"]:  # both unknown
        answers = sorted(filter(str.isalnum, tokenizer.get_vocab()))[:2]
    try:
        chats = [list(tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            sanitize_control_tokens=True, return_dict=False)) for answer in answers]
    except Exception as e:  # noqa: BLE001 (a template is a program and may raise what it likes)
        stop(f"{tokenizer.name_or_path}: its chat template can't write a question and an answer "
             f"({' '.join(f'{type(e).__name__}: {e}'.split())[:200]})")
    if chats[0] == chats[1]:
        stop(f"{tokenizer.name_or_path}: its chat template does not write what the assistant says")
    return chats


def common_beginning(a, b):
    return a[:len(os.path.commonprefix([a, b]))]


# ---------------------------------------------------------------- answers
# What announces an answer ("the answer is correct" doesn't). `A:` opens GSM8K's answers, but elsewhere an option.
ANNOUNCED = re.compile(r"""(?imx) \#{4} | \\(?:boxed|fbox)\b | ```output\n | (?P<colon>^A:) | \bfinal\ answer\s*\n
    | \b(?:answers?|ans|(?:correct|right|best)\ (?:option|choice))\b \s* (?:\([^()\n]*\)\s*)?
      (?:(?:to|of|for)\ [^.:=\n]{1,80}?\s)? (?:,[^,.\n]{1,30},\s*)? (?:choice\b|option\b|letter\b)? \s*
      (?: (?:is|are|was|(?:would|should|must|will)\ be|seems\ to\ be)\b | [:=] )
      (?!\s(?:\w+ly\s)?(?:correct|verified|confirmed|consistent|reasonable)\b)""")
# Not a part of a word or of another number: money, sign, 2 1/2, 1,234.5, 1e3 or 3 x 10^8, 3/4, not 2nd, 2 million.
NUMBER = re.compile(r"""(?x) (?<![A-Za-z_\d])(?<!\d[.,])  (?P<minus>(?<![\w).}%])-)? [$€£₹]?\ ?(?P<minus2>-)?
    (?:(?P<whole>\d+)\ (?=\d+/\d))?  (?P<digits>\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+|(?=\.\d)) (?P<decimals>\.\d+)?
    (?: [eE](?P<e>[-+]?\d{1,2})\b | \ ?[x×*]\ ?10\ ?\^\ ?\{?(?P<e10>-?\d{1,2})\b\}? )?  (?:\ ?/\ ?(?P<under>\d+))?
    (?!\d|st\b|nd\b|rd\b|th\b)  (?:\ (?P<scale>hundred|thousand|million|billion|trillion)\b)?""")
# After a number it says that this was a term of open arithmetic ("36 + 48"), or of a share ("5 of 7").
OPERATOR = re.compile(r"\(| ?%? ?(?:=|(?:[-/]|\*\*?)(?= ?[\d$(])|[+×÷^](?= ?[\w$(])|\\(?:times|cdot|div)"
                      r"|(?:x|of|times|plus|minus)\b)")
SCALE = {None: 0, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def extract_answer(task, text, choices=None):
    """The answer that a text states in canonical form (a number, LaTeX, a letter of `choices`, "yes" or "no"), or None.

    The last announcement that can be read wins; for yes and no the last one alone ("the answer is dependent on ..."
    takes back what came before), for math the last \\boxed. Only a text that announces nothing is read from its end:
    one that announces an answer and gives none ("the answer is unclear", a text cut off) is unparsed."""
    kind, choices = TASKS[task], choices or {}
    text = re.sub(r"(?<![\w)])\*\*(.+?)\*\*", r"\1", text)  # markdown's bold, not Python's power
    announced = [m for m in ANNOUNCED.finditer(text) if not (m["colon"] and kind == "choice")]
    if not announced:
        return read_end(kind, text.strip(), choices)
    if kind == "math":
        announced = [m for m in announced if m[0].startswith("\\")] or announced
    answers = (read_statement(kind, statement_after(text, m), choices) for m in announced[:-20:-1])
    return next(answers) if kind == "yesno" else next((a for a in answers if a is not None), None)


def statement_after(text, m):
    """What is announced: the braces of \\boxed, the last line of a program's output, else the paragraph."""
    rest = text[m.end():m.end() + 1000]
    if m[0].startswith("\\"):
        return braces(rest)
    if m[0].startswith("```"):
        return rest.split("```")[0].strip().rsplit("\n", 1)[-1]
    return re.split(r"\n\s*\n", re.sub(r"^(?:\s|:|\.(?!\d))+", "", rest), maxsplit=1)[0]


def braces(text):
    """The content of the balanced {...} at the start of a text, all of it if they never close; without any, a word."""
    text = text.lstrip()
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0]
    depth = list(itertools.accumulate((c == "{") - (c == "}") for c in text))
    return text[1:depth.index(0)] if 0 in depth else text[1:]


def first_sentence(text):
    return re.split(r"(?<!\\)[.!?](?=\s|$)", text, maxsplit=1)[0]


def read_statement(kind, statement, choices):
    """The answer of this kind that a statement ("The answer is" ...) makes, or None."""
    if kind == "number":
        s = re.sub(r"\\[dtc]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2", statement.replace("{,}", ",").replace("\\!", ""))
        return number_in(first_sentence(s))
    if kind == "yesno":  # "most likely No", "technically, yes"
        m = re.match(r"(?i)(?:\W|\w+ly\b|most\b|very\b|a\b|\\text\b)*(yes|no|true|false)\b", statement)
        return YESNO[m[1].lower()] if m else None
    if kind == "choice":
        return letter_in(statement, choices)
    formulas = re.findall(r"(?s)\$([^$]+)\$|\\[(\[](.+?)\\[)\]]", statement)
    return ", ".join(a or b for a, b in formulas) or statement.strip() or None


def read_end(kind, text, choices):
    """The answer of a text that announces none: its last number, formula or sentence, if that leaves no doubt."""
    if kind == "number":
        return next((n for m in reversed(list(NUMBER.finditer(text))) if (n := canonical(m)) is not None), None)
    line = text.rsplit("\n", 1)[-1]
    if kind == "math":
        formulas = re.findall(r"\$([^$]+)\$", line) or [m[0] for m in NUMBER.finditer(line)]
        return formulas[-1].strip() if formulas else None
    sentence = line if re.match(r"\(?[A-Z][).:]", line) else re.split(r"[.!?]\s+(?=\S)", line)[-1]
    if kind == "yesno":
        starts = re.compile(r"(?i)(?:so|thus|therefore|hence)?\W*(yes|no)\s*(?:[,.;:!]|$)")
        m = starts.match(sentence) or starts.match(text)
        return m[1].lower() if m else None
    letters = {a or b for a, b in re.findall(r"\(([A-Z])\)|(?:option|choice) ([A-Z])\b", sentence)} & set(choices)
    return letters.pop() if len(letters) == 1 else None if letters else letter_in(sentence, choices)


def canonical(m):
    """The exact value of a NUMBER match as a string ("18", "2.5", "1/3"); None for a division by zero."""
    try:
        value = Fraction((m["digits"].replace(",", "") or "0") + (m["decimals"] or "")) / int(m["under"] or 1)
        value = (value + int(m["whole"] or 0)) * Fraction(10) ** (int(m["e"] or m["e10"] or 0) + SCALE[m["scale"]])
        value = -value if m["minus"] or m["minus2"] else value
        return str(float(value)) if value.denominator > 1 and Fraction(str(float(value))) == value else str(value)
    except (ValueError, ArithmeticError):
        return None


def number_in(text):
    """The number that a statement gives: its first, or what its last equation comes to; None for open arithmetic."""
    text = text.replace("−", "-")
    m = NUMBER.search(text)
    if not m:
        return None
    rest = text[m.end():]
    operator = OPERATOR.match(rest)
    if operator and "=" in rest:
        return number_in(rest.rsplit("=", 1)[1])
    return canonical(m) if not operator or operator[0].endswith("of") else None


def letter_in(statement, choices):
    """The one choice that a statement names by letter or by text: never the article "a", never a negated one."""
    s = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\b|[{}$*`\"'“”]", "", statement).strip()
    if re.match(r"(?i)(?:not|neither)\b", s):
        s = "".join(re.split(r"(?i)\b(?:but|rather|instead)\b", s, maxsplit=1)[1:])
    m = re.match(r"(?:[\s:,-]|\b(?:its?|is|most|likely|probably|definitely|clearly|option|choice|letter)\b)*"
                 r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])(?!\w)|([a-z])(?=[.,:;)]?\s*$))", s)
    if m and (letter := (m[1] or m[2] or m[3]).upper()) in choices:
        rest = s[m.end():]
        other = re.match(r"\)?\s*(?:or|and|/|&)\s*\(?([A-Z])\b", rest)
        if other and other[1] in choices:
            return None
        if m[2] != "A" or not re.match(r" (?!because|since|as\b|and\b|which|is\b|for\b|with\b)[a-z]", rest):
            return letter
    return choice_by_text(s, choices)


def choice_by_text(statement, choices):
    """The letter of the one choice whose text a statement gives, or None."""
    def norm(t):
        return re.sub(r"(?:\b(?:the|an|a)\b|[^\w/.%$-])+", " ", t.lower()).strip(" .")

    texts = {letter: norm(text) for letter, text in choices.items() if norm(text)}
    whole, sentence = norm(statement), norm(first_sentence(statement))
    hits = [c for c, t in texts.items() if re.match(re.escape(t) + r"(?!\w)", whole)] or \
           [c for c, t in texts.items() if re.search(r"(?<!\w)" + re.escape(t) + r"(?!\w)", sentence)]
    hits = [c for c in hits if not any(texts[c] in texts[d] for d in hits if d != c)]  # "park" in "car park"
    return hits[0] if len(hits) == 1 else None


def grade(task, prediction, answer, choices=None):
    """True if a prediction means the same as the answer; None (unparsed) is wrong."""
    if prediction is None:
        return False
    kind, prediction, answer = TASKS[task], str(prediction).strip(), str(answer).strip()
    if kind == "math":
        return len(prediction) < 500 and same_math(clean_latex(prediction), clean_latex(answer))
    if kind != "number":
        return prediction.strip("() .").lower() == answer.strip("() .").lower()
    a, b = number_in(prediction), number_in(answer)
    if a is None or b is None:
        return False
    a, b = Fraction(a), Fraction(b)  # a program's 137.99999999999997 is 138, but 1000001 isn't 1000000
    return a == b or (a.denominator > 1 and abs(a - b) <= abs(b) / 10**6)


# ---------------------------------------------------------------- mathematical equality
# Two formulas are equal if their values agree to 80 digits wherever we put their variables. That needs neither eval()
# nor a simplifier, and its time is bounded by the length of the text: nothing can hang, in whatever thread.
FUNCTIONS = {"sin": "sin", "cos": "cos", "tan": "tan", "sec": "sec", "csc": "csc", "cot": "cot", "arcsin": "asin",
             "arccos": "acos", "arctan": "atan", "exp": "exp", "ln": "ln", "log": "log10"}
GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi",
         "varphi", "psi", "omega", "infty")
UNICODE = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "°": "", "√": r"\sqrt",
                         "π": r"\pi ", "∞": r"\infty "})
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # layout, currency and degrees; \\ ends the row of a matrix
    (r"\\\\", "\n"), (r",\s*\\!\s*|\{,\}", ""),  # 11,\!111 and 11{,}111
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|q?quad|allowbreak)(?![A-Za-z])|\\[!,;: ]|~", " "),
    (r"\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\^?\\degree|\\[()\[\]]", ""),
    # one spelling of operators, commands, names and lists: \mathrm{e}, x_{1}, plain sqrt(2), "1, 2 and 3"
    (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\*\s*\*", "^"), (r"\\div(?![a-z])", "/"), (r"\\cup(?![a-z])", "∪"),
    (r"\\[dtc]frac", r"\\frac"), (r"_\{(\w+)\}", r"_\1"),
    (r"\\(?:math(?:rm|bf|it)|operatorname|boldsymbol)\s*\{(\w)\}", r"\1"), (r"\\operatorname\s*\{(\w+)\}", r"\\\1"),
    (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)}|sqrt|pi|infty)(?![A-Za-z])", r"\\\1"),
    (r"\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s(?:and|or)\s", ","), (r",\s*,", ","),
    # mixed numbers: 3\frac12, 3\frac{1}{2} and 3 1/2; the set that x is in
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(?<![\w.^}])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\w.^}])(\d+) +(\d+) ?/ ?(\d+)(?![\d.])", r"(\1+\2/\3)"), (r"^\s*[A-Za-z]\s*\\in(?![a-z])", ""))]
# words in a formula (but "a.m." and "p.m." are part of an answer), and plain units after it
TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|[mh]box|emph|mathrm|mathbf|bold)\s*\{(?!\s*[ap]\.?m\b)([^{}]*)\}"
                  r"(?:\^\{?\d\}?)?")
UNITS = re.compile(r"(?<=\S)(?:\s+(?:[a-z]{4,}|cm|mm|km|kg|ft|mph|sq|per)\b\.?)+(?:\^\{?\d\}?)?\s*$")


def clean_latex(s):
    """LaTeX or plain mathematics without layout, currency, units and thousands separators."""
    s = s.translate(UNICODE)
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    bare = TEXT.sub(" ", s)
    s = UNITS.sub("", bare if re.search(r"\w", bare) else TEXT.sub(r"\1", s)).strip().rstrip(".").strip()
    if s[:1] in ("(", "[", "\\"):  # (1,000) is a pair
        return s
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), s)


def depths(s):
    return list(itertools.accumulate((c in "([{") - (c in ")]}") for c in s))


def split_top(s, separators):
    """Split at the separators outside of all brackets."""
    cuts = [i for i, (c, depth) in enumerate(zip(s, depths(s))) if c in separators and depth == 0]
    return [s[i + 1:j].strip() for i, j in zip([-1] + cuts, cuts + [len(s)])]


def structure(s):
    """(kind, parts) of a formula: a matrix, a union, a set or list, a tuple or interval, or the formula alone."""
    if m := re.fullmatch(r"(?s)\\begin\{([pb]?)matrix\}(.*)\\end\{\1matrix\}", s):
        rows = m[2].strip().split("\n")
        return f"matrix of {len(rows)} rows", [cell.strip() for row in rows for cell in row.split("&")]
    for kind, separators in (("union", "∪"), ("set", ",;")):
        if len(parts := split_top(s, separators)) > 1:
            return kind, [q for p in parts for q in ([p] if "\\pm" not in p else structure(p)[1])]
    m = re.fullmatch(r"(?s)(\\\{|[(\[])(.*?)(\\\}|[)\]])", s)
    if m and 0 not in depths(s)[len(m[1]) - 1:-1]:
        kind, parts = structure(m[2].strip())
        ordered = kind == "set" and m[1] != "\\{" and len(split_top(m[2], ",;")) > 1
        return m[1] + m[3] if ordered else kind, parts
    return ("set", [s.replace("\\pm", "+"), s.replace("\\pm", "-")]) if "\\pm" in s else ("formula", [s])


def same_math(a, b):
    """Equality of two cleaned formulas: sets and lists in any order, tuples, intervals and matrices part by part."""
    x, y = (re.sub(r"\\text|\s|\.(?!\d)", "", s) for s in (a, b))
    if x == y or (x.lower() == y.lower() and "\\" not in x and re.search("[A-Za-z]{2}|^[A-Za-z]$", x)):
        return x != ""
    (kind, parts), (kind_b, parts_b) = structure(a), structure(b)
    if kind != kind_b or len(parts) != len(parts_b):
        return False
    if kind == "formula":
        return same_formula(parts[0], parts_b[0])
    for part in parts:
        twin = next((p for p in (parts_b if kind in ("set", "union") else parts_b[:1]) if same_math(part, p)), None)
        if twin is None:
            return False
        parts_b.remove(twin)
    return True


def same_formula(a, b):
    """Whether two LaTeX formulas have the same values; "x =" may stand before one; equations up to a factor."""
    named = re.compile(r"(?s)([A-Za-z](?:_\w|\([a-z]\))?|\\[a-z]+)\s*=(?:.*=)?([^=]+)")  # x = 5, f(x) = ... = 2x
    m, n = named.fullmatch(a), named.fullmatch(b)
    x, y = (values((g[2] if g else s).strip()) for g, s in ((m, a), (n, b)))
    if x and y and (not m or not n or m[1] == n[1]):
        return all(close(p, q) for p, q in zip(x, y))
    if a.count("=") == b.count("=") == 1 and not any(g and v and v[0] == v[1] for g, v in ((m, x), (n, y))):
        x, y = (values("({})-({})".format(*s.split("="))) for s in (a, b))  # equations: equal up to a factor
        return bool(x and y) and all(p and q and close(p * y[0], q * x[0]) for p, q in zip(x, y))
    return False


def close(x, y):
    size, tiny = max(abs(x), abs(y)), mpmath.mpf(10) ** -80
    return abs(x - y) <= size * tiny or (min(abs(x), abs(y)) == 0 and size < tiny)


@lru_cache(maxsize=4096)
def values(formula):
    """The values of a formula with its variables at three arbitrary points (100 digits), None if it can't be read."""
    mp = mpmath.MPContext()  # our own: the precision of mpmath.mp is global, threads would share it
    mp.dps = 100
    try:
        return tuple(evaluate_formula(mp, formula, point) for point in range(3))
    except (ValueError, ArithmeticError, IndexError, RecursionError, TypeError):
        return None


def evaluate_formula(mp, formula, point):
    """Recursive descent over LaTeX; raises ValueError or IndexError where it can't read on."""
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|[A-Za-z](?:_\w)?|\S", formula)[::-1]  # a stack

    def take(*expected):
        return tokens.pop() if tokens and tokens[-1] in expected else None

    def bounded(x):  # nobody computes 9^(9^9)
        if not abs(x) <= 10**4:
            raise ValueError("too large")
        return x

    def power(x):
        return mp.power(x, bounded(power(-atom() if take("-") else atom()))) if take("^") else x

    def atom():
        token = tokens.pop()
        if token[-1].isdigit() and token[0] in ".0123456789":
            return mp.mpf(token)
        if token in "([{":
            x = total()
            if not take(")", "]", "}"):
                raise ValueError("not closed")
            return x
        if token == "\\frac":
            return atom() / atom()
        if token == "\\sqrt":
            n = atom() if tokens[-1] == "[" else 2
            return mp.power(atom(), 1 / mp.mpf(n))
        if token[1:] in FUNCTIONS:
            n = bounded(atom()) if take("^") else 1
            x = getattr(mp, FUNCTIONS[token[1:]])(bounded(product(of_function=True)))
            return mp.power(x, n)
        if token in ("e", "i", "\\pi"):
            return {"e": mp.e, "i": mp.j, "\\pi": mp.pi}[token] * 1
        if not token[0].isalpha() and token[1:] not in GREEK:
            raise ValueError(f"unexpected {token}")
        return mp.mpf(zlib.crc32(f"{token} {point}".encode())) / 2**32 + 0.5  # a variable; > 0: sqrt(1/n) is 1/sqrt(n)

    def factor():
        x = power(atom())
        while take("!"):
            x = power(mp.factorial(bounded(x)))
        if x and not abs(mp.mag(x)) < 10**5:  # bits; where numbers get that long, sums and logarithms take seconds
            raise ValueError("too large")
        return x

    def product(of_function=False):  # signs may lack, as in 2x(x+1); a function's argument ends early: sin 2x cos x
        bracket = of_function and tokens[-1] == "("
        x = -factor() if take("-") else atom() if bracket else factor()
        while tokens and not bracket:
            sign = None if of_function else take("*", "/")
            follows = tokens[-1][0].isalpha() or tokens[-1][1:] in ("frac", "sqrt", "pi", *GREEK)
            if not sign and not follows and (of_function or not (tokens[-1] in "([{" or tokens[-1][1:] in FUNCTIONS)):
                break
            y = -factor() if sign and take("-") else factor()
            x = x / y if sign == "/" else x * y
        return x

    def total():
        x = product()
        while sign := take("+", "-"):
            x = x + product() if sign == "+" else x - product()
        return x

    x = total()
    if tokens or not mp.isfinite(x):
        raise ValueError("not a formula to its end")
    return x


# ---------------------------------------------------------------- readers
def read_questions(path, task=None):
    """Flat rows {"id", "task", "question", "answer", "choices"?, "level"?, "prompt"?}, each question once, of a file in
    a published format (GSM8K, MATH, BIG-bench, BBH, CommonsenseQA, ARC, ANLI, StrategyQA), of flat JSONL or of a path
    pool. `task` overrides what the file says. Stops, naming the place, at a row that is no question."""
    if task not in (None, *TASKS):
        stop(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    stem = os.path.splitext(os.path.basename(path))[0]
    guess = next((t for t in TASKS if re.search(rf"(?<![a-z]){t}(?![a-z])", stem.lower())), None)
    questions = {}
    for i, (where, record) in enumerate(records(str(path))):
        try:
            row = flatten(record, guess)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
            stop(f"{where}: not a question in a format that I know ({type(e).__name__}: {e})")
        row["task"] = task or row["task"]
        given = [record[k] for k in ("id", "qid", "uid") if record.get(k) is not None]
        row["id"] = str(given[0]) if given else f"{stem}-{i:05d}"
        row = {k: v for k, v in row.items() if v is not None}
        check_row(row, where)
        if questions.setdefault(row["id"], row)["question"] != row["question"]:
            stop(f"{where}: the id {row['id']!r} belongs to another question already; give each question its own")
    if not questions:
        stop(f"{path}: no questions in it")
    return list(questions.values())


def records(path):
    """(place, record) for the lines of a JSONL file, or for a .json file's list or BIG-bench "examples"."""
    if not path.endswith(".json"):
        yield from numbered_rows(path)
        return
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except (OSError, ValueError) as e:
        stop(f"cannot read {path}: {e}")
    data = data.get("examples") if isinstance(data, dict) else data
    if not isinstance(data, list):
        stop(f"{path}: expected a list of questions or an object with 'examples'")
    yield from ((f"{path}, example {i}", record) for i, record in enumerate(data))


def lettered(texts):
    return {chr(ord("A") + i): text for i, text in enumerate(texts)}


def flatten(r, guess):
    """A published record as a flat row without id; `guess` is the task that the file's name suggests."""
    if "problem" in r and "solution" in r:  # MATH
        answer = braces(r["solution"][list(re.finditer(r"\\(?:boxed|fbox)", r["solution"]))[-1].end():])
        return {"task": "math", "question": r["problem"], "answer": answer, "level": r.get("level")}
    if "target_scores" in r:  # BIG-bench, which may list the right choice first: our order hangs on the texts alone
        scores = r["target_scores"]
        right = max(scores, key=scores.get)
        if {t.lower() for t in scores} == {"yes", "no"}:
            return {"task": guess or "strategyqa", "question": r["input"], "answer": right}
        choices = lettered(sorted(scores, key=lambda text: zlib.crc32(f"{r['input']} {text}".encode())))
        return {"task": guess, "question": r["input"], "answer": right, "choices": choices}
    if "input" in r and "target" in r:  # BIG-Bench Hard
        question, _, options = r["input"].partition("\nOptions:\n")
        choices = dict(re.findall(r"\(([A-Z])\) (.+)", options)) or None
        return {"task": guess, "question": question, "answer": r["target"].strip("()"), "choices": choices}
    if "hypothesis" in r:  # ANLI
        answer = {"e": "A", "n": "B", "c": "C", 0: "A", 1: "B", 2: "C"}[r["label"]]
        question = (f"Premise: {r['premise'] if 'premise' in r else r['context']}\nHypothesis: {r['hypothesis']}\n"
                    "What is the hypothesis, given the premise?")
        return {"task": "anli", "question": question, "answer": answer, "choices": ANLI}
    if "answerKey" in r:  # CommonsenseQA and ARC, as published and as on the Hugging Face hub
        question = r["question"] if isinstance(r["question"], dict) else {"stem": r["question"], **r}
        choices = question["choices"]
        if isinstance(choices, dict):
            choices = [{"label": label, "text": text} for label, text in zip(choices["label"], choices["text"])]
        labels = [c["label"] for c in choices]  # some of ARC's are numbers
        return {"task": guess or ("commonsense_qa" if "question_concept" in question else "arc"),
                "question": question["stem"], "answer": chr(ord("A") + labels.index(r["answerKey"])),
                "choices": lettered(c["text"] for c in choices)}
    answer, task = r["answer"], r.get("task") or guess
    if isinstance(answer, bool):  # StrategyQA
        answer, task = "yes" if answer else "no", task or "strategyqa"
    elif answer is None:
        raise ValueError("the answer is null")
    elif "####" in str(answer):  # GSM8K
        answer, task = answer.rsplit("####", 1)[1].strip(), task or "gsm8k"
    return {"task": task, "answer": str(answer), **{k: r.get(k) for k in ("question", "choices", "level", "prompt")}}


def check_row(row, where):
    """Bring a flat row's answer to canonical form; stop where its task is unknown or its answer can't be one."""
    if str(row.get("task")) not in TASKS:
        stop(f"{where}: unknown task {row.get('task')!r}; name one with --task: {', '.join(TASKS)}")
    kind, answer, choices = TASKS[row["task"]], row["answer"].strip(), row.get("choices")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        stop(f"{where}: field 'question' is missing, empty or not a string")
    if kind == "choice":
        if not isinstance(choices, dict) or len(choices) < 2 or not all(isinstance(t, str) for t in choices.values()):
            stop(f"{where}: task {row['task']} needs 'choices' as an object of letters and texts")
        row["answer"] = answer if answer in choices else next((c for c, t in choices.items() if t == answer), None)
    elif kind == "yesno":
        row["answer"] = YESNO.get(answer.lower())
    elif not answer or (kind == "number" and number_in(answer) is None):
        row["answer"] = None
    if row["answer"] is None:
        stop(f"{where}: {answer!r} is no answer to a question of task {row['task']} ({kind})")


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
    except Exception as e:  # noqa: BLE001 (whatever a folder that is no model makes libraries raise)
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        stop(f"{name}: not a causal language model that can be loaded from safetensors ({reason})")
    finally:
        logging.set_verbosity(loud)
    if not tokenizer.is_fast:
        stop(f"{name}: its tokenizer is not a fast one (tokenizer.json), and only those give "
             "character offsets")
    model = model.to(device).eval()
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
    if weight.is_floating_point() and weight.numel():
        if not all(math.isfinite(end) for end in weight.detach().aminmax()):
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
        weights = {key: f.get_tensor(key) for key in f.keys()}
        return config, weights, (f.metadata() or {}).get("base")


def fingerprint(model):
    """Eight hex digits that tell a model's weights from others, the same in float32 and bfloat16,
    from 64 values of each; None for a quantised model. To be called before LoRA is added."""
    import torch

    digest = 0
    for weight in model.parameters():
        if not weight.is_floating_point():
            return None
        values = weight.detach().flatten()
        values = values[::max(1, len(values) // 64)].to("cpu", torch.bfloat16)
        digest = zlib.crc32(values.view(torch.int16).numpy().tobytes(), digest)
    return f"{digest:08x}"


def merge_adapter(model, config, weights, base=None):
    """W += scale B A for every module with a LoRA pair. Raises ValueError at what is more than plain
    LoRA, lacks a part or is not finite, and where the model hasn't the fingerprint `base`."""
    import torch

    more = [key for key in ("use_dora", "alpha_pattern", "modules_to_save", "layers_to_transform",
                            "exclude_modules", "target_parameters") if config.get(key)]
    keys = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
    if more or not weights or not all(map(keys.fullmatch, weights)):
        raise ValueError(f"only plain LoRA adapters can be merged {more or ''}")
    if base and base != fingerprint(model):
        raise ValueError(f"its base {config['base_model_name_or_path']} has changed since")
    names = {keys.fullmatch(key)[1] for key in weights}
    lacking = sorted(targets(model, config["target_modules"]) - names)
    if lacking:
        raise ValueError(f"the adapter lacks {lacking[0]}, {len(lacking)} of its target_modules")
    for key, weight in weights.items():
        check_finite(key, weight)
    for name in names:
        A, B = (weights.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        if A is None or B is None:
            raise ValueError(f"the adapter has only one of the two matrices of {name}")
        A, B, weight = A.float(), B.float(), model.get_submodule(name).weight  # (r, in), (out, r)
        scale = config["lora_alpha"] / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
        delta = scale * (B @ A).to(weight.device)
        delta = delta.T if config.get("fan_in_fan_out") else delta  # GPT-2's Conv1D keeps (in, out)
        if delta.shape != weight.shape:
            raise ValueError(f"{name} of the base has the shape {tuple(weight.shape)}, that of the "
                             f"adapter {tuple(delta.shape)}")
        weight.data = (weight.float() + delta).to(weight.dtype).detach()


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
            read_prompt(model, reader, tokens[:3])
            steps = [read_prompt(model, reader, tokens[:5])]
            cache = join(cache, reader, 2)
            steps += [next_logits(model, cache, [[tokens[n - 1]]], [n]) for n in (6, 7, 8)]
    except Exception as e:  # noqa: BLE001 (whatever a model that is none raises)
        stop(f"{name}: does not run as a causal language model with a cache "
             f"({' '.join(f'{type(e).__name__}: {e}'.split())[:300]})")

    def differ(a, b):
        return not (a - b).norm() <= limit * (b - b.mean()).norm()  # also where one is NaN

    if differ(changed[:7], whole[:7]):
        stop(f"{name}: not a causal model: a token changes what is predicted before it")
    if differ(torch.cat(steps), whole[4:]):
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
def generate(model, tokenizer, prompts, max_new_tokens, batch_size, samples=1, temperature=None,
             seed=0, desc=None, until=None, done=None, dtype=None):
    """Responses to prompts (lists of token ids): per prompt a list of `samples` dicts {"text":
    without special tokens, "logprob": mean log-probability of its tokens and the one that ended it,
    "tokens": their number, "stopped": it ended by itself}. Greedy for one sample or at temperature
    0; several samples have temperature 0.8 by default. A sample hangs on seed, prompt number and
    sample number, not on the batch around it. Responses end where the model's context ends, or with
    the first match of `until`, a pattern for each prompt, which is looked for every 16 tokens.

    batch_size responses are written at a time. As soon as sample k of prompt i ends,
    done(i, k, response) is called and another prompt takes its row. The model multiplies as fast as
    it can meanwhile, with weights of type `dtype` (see laid_out), and is then as it was."""
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
        text = tokenizer.decode(row.tokens[:n], skip_special_tokens=True)
        return text, until and until[row.i].search(text)

    def ended(row):
        n = len(row.tokens)
        return (row.tokens[-1] in ends or n == max_new_tokens or row.length > context
                or bool(until) and n % 16 == 0 and bool(read(row, n)[1]))

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
    with torch.no_grad(), laid_out(model.eval(), dtype), \
            tqdm(total=len(rows), desc=desc, disable=desc is None, leave=False) as bar:
        for row in write(model, rows, batch_size, temperature, ended):
            results[row.i][row.k] = response(row)
            bar.update()
            if done:
                done(row.i, row.k, results[row.i][row.k])
    model.train(was_training)
    return results


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
    """Write responses, batch_size at a time; yield each row when it has ended."""
    # Prompts with a common beginning shall follow each other; the next one is the list's last.
    waiting = sorted(waiting, key=lambda row: row.prompt, reverse=True)
    cache, reader = empty_cache(model), empty_reader(model)
    batch_size = batch_size if can_join(cache) else 1
    rows = []  # as they lie in the cache
    while waiting or rows:
        while waiting and len(rows) < batch_size:
            row = waiting.pop()
            add_tokens([row], read_prompt(model, reader, row.prompt), temperature)
            if ended(row):
                yield row
            else:
                cache = join(cache, reader, batch_size)
                rows.append(row)
        if rows:
            last = [[row.tokens[-1]] for row in rows]
            logits = next_logits(model, cache, last, [row.length for row in rows])
            add_tokens(rows, logits, temperature)
        for place in reversed(range(len(rows))):
            if ended(rows[place]):
                yield rows[place]
                rows[place] = rows[-1]
                rows.pop()
                leave(cache, place)
        narrow(cache, max((row.length - 1 for row in rows), default=0))


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
    """What was read last: a prompt, the logits (1, V) after it and the cache of its one row."""
    return SimpleNamespace(prompt=[], logits=None, cache=empty_cache(model))


def read_prompt(model, reader, prompt):
    """Logits (1, V) after a prompt. Where it begins as the one before, that is not read again."""
    if prompt != reader.prompt:
        known = len(os.path.commonprefix([prompt[:-1], reader.prompt]))
        if all(isinstance(layer, Roomy) for layer in reader.cache.layers):
            for layer in reader.cache.layers:
                layer.show(1, layer.first, layer.first + known)
        else:  # states of other kinds can't be cut
            known, reader.cache = 0, empty_cache(model)
        reader.logits = next_logits(model, reader.cache, [prompt[known:]], [len(prompt)])
        reader.prompt = prompt
    return reader.logits


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
    """Whether rows can come and go; layers of other kinds keep the one row that they have read."""
    from transformers.cache_utils import DummyLayer, LinearAttentionLayer

    return all(type(layer) in (Roomy, LinearAttentionLayer, DummyLayer) for layer in cache.layers)


def join(cache, reader, capacity):
    """-> a cache, of at most `capacity` rows, whose last row is the prompt that was read last."""
    import torch

    if not can_join(cache):
        cache, reader.cache, reader.prompt = reader.cache, cache, []
        return cache
    for j, (layer, new) in enumerate(zip(cache.layers, reader.cache.layers)):
        if isinstance(layer, Roomy):
            layer.join(new, capacity)
        elif hasattr(new, "conv_states") and not any(layer.has_previous_state.values()):
            cache.layers[j] = copy.deepcopy(new)
        elif hasattr(new, "conv_states"):
            for mine, its in ((layer.conv_states, new.conv_states),
                              (layer.recurrent_states, new.recurrent_states)):
                mine.update({s: torch.cat([mine[s], its[s]]) for s in its if its[s] is not None})
    return cache


def leave(cache, place):
    """The last row takes the place of one that has ended."""
    import torch

    for layer in cache.layers:
        if isinstance(layer, Roomy):
            layer.leave(place)
        elif hasattr(layer, "conv_states"):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            order = list(range(len(next(x for x in states if x is not None))))
            order[place] = order[-1]
            layer.reorder_cache(torch.tensor(order[:-1], dtype=torch.long))


def narrow(cache, width):
    """Forget the columns to the left of the last `width`."""
    for layer in cache.layers:
        if isinstance(layer, Roomy):
            layer.show(layer.rows, layer.end - width, layer.end)


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
        end = left + self.get_seq_length()
        old, self.room = (self.keys, self.values), [
            states.new_zeros(rows, states.shape[1], end + right + 64, states.shape[3])
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

    def join(self, other, capacity):
        """Another layer's one row becomes the last one."""
        width = other.get_seq_length()
        if not other.room:  # the model shares another layer's states
            return
        if not self.room or self.end < width:
            left = max(0, width - self.get_seq_length())
            self.make_room((other.keys, other.values), capacity, left, 0)
        self.show(self.rows + 1, min(self.first, self.end - width), self.end)
        self.keys[-1, :, -width:], self.values[-1, :, -width:] = other.keys[0], other.values[0]

    def leave(self, place):
        """The last row takes this place."""
        if self.room:
            for states in (self.keys, self.values):
                states[place] = states[-1]
        self.show(self.rows - 1, self.first, self.end)


# ---------------------------------------------------------------- weights while answers are written
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
    floating point on the CPU; others stay as they are."""
    import torch

    weights = [(weight, weight.data) for weight in model.parameters()]
    if model.device.type != "cpu" or not all(weight.is_floating_point() for weight, _ in weights):
        yield
        return
    if dtype is None:
        large = sum(weight.numel() for weight, _ in weights) > 10**7
        dtype = torch.bfloat16 if large and has_bfloat16() else model.dtype
    replaced = []  # modules whose forward is another one inside
    try:
        for module in model.modules():
            if hasattr(module, "base") and hasattr(module, "A"):  # distill.LoRA
                merge_lora(module)
                module.forward = module.base.__call__
                replaced.append(module)
            elif type(module) is torch.nn.Linear and dtype == torch.bfloat16:
                module.forward = partial(weight_first, module)
                replaced.append(module)
        for weight, _ in weights:
            weight.data = weight.data.to(dtype)
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        for weight, data in weights:
            weight.data = data
        for module in replaced:
            del module.forward


def merge_lora(module):
    """W += alpha / rank * B A in a LoRA of distill.py, W in float32 in place of its own tensor."""
    from torch.nn import Linear

    delta = module.alpha / module.rank * (module.B.float() @ module.A.float())
    weight = module.base.weight
    weight.data = weight.data.float() + (delta if isinstance(module.base, Linear) else delta.T)


def weight_first(module, x):
    """A linear layer as (W x^T)^T. The processor's bfloat16 product lays its second matrix out anew
    in each call: with few rows that costs as much as the product if it is the weight."""
    from torch.nn.functional import linear

    rows = x.flatten(0, -2)
    if len(rows) > 128:
        return linear(x, module.weight, module.bias)
    y = linear(module.weight, rows).T
    y = y.contiguous() if module.bias is None else y + module.bias
    return y.view(*x.shape[:-1], -1)


def evaluate(students, rows, max_new_tokens, batch_size, samples=1, temperature=None, seed=0):
    """Students [(model, tokenizer), ...] on rows, in shares of 1: {"questions": their number, "accuracy", "unparsed",
    "stopped": per student a share of its responses, "ensemble": accuracy of one common answer (of the parsed response
    with the highest mean log-probability; with samples the majority's, ties by log-probability), "upper_bound": share
    of questions with any right response, "predictions": per question {"id", "answer", "ensemble", "ensemble_correct",
    "responses": [student][sample] with "prediction" and "correct"}}."""
    responses = []  # [student][question][sample]
    for s, (model, tokenizer) in enumerate(students):
        prompts = [encode_prompt(tokenizer, student_prompt(row)) for row in rows]
        responses.append(generate(model, tokenizer, prompts, max_new_tokens, batch_size, samples, temperature, seed + s,
                                  f"student {s} answers", [ASKED[TASKS[row["task"]]] for row in rows]))
        for row, answers in zip(rows, responses[s]):
            for r in answers:
                r["prediction"] = extract_answer(row["task"], r["text"], row.get("choices"))
                r["correct"] = grade(row["task"], r["prediction"], row["answer"], row.get("choices"))
    predictions = []
    for q, row in enumerate(rows):
        votes = []  # [prediction, number of votes, best log-probability]
        for r in (r for student in responses for r in student[q] if r["prediction"] is not None):
            vote = next((v for v in votes if grade(row["task"], r["prediction"], v[0], row.get("choices"))), None)
            if vote is None:
                votes.append(vote := [r["prediction"], 0, -math.inf])
            vote[1:] = vote[1] + 1, max(vote[2], r["logprob"])
        surest = max(votes, key=lambda v: (v[1] if samples > 1 else 0, v[2]), default=[None])[0]
        predictions.append({"id": row["id"], "answer": row["answer"], "ensemble": surest,
                            "ensemble_correct": grade(row["task"], surest, row["answer"], row.get("choices")),
                            "responses": [student[q] for student in responses]})

    def share(flags):
        flags = list(flags)
        return sum(flags) / max(len(flags), 1)

    return {"questions": len(rows),
            "accuracy": [share(r["correct"] for answers in s for r in answers) for s in responses],
            "unparsed": [share(r["prediction"] is None for answers in s for r in answers) for s in responses],
            "stopped": [share(r["stopped"] for answers in s for r in answers) for s in responses],
            "ensemble": share(p["ensemble_correct"] for p in predictions),
            "upper_bound": share(any(r["correct"] for s in p["responses"] for r in s) for p in predictions),
            "predictions": predictions}


# ---------------------------------------------------------------- pictures of run folders (--plot)
PICTURES = {"rate_style": ("selection rate per reasoning style", "share of paths routed to the student"),
            "rate_level": ("selection rate per question level", "share of paths routed to the student"),
            "loss_style": ("loss per reasoning style", "loss (nats per response token)")}
# Dashes and markers tell the lines apart in grey; the colours are those of Okabe and Ito.
LOOKS = [{"color": "#" + ("0072B2", "D55E00", "009E73", "000000", "CC79A7", "56B4E9", "E69F00")[i % 7], "markersize": 5,
          "linestyle": ("-", "--", ":", "-.")[i % 4], "marker": "os^DvPX*"[i % 8]} for i in range(56)]


def read_run(folder):
    """A run folder of distill.py: {"name", "args", "log": rows, "accuracy": {student or ensemble: %}, which is empty
    before the run's end}. Stops where it is no run, and with FILE:LINE where the log is damaged."""
    run = {"name": os.path.basename(os.path.abspath(folder)), "log": [], "accuracy": {}}
    args, results, log = (os.path.join(folder, name) for name in ("args.json", "results.json", "log.jsonl"))
    try:
        with open(file := args, encoding="utf-8") as f:
            run["args"] = {**json.load(f)}
        if os.path.exists(file := results):
            with open(file, encoding="utf-8") as f:
                after = json.load(f)["after"]
            shares = {**{f"student {s}": x for s, x in enumerate(after["accuracy"])}, "ensemble": after["ensemble"]}
            run["accuracy"] = {name: 100 * float(x) for name, x in shares.items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        stop(f"--plot {folder}: no run folder of distill.py, or {file} is damaged ({type(e).__name__}: {e})")
    for where, row in numbered_rows(log):
        try:
            run["log"].append({**row, "step": float(row["step"])})
            shapes = {np.array(x, float).shape for field in PICTURES for x in row.get(field, {}).values()}
            if shapes != {(len(run["log"][0]["rate"]),)}:
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            stop(f"{where}: expected a step of distill.py with a rate and a loss for each style and student")
    return run if run["log"] else stop(f"{log}: no step in it yet")


def curves(log, field, window=1):
    """{style or level: (steps, students)}: a field of the log, each step as the mean of the (odd) `window` around it.
    nan where none of these steps had such a path or, for a loss, ran one: there the log's 0 is no loss."""
    def table(field, name):
        return np.array([row.get(field, {}).get(name, [math.nan] * len(row["rate"])) for row in log], float)

    lines = {}
    for name in sorted({name for row in log for name in row.get(field, {})}):
        x = table(field, name)
        known = np.isfinite(x) & (field != "loss_style" or table("rate_style", name) > 0)
        total, count = (np.apply_along_axis(np.convolve, 0, y, np.ones(window), "same")
                        for y in (np.where(known, x, 0), known))
        lines[name] = np.where(count > 0.5, total / np.maximum(count, 1), math.nan)
    return lines


def by_flags(runs, *ignored):
    """{flags as text: runs}: grouped by the flags in which any runs differ, but for seed, out_dir and `ignored`."""
    flags = [flag for flag in dict.fromkeys(flag for run in runs for flag in run["args"])
             if flag not in ("seed", "out_dir", *ignored) and len({str(run["args"].get(flag)) for run in runs}) > 1]
    groups = defaultdict(list)
    for run in runs:
        groups["\n".join(f"{flag} {run['args'].get(flag)}" for flag in flags)].append(run)
    return groups


def panels(heading, titles):
    """A figure with a panel for each title, two a row, and their axes, which share y."""
    from matplotlib.figure import Figure

    rows, columns = math.ceil(len(titles) / 2), min(2, len(titles))
    figure, axes = Figure((1.8 + 3.8 * columns, 0.5 + 3.1 * rows), dpi=150, layout="constrained"), []
    figure.suptitle(heading, wrap=True)
    for i, title in enumerate(titles, 1):
        axes.append(figure.add_subplot(rows, columns, i, title=title, sharey=axes[0] if axes else None))
        axes[-1].spines[["top", "right"]].set_visible(False)
        axes[-1].grid(color="0.92")
    return figure, axes


def draw_training(run, field):
    """Figure of a field of PICTURES over training: a panel per student, a line per style or level."""
    from matplotlib.ticker import LogLocator

    (title, y), log, args = PICTURES[field], run["log"], run["args"]
    window = min(max(20, len(log) // 10), len(log) - 1) // 2 * 2 + 1  # one step has few paths of a style
    every = max(1, len(log) // 5)  # steps between a line's markers
    lines = list(zip(LOOKS, curves(log, field, window).items()))
    lines.sort(key=lambda line: -np.nan_to_num(line[1][1][-1]).sum())  # the legend lists them as they end
    names = zip(range(len(log[0]["rate"])), args.get("students") or itertools.repeat("demo"))
    figure, axes = panels(f"{run['name']} (route {args.get('route')}, seed {args.get('seed')}): {title}",
                          [f"student {s} ({os.path.basename(os.path.normpath(name))})" for s, name in names])
    for s, ax in enumerate(axes):
        for k, (look, (name, values)) in enumerate(lines):
            ax.plot([row["step"] for row in log], values[:, s], **look, markevery=(k * every // len(lines), every),
                    label=f"level {name}" if name.isdigit() else name)
        ax.set(xlabel=f"optimiser step (running mean of {window} steps)", ylabel=y)
    if field == "loss_style":
        axes[0].set_yscale("log")  # and with it the others
        axes[0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    else:
        axes[0].set_ylim(0, 1.02)
    return figure


def draw_share(groups):
    """Figure of accuracy against --train_frac: a panel per group of runs, mean and standard deviation of equal ones."""
    figure, axes = panels("accuracy by training data (mean and s.d. of runs)", list(groups))
    names = max((run["accuracy"] for runs in groups.values() for run in runs), key=len)
    for ax, runs in zip(axes, groups.values()):
        shares = sorted({run["args"]["train_frac"] for run in runs})
        for look, name in zip(LOOKS, names):
            y = [[r["accuracy"].get(name, math.nan) for r in runs if r["args"]["train_frac"] == x] for x in shares]
            ax.errorbar([100 * x for x in shares], [np.mean(v) for v in y], [np.std(v, ddof=len(v) > 1) for v in y],
                        **look, elinewidth=1, capsize=3, label=name)
        ax.set(xlabel="training questions used (%)", ylabel="right answers (% of test questions)", xlim=(0, 104))
    axes[0].set_ylim(bottom=0)
    return figure


def plot(folders):
    """Draw PICTURES into each run folder and, of runs with different --train_frac, the accuracy into the first."""
    if not importlib.util.find_spec("matplotlib"):
        stop("--plot needs matplotlib: pip install matplotlib")
    runs = {folder: read_run(folder) for folder in folders}
    figures = {os.path.join(folder, f"{field}.png"): draw_training(run, field) for folder, run in runs.items()
               for field in PICTURES if curves(run["log"], field)}
    ended = [run for run in runs.values() if run["accuracy"]]
    for name in {run["name"] for run in runs.values() if not run["accuracy"] and len(runs) > 1}:
        print(f"{name} has no results.json yet: left out of the accuracy")
    if len(ended) > 1:
        groups = {label: group for label, group in by_flags(ended, "train_frac").items()
                  if len({run["args"].get("train_frac") for run in group}) > 1}
        if groups:
            figures[os.path.join(folders[0], "train_frac.png")] = draw_share(groups)
    for file, figure in figures.items():
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3)  # covers no line
        try:
            figure.savefig(file)
        except OSError as e:
            stop(f"cannot write {file}: {e.strerror}")
        print(file)


def main():
    """The command: evaluate saved students, or draw run folders. Bad input stops with one sentence."""
    natural, positive = within(int, 0), within(int, 1)
    p = argparse.ArgumentParser(usage="python eval.py --students NAME ... --questions FILE [flags] | --plot DIR ...",
                                description="Evaluate saved students on a file of questions, or draw runs.",
                                epilog="Defaults in brackets.")
    p.error = stop  # one sentence and exit code 2
    g = p.add_argument_group("what")
    g.add_argument("--students", nargs="+", metavar="NAME", help="models or PEFT LoRA adapters, by folder or name")
    g.add_argument("--questions", metavar="FILE",
                   help="a dataset's own file, JSON Lines with id, task, question, answer, or a pool")
    g.add_argument("--task", help=f"overrides the task that the file names: {', '.join(TASKS)}")
    g.add_argument("--limit", type=positive, metavar="N", help="use only the first N questions (all)")
    g.add_argument("--plot", nargs="+", metavar="RUN_DIR",
                   help="draw runs of distill.py instead; pictures of several runs go into the first one's folder")
    g = p.add_argument_group("how")
    g.add_argument("--samples", type=positive, default=1, metavar="N", help="responses per question, for a vote (1)")
    g.add_argument("--temperature", type=within(float, 0, 10), metavar="X",
                   help="sampling temperature (0, greedy, for one sample; else 0.8)")
    g.add_argument("--max_new_tokens", type=positive, default=512, metavar="N", help="longest response in tokens (512)")
    g.add_argument("--batch_size", type=positive, default=16, metavar="N", help="responses generated at a time (16)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1, mps ... (%(default)s)")
    g.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    g = p.add_argument_group("output")
    g.add_argument("--out", metavar="FILE", help="write the results and every response as JSON")
    g.add_argument("--show", type=natural, default=3, metavar="N", help="responses to print per student (3)")
    args = p.parse_args()
    if args.plot:
        return plot(args.plot)
    if not (args.students and args.questions):
        stop("pass --students and --questions to test students, or --plot RUN_DIR to draw runs")
    if args.samples > 1 and args.temperature == 0:
        stop(f"--samples {args.samples} would repeat one greedy response at temperature 0; pass a higher --temperature")
    if args.out and not os.path.isdir(os.path.dirname(args.out) or "."):
        stop(f"--out {args.out}: no such folder; make it first")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        stop(f"--device {args.device} can't be used ({str(e).splitlines()[0]})")

    rows = read_questions(args.questions, args.task)[:args.limit]
    dtype = torch.bfloat16 if args.device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    students = [load_student(name, args.device, dtype) for name in args.students]
    results = evaluate(students, rows, args.max_new_tokens, args.batch_size, args.samples, args.temperature, args.seed)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as f:
            json.dump({"args": vars(args), **results}, f, indent=1)
    for p in results["predictions"][:args.show]:
        for name, answers in zip(args.students, p["responses"]):
            print(f"--- {p['id']}, {name}: {answers[0]['prediction']} (right: {p['answer']})")
            print(answers[0]["text"].strip())
    print_table(args.students, results)


def print_table(names, results):
    """Print accuracy with its standard error, unparsed and stopped shares per student, ensemble and upper bound."""
    width = max(map(len, (*names, "upper bound (any right)")))
    print(f"\n{results['questions']} questions".ljust(width + 1) + "  accuracy  (s.e.)  unparsed  stopped by itself")
    lines = [*zip(names, results["accuracy"], results["unparsed"], results["stopped"]),
             ("ensemble", results["ensemble"]), ("upper bound (any right)", results["upper_bound"])]
    for name, accuracy, *more in lines:
        error = math.sqrt(accuracy * (1 - accuracy) / results["questions"])  # binomial
        print(f"{name:{width}}  {accuracy:8.1%}  ({error:4.1%})" + "".join(f"  {x:8.1%}" for x in more))


if __name__ == "__main__":
    main()
