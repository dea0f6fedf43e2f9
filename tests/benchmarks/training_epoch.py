"""A whole training epoch: ours against a loop in the way of torchvision's reference script.

    python tests/benchmarks/training_epoch.py --data_root DIR --split train
    python tests/benchmarks/training_epoch.py --data_root DIR --split train --teacher FILE

The same network, images, crop size, batch size and workers. The reference decodes every JPEG in
every epoch, augments whole images one by one, takes the loss at full resolution and reads it at
every step, as references/segmentation/train.py does; SGD, no averaged weights. Ours is train.py as
it is by default (AdamW, class weights, averaged weights, the loss at a quarter of the resolution),
then with the loss at full resolution, then with the shallow half of the backbone frozen. With
--teacher, what each way to listen to it costs over mode none. Epochs run in turn; the first of each
(which fills the caches) is not counted.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import kd_losses  # noqa: E402
import train  # noqa: E402
import voc_data  # noqa: E402
from data_path import ReferencePipeline, publish  # noqa: E402


def our_epoch(args, items, cache_dir, *more):
    """A function that trains one epoch with the project's own loop, under `more` flags."""
    flags = ["--no_pretrained", "--model", args.model, "--crop_size", str(args.crop_size),
             "--batch_size", str(args.batch_size), "--workers", str(args.workers),
             "--cache_dir", cache_dir, *more]  # fmt: skip
    ours = train.get_args_parser().parse_args(flags)
    train.check_args(ours)
    train.setup_processes(ours)
    teacher = train.build_teacher(ours)
    loaders, _ = train.build_loaders(ours, items, items[:1], teacher)
    loader = loaders[ours.crop_size]
    weights = train.find_class_weights(ours, loaders)
    training = train.Training(ours, teacher, len(loader), weights)
    return lambda: training.train_one_epoch(loader)


def reference_epoch(args, items):
    """A function that trains one epoch as torchvision's reference script does."""
    device = voc_data.choose_device()
    loader = DataLoader(
        ReferencePipeline(items, args.crop_size), args.batch_size, shuffle=True, drop_last=True,
        num_workers=args.workers,
    )  # fmt: skip
    network = kd_losses.STUDENTS[args.model](pretrained=False).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def one_epoch():
        for image, target in loader:
            image, target = image.to(device), target.squeeze(1).long().to(device)
            loss = torch.nn.functional.cross_entropy(network(image), target, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return one_epoch


def loops_to_compare(args, items, cache_dir):
    """{name: function that trains one epoch}; the first is what the others are compared with."""
    if not args.teacher:
        return {
            "torchvision reference": reference_epoch(args, items),
            "ours": our_epoch(args, items, cache_dir),
            "ours, --loss_stride 1": our_epoch(args, items, cache_dir, "--loss_stride", "1"),
            "ours, --freeze mid": our_epoch(args, items, cache_dir, "--freeze", "mid"),
        }
    loops = {"none": our_epoch(args, items, cache_dir)}
    for mode in ("response", "feature"):
        for cache in ("auto", "none"):
            flags = ["--kd_mode", mode, "--teacher", args.teacher, "--teacher_cache", cache]
            name = f"{mode}, {'cached' if cache == 'auto' else 'live'} teacher"
            loops[name] = our_epoch(args, items, cache_dir, *flags)
    return loops


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="as in train.py; 'sample' needs no download")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default="ultracompact")
    parser.add_argument("--crop_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="use so many images only")
    parser.add_argument("--teacher", help="compare the modes with this teacher instead")
    parser.add_argument("--output", help="write the table to this file")
    return parser


def main(args):
    root = voc_data.find_voc(args.data_root, download=True)
    items = voc_data.list_items(root, args.split)[: args.limit]
    with tempfile.TemporaryDirectory() as cache_dir:
        loops = loops_to_compare(args, items, cache_dir)
        seconds = {name: [] for name in loops}
        for epoch in range(args.epochs + 1):
            for name, loop in loops.items():
                start = time.perf_counter()
                loop()
                if epoch:
                    seconds[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(seconds.values())))
    rows = [
        (name, f"{statistics.median(v):.1f}", f"{min(v):.1f}-{max(v):.1f}",
         f"{statistics.median(v) / base:.2f}", f"{base / statistics.median(v):.2f}")
        for name, v in seconds.items()
    ]  # fmt: skip
    teacher = f", taught by {Path(args.teacher).name}" if args.teacher else ""
    what = (
        f"One epoch of {args.model}{teacher}: {len(items):,} images, crops of {args.crop_size} px, "
        f"batches of {args.batch_size}, {args.workers} workers, median of {args.epochs} epochs"
    )
    headers = ("loop", "s an epoch", "range", "times the first's time", "times its speed")
    publish(what, rows, headers, args.output, voc_data.choose_device())


if __name__ == "__main__":
    main(get_args_parser().parse_args())
