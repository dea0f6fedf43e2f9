"""Kill a training again and again, start it again each time, and compare it with one left alone.

    python tests/kill_test.py --kills 20

A real process of train.py on part of the synthetic sample, on the CPU, is killed (SIGKILL) at
random moments: while it starts, in an epoch, and while it writes a file, which is told from the
unfinished file that is left behind. The same command starts it again each time. At the end the
checkpoints must be equal bit by bit to those of an undisturbed run, the history must have each
epoch once, and no unfinished file may be left. Takes about ten seconds a kill.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kd_losses  # noqa: E402  (found through the path set above)
import voc_data  # noqa: E402

PATIENCE = 300  # seconds that one life of the process may last
CLOCKS = {"seconds", "images_per_second", "val_seconds"}  # differ from run to run


def hear_ctrl_c():
    """A shell starts background jobs with SIGINT ignored, and they hand that on; here it counts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """One command of train.py in a folder of its own, and the process that runs it now."""

    def __init__(self, folder, data, epochs, kd_mode="feature", workers=0, more=()):
        self.folder, self.epochs = folder, epochs
        self.save, self.cache = folder / "save", folder / "cache"
        self.name = f"ultracompact_{kd_mode}"
        self.best = self.save / f"best_model_{self.name}.pth"
        self.last = self.save / f"last_{self.name}.pth"
        self.history_file = self.save / f"history_{self.name}.jsonl"
        self.command = [
            sys.executable, str(ROOT / "train.py"), "--data_root", str(data), "--no_pretrained",
            "--epochs", str(epochs), "--batch_size", "4", "--crop_size", "65", "--eval_size", "65",
            "--workers", str(workers), "--device", "cpu", "--kd_mode", kd_mode,
            "--cache_dir", str(self.cache), "--save_dir", str(self.save), *more,
        ]  # fmt: skip
        if kd_mode != "none":
            self.command += ["--teacher", str(data.parent / "teacher.pth")]
        folder.mkdir(parents=True, exist_ok=True)
        self.process, self.lives = None, 0

    def start(self):
        """Start the command, in a process group of its own."""
        self.lives += 1
        self.output = self.folder / f"output_{self.lives}.txt"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=self.folder, env={"OMP_NUM_THREADS": "1"} | os.environ,
                preexec_fn=hear_ctrl_c,
            )  # fmt: skip
        return self

    def running(self):
        return self.process.poll() is None

    def wait(self):
        """Wait for the end and return (status, what it printed)."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return status, self.output.read_text()

    def kill(self):
        """SIGKILL to the process and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def until(self, reached, pause=0.01):
        """Wait until `reached()` holds; False if the process ended before it did."""
        limit = time.monotonic() + PATIENCE
        while not reached():
            if not self.running() or time.monotonic() > limit:
                return False
            time.sleep(pause)
        return True

    def until_training(self):
        """Wait until the training has begun; False if the process ended before."""
        return self.until(lambda: "ultracompact (" in self.output.read_text())

    def until_epoch(self, epoch):
        """Wait until so many epochs are saved; False if the process ended before."""
        return self.until(lambda: f"epoch {epoch}/{self.epochs}" in self.output.read_text())

    def unfinished(self):
        """The names of unfinished files in the folder of results."""
        try:
            return {entry.name for entry in os.scandir(self.save) if entry.name.endswith(".tmp")}
        except FileNotFoundError:
            return set()

    def epochs_done(self):
        """Whole epochs in the history."""
        return len(self.history()) if self.history_file.exists() else 0

    def history(self):
        return [json.loads(line) for line in self.history_file.read_text().splitlines()]


def make_data(folder, train=12, val=4):
    """Part of the sample as a VOC folder, and beside it a teacher: an untrained student."""
    source = voc_data.make_sample()
    data = folder / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (data / name).mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        ids = voc_data.read_split(source, split)[:count]
        for image_id in ids:
            for name in (f"JPEGImages/{image_id}.jpg", f"SegmentationClass/{image_id}.png"):
                shutil.copyfile(source / name, data / name)
        (data / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(ids) + "\n")
    make_teacher(folder / "teacher.pth")
    return data


def make_teacher(path):
    """A checkpoint of an untrained student, to teach with."""
    torch.manual_seed(1)
    student = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    content = {"model_state_dict": student.state_dict(), "model": "ultracompact"}
    content |= {"kd_mode": "none", "num_classes": voc_data.NUM_CLASSES}
    torch.save(content, path)


# -------------------------------------------------------------------------------- ways to be killed


def kill_at_random(run, rng):
    """Some time after the training began: in an epoch, in validation, or between."""
    if run.until_training():
        time.sleep(rng.uniform(0, 0.8))


def kill_while_starting(run, rng):
    """Before, or as, the caches are built and the state is read."""
    time.sleep(rng.uniform(0.5, 8))


