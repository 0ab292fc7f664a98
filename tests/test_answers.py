"""What a text says its answer is, and whether that is the right one."""
import json
import random
import re
import threading

import pytest

import eval as E

CHOICES = {"A": "bank", "B": "library", "C": "department store", "D": "store", "E": "St. Louis"}
DATES = {"A": "03/12/1987", "B": "03/13/1987", "C": "04/13/1987"}


def table(task, choices, **expected):
    """[(task, text, choices, answer)] of {answer: [text, ...]}; _5_ stands for 5."""
    return [(task, text, choices, None if answer == "unparsed" else answer.strip("_"))
            for answer, texts in expected.items() for text in texts]


def read(task, text, choices=None):
    return E.extract_answer(task, text, choices)


# ----------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("task", E.TASKS)
def test_an_answer_stated_as_the_prompt_asks_is_read(task):
    blank, answer = {"number": ("N", "7"), "math": ("X", "\\frac{1}{2}"), "yesno": ("yes", "yes"),
                     "choice": ("X", "B")}[E.TASKS[task]]
    phrase = re.search('"(The answer is .*?[.])"', E.KINDS[E.TASKS[task]][0])[1]
    assert read(task, "So. " + phrase.replace(blank, answer), {"A": "x", "B": "y"}) == answer


NUMBERS = [
    ("18", ["He makes 9 * 2 = $18.\n#### 18", "A: 18", "The answer is 18", "The answer is $18.", "**Answer:** 42\n\n#### 18",
            "The answer is 18 (16 + 2 = 18).", "The answer is 18 eggs. He sells 2.", "<answer>18</answer>", '{"answer": 18}',
            "The answer is 16 + 2 = 18", "print(x)\n```output\n17\n18\n```", "\\boxed{\\text{18 dollars}}", "The answer is x = 18.",
            "The answer is 3. No: the answer is 18.", "Final Answer\n\n18", "The correct answer is: 18",
            "The answer would be 18 eggs.", "The answer is therefore 18.", "The answer is most likely 18.", "The answer is €18 each.",
            "The answer is 18. Check: 16 + 2 = 18, so the answer is correct.", "16 + 2 = 18 \\boxed{18}", "\\boxed{18}^\\circ",
            "She doesn't sell any so the answer is 18.", "The answer is 18.\n\nThe other answers are wrong.", "She has 18", "It is 18kg."]),
    ("-5", ["The answer is -5.", "The answer is −5 degrees.", "The answer is $-5", "The answer is -$5.", "**Answer:**\n\n-5", "x = -5"]),
    ("5", ["**Answer:**\n\n- 5", "10-5 = 5", "The answer is 5kg", "It came 2nd of 5", "The answer is $5/hour.", "The answer is 5%."]),
    ("1234.5", ["The answer is: **$1,234.50**.", "\\boxed{1{,}234.5}", "The answer is 1,234.5", "The answer is 1 234.5"]),
    ("3/4", ["The answer is 3/4 of a cup.", "So it is 3/4"]),
    ("70000", ["\\boxed{70\\,000}", "The answer is 70\u202f000.", "She makes 70 000", "\\boxed{\\$70{,}000}"]),
]
NO_NUMBER = {  # why: texts
    "is not announced": ["", "no number here", "The 3rd of them", "The answer is unclear.", "Therefore, the answer (arabic numerals) is"],
    "is denied or supposed": [
        "The wrong answer is 5.", "I don't think the answer is 5.", "One might think the answer is 5. It is 6.", "It isn't 5.",
        "The answer isn't 5.", "The answer can't be 5.", "The answer should not be 5.", "It cannot be \\boxed{5}.", "The answer is not 5.",
        "The answer is 4. But the answer isn’t $5.", "The answer is 5? No.", "If the answer is 4, he has 2 left.", "The answer is never 5",
        "The answer is 5. Therefore, the answer is unclear.", "The answer is 5 and not 6."],
    "is several": [
        "The answer is 4 hours and 30 minutes.", "The answer is 7 feet, 4 inches.", "The answer is 4:30.", "The answer is 24 and 12.",
        "The answer is 5 or 6.", "The answer is 3 to 5.", "The answer is x = 3, y = 5.", "The answer is 4 hrs. 30 min.", "It is 4 hours 30",
        "The answer is 18 eggs because y = 9.", "\\boxed{4\\text{ hours and }30\\text{ minutes}}", "\\boxed{12\\text{ feet }6\\text{ inches}}",
        "The answer is 4 hours and thirty minutes.", "The answers are 5 and 7.", "The answer is 5, 6", "So 5 or 6", "\\boxed{2} and \\boxed{3}"],
    "is open arithmetic": [
        "The answer is 36 + 48", "The answer is 2π.", "The answer is 10 dollars - 5 dollars.", "The answer is 2**3", "The answer is 10\u00b2.",
        "The answer is 2^{10}.", "The answer is \u221a16.", "The answer is \\sqrt{16}.", "The answer is \\frac{10}{2+3}.", "\\boxed{2\\pi}",
        "The answer is 5 more than 7.", "The answer is -(5).", "The answer is half of 10.", "The answer is twice 5.", "The answer is 5 squared.",
        "The answer is 20% of 50.", "The answer is 5 multiplied by 6.", "The answer is |-5|.", "The answer is x minus 5.", "\\boxed{2\\sqrt{3}}",
        "The answer is more than 5.", "The answer is the square root of 16.", "The answer is 1/0.", "The answer is over 100.", "$3 \\times 10^{3}$"],
    "has a scale that is not read": [
        "The answer is 2.5 million people.", "The answer is $10K.", "The answer is 5 dozen.", "The answer is 3 quarters.", "She has 5 million",
        "The answer is 4½ hours.", "The answer is 1.5e3", "The answer is two and a half.", "The answer is 2 1/2 hours.", "The answer is 1,5",
        "The answer is forty-two.", "\\boxed{2.5\\text{ million}}", "So he has 3 hundred"],
    "is a part of a box": [
        "The answer is $-\\boxed{3}$.", "The answer is $−\\boxed{3}$.", "so 2\\boxed{3}", "\\boxed{3}^2", "\\boxed{3}\\sqrt{2}", "\\boxed{3} / 2"],
}


