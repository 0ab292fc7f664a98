"""What qr_distill.yaml calls: eval.py's questions, prompts and grading inside lm-evaluation-harness."""
import json
import sys
from pathlib import Path

import datasets

sys.path.append(str(Path(__file__).resolve().parents[3]))
import eval as tasks


def load(questions, chat=False, **_):
    """The test split of a file that eval.py reads. chat: a chat turn has no spaces around it, as in
    eval.encode_prompt; without a chat template the prompt ends in its newline."""
    rows = []
    for row in tasks.read_questions(questions):
        prompt = tasks.student_prompt(row)
        rows.append({"prompt": prompt.strip() if chat else prompt, "answer": row["answer"],
                     "row": json.dumps(row)})
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc, results):
    """Grade a response as eval.py does: up to its first "The answer is ...", where ours stops."""
    row, text = json.loads(doc["row"]), results[0]
    asked = tasks.ASKED[tasks.TASKS[row["task"]]].search(text)
    text = text[:asked.end()] if asked else text
    prediction = tasks.extract_answer(row["task"], text, row.get("choices"))
    right = tasks.grade(row["task"], prediction, row["answer"])
    return {"accuracy": float(right), "unparsed": float(prediction is None)}
