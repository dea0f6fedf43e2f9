"""How epoch time and memory grow with the number of images: time should be linear, memory flat.

    python tests/benchmarks/growth.py --data_root DIR --split train --images 100

The list is read 1, 2, 4 and 8 times over, each copy with pixels of its own in the cache, in a
process of its own. Memory is that of the training process after the second epoch, without the file
pages that it only maps.
"""

import argparse
import multiprocessing
import queue
import sys
import tempfile
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import train  # noqa: E402
import voc_data  # noqa: E402
from data_path import publish  # noqa: E402


def anonymous_memory():
    """Resident memory that is not a mapped file, in MB (Linux); NaN elsewhere."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measure(args, factor, results):
    """Train two epochs on `factor` copies of the list; put (images, seconds, MB) of the second."""
    root = voc_data.find_voc(args.data_root, download=True)
    items = voc_data.list_items(root, args.split)[: args.images]
    with tempfile.TemporaryDirectory() as cache_dir:
        flags = ["--no_pretrained", "--cache_dir", cache_dir, "--workers", str(args.workers)]
        ours = train.get_args_parser().parse_args(flags)
        train.check_args(ours)
        train.setup_processes(ours)
        loaders, _ = train.build_loaders(ours, items * factor, items[:1], teacher=None)
        loader = loaders[ours.crop_size]
        weights = train.find_class_weights(ours, loaders)
        training = train.Training(ours, None, len(loader), weights)
        training.train_one_epoch(loader)
        start = time.perf_counter()
        training.train_one_epoch(loader)
        results.put((len(items) * factor, time.perf_counter() - start, anonymous_memory()))


def result_of(process, results):
    """What the process puts into the queue; ends the script where it dies without a word."""
    while True:
        try:
            return results.get(timeout=5)
        except queue.Empty:
            if not process.is_alive():
                sys.exit(f"a measuring process ended with status {process.exitcode}")


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="as in train.py; 'sample' needs no download")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=100, help="images at 1x")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", help="write the table to this file")
    return parser


def main(args):
    context, rows = multiprocessing.get_context("spawn"), []
    for factor in (1, 2, 4, 8):
        results = context.Queue()
        process = context.Process(target=measure, args=(args, factor, results))
        process.start()
        rows.append((factor, *result_of(process, results)))
        process.join()
    _, _, base_seconds, base_memory = rows[0]
    rows = [
        (f"{factor}x", images, f"{seconds:.1f}", f"{seconds / base_seconds:.2f}",
         f"{memory:.0f}", f"{memory / base_memory:.2f}")
        for factor, images, seconds, memory in rows
    ]  # fmt: skip
    what = "The second epoch of a new process; memory of its own at the end of it"
    headers = ("data", "images", "s an epoch", "times 1x", "memory MB", "times 1x")
    publish(what, rows, headers, args.output, voc_data.choose_device())


if __name__ == "__main__":
    main(get_args_parser().parse_args())