@pytest.mark.parametrize("text, expected", [(text, number) for number, texts in NUMBERS for text in texts])
def test_the_one_number_that_a_text_announces_or_ends_with_is_read(text, expected):
    assert E.grade("gsm8k", read("gsm8k", text), expected)


@pytest.mark.parametrize("text", [pytest.param(text, id=f"{why}: {text[:40]}") for why, texts in NO_NUMBER.items() for text in texts])
def test_a_number_that_leaves_a_doubt_is_unparsed(text):
    assert read("gsm8k", text) is None


READ = [
    # a letter, or the exact text of one choice
    *table("arc", CHOICES,
           B=["The answer is (B).", "The answer is B", "The answer is **B**.", "Answer: B) library", "The answer is B: library.",
              "so the answer is \\boxed{\\text{B}}", "The answer is a library.", "The answer is: (B), clearly", "<answer>B</answer>",
              "The answer is B. Note that A is a common distractor.", "Answer: B\nExplanation: A library lends books.", "Answer is A\n\nAnswer: B",
              "The answer is therefore (B).", "The answer is simply B.", "The correct answer is B. The other answers are incorrect.",
              "On the other hand the answer is B.", "***Answer***: ***B***", "The correct option is (B).", "The answer is (B) because it is quiet."],
           C=["The answer is the department store.", "The answer is (C). department store", "The answer is (C) department store."],
           D=["The answer is store", "It is not B, the answer is D"], E=["The answer is St. Louis."],
           unparsed=[
               "", "B", "I think it is (C).", "The answer is (G).", "The answer is Cars.", "The answer is not B.", "The answer is A or B.",
               "The answer is a place to read books.", "The answer is A place to read.", "Answer: None of the above", "Answer: I don't know",
               "The answer is either the bank or the library", "The wrong answer is B.", "The least likely answer is (B).",
               "I don't think the answer is B.", "The correct answer is D. department store", "The answer is (B): A bank.",
               "The answer is (B): A and C.", "Therefore, the answer is B, C, or D.", "The answer is A through C.", "The answer is B/C",
               "The answer is B. or C.", "The answer is both A and C.", "The answer is library or bank.", "The answer is (D) department store.",
               "The answer is A. So the answer is B, C, or D.", "The answer cannot be (A).", "The answer is A.B", "The answer is A-B.",
               "The answer is most likely (B) bank.", "Where?\n(A) bank\n(B) library", "\\boxed{A} or \\boxed{B}"]),
    *table("arc", {"A": "Paris", "B": "London"}, A=["The answer is (A) Paris.", "The answer is Paris."], unparsed=["The answer is (A) Paris or London."]),
    *table("date", DATES, B=["The answer is (B) 03/13/1987.", "So the answer is 03/13/1987.", "The answer is B. March 13, 1987"],
           unparsed=["The answer is B. 03/12/1987", "So the answer is 03/13/1987 or 04/13/1987."]),
    *table("arc", {"A": "500 N", "B": "1,500 N", "C": "-5 N", "D": "type A"}, B=["The answer is 1,500 N."], C=["The answer is -5 N."],
           unparsed=["The answer is 2.500 N.", "The answer is 5 N.", "The answer is type AB."]),
    # yes or no
    *table("strategyqa", None,
           yes=["So the answer is Yes.", "The answer is: \"Yes\".", "The answer is true.", "#### yes", "The answer is indeed yes.",
                "the answer (Yes or No) is technically Yes, but it is small", "The answer is yes. Checking again, the answer is correct."],
           no=["Therefore, the answer (Yes or No) is No.", "the answer is most likely No", "\\boxed{\\text{No}}", "The answer is **no**.",
               "The answer is no, it would not sink."],
           unparsed=["The answer is hardly yes.", "The answer is unlikely yes.", "The answer is yes and no.", "The answer is yes/no.",
                     "Therefore, the answer (Yes or No) is dependent on whether no one knows", "the answer is not known", "the answer is unknown",
                     "If so, the answer is yes. Therefore, the answer (Yes or No) is: It depends.", "the answer (Yes or No) is Northern",
                     "The wrong answer is yes.", "No one has seen it", "nothing", "Yes", "The answer is no longer clear", "The answer is yes?"]),
    # mathematics: a box, or the one formula of the sentence
    *table("math", None,
           _5_=["$\\boxed{5}$. So our answer is correct.", "\\fbox{5}", "#### 5", "The answer is $5$.", "The answer is most likely $5$.",
                "So \\boxed{4}., but\n**Final Answer**\n\\boxed{5}", "The answer is 5. This is the least.", "The final answer is:\n\n$$5$$",
                "$x = \\boxed{5}$", "${\\boxed{5}}$", "$\\frac{6}{2} = {\\boxed{5}}$", "\n- \\boxed{5}", "$7 - 2 = \\boxed{5}$", "$5 \\le \\boxed{5}$"],
           unparsed=["\\boxed{}", "\\boxed{5", "I don't know.", "so $x=3$", "The answer is not $5$.", "It cannot be $\\boxed{5}$.", "It isn't 5",
                     "The answer is $5$? No, $6$.", "The answer isn't $5$.", "The answer is $5$ or $6$.", "The answer is greater than $5$.",
                     "$-\\boxed{3}$", "$2\\boxed{3}$", "$\\frac{1}{\\boxed{3}}$", "\\( - \\boxed{3}\\)", "$x = -\\boxed{3}$", "$\\pm\\boxed{3}$",
                     "$\\frac{\\boxed{3}}{2}$", "$\\sqrt{\\boxed{3}}$", "$2^{\\boxed{3}}$", "$2 \\cdot \\boxed{3}$",
                     "The roots are $\\boxed{-4}$ and $\\boxed{9}$.", "$x = \\boxed{1}$ or $x = \\boxed{2}$"]),
]


