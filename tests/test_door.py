"""Claims about what a run does with damage: of its folder, its numbers, its processes. One sentence, exit code 2."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import transformers
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_distill import (  # noqa: F401
    ROOT,
    Killed,
    die_after,
    files_of,
    flags_of,
    one_thread,
    refused,
    same_run,
    tiny_model,
    train,
    world,
    write_jsonl,
)

import distill

SHORT = "--max_steps", 4, "--save_every", 2


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):  # noqa: F811
    """A run that was killed in its fourth step, and the run that nobody killed."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "router_step", 4)
        distill.main(flags_of(world, folder / "killed", *SHORT))
    distill.main(flags_of(world, folder / "whole", *SHORT))
    return folder


def another_step(out):
    with safe_open(out / "checkpoint.safetensors", "pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["run"])  # noqa: SIM118
    return tensors, meta


def other_weights(out):
    tensors, meta = another_step(out)
    tensors["router.net.weight"] = torch.zeros(3, 3)
    save_file(tensors, out / "checkpoint.safetensors", {"run": json.dumps(meta)})


def fewer_weights(out):
    tensors, meta = another_step(out)
    del tensors["collab.w"]
    save_file(tensors, out / "checkpoint.safetensors", {"run": json.dumps(meta)})


def another_run(out):
    tensors, meta = another_step(out)
    save_file(tensors, out / "checkpoint.safetensors", {"run": json.dumps({**meta, "digest": "x"})})


def cut(name, share):
    def damage(out):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:int(share * len(whole))])
    return damage


def flags(change):
    def damage(out):
        args = json.loads((out / "args.json").read_text())
        change(args)
        (out / "args.json").write_text(json.dumps(args))
    return damage


