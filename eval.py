"""Tasks and evaluation: the student's prompt, reading questions, answer extraction, grading, generation, tables.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl
    python eval.py --plot out/run_a out/run_b

A row is a flat dict {"id", "task", "question", "answer"} and, where there are any, "choices" {"A": text, ...}, "level"
and "prompt" (which overrides the student prompt).
"""
import argparse
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
from functools import lru_cache

import mpmath
import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

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
    """Token ids of a prompt: one user turn and the generation prompt if the tokenizer has a chat template, else the
    plain text with the tokenizer's own BOS. Never a trailing EOS."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt.strip()}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_token(tokenizer):
    """Id of the token that ends a response: the first special token after the assistant's text in the rendered chat
    template, else eos_token_id. Stops if there is none."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "MARK"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rsplit("MARK", 1)[1]
        for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token].special:
                return token
    if tokenizer.eos_token_id is None:
        stop(f"{tokenizer.name_or_path}: the tokenizer has no token that ends a response; give it an eos_token")
    return tokenizer.eos_token_id


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
def load_student(name, device="cpu", dtype=torch.float32, **more):
    """(model, tokenizer) of a Hugging Face causal LM, or of a folder with a LoRA adapter in PEFT's format (merged).
    `more` goes to from_pretrained. Stops if there is no such model or if its tokenizer isn't a fast one."""
    try:
        config_file = os.path.join(name, "adapter_config.json")
        adapter = None
        if os.path.isfile(config_file):
            with open(config_file, encoding="utf-8") as f:
                adapter = json.load(f)
        base = adapter["base_model_name_or_path"] if adapter else name
        own_tokenizer = os.path.isfile(os.path.join(name, "tokenizer_config.json"))
        tokenizer = AutoTokenizer.from_pretrained(name if own_tokenizer else base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, **more)
        if adapter:
            merge_adapter(model, adapter, load_file(os.path.join(name, "adapter_model.safetensors")))
    except Exception as e:  # noqa: BLE001 (whatever a folder that is not a model makes the libraries raise)
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        stop(f"{name}: not a causal language model that transformers can load from safetensors ({reason})")
    if not tokenizer.is_fast:
        stop(f"{name}: its tokenizer is not a fast one (tokenizer.json), and only those give character offsets")
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def merge_adapter(model, config, weights):
    """W += scale B A for every module with a LoRA pair; raises ValueError at what is more than plain LoRA."""
    extra = [k for k in ("use_dora", "alpha_pattern", "modules_to_save") if config.get(k)]
    if extra or any(".lora_A.weight" not in k and ".lora_B.weight" not in k for k in weights) or not weights:
        raise ValueError(f"only plain LoRA adapters can be merged {extra or ''}")
    for key in (k for k in weights if ".lora_A." in k):
        module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        A, B = weights[key].float(), weights[key.replace(".lora_A.", ".lora_B.")].float()  # (r, in), (out, r)
        scale = config["lora_alpha"] / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
        delta = scale * (B @ A)
        delta = delta.T if config.get("fan_in_fan_out") else delta  # GPT-2's Conv1D keeps (in, out)
        module.weight = torch.nn.Parameter((module.weight.float() + delta).to(module.weight.dtype))