@pytest.mark.parametrize("task, text, choices, expected", READ)
def test_what_is_announced_last_is_read_if_it_is_one_value_and_nothing_else(task, text, choices, expected):
    assert read(task, text, choices) == expected


@pytest.mark.parametrize("text, rest", [
    ("no thought", "no thought"), ("<think>a</think>b", "b"), ("a</think>b</think>c", "c"), ("<think>a</think>b<think>c", ""),
    ("<THINKING>a</THINKING> b", " b"), ("<seed:think>a</seed:think>b", "b"), ("<think>", ""), ("", ""), ("a</think>", ""),
    ("I think < 5", "I think < 5"), ("Analysis shows 5", "Analysis shows 5"), ("[THINK]a[/THINK]b", "b"), ("<|START_THINKING|>a", ""),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"), ("<|channel|>analysis<|message|>a", ""),
    ("analysisWe say a.assistantfinalb", "b"), ("analysisWe say a.", "")])
def test_only_what_follows_the_thoughts_is_said(text, rest):
    assert E.after_thought(text) == rest


# ------------------------------------------------------------------------------------------- equality

EQUAL = [  # prediction, answer
    ("1/2", "\\frac{1}{2}"), ("0.5", "\\frac12"), ("\\dfrac{1}{2}", "\\tfrac12"), ("2/3", "\\frac{2}{3}"), ("+7", "7"), ("2^{10}", "1024"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt2}{2}"), ("sqrt(3)/3", "\\frac{1}{\\sqrt{3}}"), ("\\sqrt[3]{8}", "2"), ("3\\cdot10^{4}", "30000"),
    ("11,111,111,100", "11,\\! 111,\\! 111,\\! 100"), ("8880", "8{,}880"), ("\\$15,\\!000", "15000"), ("10 cm", "10\\text{ cm}"),
    ("440", "440\\text{ cm}^2"), ("45", "45^\\circ"), ("30%", "30\\%"), ("x = 5", "5"), ("3\\frac12", "7/2"), ("\\text{(C)}", "C"),
    ("evelyn", "\\text{Evelyn}"), ("(x+1)(x+2)", "x^2+3x+2"), ("y^2 + 2xy + x^2", "(x+y)^2"), ("2, 1", "1,2"), ("\\{3, 5\\}", "5, 3"),
    ("7, -2, and -5", "7, -2, \\text{ and } -5"), ("x=1 or x=2", "1,2"), ("3 + 2\\sqrt{2}, 3 - 2\\sqrt{2}", "3 \\pm 2 \\sqrt{2}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"), ("[0, 1)", "\\left[0,1\\right)"), ("(a,b)=(2,9)", "(2,9)"), ("\\mathbf{46}", "46"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3, \\infty) \\cup (-\\infty, 2)"), ("x \\in [-2,7]", "[-2,7]"), ("e^{i\\pi}", "-1"),
    ("\\begin{pmatrix} 1/2 \\\\ 0 \\end{pmatrix}", "\\begin{bmatrix} \\frac{1}{2} \\\\ 0 \\end{bmatrix}"), ("\\sqrt{1/n}", "\\frac{1}{\\sqrt{n}}"),
    ("\\left[\\begin{array}{cc}1 & 2 \\\\ 3 & 4\\end{array}\\right]", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"), ("y = 3 + 2x", "y=2x+3"),
    ("4210_7", "4210_{7}"), ("4210_{\\text{7}}", "4210_7"), ("\\frac{20}{7} \\approx 2.857", "\\frac{20}{7}"), ("\\text{Yes}", "yes"),
    ("5\\text{ million}", "5 million"), ("\\overline{CD}", "\\overline{CD}"), ("\\sin 3x", "\\sin3x"), ("\\frac{x}{\\frac{1}{y}}", "xy"), ("2\\mathrm{e}", "2e"),
]
DIFFERENT = [
    ("east", "seat"), ("\\text{east}", "\\text{seat}"), ("1 2", "12"), ("5\\text{ feet }30\\text{ inches}", "530"), ("", "0"), ("", ""),
    ("x>1 and x<3", "x>1 or x<3"), ("x>3", "x<3"), ("x>3", "y>3"), ("x=1, y=2", "2"), ("x \\approx 2.857", "\\frac{20}{7}"),
    ("2x + z = 1", "1"), ("(x,y)=(1,2)", "(2,1)"), ("4210_{\\text{8}}", "4210_7"), ("52_9", "52_8"), ("\\frac{20}{7} \\approx 2.857", "2.857"),
    ("1/2", "1/3"), ("4\\sqrt(2)", "4"), ("\\frac{1}{2006!}", "\\frac{1}{2004!}"), ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"), ("2y", "2x"),
    ("1, 2, 3", "2, 3, 4"), ("n=1,2,3", "n=2,3,4"), ("1, 1, 2", "1, 2, 2"), ("1728", "1331, 1728"), ("(0, 1.5)", "(0, 1)"), ("[0,1]", "[0,1)"),
    ("(2,1)", "(1,2)"), ("(1,000)", "1000"), ("2021", "\\pm 2021"), ("1:00", "12:00"), ("9 p.m.", "9\\text{ a.m.}"), ("x^2", "x^3"), ("A", "B"),
    ("\\frac{1}{3 \\cdot 2^{2006}}", "\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}"), ("3x + 4y + 14=0", "3x-y+13=0"), ("x=5", "y=5"), ("2x=10", "x=5"),
    ("0", "x - 3z = 0"), ("1.5", "15"), ("\\text{even}", "\\text{odd}"), ("0.33", "\\frac13"), ("3.14", "\\pi"), ("\\sin x", "\\cos x"),
    ("1000000000000000000000000000000000000001", "1000000000000000000000000000000000000000"), ("\\sin x", "x\\sin"), ("3\\mathbf{i}+4\\mathbf{j}", "7"),
    ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"), ("5 \\text{ or more}", "5"), ("5 or more", "5"),
    *((s, "5") for s in ("5 \\text{ million}", "5 million", "5\\text{ dozen}", "\\text{less than } 5", "\\text{at least }5", "\\text{not } 5",
                         "\\text{negative }5", "\\text{at most }5", "5 hundred", "__import__('os')", "5 if 1 else 5", "5;5", "[5][0]")),
]


@pytest.mark.parametrize("prediction, answer", EQUAL)
def test_equal_mathematics_is_graded_right(prediction, answer):
    assert E.grade("math", prediction, answer) and E.grade("math", answer, prediction)


@pytest.mark.parametrize("prediction, answer", DIFFERENT)
def test_different_mathematics_is_graded_wrong(prediction, answer):
    assert not E.grade("math", prediction, answer) and not E.grade("math", answer, prediction)


@pytest.mark.parametrize("task, prediction, answer, right", [
    ("gsm8k", "18.0", "18", True), ("gsm8k", "137.99999999999997", "138", True), ("gsm8k", "$5", "5", True), ("gsm8k", "1000001", "1000000", False),
    ("gsm8k", "1/3", "0.3333333333", True), ("gsm8k", None, "5", False), ("gsm8k", "70000", "70,000", True), ("gsm8k", "-5", "5", False),
    ("arc", "B", "B", True), ("arc", "B", "(B)", True), ("arc", "A", "B", False), ("arc", None, "B", False), ("strategyqa", "yes", "Yes", True),
    ("math", None, "", False), ("strategyqa", "no", "yes", False)])
def test_grading_compares_values(task, prediction, answer, right):
    assert E.grade(task, prediction, answer) is right


# ------------------------------------------------------------------------------------- whatever a text is

HOSTILE = ["9^{9^{9^{9}}}", "9**9**9**9", "99999!", "(" * 300, "{" * 300 + "}" * 300, "\\frac" * 90, "x^{y^{z^{9999}}}", "\\sqrt" * 99, "0^{-1}",
           "\\tan(\\pi/2)", "1" * 450, "__import__('os')", "\\infty^{\\infty}", "-" * 450, "1," * 200, "x" + "^x" * 200, "\\frac{" * 60, "a0.b1"]


def test_hostile_formulas_are_unequal_and_never_raise_in_any_thread():
    verdicts = {}

    def work():
        verdicts.update({s: (E.grade("math", s, "x+1"), E.grade("math", "2", s)) for s in HOSTILE})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert verdicts == dict.fromkeys(HOSTILE, (False, False))


def test_no_integer_of_a_power_tower_is_computed(monkeypatch):
    powers = []
    monkeypatch.setitem(E.OPERATORS, E.ast.Pow, lambda x, y: powers.append(y) or x**y)
    assert not E.grade("math", "9^{9^{9^{9}}}+1", "9^{9^{9^{9}}}+2") and powers and max(powers) <= 10**4


PIECES = ["\\frac", "{", "}", "(", ")", "[", "]", "^", "_", "\\sqrt", "\\boxed{", "\\boxed{}", "the answer is ", "= ", "\\approx", "<", "\\pm",
          "\\cup", "\\infty", "x", "\\sin", "1", "3.5", "1/2", ",", " or ", " and ", "\\text{", "$", "\\(", "\\)", "\\begin{pmatrix}", "&", "\\\\",
          "|", "!", "%", "**", "\n", "\n\n", "(A)", "B", "yes", "no", "<think>", "</think>", "seven ", "\u2013", "\u00b2", "\ud800", "####",
          "<answer>", "?", ". ", "not ", "lambda", "import os", "\u0663"]


def test_no_garble_raises_and_what_is_read_is_of_the_tasks_kind():
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 40)))
        for task, valid in (("gsm8k", lambda x: E.grade("gsm8k", x, x)), ("math", str.strip), ("strategyqa", {"yes", "no"}.__contains__),
                            ("date", DATES.__contains__)):
            prediction = read(task, text, DATES)
            assert prediction is None or valid(prediction), (task, text, prediction)
            assert E.grade(task, prediction, "x+1") in (True, False) and (task != "math" or E.grade("math", text, text) in (True, False))


