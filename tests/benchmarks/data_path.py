"""Images per second from disk to a batch of uint8 crops, against torchvision's reference pipeline.

    python tests/benchmarks/data_path.py --data_root DIR

All pipelines read the same files and end in the same stage, image and mask crops in bytes, before
jitter and normalisation. They run in turn, A B C A B C; the first pass, which fills the cache, is
not timed. The table gives the median and the range.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import voc_data  # noqa: E402


class Reference(Dataset):
    """As torchvision's references/segmentation by default, in Pillow: resize, flip, crop."""

    def __init__(self, items, crop_size, longest, scale):
        self.items, self.crop_size, self.longest, self.scale = items, crop_size, longest, scale

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image = Image.open(self.items[index].image).convert("RGB")
        mask = Image.open(self.items[index].mask)
        factor = random.uniform(*self.scale) * self.longest / max(image.size)
        height, width = (round(side * factor) for side in reversed(image.size))
        image = F.resize(image, [height, width])
        mask = F.resize(mask, [height, width], InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        padding = [0, 0, max(0, self.crop_size - width), max(0, self.crop_size - height)]
        image, mask = F.pad(image, padding), F.pad(mask, padding, fill=voc_data.VOID)
        top, left = (random.randint(0, max(0, n - self.crop_size)) for n in (height, width))
        window = top, left, self.crop_size, self.crop_size
        return [F.pil_to_tensor(F.crop(part, *window)) for part in (image, mask)]


def reference_loader(items, workers):
    """Batches of 16 of its crops of 256 px."""
    return DataLoader(
        Reference(items, 256, 320, (0.7, 2.0)), 16, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip


def save_table(rows, headers, note, output):
    """Print a table and write it as Markdown."""
    note = f"{note}; {os.cpu_count()} cores, torch {torch.__version__}."
    text = f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{note}\n"
    voc_data.atomic_save(output, text)
    print(text)


def run_in_turn(passes, rounds):
    """{name: [seconds]} of `rounds` timed calls of each function, after one that is not timed."""
    seconds = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, one_pass in passes.items():
            start = time.perf_counter()
            one_pass(number)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(args):
    torch.set_num_threads(1)
    items = voc_data.list_items(voc_data.find_voc(args.data_root), "train") * args.copies
    crop = {"size": 256, "longest": 320, "scale": (0.7, 2.0), "seen": 0}

    def ours(cache_dir):
        images = voc_data.VOCDataset(items, cache_dir, args.workers)
        sampler = voc_data.TrainSampler(len(items), 0, 16, seed=0)
        data = voc_data.TrainDataset(images, crop)
        return voc_data.make_loader(data, args.workers, 1, batch_sampler=sampler)

    with tempfile.TemporaryDirectory() as cache_dir:
        loaders = {
            "torchvision reference": reference_loader(items, args.workers),
            "ours, decoding every time": ours(None),
            "ours, decoded once": ours(Path(cache_dir)),
        }
        os.sync()
        passes = {name: lambda _, l=loader: list(l) and None for name, loader in loaders.items()}
        seconds = run_in_turn(passes, args.rounds)
    images = len(items) // 16 * 16
    speeds = {name: [images / s for s in values] for name, values in seconds.items()}
    base = statistics.median(speeds["torchvision reference"])
    rows = [
        [name, f"{statistics.median(v):.0f}", f"{min(v):.0f}-{max(v):.0f}",
         f"{statistics.median(v) / base:.1f}"] for name, v in speeds.items()
    ]  # fmt: skip
    note = (f"{len(items)} images, batches of 16 crops of 256 px in bytes, {args.workers} workers, "
            f"median and range of {args.rounds} passes in turn")  # fmt: skip
    save_table(rows, ["pipeline", "img/s", "range", "times the reference"], note, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", type=voc_data.path)
    parser.add_argument("--copies", type=int, default=1, help="read the list so many times over")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default="report/speed/data_path.md")
    voc_data.run(main, parser.parse_args())
