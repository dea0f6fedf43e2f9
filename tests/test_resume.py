"""Runs that are cut off, and end as if they had not been: bit by bit, on a CPU."""

import errno
import itertools
import multiprocessing.forkserver
import os
import random
import re
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch

import kd_losses
import train
import voc_data
from conftest import ROOT
from test_training import CPU, differences, files_differ, flags_of, trained
from test_training import teacher_file  # noqa: F401  (a fixture)
from voc_data import DataError

LIMIT, NOTEBOOK = 100, "module://matplotlib_inline.backend_inline"  # seconds; a backend
ENVIRONMENT = {"MPLBACKEND": NOTEBOOK, "PYTHONPATH": str(ROOT)}
CHILD = """
import multiprocessing, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
multiprocessing.set_start_method(None, force=True)
os.setsid()
os.chdir({folder!r})
output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(output, 1), os.dup2(output, 2)
sys.argv = ["train.py", *{flags!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def start():
    """`start(folder, flags)`: train.py in a process group of its own, a copy of one that has
    imported torch, which takes seconds; it writes output.txt."""
    context, started = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["train"])
    with patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()

    def start(folder, flags):
        folder.mkdir(exist_ok=True)
        (folder / "output.txt").write_text("")
        code = CHILD.format(folder=str(folder), flags=flags, script=str(ROOT / "train.py"))
        started.append(context.Process(target=exec, args=(code, {})))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()


def output_of(folder):
    return (folder / "output.txt").read_text()


def wait_until(reached, process, folder):
    while not reached():
        assert process.is_alive(), output_of(folder)
        time.sleep(0.0005)


def epochs_of(save, mode):
    """The number of epochs in last_*.pth and in the history."""
    state = torch.load(save / f"last_ultracompact_{mode}.pth", weights_only=True)
    lines = (save / f"history_ultracompact_{mode}.jsonl").read_text().count("\n")
    return len(state["history"]), lines


def test_killed_run_equals_an_undisturbed_one(start, tiny_voc, teacher_file, tmp_path):
    """SIGKILL while last_*.pth is written, and at a random moment."""
    flags = ["--kd_mode", "feature", "--teacher", teacher_file, "--epochs", 9, "--val_every", 2]
    trained(tiny_voc, tmp_path / "alone", *flags)
    folder, save, done = tmp_path / "killed", tmp_path / "killed/save", 0
    for moment in ("in a write", "any"):
        process = start(folder, flags_of(tiny_voc, save, *flags))
        wait_until(lambda: f"epoch {done + 1}/9" in output_of(folder), process, folder)
        if moment == "in a write":
            wait_until((save / "last_ultracompact_feature.pth.tmp").exists, process, folder)
        else:
            time.sleep(random.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.join(LIMIT)
        done, lines = epochs_of(save, "feature")
        assert 1 <= lines <= done < 9
    trained(tiny_voc, save, *flags)
    assert files_differ(tmp_path / "alone", save, "ultracompact_feature") == []
    assert epochs_of(save, "feature") == (9, 9) and not list(save.glob("*.tmp"))


def test_signals_end_a_run_with_a_line_and_their_status(start, tiny_voc, tmp_path):
    """Ctrl-C, which goes to the workers too, and SIGTERM; both runs at once, to save time."""
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        flags = flags_of(tiny_voc, folder / "save", "--epochs", 500, "--workers", 1)
        processes[number] = start(folder, flags)
    for number, process in processes.items():
        folder = tmp_path / number.name
        wait_until(lambda: "epoch 1/500" in output_of(folder), process, folder)  # noqa: B023
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    for number, process in processes.items():
        process.join(LIMIT)
        output = output_of(tmp_path / number.name)
        assert process.exitcode == 128 + number, output
        assert "stopped in epoch" in output
        assert not re.search("KeyboardInterrupt|SystemExit|DataLoader worker", output), output
        state, lines = epochs_of(tmp_path / number.name / "save", "none")
        assert 1 <= lines <= state <= lines + 1 and not [*tmp_path.rglob("*.tmp")]


def test_interrupted_run_equals_an_undisturbed_one(tiny_voc, teacher_file, tmp_path, monkeypatch):
    """Ctrl-C in the second epoch of a response run with unlabelled images; then the same again."""
    flags = ["--kd_mode", "response", "--teacher", teacher_file, "--train_split", "val",
             "--allow_val_in_train", "--extra_images", "voc", "--epochs", 3]  # fmt: skip
    trained(tiny_voc, tmp_path / "alone", *flags)
    compute, calls = train.compute_losses, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 4:  # of two an epoch
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(train, "compute_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_voc, tmp_path / "cut", *flags)
    assert epochs_of(tmp_path / "cut", "response") == (1, 1)
    trained(tiny_voc, tmp_path / "cut", *flags)
    assert next(calls) == 4 + 4 + 1  # the second epoch and the third
    assert files_differ(tmp_path / "alone", tmp_path / "cut", "ultracompact_response") == []


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call, error, words", [
    (1, NO_SPACE, "could not write"), (2, RuntimeError("torch"), "could not write"),
    (3, KeyboardInterrupt(), "^$"),
])  # fmt: skip
def test_failed_save_leaves_whole_files(call, error, words, tiny_voc, tmp_path):
    flags, save, calls = ["--epochs", 2, "--batch_size", 24], torch.save, itertools.count(1)
    trained(tiny_voc, tmp_path / "alone", *flags)

    def fill(content, file):
        save(content, file)
        if next(calls) == call:
            os.truncate(file, 1000)
            raise error

    shown = pytest.raises((DataError, KeyboardInterrupt), match=words)
    with patch.object(torch, "save", fill), shown:
        trained(tiny_voc, tmp_path / "full", *flags)
    for file in tmp_path.glob("full/*.pth"):
        torch.load(file, weights_only=True)
    assert not list(tmp_path.rglob("*.tmp"))
    trained(tiny_voc, tmp_path / "full", *flags)
    assert files_differ(tmp_path / "alone", tmp_path / "full") == []


RANK = """
import faulthandler, os, signal
import torch, train, voc_data
faulthandler.dump_traceback_later(60, exit=True)