# ------------------------------------------------------------------------------------------ real data


def graded(data_dir, name):
    for row in E.read_jsonl(data_dir / "paths" / f"{name}.jsonl"):
        yield row, E.grade(row["task"], read(row["task"], row["path"], row.get("choices")), row["answer"])


def accuracy(verdicts, teacher):
    right = [right for row, right in verdicts if row["teacher"] == teacher]
    return sum(right) / len(right)


def test_grader_agrees_with_the_authors_on_all_gpt3_paths_and_with_the_papers_on_the_rest(data_dir):
    verdicts = list(graded(data_dir, "gsm8k"))
    judged = [(row["source_correct"], right) for row, right in verdicts if re.match("6b_|175b_", row["teacher"])]
    assert len(judged) == 5276 and all(theirs == ours for theirs, ours in judged)
    assert accuracy(verdicts, "human") == 1
    assert accuracy(verdicts, "tora-70b") == pytest.approx(0.843, abs=0.006)  # Gou et al., ToRA
    assert accuracy(verdicts, "tora-code-34b") == pytest.approx(0.807, abs=0.005)
    assert accuracy(verdicts, "gpt3-xl") == pytest.approx(0.407, abs=0.03)  # Kojima et al. take the first number


def test_grader_agrees_with_the_papers_on_date_and_strategyqa(data_dir):
    date, strategyqa = list(graded(data_dir, "date")), list(graded(data_dir, "strategyqa"))
    assert accuracy(date, "code-davinci-002") == pytest.approx(0.872, abs=0.01)  # the BIG-Bench Hard authors' count
    assert accuracy(date, "gpt3-xl") == pytest.approx(0.675, abs=0.01)  # Kojima et al.
    assert accuracy(strategyqa, "gpt3-xl") == pytest.approx(0.548, abs=0.015)
    assert accuracy(strategyqa, "human") == 1


