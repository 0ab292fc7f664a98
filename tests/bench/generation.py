"""Answers written in a second: ours against transformers' generate, in float32 and bfloat16.

    python tests/bench/generation.py --model FOLDER [--rows 1 8 32 128] [--questions FILE]

Both sides write greedy answers of up to --new tokens to the same questions in one process, turn and
turn about: ours with its batch kept full, generate in batches of as many rows in the file's order,
left-padded. Printed are new tokens a second (medians) and their ratio.
"""
import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import torch

import eval as tasks

QUESTIONS = [{"task": "gsm8k", "question": f"Ann has {n} apples and eats {n // 3} of them. Then {n % 7} friends "
              f"bring her {n % 5} each. How many has she now?"} for n in range(10, 600)]


def ours(model, tokenizer, prompts, rows, new):
    """-> tokens written, seconds until the first answer"""
    began, first = time.perf_counter(), []
    answers = tasks.generate(model, tokenizer, prompts, new, rows, dtype=model.dtype,
                             done=lambda *_: first.append(time.perf_counter() - began))
    return sum(answer["tokens"] for [answer] in answers), first[0]


def theirs(model, tokenizer, prompts, rows, new):
    """-> tokens written up to each answer's end, seconds until the first answers"""
    ends, began, first = tasks.end_tokens(model, tokenizer), time.perf_counter(), []
    written = 0
    for start in range(0, len(prompts), rows):
        batch = prompts[start:start + rows]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=model.device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new,
                                 do_sample=False, eos_token_id=sorted(ends), pad_token_id=0)
        for answer in out[:, longest:].tolist():
            written += next((n for n, t in enumerate(answer, 1) if t in ends), len(answer))
        first.append(time.perf_counter() - began)
    return written, first[0]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", required=True, metavar="FOLDER")
    p.add_argument("--questions", metavar="FILE", help="(made-up ones)")
    p.add_argument("--limit", type=int, metavar="N", help="questions (the rows, at least 32)")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--new", type=int, default=100, metavar="N", help="longest answer (100)")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--only_ours", action="store_true")
    args = p.parse_args()
    questions = tasks.read_questions(args.questions) if args.questions else QUESTIONS
    sides = [ours] if args.only_ours else [ours, theirs]
    print(f"{torch.get_num_threads()} threads, own bfloat16: {tasks.has_bfloat16()}")
    for dtype in args.dtypes:
        model, tokenizer = tasks.load_student(args.model, "cpu", getattr(torch, dtype))
        for rows in args.rows:
            some = questions[:args.limit or max(rows, 4 if rows == 1 else 32)]
            prompts = [tasks.encode_prompt(tokenizer, tasks.student_prompt(row)) for row in some]
            rates, waits = [[] for _ in sides], [[] for _ in sides]
            for _ in range(args.repeats):
                for side, rate, wait in zip(sides, rates, waits):
                    began = time.perf_counter()
                    written, first = side(model, tokenizer, prompts, rows, args.new)
                    rate.append(written / (time.perf_counter() - began))
                    wait.append(first)
            median = [statistics.median(rate) for rate in rates]
            text = "  ".join(f"{side.__name__} {rate:7.1f} tokens/s, the first after "
                             f"{statistics.median(wait):5.1f} s"
                             for side, rate, wait in zip(sides, median, waits))
            ratio = f"  ratio {median[0] / median[1]:.2f}" if len(sides) > 1 else ""
            print(f"{dtype:8}  {rows:3} rows, {len(prompts)} questions: {text}{ratio}", flush=True)


if __name__ == "__main__":
    main()
