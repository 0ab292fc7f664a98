"""python eval.py --plot: what is drawn is what the run folders say."""
import json
import statistics
import sys

import pytest

import eval as E

pytest.importorskip("matplotlib")
NAN = float("nan")


def step(number, loss, rate, style, **more):
    """A line of log.jsonl with two students, as far as it is drawn."""
    return {"step": number, "loss": loss, "rate": rate, "rate_style": style, **more}


LOG = [step(1, [2.0, 3.0], [1.0, 1.0], {"program": [0.2, 0.8], "vanilla": [0.6, 0.4]}),
       step(2, [1.5, 0.0], [0.5, 0.0], {"program": [0.4, 1.0]})]


def write_run(folder, log=LOG, accuracy=(0.5, 0.25), ensemble=0.75, **args):
    folder.mkdir()
    folder.joinpath("args.json").write_text(json.dumps(
        {"students": None, "route": "learned", "max_steps": None, "seed": 0, "out_dir": str(folder), **args}))
    folder.joinpath("log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    if accuracy:
        folder.joinpath("results.json").write_text(json.dumps({
            "before": {"accuracy": [0.1, 0.2], "ensemble": 0.2}, "after": {"accuracy": list(accuracy), "ensemble": ensemble},
            "counts": {"steps": len(log)}}))
    return str(folder)


def drawn(ax):
    """{label: (x, y)} of the lines in a panel, its marks aside."""
    return {line.get_label(): (list(line.get_xdata()), pytest.approx(list(line.get_ydata()), nan_ok=True)) for line in ax.get_lines()
            if line.get_label()[0] != "_"}


def panels(folder):
    return {ax.get_title(): ax for ax in E.draw_run(E.read_run(folder)).axes}


def test_losses_and_selection_rates_are_the_logs_per_style_and_student(tmp_path):
    axes = panels(write_run(tmp_path / "run", students=["org/small", "folders/large/"]))
    assert list(axes) == ["loss", "selection rates of student 0 (small)", "selection rates of student 1 (large)"]
    loss, first, second = (drawn(ax) for ax in axes.values())
    assert loss == {"student 0 (small)": ([1, 2], [2.0, 1.5]), "student 1 (large)": ([1, 2], [3.0, NAN])}  # no path: no loss
    assert first == {"program": ([1, 2], [0.2, 0.4]), "vanilla": ([1, 2], [0.6, NAN])}
    assert second == {"program": ([1, 2], [0.8, 1.0]), "vanilla": ([1, 2], [0.4, NAN])}


def test_accuracy_is_drawn_from_before_to_after_if_it_was_measured(tmp_path):
    log = [step(i, [1, 1], [1, 1], {"program": [1, 1]}, **({"accuracy": [i / 10, 0.3]} if i % 2 == 0 else {})) for i in range(1, 5)]
    axes = panels(write_run(tmp_path / "run", log))
    assert drawn(axes["accuracy"]) == {"student 0 (demo)": ([0, 2, 4], [10, 20, 50]), "student 1 (demo)": ([0, 2, 4], [20, 30, 25])}
    running = panels(write_run(tmp_path / "running", log, accuracy=None))
    assert drawn(running["accuracy"])["student 0 (demo)"] == ([2, 4], [20, 40])


def test_lines_are_a_centred_mean_that_skips_what_is_unknown():
    values = [0.0, 0.3, None, 0.9, 0.6] * 6  # 30 steps: a window of three
    smooth = E.running_mean(values)
    assert list(smooth[:5]) == pytest.approx([0.15, 0.15, 0.6, 0.75, 0.5]) and len(smooth) == 30
    assert list(E.running_mean([0.5, None])) == pytest.approx([0.5, NAN], nan_ok=True)


def test_every_line_looks_different_without_colour():
    """Up to eight styles by their marker alone, up to 56 by colour, dashes and marker."""
    assert len({look["marker"] for look in E.LOOKS[:8]}) == 8
    assert len({tuple(look.values()) for look in E.LOOKS}) == 56


def test_runs_are_compared_by_the_flags_that_differ_with_mean_and_deviation_over_seeds(tmp_path):
    accuracy = {("all", 0): 0.10, ("all", 1): 0.20, ("all", 2): 0.24, ("learned", 0): 0.5}
    runs = [E.read_run(write_run(tmp_path / f"{route}-{seed}", route=route, seed=seed, accuracy=[x, 0.05], ensemble=x + 0.1))
            for (route, seed), x in accuracy.items()]
    [ax] = E.draw_comparison(E.by_flags(runs)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["route all\n3 runs", "route learned\n1 run"]
    for name, shift in (("student 0", 0), ("ensemble", 10)):
        [(line, _, [bars])] = [c.lines for c in ax.containers if c.get_label() == name]
        mean, spread = statistics.mean([10, 20, 24]) + shift, statistics.stdev([10, 20, 24])
        assert list(line.get_xdata()) == pytest.approx([mean, 50 + shift])
        assert [list(x[:, 0]) for x in bars.get_segments()] == [pytest.approx([mean - spread, mean + spread]),
                                                                pytest.approx([50 + shift] * 2)]  # one run: no spread


def test_pictures_go_into_each_run_and_the_comparison_into_the_first(tmp_path, capsys):
    folders = [write_run(tmp_path / "a", tau=0.5), write_run(tmp_path / "b"), write_run(tmp_path / "killed", accuracy=None)]
    E.plot(folders)
    said = capsys.readouterr().out
    pictures = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert pictures == {"a/training.png", "b/training.png", "killed/training.png", "a/comparison.png"}
    assert all(str(tmp_path / name) in said for name in pictures)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "killed has no results.json" in said


def test_a_dollar_in_a_name_is_no_formula(tmp_path, capsys):
    log = [step(1, [2.0, 3.0], [1.0, 1.0], {"$_$": [0.2, 0.8]})]
    E.plot([write_run(tmp_path / f"run $_{i}$", log, students=["a $^$", "b"], route=f"$_{i}^$") for i in range(2)])
    assert len(list(tmp_path.rglob("*.png"))) == 3


def test_a_run_that_is_named_twice_is_one_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    E.plot([folder, folder + "/", str(tmp_path / "link")])
    assert not list(tmp_path.rglob("comparison.png"))


@pytest.mark.parametrize("file, text, complaint", [
    ("args.json", None, "args.json"),
    ("args.json", "[]", "args.json"),
    ("args.json", "{", "args.json"),
    ("results.json", '{"before": 1}', "results.json"),
    ("results.json", '{"before": {}, "after": {"accuracy": ["much"], "ensemble": 1}}', "results.json"),
    ("log.jsonl", None, "log.jsonl"),
    ("log.jsonl", "", "log.jsonl"),
    ("log.jsonl", json.dumps(LOG[0]) + '\n{"step": 2, "ra', "log.jsonl:2"),
    ("log.jsonl", json.dumps(LOG[0]) + '\n{"step": 2}', "log.jsonl:2"),
    ("log.jsonl", json.dumps(LOG[0]) + "\n\n" + json.dumps(step(2, [1], [1], {})), "log.jsonl:3"),
    ("log.jsonl", json.dumps(step(1, [1, 1], [1, 1], {"vanilla": ["much", 0.5]})), "log.jsonl:1"),
    ("log.jsonl", json.dumps(step(1, [1, 1], [1, 1], {}, accuracy=[1])), "log.jsonl:1"),
])
def test_what_is_no_run_ends_with_one_sentence(tmp_path, capsys, file, text, complaint):
    write_run(tmp_path / "run")
    (tmp_path / "run" / file).unlink() if text is None else (tmp_path / "run" / file).write_text(text)
    assert complaint in complaint_of(["--plot", str(tmp_path / "run")], capsys)
    assert not list(tmp_path.rglob("*.png"))


def complaint_of(argv, capsys):
    """The one line on stderr with which eval.py ends."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, "argv", ["eval.py", *argv])
        E.main()
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_a_folder_that_is_not_there_and_missing_flags_end_with_one_sentence(tmp_path, capsys):
    assert "nowhere" in complaint_of(["--plot", str(tmp_path / "nowhere")], capsys)
    for argv in ([], ["--students", "a"], ["--questions", "q"]):
        assert all(flag in complaint_of(argv, capsys) for flag in ("--students", "--questions", "--plot"))
    for argv in (["--plot", ""], ["--questions", " ", "--students", "a"], ["--questions", "q", "--students", ""]):
        assert "empty" in complaint_of(argv, capsys)


def test_a_picture_that_cannot_be_written_ends_with_one_sentence(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (tmp_path / "run" / "training.png").mkdir()
    assert "cannot write" in complaint_of(["--plot", folder], capsys)


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in complaint_of(["--plot", write_run(tmp_path / "run")], capsys)
