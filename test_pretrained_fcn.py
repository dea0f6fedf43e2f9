"""Measure torchvision's pretrained FCN-ResNet50, the default teacher, on PASCAL VOC 2012 val.

    python test_pretrained_fcn.py
    python test_pretrained_fcn.py --teacher deeplabv3_resnet50          another torchvision network
    python test_pretrained_fcn.py --teacher_weights fcn.pth             weights from disk

Through the same `evaluate` as the students, at each image's own size; train.py shows a teacher
images of 513 px, which is `--eval_size 513` here. Prints mIoU, per-class IoU, parameters and
latency, and leaves its row for the comparison table of test.py in --output_dir.

torchvision reports 60.5 % mIoU for these weights on COCO val2017 with the VOC labels, which is
another test: https://docs.pytorch.org/vision/stable/models.html
"""

import argparse
import os
import re
from pathlib import Path

from torch import nn

import voc_data
from kd_losses import load_teacher


def get_args_parser():
    parser = argparse.ArgumentParser(
        description="Measure a pretrained teacher on VOC 2012 val.",
        formatter_class=voc_data.HelpFormatter,
    )
    parser.add_argument(
        "--teacher", default="fcn_resnet50",
        help="a torchvision segmentation model, a .pth of this project or a .pt2 of torch.export",
    )  # fmt: skip
    parser.add_argument("--teacher_weights", metavar="FILE", help="a state dict, on disk")
    parser.add_argument("--data_root", help="where VOC 2012 is, in any usual layout, or 'sample'")
    parser.add_argument("--val_split", default="val", help="list in ImageSets/Segmentation")
    parser.add_argument(
        "--eval_size", type=int, default=0, help="longest side on the way in; 0 keeps the image's"
    )
    parser.add_argument("--output_dir", default="report", help="where the row for the table goes")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    parser.add_argument("--speed_size", type=int, default=512, help="side of the image for latency")
    parser.add_argument("--speed_repeats", type=int, default=20, help="timed runs for the latency")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="loader processes"
    )
    return parser


class LogitsOnly(nn.Module):
    """A teacher with the interface of a student: `image -> logits`."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, image):
        return self.teacher(image)["out"]


def main(args):
    rules = [
        ("eval_size", args.eval_size == 0 or args.eval_size >= 33, "0, or at least 33"),
        ("speed_size", args.speed_size >= 33, "at least 33"),
        ("speed_repeats", args.speed_repeats >= 1, "at least 1"),
        ("workers", args.workers >= 0, "0 or more"),
    ]
    voc_data.check_flags(args, rules)
    device = voc_data.choose_device(args.device)
    voc_data.check_writable(args.output_dir, "--output_dir")
    teacher = load_teacher(args.teacher, args.teacher_weights, device)
    root = voc_data.find_voc(args.data_root, download=True)
    items = voc_data.list_items(root, args.val_split)
    data = voc_data.VOCDataset(items, voc_data.EvalTransform(args.eval_size))
    network = LogitsOnly(teacher)
    result = voc_data.evaluate(network, voc_data.eval_loader(data, args.workers), device)
    cost = voc_data.measure_cost(network, device, args.speed_size, args.speed_repeats)
    cost["parameters"] = teacher.parameter_count
    row = {"model": teacher.name, "kd_mode": "teacher"}
    row |= voc_data.result_row(result, cost, args.val_split, args.eval_size, device)
    print(f"{teacher.name} on {result.images} images of '{args.val_split}'\n{result.matrix}")
    print(
        f"\nmIoU {row['miou']:.4f} | {row['parameters']:,} parameters | "
        f"{row['macs'] / 1e9:.1f} GMACs | {row['latency_ms']:.1f} ms for {args.speed_size} x "
        f"{args.speed_size} on {row['device']} | score {row['score']:.4f}"
    )
    path = Path(args.output_dir) / f"teacher_{re.sub(r'[^A-Za-z0-9]+', '_', teacher.name)}.json"
    voc_data.write_whole(voc_data.strict_json(row).encode(), path)
    print(f"its row for the table of test.py: {path}")


if __name__ == "__main__":
    voc_data.run_script(main, get_args_parser().parse_args())