def one_epoch(args, epoch, network, *rest):
    record = one_epoch.original(args, epoch, network, *rest)
    if (epoch, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    seen = [index for batch in rest[0].batch_sampler for index, _ in batch]
    states = [network.state_dict(), rest[-1].network.state_dict(), seen]
    torch.save(states, f"rank{os.environ['RANK']}.pt")
    return record

one_epoch.original, train.train_one_epoch = train.train_one_epoch, one_epoch
voc_data.run(train.main, train.get_args_parser().parse_args())
"""


def test_two_processes_validate_exactly_and_restart_after_a_kill(voc, teacher_file, tmp_path):
    """Seven val images, of which one process has more; the second one is killed in epoch 2."""
    val = voc / "ImageSets/Segmentation/val.txt"
    val.write_text("\n".join(val.read_text().split()[:7]))
    (tmp_path / "rank.py").write_text(RANK)
    flags = ["--kd_mode", "feature", "--teacher", teacher_file, "--epochs", 2]
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1 rank.py"
    result = subprocess.run(
        [sys.executable, *launch.split(), *flags_of(voc, tmp_path / "save", *flags)], cwd=tmp_path,
        env=os.environ | ENVIRONMENT, timeout=LIMIT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 of 2 epochs are done" in result.stdout
    assert epochs_of(tmp_path / "save", "feature") == (2, 2)
    assert (tmp_path / "save/training_curves_ultracompact_feature.png").is_file()
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not set(one.pop()) & set(other.pop())  # the images
    assert differences(one, other) == []
    state = torch.load(tmp_path / "save/last_ultracompact_feature.pth", weights_only=True)
    assert differences(state["ema"], one[1]) == []
    student = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    student.load_state_dict(state["ema"])
    images = voc_data.VOCDataset(voc_data.list_items(voc, "val"))
    matrix, loss = voc_data.evaluate(student, images, 65, CPU)
    assert state["history"][-1]["val_miou"] == matrix.miou
    assert state["history"][-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
