"""How good the two filters are where the truth is known, printed by one command:

    python tests/experiments/filter_quality.py                     # needs QRD_DATA and QRD_MODELS
    python tests/experiments/filter_quality.py --judge MODEL@URL   # another judge than smollm2

Step 1 against the authors' own verdict on GPT-3 paths (paths/gsm8k.jsonl); step 2 on canaries, and on
the demo teacher's own truth.
"""
import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as tasks
import judge


def command(*argv):
    """Run judge.py with these arguments, in this process."""
    print("\n$ python judge.py", *argv)
    sys.argv = ["judge.py", *argv]
    judge.main()


def four_counts(rows, ours, truth):
    """'both right N, both wrong N, wrongly kept N, wrongly dropped N' of two fields of the rows."""
    counts = Counter((bool(row[ours]), bool(row[truth])) for row in rows)
    return (f"{len(rows)} paths: both right {counts[True, True]}, both wrong {counts[False, False]}, "
            f"wrongly kept {counts[True, False]}, wrongly dropped {counts[False, True]}")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    models = os.environ.get("QRD_MODELS", ".")
    p.add_argument("--judge", default=os.path.join(models, "smollm2"), help="(smollm2)")
    p.add_argument("--canaries", default="8", help="bad and good paths that it is tested on (8)")
    p.add_argument("--rows", type=int, default=8, help="right real paths that it judges as well (8)")
    return p.parse_args()


def main():
    args = parse_args()
    pool = Path(os.environ.get("QRD_DATA", ".")) / "paths" / "gsm8k.jsonl"
    known = [row for row in judge.read_pool(pool) if row.get("source_correct") is not None]
    rows = judge.grade_paths(known)
    print("step 1 against the authors:", four_counts(rows, "correct", "source_correct"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        command("--demo", "400", "--judge", "rule", "--canaries", "200", "--out", "demo.jsonl")
        right = [row for row in judge.read_pool("demo.jsonl") if row["correct"]]
        print("rule judge against the demo's truth, right answers:",
              four_counts(right, "valid", "source_valid"))
        right = [row for row in rows if row["correct"]]
        some = right[::max(1, len(right) // args.rows)][:args.rows]
        Path("real.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        command("--paths", "real.jsonl", "--judge", args.judge, "--canaries", args.canaries,
                "--max_new_tokens", "200", "--out", "judged.jsonl")


if __name__ == "__main__":
    main()
