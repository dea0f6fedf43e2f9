"""Seconds of a training epoch: the three modes against a loop like torchvision's reference script.

    python tests/benchmarks/training_epoch.py --data_root DIR --teacher FILE.pt2

The same student, images, crop size, batch size and workers. The reference decodes and resizes whole
images, takes the loss at every pixel, and uses SGD; it too has channels_last and persistent
workers. Ours is train.py with its defaults. Epochs run in turn; the first is not timed.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import kd_losses  # noqa: E402
import train  # noqa: E402
import voc_data  # noqa: E402
from data_path import reference_loader, run_in_turn, save_table  # noqa: E402


def our_epoch(flags):
    """A function of the epoch that trains it as train.py does."""
    args = train.get_args_parser().parse_args([*map(str, flags), "--no_pretrained"])
    train.check_flags(args)
    device = train.init_processes(args)
    images, _ = train.load_data(args)
    teacher = None
    if args.kd_mode != "none":
        teacher = kd_losses.load_teacher(args.teacher, args.teacher_weights, device)
    loader = train.build_loader(args, images, teacher, device)
    weights = kd_losses.class_weights(images.class_pixels(), args.class_balance).to(device)
    model = train.build_model(args, teacher).to(device, memory_format=torch.channels_last)
    state = train.build_optimizer(args, model), torch.amp.GradScaler(enabled=False)
    ema = train.EMA(model.student)
    return lambda epoch: train.train_one_epoch(
        args, epoch, model, loader, teacher, weights, *state, ema
    )


def reference_epoch(args):
    """A function of the epoch that trains it in the way of torchvision's reference script."""
    device = voc_data.choose_device(None)
    items = voc_data.list_items(voc_data.find_voc(args.data_root), "train")
    loader = reference_loader(items, args.workers)
    student = kd_losses.STUDENTS["ultracompact"](pretrained=False)
    student = student.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def epoch(_):
        for images, masks in loader:
            images = voc_data.normalise(images.to(device))
            masks = masks.squeeze(1).to(device).long()
            loss = F.cross_entropy(student(images), masks, ignore_index=voc_data.VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return epoch


def main(args):
    with tempfile.TemporaryDirectory() as cache_dir:
        flags = ["--cache_dir", cache_dir, "--workers", args.workers, "--teacher", args.teacher]
        flags += ["--data_root", args.data_root] if args.data_root else []
        epochs = {"torchvision reference": reference_epoch(args), "ours, none": our_epoch(flags)}
        for mode in ("response", "feature"):
            epochs[f"ours, {mode}"] = our_epoch([*flags, "--kd_mode", mode])
        seconds = run_in_turn(epochs, args.rounds)
    none = statistics.median(seconds["ours, none"])
    rows = [
        [name, f"{statistics.median(v):.1f}", f"{min(v):.1f}-{max(v):.1f}",
         f"{statistics.median(v) / none:.2f}"] for name, v in seconds.items()
    ]  # fmt: skip
    note = (f"One epoch of the ultra-compact student, crops of 256 px, batches of 16, "
            f"{args.workers} workers, teacher {Path(args.teacher).name} cached; median and range "
            f"of {args.rounds} epochs in turn")  # fmt: skip
    save_table(rows, ["loop", "s", "range", "times 'ours, none'"], note, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", type=voc_data.path)
    parser.add_argument("--teacher", default="fcn_resnet50")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default="report/speed/training_epoch.md")
    voc_data.run(main, parser.parse_args())
