"""Resident memory over ten epochs on the synthetic sample: flat, or something is kept.

    python tests/memory_test.py --kd_mode feature

Trains in this process, on the CPU, and reads VmRSS of /proc/self/status (Linux) after each epoch.
Fails if the memory after the last epoch differs by 5 % or more from that after epoch 2.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kill_test  # noqa: E402
import train  # noqa: E402  (found through the path set above)
import voc_data  # noqa: E402

LARGEST_CHANGE = 0.05


def resident_mb():
    """Resident memory of this process in MB, garbage and the allocator's spare pages left out."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status")


def measure(args, folder):
    """Train, and return the memory after each epoch."""
    memory, finish_epoch = [], train.Training.finish_epoch

    def finish_and_measure(self, record):
        finish_epoch(self, record)
        memory.append(resident_mb())

    flags = [
        "--data_root", str(args.data_root), "--no_pretrained", "--epochs", str(args.epochs),
        "--batch_size", "8", "--crop_size", "65", "--workers", str(args.workers), "--device", "cpu",
        "--kd_mode", args.kd_mode, "--cache_dir", str(folder / "cache"),
        "--save_dir", str(folder / "save"),
    ]  # fmt: skip
    if args.kd_mode != "none":
        kill_test.make_teacher(folder / "teacher.pth")
        flags += ["--teacher", str(folder / "teacher.pth")]
    train.Training.finish_epoch = finish_and_measure
    try:
        train.main(train.get_args_parser().parse_args(flags))
    finally:
        train.Training.finish_epoch = finish_epoch
    return memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="at least 3")
    parser.add_argument("--data_root", default="sample")
    parser.add_argument("--kd_mode", default="feature", choices=("none", "response", "feature"))
    parser.add_argument("--workers", type=int, default=0, help="0 counts all memory in one process")
    args = parser.parse_args()
    if args.data_root == "sample":
        args.data_root = voc_data.make_sample()
    with tempfile.TemporaryDirectory() as folder:
        memory = measure(args, Path(folder))
    change = memory[-1] / memory[1] - 1
    print("resident memory by epoch, MB: " + " ".join(f"{value:.0f}" for value in memory))
    print(f"after epoch 2 {memory[1]:.0f} MB, after epoch {len(memory)} {memory[-1]:.0f} MB: "
          f"{100 * change:+.1f} %")  # fmt: skip
    if abs(change) >= LARGEST_CHANGE:
        sys.exit(f"memory is not flat: {100 * change:+.1f} %, 5 % are allowed")


if __name__ == "__main__":
    main()