def test_nearly_every_math_solution_is_read_and_every_answer_equals_itself(data_dir):
    solutions = [json.loads(line)["solution"] for line in open(data_dir / "original" / "math_test.jsonl", encoding="utf-8")]
    answers = [last_box(solution) for solution in solutions]
    assert len(answers) == 5000 and all(E.grade("math", answer, answer) for answer in answers)
    assert sum(E.grade("math", read("math", solution), answer) for solution, answer in zip(solutions, answers)) >= 4970


def last_box(solution):
    """The content of a solution's last box: the shortest text in balanced braces."""
    rest = re.split(r"\\(?:boxed|fbox)\s*", solution)[-1]
    ends = (i for i in range(len(rest)) if rest[:i + 1].count("{") == rest[:i + 1].count("}"))
    return rest[1:next(ends)] if rest[0] == "{" else rest[0]


def changed(answer, rng):
    """A MATH answer with one small change that makes it another answer; None if none is at hand."""
    ways = []
    if digits := [m.start() for m in re.finditer(r"(?<![_\d{.])\d|(?<=\{)\d", answer)]:
        i = rng.choice(digits)
        ways.append(f"{answer[:i]}{(int(answer[i]) + rng.randint(1, 8)) % 9 + 1}{answer[i + 1:]}")
    for old, new in (("+", "-"), ("-", "+"), ("\\sqrt", ""), ("<", ">"), ("\\cup", "\\cap"), ("\\pi", ""), ("[", "("), ("x", "y"),
                     ("sin", "cos"), ("^2", "^3"), ("\\frac{1}", "\\frac{2}")):
        ways.append(answer.replace(old, new, 1))
    if re.fullmatch(r"[1-9]\d*", answer):
        ways += ["-" + answer, answer + "0", answer + ".5", f"\\frac{{{answer}}}{{3}}", f"{answer}, {int(answer) + 1}"]
    if (parts := re.fullmatch(r"(\D*?)(-?\d+),\s*(-?\d+)(\D*)", answer)) and parts[2] != parts[3]:
        ways.append(f"{parts[1]}{parts[2]},{parts[2]}{parts[4]}")
    ways = [way for way in ways if way != answer]
    return rng.choice(ways) if ways else None


