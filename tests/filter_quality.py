"""How good the two filters are where the truth is known, printed by one command:

    python tests/filter_quality.py                     # needs QRD_DATA (paths/gsm8k.jsonl) and QRD_MODELS (smollm2/)
    python tests/filter_quality.py --judge MODEL@URL   # another judge

Step 1 against the authors' own verdict on GPT-3 paths; step 2 on canaries, and on the demo teacher's own truth.
"""
import argparse
import json
import os
import sys
import tempfile
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import judge

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--judge", default=os.path.join(os.environ.get("QRD_MODELS", "."), "smollm2"), help="the LLM judge")
parser.add_argument("--canaries", default="8", help="bad and good paths that it is tested on")
parser.add_argument("--rows", type=int, default=8, help="real right-answer paths that it judges as well")
args = parser.parse_args()
pool = os.path.join(os.environ.get("QRD_DATA", "."), "paths", "gsm8k.jsonl")


def command(*argv):
    print("\n$ python judge.py", *argv)
    sys.argv = ["judge.py", *argv]
    judge.main()


rows = judge.grade_paths([row for row in judge.read_pool(pool) if row.get("source_correct") is not None])
counts = Counter((row["correct"], row["source_correct"]) for row in rows)
print(f"step 1 against source_correct on {len(rows)} paths: both right {counts[True, True]}, both wrong {counts[False, False]}, "
      f"wrongly kept {counts[True, False]}, wrongly dropped {counts[False, True]}")

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    command("--demo", "400", "--judge", "rule", "--canaries", "200", "--out", "demo.jsonl")
    right = [row for row in judge.read_pool("demo.jsonl") if row["correct"]]
    counts = Counter((row["valid"], row["source_valid"]) for row in right)
    print(f"rule judge against the demo teacher's truth on {len(right)} right answers: wrongly kept {counts[True, False]}, "
          f"wrongly dropped {counts[False, True]}")
    with open("real.jsonl", "w", encoding="utf-8") as file:
        some = [row for row in rows if row["correct"]][::max(1, 2000 // args.rows)][:args.rows]
        file.writelines(json.dumps(row) + "\n" for row in some)
    command("--paths", "real.jsonl", "--judge", args.judge, "--canaries", args.canaries, "--max_new_tokens", "200",
            "--out", "judged.jsonl")
