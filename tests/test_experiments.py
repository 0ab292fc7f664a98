"""Claims about tests/experiments: what a line holds, what a gain is, and that the committed tables are the lines'."""
import argparse
import json
import re
import statistics

import grid
import numpy as np
import pytest
import rows
import tables

import judge


def line(row, seed, accuracy, budget="steps", against=rows.FULL, tokens=(100, 100), compared=None):
    return {"row": row, "against": against, "budget": budget, "seed": seed, "accuracy": accuracy, "tokens": list(tokens),
            "compared": compared, "setting": "s", "versions": {"commit": "c"}, "seconds": 1.0, "questions": 10, "ensemble": 0.5,
            "upper_bound": 0.5, "before": {"accuracy": [0, 0], "ensemble": 0, "upper_bound": 0}, "rate": {}}


@pytest.mark.parametrize("seeds", [3, 5, 15])
def test_intervals_hold_the_true_mean_in_95_of_100_samples(seeds):
    draws = np.random.default_rng(0).normal(1.0, 3.0, (4000, seeds))
    holds = [abs(mean - 1) <= half for mean, half in map(tables.interval, draws.tolist())]
    assert statistics.mean(holds) == pytest.approx(0.95, abs=0.012)


def test_gain_is_positive_where_the_reference_is_better_and_pairs_equal_seeds_only():
    better = {seed: line(rows.FULL, seed, [0.5 + seed / 100, 0.3]) for seed in (1, 2, 3)}
    worse = {seed: line("x", seed, [0.4 + seed / 100, 0.2]) for seed in (2, 3, 4)}
    mean, half = tables.gain(worse, better)
    assert mean == pytest.approx(10) and half == pytest.approx(0, abs=1e-9)
    assert tables.gain({4: worse[4]}, better) is None


def test_gain_is_that_of_the_compared_students():
    full = {1: line(rows.FULL, 1, [0.9, 0.3])}
    assert tables.gain({1: line("x", 1, [0.1, 0.2], compared=[1])}, full)[0] == pytest.approx(10)


def test_best_single_style_is_the_one_with_the_highest_mean_at_that_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed in (1, 2):
        tables.append_line("main", line(rows.FULL, seed, [0.5, 0.5]))
        for style, steps, tokens in (("a", 0.6, 0.2), ("b", 0.4, 0.7)):
            few = (50, 50)
            tables.append_line("main", line(f"only {style}", seed, [steps, steps], "steps", tokens=few))
            tables.append_line("main", line(f"only {style}", seed, [tokens, tokens], "tokens"))
    [cells] = tables.settings_of("main").values()
    best = {budget: (row, gain[0]) for row, budget, _, gain in tables.comparisons(cells) if tables.BEST in row}
    assert best == {"steps": (f"{tables.BEST} (a)", pytest.approx(-10)), "tokens": (f"{tables.BEST} (b)", pytest.approx(-20))}


def test_every_reference_is_a_row_of_its_table_and_every_row_has_its_place():
    for table in rows.TABLES:
        some = rows.rows_of(table, judge.STYLES)
        assert {row.against for row in some} <= {row.name for row in some}
        places = [rows.place(table, row.name) for row in some]
        assert len(rows.TABLES[table]) not in places and set(places) == set(range(len(rows.TABLES[table])))


def test_a_line_names_files_and_no_folder(tmp_path):
    for name in ("pool.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    for name in ("a", "b", "encoder"):
        (tmp_path / name).mkdir()
    args = argparse.Namespace(students=[f"{tmp_path}/a/", f"{tmp_path}/b"], paths=f"{tmp_path}/pool.jsonl", steps=5,
                              eval_questions=f"{tmp_path}/test.jsonl", batch_size=2, more=["--encoder", f"{tmp_path}/encoder"])
    flags, begun = grid.job_of(args, rows.Row(rows.FULL), "steps", 1, 5, 2)
    assert str(tmp_path) in " ".join(flags) and "/" not in json.dumps(begun)
    assert begun["flags"].startswith("--students a b --paths pool.jsonl --eval_questions test.jsonl --seed 1")
    (tmp_path / "pool.jsonl").write_text("{} ")
    assert grid.key_of(grid.job_of(args, rows.Row(rows.FULL), "steps", 1, 5, 2)[1]) != grid.key_of(begun)


def test_equal_tokens_scale_the_questions_of_a_step_and_then_the_steps():
    args = argparse.Namespace(students=None, paths=None, more=[], steps=150, batch_size=8, seeds=[1])
    lines = [line(rows.FULL, 1, [0, 0], tokens=(100, 100)), line("all paths to both", 1, [0, 0], tokens=(300, 340))]
    [(flags, _)] = grid.scaled_jobs(args, [rows.Row(rows.FULL), rows.ALL], lines)
    steps, batch_size = (int(flags[flags.index(flag) + 1]) for flag in ("--max_steps", "--batch_size"))
    assert steps * batch_size / (150 * 8) * 640 == pytest.approx(200, rel=0.02)


@pytest.mark.parametrize("table", [name for name in rows.TABLES if (tables.RESULTS / f"{name}.jsonl").exists()])
def test_committed_tables_are_those_of_the_committed_lines(table):
    assert (tables.RESULTS / f"{table}.md").read_text() == tables.markdown(table)
    assert not re.search(r"(?<![\w.])/\w+/", (tables.RESULTS / f"{table}.jsonl").read_text())