def rewritten(answer, rng):
    """The same MATH answer written otherwise, in up to three of the ways that fit."""
    ways = [f" {answer}\\, ", f"${answer}$", answer + ".", answer.replace("\\frac", "\\dfrac")]
    if m := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer):
        n, d, k = int(m[2]), int(m[3]), rng.randint(2, 9)
        ways += [f"{m[1]}{n}/{d}", f"{m[1]}\\frac{{{k * n}}}{{{k * d}}}", f"x = {answer}", f"{answer} \\approx {n / d:.4f}"]
    if re.fullmatch(r"\d+", answer):
        n = int(answer)
        ways += [f"{n + 3} - 3", f"\\frac{{{6 * n}}}{{6}}", f"n = {n}", f"{n}.0", f"{n} apples", f"{n}\\text{{ cm}}", f"\\sqrt{{{n * n}}}", f"{n:,}"]
    if re.fullmatch(r"\(-?[^,()]+,-?[^,()]+\)", answer):
        ways += [f"\\left({answer[1:-1]}\\right)", f"(a, b) = {answer}"]
    if re.fullmatch(r"-?\d\d?(?:,\s*-?\d\d?)+", answer):
        parts = re.split(r",\s*", answer)
        ways += [", ".join(reversed(parts)), f"\\{{{answer}\\}}", ", ".join(parts[:-1]) + " and " + parts[-1]]
    if "pmatrix" in answer:
        ways += [answer.replace("pmatrix", "bmatrix")]
    return rng.sample(ways, min(3, len(ways)))


def test_of_the_changed_math_answers_one_in_five_hundred_is_accepted_and_nearly_all_rewritings_are_equal(data_dir):
    solutions = [json.loads(line)["solution"] for line in open(data_dir / "original" / "math_test.jsonl", encoding="utf-8")]
    answers, rng = [last_box(solution) for solution in solutions], random.Random(0)
    others = [(other, answer) for answer in answers if (other := changed(answer, rng)) is not None]
    accepted = [pair for pair in others if E.grade("math", *pair)]
    assert len(others) > 4442 and len(accepted) <= 8, accepted
    equal = [(other, answer) for answer in rng.sample(answers, 1000) for other in rewritten(answer, rng)]
    missed = [pair for pair in equal if not E.grade("math", *pair)]
    assert len(equal) > 2900 and len(missed) < len(equal) / 100, missed[:9]
