"""Claims about tests/experiments: what a gain is, and that the committed tables are those of the committed lines."""
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


def line(row, seed, accuracy, tokens=(100, 100), compared=None):
    return {"row": row, "seed": seed, "accuracy": accuracy, "tokens": tokens, "compared": compared}


@pytest.mark.parametrize("seeds", [3, 5, 15])
def test_intervals_hold_the_true_mean_in_95_of_100_samples(seeds):
    draws = np.random.default_rng(0).normal(1.0, 3.0, (4000, seeds))
    holds = [abs(mean - 1) <= half for mean, half in map(tables.interval, draws.tolist())]
    assert statistics.mean(holds) == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_gain_is_that_of_the_reference_in_the_compared_students_over_equal_seeds():
    better = {seed: line("a", seed, [0.5 + seed / 100, 0.3]) for seed in (1, 2, 3)}
    worse = {seed: line("b", seed, [0.4 + seed / 100, 0.2]) for seed in (2, 3, 4)}
    assert tables.gain(worse, better) == pytest.approx((10, 0), abs=1e-9)
    assert tables.gain({4: worse[4]}, better) is None
    assert tables.gain({1: line("b", 1, [0.1, 0.2], compared=[1])}, better)[0] == pytest.approx(10)


@pytest.mark.parametrize("table", rows.TABLES)
def test_every_row_has_its_place_and_its_reference_in_the_table(table):
    some = rows.rows_of(table, judge.STYLES)
    assert {row.against for row in some} <= {row.name for row in some}
    assert all(rows.place(table, row.name) < len(rows.TABLES[table]) for row in some)


def test_equal_tokens_scale_the_questions_of_a_step_and_then_the_steps():
    args = argparse.Namespace(students=None, paths=None, more=[], steps=150, batch_size=8, seeds=[1])
    lines = [line(rows.FULL, 1, [0, 0]), line(rows.ALL.name, 1, [0, 0], tokens=(300, 340))]
    [(flags, _)] = grid.scaled_jobs(args, [rows.Row(rows.FULL), rows.ALL], lines)
    steps, batch_size = (int(flags[flags.index(flag) + 1]) for flag in ("--max_steps", "--batch_size"))
    assert steps * batch_size / (150 * 8) * 640 == pytest.approx(200, rel=0.02)


@pytest.mark.parametrize("table", [name for name in rows.TABLES if tables.read_lines(name)])
def test_committed_tables_are_those_of_the_committed_lines(table):
    assert (tables.RESULTS / f"{table}.md").read_text() == tables.markdown(table)
    for text in map(json.dumps, tables.read_lines(table)):
        assert not re.search(r"(?<![\w.])/\w+/", text), "a line names a folder of some machine"