DAMAGE = {
    "checkpoint cut": (cut("checkpoint.safetensors", 0.5), "checkpoint"),
    "checkpoint empty": (cut("checkpoint.safetensors", 0), "checkpoint"),
    "checkpoint is text": (lambda out: (out / "checkpoint.safetensors").write_text("hello" * 99), "checkpoint"),
    "checkpoint with another shape": (other_weights, "checkpoint"),
    "checkpoint that lacks a tensor": (fewer_weights, "checkpoint"),
    "another run's checkpoint": (another_run, "have changed"),
    "log torn": (cut("log.jsonl", 0.3), "log"),
    "log gone": (lambda out: (out / "log.jsonl").unlink(), "log"),
    "log of garbage": (lambda out: (out / "log.jsonl").write_text("x\n" * 9), "log"),
    "flags are a list": (lambda out: (out / "args.json").write_text("[1]"), "args.json"),
    "flags lack one": (flags(lambda args: args.pop("reward")), "--reward"),
    "flags gone": (lambda out: (out / "args.json").unlink(), "args.json"),
    "pool shorter": (flags(lambda args: args.update(train_frac=0.5)), "changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_run_folder_is_refused_in_one_sentence(killed, tmp_path, capsys, kind):
    damage, says = DAMAGE[kind]
    shutil.copytree(killed / "killed", tmp_path / "run")
    damage(tmp_path / "run")
    assert says in refused(capsys, ["--resume", tmp_path / "run"])


def test_torn_line_after_the_checkpoint_is_done_again(killed, tmp_path):
    shutil.copytree(killed / "killed", tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    distill.main(["--resume", str(tmp_path / "run")])
    same_run(files_of(tmp_path / "run"), files_of(killed / "whole"))


def test_run_resumes_from_another_working_directory(world, tmp_path, monkeypatch, killed):  # noqa: F811
    monkeypatch.chdir(pathlib.Path(world.pool).parent)
    flags = [x.replace(world.pool, "pool.jsonl") for x in flags_of(world, tmp_path / "run", *SHORT)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "router_step", 4)
        distill.main(flags)
    monkeypatch.chdir(tmp_path)
    distill.main(["--resume", "run"])
    same_run(files_of(tmp_path / "run"), files_of(killed / "whole"))


def test_folder_whose_run_never_started_may_be_used_again(world, tmp_path):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill.tasks, "evaluate", 1)
        distill.main(flags_of(world, tmp_path / "run", *SHORT))
    distill.main(flags_of(world, tmp_path / "run", *SHORT))
    assert (tmp_path / "run" / "results.json").exists()


CHANGES = {
    "base weights": lambda folder: save_file(
        {k: v + (k == "model.norm.weight") for k, v in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors", {"format": "pt"}),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace('"apples"', '"oranges"').replace('" apples"', '" oranges"')),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_is_refused_after_a_change_of(world, tmp_path, capsys, what):  # noqa: F811
    shutil.copytree(world.students["words"], tmp_path / "base")
    students = str(tmp_path / "base"), "pieces"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "router_step", 4)
        distill.main(flags_of(world, tmp_path / "run", *SHORT, "--lora_rank", 2, students=students))
    CHANGES[what](tmp_path / "base")
    assert "changed" in refused(capsys, ["--resume", tmp_path / "run"])


@pytest.mark.parametrize("dtype", ["float32", "fp16"])
def test_run_killed_before_its_second_checkpoint_resumes(world, tmp_path, dtype):  # noqa: F811
    flags = *SHORT, "--dtype", dtype
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "router_step", 2)
        distill.main(flags_of(world, tmp_path / "killed", *flags))
    distill.main(flags_of(world, tmp_path / "whole", *flags))
    distill.main(["--resume", str(tmp_path / "killed")])
    same_run(files_of(tmp_path / "killed"), files_of(tmp_path / "whole"))


def test_run_that_stops_being_finite_stops_and_keeps_its_last_good_checkpoint(world, tmp_path, capsys):  # noqa: F811
    error = refused(capsys, flags_of(world, tmp_path / "run", "--lr", 1e30, "--max_steps", 12, "--save_every", 1,
                                     "--route", "all", "--mutual_weight", 0))
    assert "step" in error and "student" in error and "finite" in error
    saved = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(x.isfinite().all() for name, x in saved.items() if name.startswith("student"))
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("place, name", [(1, "student 1"), (2, "the collaboration"), (3, "the router")])
def test_gradient_that_is_not_finite_stops_whatever_it_trains(capsys, tmp_path, place, name):
    norms, scaler = [1.0] * 4, torch.amp.GradScaler("cpu", enabled=False)  # of two students, the collaboration, the router
    distill.stop_if_not_finite(torch.zeros(3, 2), norms, 6, tmp_path, scaler)
    norms[place] = float("nan")
    with pytest.raises(SystemExit):
        distill.stop_if_not_finite(torch.zeros(3, 2), norms, 6, tmp_path, scaler)
    error = capsys.readouterr().err
    assert f"step 7: the loss or gradient of {name} is not finite" in error


def test_second_run_in_the_same_folder_is_refused(world, tmp_path, capsys):  # noqa: F811
    (tmp_path / "run").mkdir()
    hold = (f"import time; from filelock import FileLock\nlock = FileLock({str(tmp_path / 'run' / '.lock')!r}); "
            "lock.acquire(); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert "another run" in refused(capsys, flags_of(world, tmp_path / "run", *SHORT))
    finally:
        holder.kill()
        holder.wait()
    with FileLock(tmp_path / "run" / ".lock").acquire(timeout=5):
        pass  # freed by the system


def test_a_run_that_ended_there_while_this_one_loaded_is_not_written_over(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    load, results = distill.load_data, tmp_path / "run" / "results.json"

    def load_while_another_run_ends(args):
        results.parent.mkdir()
        results.write_text("of the other run")
        return load(args)
    monkeypatch.setattr(distill, "load_data", load_while_another_run_ends)
    assert "holds a run already" in refused(capsys, flags_of(world, tmp_path / "run", *SHORT))
    assert results.read_text() == "of the other run"


def test_a_folder_that_knows_no_locks_is_one_sentence(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    def no_locks(*a, **k):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    assert "No locks available" in refused(capsys, flags_of(world, tmp_path / "run", *SHORT))


def test_a_test_file_in_the_run_folder_is_not_written_over(world, tmp_path, capsys):  # noqa: F811
    (tmp_path / "test.jsonl").write_text("mine")
    assert "test.jsonl" in refused(capsys, flags_of(world, tmp_path, *SHORT))
    assert (tmp_path / "test.jsonl").read_text() == "mine"


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_batches(world, killed, tmp_path, capsys, monkeypatch):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(killed / "killed", run)

    def full(args):
        raise torch.OutOfMemoryError("2 GiB wanted")
    with monkeypatch.context() as patch:
        patch.setattr(distill, "main", full)
        patch.setattr(distill, "FLAGS", distill.parse_args(["--resume", str(run)]), raising=False)
        with pytest.raises(SystemExit):
            distill.command()
    error = capsys.readouterr().err
    assert "--micro_batch_size 1" in error and f"go on with: python distill.py --resume {run}" in error
    sizes, micro_batches = [], distill.micro_batches

    def noted(question, args):
        for batch in micro_batches(question, args):
            sizes.append(len(set(question[batch].tolist())))
            yield batch
    monkeypatch.setattr(distill, "micro_batches", noted)
    distill.main(["--resume", str(run), "--micro_batch_size", "1"])
    assert set(sizes) == {1} and (run / "log.jsonl").read_text().count("\n") == 4
    assert json.loads((run / "args.json").read_text())["micro_batch_size"] == 1  # also after the next kill


def test_each_run_has_its_own_page_of_weights_and_biases_and_a_resumed_one_the_same(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    class NoKey(Exception):
        pass
    ids, wandb = [], types.ModuleType("wandb")
    wandb.__spec__, wandb.Error = ModuleSpec("wandb", None), NoKey
    board = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    wandb.init = lambda **k: ids.append(k["id"]) or board
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = flags_of(world, tmp_path / "run", *SHORT, "--wandb", "p")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "router_step", 4)
        distill.main(flags)
    distill.main(["--resume", str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "run")

    def not_logged_in(**k):
        ids.append(k["id"])
        raise NoKey("No API key configured")
    wandb.init = not_logged_in
    error = refused(capsys, flags)
    assert "No API key configured" in error and f"python distill.py --resume {tmp_path / 'run'}" in error
    assert ids[0] == ids[1] != ids[2]


def test_log_is_json_where_fp16_skips_a_step(train):  # noqa: F811
    run = train("--dtype", "fp16", "--mutual_weight", 1e4, "--max_steps", 3)
    assert run.log[0]["grad_norm"] == [None, None]


def test_an_encoder_with_a_decoder_is_refused(world, tmp_path, capsys):  # noqa: F811
    config = transformers.T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    transformers.AutoTokenizer.from_pretrained(world.students["words"]).save_pretrained(tmp_path / "t5")
    assert "not an encoder" in refused(capsys, flags_of(world, tmp_path / "run", "--encoder", tmp_path / "t5"))


def test_ctrl_c_writes_a_checkpoint_and_names_the_command_that_goes_on(world, tmp_path):  # noqa: F811
    flags = "--max_steps", 40, "--save_every", 1000
    process = subprocess.Popen([sys.executable, ROOT / "distill.py", *flags_of(world, tmp_path / "run", *flags)],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    log, end = tmp_path / "run" / "log.jsonl", time.time() + 120
    while time.time() < end and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f"python distill.py --resume {tmp_path / 'run'}" in error
    assert "Traceback" not in error
    _, meta = another_step(tmp_path / "run")
    assert 3 <= meta["step"] < 40 and meta["step"] == log.read_text().count("\n")
    distill.main(["--resume", str(tmp_path / "run")])
    distill.main(flags_of(world, tmp_path / "whole", *flags))
    same_run(files_of(tmp_path / "run"), files_of(tmp_path / "whole"))


@pytest.mark.parametrize("flags", ["--paths", "--eval_questions", "--resume", "--out_dir", "--encoder", "--device"])
def test_empty_value_is_refused_by_the_name_of_its_flag(world, tmp_path, capsys, flags):  # noqa: F811
    assert flags in refused(capsys, [*flags_of(world, tmp_path / "run"), flags, ""])


def test_held_out_questions_are_all_kept_whatever_the_limit_of_the_test(train):  # noqa: F811
    run = train("--test_frac", 0.5, "--eval_limit", 3, "--max_steps", 1)
    assert (run.out / "test.jsonl").read_text().count("\n") == 12 and run.results["after"]["questions"] == 3


def test_ids_mean_nothing_by_their_spelling(world, tmp_path, train):  # noqa: F811
    ids = {row["id"]: name for row, name in zip(world.rows[::6], ("q~1", "q~2", "../x", "7", "a b", "q") + tuple("stuvw"))}
    pool = write_jsonl(tmp_path / "pool.jsonl", [{**row, "id": ids.get(row["id"], row["id"])} for row in world.rows])
    plain, odd = train("--max_steps", 2, name="a"), train("--max_steps", 2, "--paths", pool, name="b")
    count = "training_questions"
    assert plain.results["counts"][count] == odd.results["counts"][count]


def test_accuracy_is_measured_during_training_where_asked(train):  # noqa: F811
    run = train("--eval_every", 2, "--max_steps", 4)
    assert ["accuracy" in line for line in run.log] == [False, True, False, True]
    assert run.log[-1]["accuracy"] == run.results["after"]["accuracy"]
