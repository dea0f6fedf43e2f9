"""From disk to a ready training batch: images a second, against torchvision's reference pipeline.

    python tests/benchmarks/data_path.py --data_root DIR --split train --workers 2

Every pipeline reads the same files and ends in normalised float batches of the same size; the last
one ends in bytes, which a GPU would jitter and normalise (`voc_data.normalise`) while the CPU goes
on. The first pass over the data (which fills caches) is not timed; the passes are taken in turn, A
B C A B C, and the table gives the median of each and the ratio to the reference. `--copies N` reads
the list N times over, each copy with pixels of its own in the cache, to stand for a larger data
set.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import voc_data  # noqa: E402


def publish(what, rows, headers, output=None, device="cpu"):
    """Print a table with what was measured on which machine; write it to `output` as Markdown."""
    machine = f"{voc_data.device_name(device)}, {os.cpu_count()} cores"
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    text = f"{table}\n\n{what}; {machine}, torch {torch.__version__}.\n"
    print(text, end="")
    if output:
        voc_data.write_whole(text.encode(), output)


class ReferencePipeline(Dataset):
    """As in torchvision's references/segmentation (presets.py, backend "tensor", v2), with colour
    jitter added: decode, resize the whole image, jitter, flip, crop, normalise, one at a time."""

    def __init__(self, items, crop_size):
        self.items, self.crop = items, crop_size
        self.after = v2.Compose(
            [
                v2.ColorJitter(0.3, 0.3, 0.3),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomCrop(
                    crop_size, pad_if_needed=True,
                    fill={tv_tensors.Image: 0, tv_tensors.Mask: voc_data.VOID},
                ),
                v2.ToDtype({tv_tensors.Image: torch.float, "others": None}, scale=True),
                v2.Normalize(voc_data.IMAGENET_MEAN, voc_data.IMAGENET_STD),
            ]
        )  # fmt: skip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        image = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(item.image).convert("RGB")))
        mask = tv_tensors.Mask(v2.functional.pil_to_tensor(Image.open(item.mask)))
        factor = float(torch.empty(1).uniform_(0.5, 2.0))
        size = [round(side * factor) for side in image.shape[-2:]]
        return self.after(v2.functional.resize(image, size), v2.functional.resize(mask, size))


def our_batches(items, args, pixels, on_gpu=False):
    """The project's loader, and what runs on the device: nothing here, if that is a GPU."""
    data = voc_data.VOCDataset(items, voc_data.train_transform(args.crop_size), pixels)
    loader = voc_data.train_loader(data, args.batch_size, args.workers)

    def one_pass(epoch):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if not on_gpu:
                voc_data.normalise(batch["image"], batch["colour"], torch.channels_last)
        return len(loader) * args.batch_size

    return one_pass


def reference_batches(items, args):
    """torchvision's pipeline behind an ordinary DataLoader."""
    loader = DataLoader(
        ReferencePipeline(items, args.crop_size), args.batch_size, shuffle=True, drop_last=True,
        num_workers=args.workers, persistent_workers=args.workers > 0,
    )  # fmt: skip

    def one_pass(epoch):
        for _ in loader:
            pass
        return len(loader) * args.batch_size

    return one_pass


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="as in train.py; 'sample' needs no download")
    parser.add_argument("--split", default="train")
    parser.add_argument("--crop_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--limit", type=int, help="use so many images only")
    parser.add_argument("--copies", type=int, default=1, help="read the list so many times over")
    parser.add_argument("--output", help="write the table to this file")
    return parser


def main(args):
    torch.set_num_threads(1)
    root = voc_data.find_voc(args.data_root, download=True)
    items = voc_data.list_items(root, args.split)[: args.limit] * args.copies
    with tempfile.TemporaryDirectory() as cache_dir:
        pixels = voc_data.pixel_cache(items, cache_dir, args.workers)
        os.sync()  # the disk is done with it before the clock starts
        pipelines = {
            "torchvision reference": reference_batches(items, args),
            "ours, decoding": our_batches(items, args, None),
            "ours, pixel cache": our_batches(items, args, pixels),
            "ours, pixel cache, for a GPU": our_batches(items, args, pixels, on_gpu=True),
        }
        speeds = {name: [] for name in pipelines}
        for epoch in range(args.passes + 1):
            for name, one_pass in pipelines.items():
                start = time.perf_counter()
                images = one_pass(epoch)
                if epoch:
                    speeds[name].append(images / (time.perf_counter() - start))
    base = statistics.median(speeds["torchvision reference"])
    rows = [
        (name, f"{statistics.median(v):.0f}", f"{min(v):.0f}-{max(v):.0f}",
         f"{statistics.median(v) / base:.1f}")
        for name, v in speeds.items()
    ]  # fmt: skip
    what = (
        f"From disk to ready batches of {args.batch_size} crops of {args.crop_size} px: "
        f"{len(items):,} images, {args.workers} workers, median of {args.passes} passes in turn"
    )
    publish(what, rows, ("pipeline", "img/s", "range", "times the reference"), args.output)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
