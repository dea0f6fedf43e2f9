"""Measure torchvision's pretrained FCN-ResNet50, the default teacher, on PASCAL VOC 2012 val.

    python test_pretrained_fcn.py
    python test_pretrained_fcn.py --teacher deeplabv3_resnet50     another torchvision network

Measured as the students are, by the same `evaluate`; writes its row for the table of test.py.
In training the teacher has images of 513 px (`--eval_size 513`), here their own size by default.
torchvision reports 60.5 % mIoU for these weights, but on another test, COCO val2017 with VOC's
classes: https://docs.pytorch.org/vision/stable/models.html
"""

import argparse
import json
import os

from torch import nn

import voc_data
from kd_losses import load_teacher, score
from voc_data import CLASSES, in_range, path


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag = parser.add_argument
    flag("--teacher", type=os.path.expanduser, default="fcn_resnet50", help="as in train.py")
    flag("--teacher_weights", type=path, metavar="FILE", help="weights of --teacher on disk")
    voc_data.add_data_flags(flag)
    flag("--eval_size", type=in_range(0), default=0, help="longest side in px; 0: images' own")
    flag("--output_dir", type=path, default="report", help="where its row goes")
    return parser


class Logits(nn.Module):
    """A teacher with the interface of a student, image -> logits."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, image):
        return self.teacher(image)["out"]


def main(args):
    device = voc_data.choose_device(args.device)
    teacher = load_teacher(args.teacher, args.teacher_weights, device)
    items = voc_data.list_items(voc_data.find_voc(args.data_root), args.val_split)
    images = voc_data.VOCDataset(items)
    network, size = Logits(teacher), args.eval_size or 500
    matrix, loss = voc_data.evaluate(network, images, args.eval_size, device, args.workers)
    row = {
        "model": teacher.name, "kd_mode": "teacher", "label": teacher.name,
        "split": args.val_split, "images": len(images), "eval_size": args.eval_size,
        "miou": matrix.miou, "pixel_accuracy": matrix.pixel_accuracy, "loss": loss,
        "score": score(matrix.miou, teacher.parameters),
        "parameters": teacher.parameters,
        **voc_data.measure_speed(network, device, size),
        "iou": {c: None if iou != iou else iou for c, iou in zip(CLASSES, matrix.iou.tolist())},
    }  # fmt: skip
    file = args.output_dir / f"teacher_{teacher.name.replace('.', '_')}.json"
    voc_data.atomic_save(file, json.dumps(row) + "\n")
    print(f"{teacher.name}, {len(images)} images of '{args.val_split}'\n{matrix}\n")
    print(f"mIoU {matrix.miou:.4f} | {teacher.parameters:,} parameters | "
          f"{row['macs'] / 1e9:.1f} GMACs, {row['latency_ms']:.1f} ms at {size} px on "
          f"{row['device']} | its row for the table of test.py: {file}")  # fmt: skip


if __name__ == "__main__":
    voc_data.run(main, get_args_parser().parse_args())
