"""Latency and throughput of the students against torchvision's compact segmentation networks.

    python tests/benchmarks/inference.py                   the device there is, random weights

All networks run in turn, round after round, so that a machine that drifts drifts for all. The table
gives the median time of a batch, images a second, and the ratio to LR-ASPP.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision import models

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import voc_data  # noqa: E402
from data_path import publish  # noqa: E402
from kd_losses import STUDENTS  # noqa: E402

REFERENCE = "lraspp_mobilenet_v3_large"
OTHERS = (REFERENCE, "deeplabv3_mobilenet_v3_large", "fcn_resnet50")


def networks(device):
    """{name: function of an image batch}, all in eval mode."""
    result = {}
    for name, student in STUDENTS.items():
        network = student(pretrained=False).eval().to(device, memory_format=torch.channels_last)
        result[name] = network
        folded = student(pretrained=False).eval()
        folded = voc_data.fold_batch_norm(folded)
        result[f"{name}, BatchNorm folded"] = folded.to(device, memory_format=torch.channels_last)
    for name in OTHERS:
        network = models.get_model(name, weights=None, weights_backbone=None, num_classes=21)
        result[name] = network.eval().to(device, memory_format=torch.channels_last)
    return result


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=25, help="at most, for each size and batch")
    parser.add_argument("--seconds", type=float, default=30, help="after so many, 3 rounds will do")
    parser.add_argument("--output", help="write the table to this file")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=[*STUDENTS, *OTHERS[1:]],
        help="networks to leave out",
    )  # fmt: skip
    return parser


def main(args):
    device = voc_data.choose_device(args.device)
    tested = {name: net for name, net in networks(device).items() if name not in args.skip}
    rows = []
    for size in args.sizes:
        for batch in args.batches:
            rows += compare(tested, size, batch, args, device)
    headers = ("network", "px", "batch", "ms", "range", "img/s", f"times {REFERENCE}")
    what = (
        f"Forward passes, random weights, medians of up to {args.rounds} rounds in turn (at least "
        "three of large batches)"
    )
    publish(what, rows, headers, args.output, device)


@torch.inference_mode()
def compare(tested, size, batch, args, device):
    """Rows of the table for one size and batch."""
    image = torch.randn(batch, 3, size, size, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    times = {name: [] for name in tested}
    begin = time.perf_counter()
    for turn in range(args.rounds + 1):
        if turn > 3 and time.perf_counter() - begin > args.seconds:
            break
        for name, network in tested.items():
            voc_data.synchronise(device)
            start = time.perf_counter()
            network(image)
            voc_data.synchronise(device)
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    reference = statistics.median(times[REFERENCE])
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        rows.append(
            (name, size, batch, f"{middle:.1f}", f"{min(values):.1f}-{max(values):.1f}",
             f"{1000 * batch / middle:.0f}", f"{reference / middle:.2f}")
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main(get_args_parser().parse_args())
