"""Runs that are cut off, and end as if they had not been: bit by bit, on a CPU."""

import errno
import itertools
import os
import random
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
from test_training import CPU, differences, files_differ, flags_of, teacher_file, trained
from voc_data import DataError

__all__ = ["teacher_file"]  # a fixture
LIMIT = 100  # seconds


def start(folder, *command):
    """A process as from a shell, in a process group of its own; its output is in output.txt."""
    folder.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://nowhere.backend"}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=folder, env=os.environ | environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip


def wait_until(reached, process, folder):
    limit = time.monotonic() + LIMIT
    while not reached():
        assert process.poll() is None and time.monotonic() < limit, output_of(folder)
        time.sleep(0.0005)


def output_of(folder):
    return (folder / "output.txt").read_text()


def history_of(save, run):
    return (save / f"history_ultracompact_{run}.jsonl").read_text().splitlines()


def test_killed_run_equals_an_undisturbed_one(tiny_voc, teacher_file, tmp_path):
    """SIGKILL while last_*.pth is written, and at a random moment."""
    flags = ["--kd_mode", "feature", "--teacher", teacher_file, "--epochs", 9, "--val_every", 2]
    trained(tiny_voc, tmp_path / "alone", *flags)
    folder, rng, run = tmp_path / "killed", random.Random(), "ultracompact_feature"
    save = folder / "save"
    command = ROOT / "train.py", *flags_of(tiny_voc, save, *flags)
    unfinished, done = save / f"last_{run}.pth.tmp", 0
    for in_write in (True, False):
        process = start(folder, *command)
        wait_until(lambda: f"epoch {done + 1}/9" in output_of(folder), process, folder)
        if in_write:
            wait_until(unfinished.exists, process, folder)
        else:
            time.sleep(rng.uniform(0, 0.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = len(torch.load(save / f"last_{run}.pth", weights_only=True)["history"])
        assert 1 <= len(history_of(save, "feature")) <= done < 9
    assert start(folder, *command).wait(LIMIT) == 0, output_of(folder)
    assert files_differ(tmp_path / "alone", save, run) == []
    assert len(history_of(save, "feature")) == 9
    assert not list(save.glob("*.tmp")) and (save / f"training_curves_{run}.png").is_file()


def test_interrupted_run_equals_an_undisturbed_one(
    tiny_voc, teacher_file, sample_root, tmp_path, monkeypatch
):
    """Ctrl-C in the second epoch of a response run with unlabelled images; then the same again."""
    flags = ["--kd_mode", "response", "--teacher", teacher_file, "--extra_images",
             sample_root / "JPEGImages", "--epochs", 3]  # fmt: skip
    trained(tiny_voc, tmp_path / "alone", *flags)
    compute, calls = train.compute_losses, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 9:  # of six an epoch
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(train, "compute_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_voc, tmp_path / "cut", *flags)
    assert len(history_of(tmp_path / "cut", "response")) == 1
    trained(tiny_voc, tmp_path / "cut", *flags)
    assert next(calls) == 9 + 12 + 1  # the second epoch and the third
    assert files_differ(tmp_path / "alone", tmp_path / "cut", "ultracompact_response") == []


@pytest.mark.parametrize("call, error", [
    (1, OSError(errno.ENOSPC, "No space left on device")),
    (2, OSError(errno.ENOSPC, "No space left on device")), (3, RuntimeError("writing failed")),
])  # fmt: skip
def test_full_disk_leaves_whole_files_and_the_run_can_go_on(call, error, tiny_voc, tmp_path):
    flags, save, calls = ["--epochs", 2, "--batch_size", 12], torch.save, itertools.count(1)
    trained(tiny_voc, tmp_path / "alone", *flags)

    def fill(content, file):
        save(content, file)
        if next(calls) == call:
            os.truncate(file, 1000)
            raise error

    with patch.object(torch, "save", fill), pytest.raises(DataError, match="could not write"):
        trained(tiny_voc, tmp_path / "full", *flags)
    for file in tmp_path.glob("full/*.pth"):
        torch.load(file, weights_only=True)
    assert not list(tmp_path.rglob("*.tmp"))
    trained(tiny_voc, tmp_path / "full", *flags)
    assert files_differ(tmp_path / "alone", tmp_path / "full") == []


def test_signals_end_a_run_with_a_line_and_their_status(tiny_voc, tmp_path):
    """Ctrl-C, which goes to the workers too, and SIGTERM; both runs at once, to save time."""
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        flags = flags_of(tiny_voc, folder / "save", "--epochs", 500, "--workers", 1)
        processes[number] = start(folder, ROOT / "train.py", *flags)
    for number, process in processes.items():
        folder = tmp_path / number.name
        wait_until(lambda: "epoch 1/500" in output_of(folder), process, folder)  # noqa: B023
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    for number, process in processes.items():
        folder = tmp_path / number.name
        assert process.wait(LIMIT) == 128 + number, output_of(folder)
        assert "the same command" in output_of(folder) and "Traceback" not in output_of(folder)
        state = torch.load(folder / "save/last_ultracompact_none.pth", weights_only=True)
        assert len(history_of(folder / "save", "none")) == len(state["history"]) >= 1
        assert not list(folder.rglob("*.tmp"))


RANK = """
import faulthandler, os, signal
import torch, train, voc_data
faulthandler.dump_traceback_later(60, exit=True)

def one_epoch(args, epoch, network, *rest):
    if (epoch, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    record = one_epoch.original(args, epoch, network, *rest)
    states = [network.state_dict(), rest[-1].network.state_dict()]
    torch.save(states, f"rank{os.environ['RANK']}.pt")
    return record

one_epoch.original, train.train_one_epoch = train.train_one_epoch, one_epoch
voc_data.run(train.main, train.get_args_parser().parse_args())
"""


def test_two_processes_validate_exactly_and_restart_after_a_kill(voc, teacher_file, tmp_path):
    """13 val images, of which one process has more; the second process is killed in epoch 2."""
    lists = voc / "ImageSets/Segmentation"
    names = (lists / "val.txt").read_text().split()
    (lists / "val.txt").write_text("\n".join(names[:7]))
    folder = tmp_path / "run"
    (tmp_path / "rank.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{RANK}")
    flags = ["--kd_mode", "feature", "--teacher", teacher_file, "--epochs", 3]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              "--max_restarts=1", tmp_path / "rank.py"]  # fmt: skip
    process = start(folder, *launch, *flags_of(voc, folder / "save", *flags))
    assert process.wait(LIMIT) == 0, output_of(folder)
    assert "1 of 3 epochs are done" in output_of(folder)
    assert len(history_of(folder / "save", "feature")) == 3
    one, other = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert differences(one, other) == []
    state = torch.load(folder / "save/last_ultracompact_feature.pth", weights_only=True)
    assert differences(state["ema"], one[1]) == []
    student = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    student.load_state_dict(state["ema"])
    images = voc_data.VOCDataset(voc_data.list_items(voc, "val"))
    matrix, loss = voc_data.evaluate(student, images, 65, CPU)
    assert state["history"][-1]["val_miou"] == matrix.miou
    assert state["history"][-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