def kill_in_a_write(run, rng):
    """As soon as the n-th unfinished file appears."""
    if not run.until_training():
        return
    limit, seen, last = rng.randint(1, 8), 0, set()
    while run.running():
        now = run.unfinished()
        seen += len(now - last)
        last = now
        if seen >= limit and now:
            return
        time.sleep(0.0003)


def live_and_die(run, how, rng):
    """One life of the process: (killed at all, killed in a write)."""
    stale = {name: (run.save / name).stat().st_ino for name in run.unfinished()}
    run.start()
    how(run, rng)
    if not run.running():
        return False, False
    run.kill()
    left = {name: (run.save / name).stat().st_ino for name in run.unfinished()}
    return True, any(stale.get(name) != inode for name, inode in left.items())


def torture(run, kills, seed=0, in_writes=0.5):
    """Kill `run` so many times, then let it end: counts by name."""
    rng = random.Random(seed)
    counts = {"kills": 0, "in a write": 0, "while starting": 0}
    while counts["kills"] < kills:
        how = rng.choice([kill_at_random, kill_at_random, kill_while_starting])
        if counts["in a write"] < math.ceil(in_writes * (counts["kills"] + 1)):
            how = kill_in_a_write
        killed, in_write = live_and_die(run, how, rng)
        if not killed:
            status, output = run.process.returncode, run.output.read_text()
            if status:
                raise AssertionError(f"a restart ended with status {status}:\n{output}")
            break
        counts["kills"] += 1
        counts["in a write"] += in_write
        counts["while starting"] += how is kill_while_starting
        print(
            f"kill {counts['kills']:>2}: {how.__name__:<20} in a write: "
            f"{'yes' if in_write else 'no':<4} epochs saved: {run.epochs_done()}/{run.epochs}",
            flush=True,
        )
    status, output = run.start().wait()
    if status:
        raise AssertionError(f"the last restart ended with status {status}:\n{output}")
    return counts | {"restarts": run.lives - 1}


# --------------------------------------------------------------------------------------- comparison


def differences(one, other, where=""):
    """The places where two nested structures differ, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        return [] if same and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [f"{where} (keys)"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if not isinstance(other, type(one)) or len(one) != len(other):
            return [f"{where} (length)"]
        pairs = enumerate(zip(one, other))
        return [d for index, pair in pairs for d in differences(*pair, f"{where}/{index}")]
    return [] if one == other else [f"{where} ({one} and {other})"]


def without_clocks(records):
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records]


def compare(run, reference):
    """What is wrong with a run, beside an undisturbed one; empty if nothing is."""
    wrong = []
    for mine, its in ((run.best, reference.best), (run.last, reference.last)):
        one, other = (torch.load(path, weights_only=True) for path in (mine, its))
        for content in (one, other):
            content.pop("settings")  # names the folders
            if "history" in content:
                content["history"] = without_clocks(content["history"])
        wrong += [f"{mine.name}: {where} differs" for where in differences(one, other)]
    epochs = [record["epoch"] for record in run.history()]
    if epochs != list(range(1, run.epochs + 1)):
        wrong.append(f"the history has the epochs {epochs}")
    if without_clocks(run.history()) != without_clocks(reference.history()):
        wrong.append("the history has other numbers")
    wrong += [f"stray file {path}" for path in run.save.rglob("*.tmp")]
    files = [{path.name for path in r.save.iterdir()} for r in (run, reference)]
    if files[0] != files[1]:
        wrong.append(f"other files: {sorted(files[0] ^ files[1])}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, help="of the training (default: five for four kills)")
    parser.add_argument("--kd_mode", default="feature", choices=("none", "response", "feature"))
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument(
        "--overwrite", action="store_true", help="give it to train.py, as train.txt does"
    )
    args = parser.parse_args()
    more = ["--overwrite"] if args.overwrite else []
    start, epochs = time.monotonic(), args.epochs or 5 * args.kills // 4
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = make_data(folder)
        reference = Run(folder / "alone", data, epochs, args.kd_mode, args.workers, more)
        status, output = reference.start().wait()
        if status:
            sys.exit(output)
        run = Run(folder / "killed", data, epochs, args.kd_mode, args.workers, more)
        counts = torture(run, args.kills, args.seed)
        differing = compare(run, reference)
    wrong = list(differing)
    if counts["kills"] < args.kills:
        wrong.append(f"the training ended after {counts['kills']} kills: give it more --epochs")
    if 4 * counts["in a write"] < counts["kills"]:
        wrong.append("fewer than a quarter of the kills hit a write")
    print(f"\n{'kills':<24} {counts['kills']}")
    print(f"{'  during a write':<24} {counts['in a write']}")
    print(f"{'  while starting':<24} {counts['while starting']}")
    print(f"{'restarts':<24} {counts['restarts']}")
    print(f"{'epochs':<24} {epochs}, kd_mode {args.kd_mode}")
    print(f"{'time':<24} {time.monotonic() - start:.0f} s")
    print(f"{'result':<24} {'NOT EQUAL' if differing else 'equal, bit by bit'}")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
