"""python eval.py --plot: what is drawn is what the run folders say."""
import json
import statistics
import sys

import pytest

import eval as E

pytest.importorskip("matplotlib")
NAN = float("nan")


def step(number, rate, loss):
    """A line of log.jsonl with two students, as far as it is drawn."""
    return {"step": number, "rate": [0.5, 0.5], "rate_style": rate, "loss_style": loss}


LOG = [step(1, {"program": [0.2, 0.8], "vanilla": [0.6, 0.4]}, {"program": [3.0, 2.0], "vanilla": [1.0, 4.0]}),
       step(2, {"program": [0.4, 1.0], "vanilla": [0.0, 0.5]}, {"program": [2.5, 1.5], "vanilla": [0.0, 3.0]})]


def write_run(folder, log=LOG, accuracy=(0.5, 0.25), ensemble=0.75, **args):
    folder.mkdir()
    folder.joinpath("args.json").write_text(json.dumps(
        {"students": None, "route": "learned", "train_frac": 1.0, "seed": 0, "out_dir": str(folder), **args}))
    folder.joinpath("log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    if accuracy:
        folder.joinpath("results.json").write_text(
            json.dumps({"after": {"accuracy": list(accuracy), "ensemble": ensemble}}))
    return str(folder)


def drawn(ax):
    """{label: (x, y)} of the lines in a panel."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()
            if line.get_label()[0] != "_"}


def test_selection_rates_over_training_are_the_logs_per_style_and_student(tmp_path):
    figure = E.draw_training(E.read_run(write_run(tmp_path / "mine", seed=7)), "rate_style")
    first, second = figure.axes
    assert drawn(first) == {"program": ([1, 2], [0.2, 0.4]), "vanilla": ([1, 2], [0.6, 0.0])}
    assert drawn(second) == {"program": ([1, 2], [0.8, 1.0]), "vanilla": ([1, 2], [0.4, 0.5])}
    assert [ax.get_title() for ax in figure.axes] == ["student 0 (demo)", "student 1 (demo)"]
    assert "mine" in figure.get_suptitle() and "seed 7" in figure.get_suptitle()


def test_panels_are_named_after_the_students(tmp_path):
    run = E.read_run(write_run(tmp_path / "run", students=["org/small", "folders/large/"]))
    assert [ax.get_title() for ax in E.draw_training(run, "loss_style").axes] == ["student 0 (small)", "student 1 (large)"]


def test_a_style_that_no_student_was_given_has_no_loss(tmp_path):
    first, second = E.draw_training(E.read_run(write_run(tmp_path / "run")), "loss_style").axes
    assert drawn(second) == {"program": ([1, 2], [2.0, 1.5]), "vanilla": ([1, 2], [4.0, 3.0])}
    assert drawn(first)["program"] == ([1, 2], [3.0, 2.5])
    assert drawn(first)["vanilla"][1] == pytest.approx([1.0, NAN], nan_ok=True)  # the log's 0, at rate 0, is no loss


def test_levels_are_drawn_where_the_log_has_them(tmp_path):
    without, with_levels = tmp_path / "a", tmp_path / "b"
    log = [{**row, "rate_level": {"3": [0.25, 0.5], "Level 5": [1.0, 0.0]}} for row in LOG]
    E.plot([write_run(without), write_run(with_levels, log)])
    assert not (without / "rate_level.png").exists() and (with_levels / "rate_level.png").exists()
    first, second = E.draw_training(E.read_run(str(with_levels)), "rate_level").axes
    assert drawn(first) == {"level 3": ([1, 2], [0.25, 0.25]), "Level 5": ([1, 2], [1.0, 1.0])}
    assert drawn(second)["Level 5"] == ([1, 2], [0.0, 0.0])


def test_lines_are_a_centred_mean_that_skips_steps_without_the_style():
    rates = [0.0, 0.3, None, 0.9, 0.6]  # the third step has no path of this style
    log = [step(i, {} if rate is None else {"program": [rate, 1.0]}, {}) for i, rate in enumerate(rates)]
    smooth = E.curves(log, "rate_style", 3)["program"]
    assert smooth[:, 0] == pytest.approx([0.15, 0.15, 0.6, 0.75, 0.75])
    assert smooth[:, 1] == pytest.approx([1.0] * 5)


def test_every_line_looks_different_without_colour():
    """Up to eight styles by their marker alone, up to 56 by colour, dashes and marker."""
    assert len({look["marker"] for look in E.LOOKS[:8]}) == 8
    assert len({tuple(look.values()) for look in E.LOOKS}) == 56


def test_accuracy_against_data_is_mean_and_standard_deviation_over_seeds(tmp_path):
    accuracy = {(0.25, 0): 0.10, (0.25, 1): 0.20, (0.25, 2): 0.24, (1.0, 0): 0.5}
    runs = [E.read_run(write_run(tmp_path / f"{share}-{seed}", train_frac=share, seed=seed, accuracy=[x, 0.05],
                                 ensemble=x + 0.1)) for (share, seed), x in accuracy.items()]
    [ax] = E.draw_share(E.by_flags(runs, "train_frac")).axes
    for name, shift in (("student 0", 0), ("ensemble", 10)):
        [(line, _, [bars])] = [c.lines for c in ax.containers if c.get_label() == name]
        mean, spread = statistics.mean([10, 20, 24]) + shift, statistics.stdev([10, 20, 24])
        assert list(line.get_xdata()) == [25, 100] and list(line.get_ydata()) == pytest.approx([mean, 50 + shift])
        assert [list(x[:, 1]) for x in bars.get_segments()] == [pytest.approx([mean - spread, mean + spread]),
                                                                pytest.approx([50 + shift] * 2)]  # one run: no spread


def test_pictures_go_into_each_run_and_the_comparison_into_the_first(tmp_path, capsys):
    folders = [write_run(tmp_path / "a", train_frac=0.5), write_run(tmp_path / "b"),
               write_run(tmp_path / "killed", accuracy=None)]
    E.plot(folders)
    said = capsys.readouterr().out
    pictures = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert pictures == {*(f"{run}/{name}.png" for run in ("a", "b", "killed") for name in ("rate_style", "loss_style")),
                        "a/train_frac.png"}
    assert all(str(tmp_path / name) in said for name in pictures)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "killed has no results.json" in said


@pytest.mark.parametrize("file, text, complaint", [
    ("args.json", None, "args.json"),
    ("args.json", "[]", "args.json"),
    ("args.json", "{", "args.json"),
    ("results.json", '{"before": 1}', "results.json"),
    ("log.jsonl", None, "log.jsonl"),
    ("log.jsonl", "", "log.jsonl"),
    ("log.jsonl", json.dumps(LOG[0]) + '\n{"step": 2, "ra', "log.jsonl:2"),
    ("log.jsonl", json.dumps(LOG[0]) + '\n{"step": 2}', "log.jsonl:2"),
    ("log.jsonl", json.dumps(LOG[0]) + "\n\n" + json.dumps(step(2, {"vanilla": [0.5]}, {})), "log.jsonl:3"),
    ("log.jsonl", json.dumps(step(1, {"vanilla": ["much", 0.5]}, {})), "log.jsonl:1"),
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


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in complaint_of(["--plot", write_run(tmp_path / "run")], capsys)