# ---------------------------------------------------------------- generation
class Roomy(DynamicLayer):
    """A cache layer whose states (rows, heads, length, d) lie in buffers with room for 64 more tokens: the library's
    own concatenates, which copies the whole cache for every token."""

    room = None

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        old = self.get_seq_length()
        end = old + keys.shape[2]
        if self.room is None or self.room[0].shape[2] < end:
            self.room = [new.new_empty(*new.shape[:2], end + 64, new.shape[3]) for new in (keys, values)]
            for room, states in zip(self.room, (self.keys, self.values) if old else ()):
                room[:, :, :old] = states
        for room, new in zip(self.room, (keys, values)):
            room[:, :, old:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, rows):
        super().reorder_cache(rows)
        self.room = None


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, batch_size, samples=1, temperature=None, seed=0, desc=None,
             until=None, done=None):
    """Responses to prompts (lists of token ids): per prompt a list of `samples` dicts {"text": without special tokens,
    "logprob": mean log-probability of its tokens and the one that ended it, "tokens": their number, "stopped": it
    ended by itself}. Greedy for one sample or at temperature 0; several samples have temperature 0.8 by default. A
    sample hangs on seed and prompt number, not on the batch around it. Responses end where the model's context ends, or
    with the first match of `until`, a pattern for each prompt, which is looked for every 16 tokens. done(i, k, response) is
    called as soon as sample k of prompt i is finished."""
    temperature = temperature if temperature is not None else 0.8 if samples > 1 else 0
    device = model.device
    eos = model.generation_config.eos_token_id
    ends = {end_token(tokenizer), tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    ends = torch.tensor(sorted(ends), device=device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if prompts and max(map(len, prompts)) >= context:
        stop(f"a prompt of {max(map(len, prompts))} tokens leaves no room in the model's context of {context}")
    accepted = inspect.signature(model.forward).parameters

    def read(i, response):
        text = tokenizer.decode(response, skip_special_tokens=True)
        return text, until and until[i].search(text)

    jobs = [(i, k) for i in range(len(prompts)) for k in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))  # longest first: what doesn't fit into memory shows at once
    results = [[None] * samples for _ in prompts]
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(jobs), desc=desc, disable=desc is None, leave=False)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start:start + batch_size]
        n, width = len(batch), max(len(prompts[i]) for i, _ in batch)
        ids = torch.zeros(n, width, dtype=torch.long)
        mask = torch.ones(n, width + max_new_tokens, dtype=torch.long)
        noise = torch.zeros(n, max_new_tokens)
        for b, (i, k) in enumerate(batch):  # left-padded, so that all continue at the right edge
            ids[b, width - len(prompts[i]):] = torch.tensor(prompts[i])
            mask[b, :width - len(prompts[i])] = 0
            if temperature:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {i} {k}".encode()))
                noise[b] = torch.rand(max_new_tokens, generator=generator)
        mask, noise, inputs = mask.to(device), noise.to(device), ids.to(device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
        logprob = torch.zeros(n, max_new_tokens, device=device)
        length = torch.zeros(n, dtype=torch.long, device=device)
        stopped = torch.zeros(n, dtype=torch.bool, device=device)
        rows, cache = torch.arange(n, device=device), DynamicCache(config=model.config)  # rows: those still running
        cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        for t in range(max_new_tokens):
            extra = {"position_ids": position[rows, width + t - inputs.shape[1]:width + t], "logits_to_keep": 1}
            out = model(input_ids=inputs, attention_mask=mask[rows, :width + t], past_key_values=cache, use_cache=True,
                        **{k: v for k, v in extra.items() if k in accepted})
            logp = out.logits[:, -1].float().log_softmax(-1)  # (rows, V)
            token = logp.argmax(-1)
            if temperature:  # the token whose stretch of the cumulated probabilities holds the row's random number
                cumulated = (logp / temperature).softmax(-1).cumsum(-1)
                token = torch.searchsorted(cumulated, noise[rows, t, None] * cumulated[:, -1:], right=True).squeeze(1)
                token = token.clamp(max=logp.shape[1] - 1)
            tokens[rows, t] = token
            logprob[rows, t] = logp.gather(1, token[:, None]).squeeze(1)
            length[rows] += 1
            stopped[rows] = torch.isin(token, ends)
            going = ~stopped[rows] & (position[rows, width + t] < context)
            if until and t % 16 == 15:
                said = zip(rows.tolist(), tokens[rows, :t + 1].tolist())
                going &= torch.tensor([not read(batch[b][0], response)[1] for b, response in said], device=device)
            if not going.all():  # finished rows leave the batch
                going = going.nonzero().squeeze(1)
                bar.update(len(rows) - len(going))
                rows, token = rows[going], token[going]
                if not len(rows):
                    break
                cache.reorder_cache(going)  # batch_select_indices would forget the states of linear attention
            inputs = token[:, None]
        bar.update(len(rows))
        for b, (i, k) in enumerate(batch):
            m, response = int(length[b]), tokens[b, :length[b] - stopped[b].long()].tolist()
            text, end = read(i, response)
            if end and end.end() < len(text):  # what follows the answer does not count
                text = text[:end.end()]
                m = next(m for m in range(1, m + 1) if read(i, response[:m])[1])
            results[i][k] = {"text": text, "tokens": m, "logprob": float(logprob[b, :m].mean()),
                             "stopped": bool(stopped[b])}
            if done:
                done(i, k, results[i][k])
    bar.close()
    model.train(was_training)
    return results


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
