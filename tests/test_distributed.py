"""Two processes on the CPU (gloo), started by torchrun: equal weights, exact validation, restarts.

The processes run this file as a script (see `main` below): it trains with train.main and notes what
each rank ended with.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kd_losses  # noqa: E402
import kill_test  # noqa: E402
import train  # noqa: E402  (found through the path set above)
import voc_data  # noqa: E402

EPOCHS = 6
LIMIT = 150  # seconds


def flags(folder, save):
    """A short training in feature mode, with adapters at two levels."""
    return [
        "--data_root", str(folder / "VOC2012"), "--no_pretrained", "--epochs", str(EPOCHS),
        "--batch_size", "3", "--crop_size", "65", "--eval_size", "65", "--workers", "0",
        "--device", "cpu", "--kd_mode", "feature", "--kd_levels", "mid", "high",
        "--teacher", str(folder / "teacher.pth"), "--cache_dir", str(folder / f"cache_{save}"),
        "--save_dir", str(folder / save),
    ]  # fmt: skip


def torchrun(script, *arguments, restarts=0, output=None):
    """Start two processes of a script; the returned process is torchrun itself."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        f"--max_restarts={restarts}", str(script), *map(str, arguments),
    ]  # fmt: skip
    with open(output, "w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=Path(output).parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finish(process, output):
    """Wait for torchrun; its status. Ends its process group if it takes too long."""
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"did not end:\n{Path(output).read_text()}") from None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of 13 train and 5 val images: neither divides by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    kill_test.make_data(folder, train=13, val=5)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    """What each of two processes ended with, by rank."""
    output = folder / "undisturbed.txt"
    process = torchrun(__file__, folder, output=output)
    assert finish(process, output) == 0, output.read_text()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(
    "part", ["student", "averaged", "adapters", "optimizer", "best", "history"]
)
def test_all_ranks_end_equal(undisturbed, part):
    """Weights and BatchNorm statistics, the adapters of feature mode, and what was measured."""
    one, other = (dict(state["state"]) for state in undisturbed)
    for state in (one, other):
        state["history"] = kill_test.without_clocks(state["history"])
    assert kill_test.differences(one[part], other[part], part) == []


def test_adapters_are_trained(undisturbed):
    state = undisturbed[0]
    for key, value in state["state"]["adapters"].items():
        assert not torch.equal(value, state["adapters at first"][key]), key


def test_ranks_start_equal_and_see_different_images(undisturbed):
    one, other = undisturbed
    assert kill_test.differences(one["adapters at first"], other["adapters at first"]) == []
    for first, second in zip(one["images"], other["images"]):
        assert len(first) == len(second) == 6
        assert not set(first) & set(second)
    assert len({tuple(epoch) for epoch in one["images"]}) == EPOCHS


def test_validation_matrix_equals_that_of_one_process(undisturbed, folder):
    """Five images over two ranks, each counted once: the very same integers."""
    student, checkpoint = kd_losses.load_student(folder / "two/best_model_ultracompact_feature.pth")
    items = voc_data.list_items(folder / "VOC2012", "val")
    data = voc_data.VOCDataset(items, voc_data.EvalTransform(checkpoint["eval_size"]))
    alone = voc_data.evaluate(student, voc_data.eval_loader(data, workers=0), "cpu")
    pixels = sum(int((voc_data.read_mask(item.mask) != voc_data.VOID).sum()) for item in items)
    assert alone.matrix.counts.sum() == pixels
    for state in undisturbed:
        assert torch.equal(state["matrix"], alone.matrix.counts)
        assert state["evaluated"] == alone.images == 5
        assert state["val_loss"] == pytest.approx(alone.loss, rel=1e-6)
    best = undisturbed[0]["state"]["history"][checkpoint["epoch"] - 1]
    assert best["val_miou"] == checkpoint["miou"] == alone.matrix.miou


def test_only_the_first_rank_writes_results(undisturbed):
    assert undisturbed[0]["written"] and not undisturbed[1]["written"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_killed_worker_is_restarted_and_goes_on(undisturbed, folder):
    """`torchrun --max_restarts=1 train.py ...`: a rank is killed, all start again and resume.

    The end is that of the undisturbed run, bit by bit: so resuming works in two processes too.
    """
    output = folder / "killed.txt"
    process = torchrun(ROOT / "train.py", *flags(folder, "killed"), restarts=1, output=output)
    limit = time.monotonic() + LIMIT
    while f"epoch 2/{EPOCHS}" not in output.read_text():
        assert process.poll() is None and time.monotonic() < limit, output.read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victims = [pid for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(victims) == 2
    os.kill(int(victims[1]), signal.SIGKILL)
    assert finish(process, output) == 0, output.read_text()
    text = output.read_text()
    assert "continuing after epoch" in text, "it started afresh, or was not killed in time"
    killed = torch.load(folder / "killed/last_ultracompact_feature.pth", weights_only=True)
    alone = torch.load(folder / "two/last_ultracompact_feature.pth", weights_only=True)
    for state in (killed, alone):
        state["history"] = kill_test.without_clocks(state["history"])
        del state["settings"]
    assert [record["epoch"] for record in killed["history"]] == list(range(1, EPOCHS + 1))
    assert kill_test.differences(killed, alone) == []
    assert not list((folder / "killed").glob("*.tmp"))


def test_bad_data_ends_all_processes_soon(folder):
    """The first rank meets it; the other must not wait for it for hours. One message, no more."""
    output = folder / "bad.txt"
    arguments = [*flags(folder, "bad"), "--data_root", folder / "nowhere"]
    assert finish(torchrun(ROOT / "train.py", *arguments, output=output), output) != 0
    text = output.read_text()
    assert text.count("train.py: error: VOC 2012 was not found") == 1, text
    assert not (folder / "bad").exists()


# ------------------------------------------------------------------- what torchrun runs, each rank


def main(folder):
    """Train with the two processes; note this rank's end in rank{n}.pt."""
    folder, rank = Path(folder), int(os.environ["RANK"])
    notes = {"images": [], "written": []}
    finish_epoch, write_whole = train.Training.finish_epoch, voc_data.write_whole
    step, validate = train.Training.step, train.Training.validate
    trainers, loaders = [], []

    def spy_step(self, batch, global_step):
        if not trainers:
            adapters = self.adapters.state_dict().items()
            notes["adapters at first"] = {key: value.clone() for key, value in adapters}
            trainers.append(self)
        if global_step % self.steps_per_epoch == 0:
            notes["images"].append([])
        notes["images"][-1] += batch["index"].tolist()
        return step(self, batch, global_step)

    def spy_finish(self, record):
        finish_epoch(self, record)
        # What `best` holds must give the matrix that was measured: evaluate the same weights.
        if self.best["epoch"] == self.epoch:
            result = voc_data.evaluate(self.averaged, loaders[0], self.device)
            notes["matrix"] = result.matrix.counts.clone()
            notes["evaluated"], notes["val_loss"] = result.images, result.loss

    def spy_validate(self, loader):
        loaders[:] = [loader]
        return validate(self, loader)

    def spy_write(data, path):
        notes["written"].append(str(path))
        write_whole(data, path)

    train.Training.step, train.Training.finish_epoch = spy_step, spy_finish
    train.Training.validate = spy_validate
    train.write_whole = voc_data.write_whole = spy_write
    train.main(train.get_args_parser().parse_args(flags(folder, "two")))
    state = trainers[0].state_dict()
    torch.save(notes | {"state": state}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
