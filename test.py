"""Measure trained students on PASCAL VOC 2012; write the tables and figures of a report.

    python test.py                                          every best_model_*.pth in checkpoints/
    python test.py --visualize --num_vis 8                  with overlays: successes and failures
    python test.py --checkpoint A.pth B.pth                 these; several seeds give errors
    python test.py --checkpoint A.pth --image photo.jpg     overlays of your own images
    python test.py --checkpoint A.pth --export A.pt2        a program for deployment

Writes results.md, .tex and .json, per_class.md, per_class_iou.png and, from the histories
beside the checkpoints, training_curves.png. score = 4 * mIoU / (1 + parameters in millions).
"""

import argparse
import io
import json
import math
import os
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # before matplotlib: a notebook's may not exist in this Python
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tabulate import tabulate

import voc_data
from kd_losses import KD_MODES, STUDENTS, StudentWithDict, count_parameters, load_student, score
from voc_data import CLASSES, NUM_CLASSES, VOID, DataError, UsageError, atomic_save, in_range, path


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag = parser.add_argument
    flag("--model", choices=STUDENTS, help="this model only")
    flag("--checkpoint", type=path, nargs="+", metavar="FILE", help="default: all in --save_dir")
    flag("--save_dir", type=path, default="checkpoints", help="where train.py wrote them")
    voc_data.add_data_flags(flag)
    flag("--eval_size", type=in_range(0), help="longest side of the images in px, 0 for their own "
         "(default: that of the training's validation)")  # fmt: skip
    flag("--num_vis", type=in_range(2), default=8, help="images in a sheet: best and worst")
    flag("--output_dir", type=path, help="default: report, or report/NAME for a selection")
    flag = parser.add_mutually_exclusive_group().add_argument
    flag("--visualize", action="store_true", help="write overlays")
    flag("--image", type=path, nargs="+", metavar="FILE", help="overlays of these, no measuring")
    flag("--export", type=path, metavar="FILE.pt2", help="write a torch.export program instead")
    return parser


def main(args):
    device = voc_data.choose_device(args.device)
    students = load_students(args, device)
    selection = args.model or ""
    if args.checkpoint:
        selection = "several" if args.checkpoint[1:] else args.checkpoint[0].stem
    output = args.output_dir or Path("report", selection)
    if args.export:
        return export(students, args.export)
    if args.image:
        return overlay_images(args.image, students, device, output)
    items = voc_data.list_items(voc_data.find_voc(args.data_root), args.val_split)
    images = voc_data.VOCDataset(items)
    rows, speeds = [], {}
    for student in students:
        row = measure(args, student, images, device)
        key = student.model, student.eval_size or 500  # speed does not depend on the weights
        speeds[key] = speeds.get(key) or voc_data.measure_speed(student.network, device, key[1])
        rows.append(row | speeds[key])
    rows += teacher_rows(output, rows[0])
    write_tables(rows, output)
    colours = colormaps["turbo"](np.linspace(0, 1, len(rows)))  # seeds of a network look alike
    draw_class_bars(rows, colours, output / "per_class_iou.png")
    draw_curves(students, colours, output / "training_curves.png")
    if args.visualize:
        draw_overlays(args, students, images, device, output)


# ---------------------------------------------------------------------------------------- measuring

class Tested:
    """A student with the settings of its checkpoint."""

    def __init__(self, file, eval_size, device):
        network, checkpoint = load_student(file)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.file, self.settings = file, checkpoint.get("settings", {})
        self.model, self.kd_mode = checkpoint["model"], checkpoint["kd_mode"]
        self.eval_size = checkpoint.get("eval_size", 0) if eval_size is None else eval_size
        self.seed = self.settings.get("seed", 0)
        self.name = f"{self.model} {self.kd_mode}"
        history = file.with_name(f"history_{self.model}_{self.kd_mode}.jsonl")
        self.history = read_json(history) if history.is_file() else []


def load_students(args, device):
    """The students to test, in the order of the table."""
    files = args.checkpoint or sorted(args.save_dir.glob(f"best_model_{args.model or ''}*.pth"))
    chosen = [Tested(file, args.eval_size, device) for file in files]
    if any(args.model not in (None, student.model) for student in chosen):
        raise UsageError(f"not every --checkpoint is of --model {args.model}")
    if not chosen:
        raise DataError(f"no best_model_*.pth in {args.save_dir}: train one with train.py first")
    chosen.sort(key=lambda s: (list(STUDENTS).index(s.model), KD_MODES.index(s.kd_mode), s.seed))
    for student in chosen:
        several = sum(other.name == student.name for other in chosen) > 1
        student.label = f"{student.name} seed {student.seed}" if several else student.name
    if len({student.label for student in chosen}) < len(chosen):
        raise UsageError("two checkpoints have one model, kd_mode and seed: test them one by one")
    return chosen


def measure(args, student, images, device):
    """A row of the tables; student.ious: {index: mean IoU} of the images, over their classes."""
    ious = {}

    def image_iou(index, mask, prediction):
        matrix = voc_data.ConfusionMatrix(device)
        matrix.update(mask, prediction)
        ious[index] = matrix.miou

    arguments = student.network, images, student.eval_size, device, args.workers
    matrix, loss = voc_data.evaluate(*arguments, on_image=image_iou)
    print(f"\n{student.file}, {len(images)} images of '{args.val_split}'\n{matrix}")
    parameters = count_parameters(student.network)
    trained_for = [student.settings.get(key) for key in ("val_split", "eval_size")]
    alike = student.history and trained_for == [args.val_split, student.eval_size]
    student.ious = {index: iou for index, iou in ious.items() if not math.isnan(iou)}
    return {
        "model": student.model, "kd_mode": student.kd_mode, "seed": student.seed,
        "epochs": student.settings.get("epochs"), "checkpoint": str(student.file),
        "train_split": student.settings.get("train_split"), "label": student.label,
        "labelled_images": student.settings.get("labelled_images"),
        "split": args.val_split, "images": len(images), "eval_size": student.eval_size,
        "miou": matrix.miou, "pixel_accuracy": matrix.pixel_accuracy, "loss": loss,
        "final_val_miou": student.history[-1].get("val_miou") if alike else None,
        "score": score(matrix.miou, parameters), "parameters": parameters,
        "iou": {c: None if iou != iou else iou for c, iou in zip(CLASSES, matrix.iou.tolist())},
    }  # fmt: skip


def teacher_rows(output, like):
    """The rows that test_pretrained_fcn.py left there, of an equal list and the same device."""
    rows = [row for file in sorted(output.glob("teacher_*.json")) for row in read_json(file)]
    return [r for r in rows if all(r.get(k) == like[k] for k in ("split", "images", "device"))]


def read_json(file):
    """The values of a file, one a line; DataError where it is damaged."""
    try:
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): delete it") from error


def gains(rows):
    """What distillation gives: {label: (runs, mean mIoU, pairs, gain over none, its standard error,
    and both again for the final epoch)}.

    Runs of one seed, length and list are a pair; gains are in points of mIoU. None where there is
    no pair, or for the standard error of a single one.
    """
    table, same = {}, ("model", "seed", "epochs", "train_split", "labelled_images")
    for name in dict.fromkeys((r["model"], r["kd_mode"]) for r in rows if r["kd_mode"] in KD_MODES):
        runs = [row for row in rows if (row["model"], row["kd_mode"]) == name]
        alone = [row for row in rows if row["kd_mode"] == "none" != name[1]]
        pairs = [(a, b) for a in runs for b in alone if all(a[key] == b[key] for key in same)]
        cells = [len(runs), 100 * np.mean([row["miou"] for row in runs]), len(pairs)]
        for key in ("miou", "final_val_miou"):
            found = [100 * (a[key] - b[key]) for a, b in pairs if None not in (a[key], b[key])]
            cells.append(np.mean(found) if found else None)
            cells.append(np.std(found, ddof=1) / len(found) ** 0.5 if found[1:] else None)
        table[" ".join(name)] = tuple(cells)
    return table


# ------------------------------------------------------------------------------------------- tables

def show(value, digits=2, sign=""):
    """A number for a table; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def write_tables(rows, output):
    """Write the comparison as .md, .tex and .json, then print it."""
    columns = {
        "network": lambda r: r["label"],
        "input px": lambda r: str(r["eval_size"] or "own"),
        "mIoU %": lambda r: show(100 * r["miou"]),
        "final epoch": lambda r: show(100 * (r.get("final_val_miou") or math.nan)),
        "pixel acc. %": lambda r: show(100 * r["pixel_accuracy"]),
        "parameters": lambda r: f"{r['parameters']:,}",
        "MMACs": lambda r: show(r["macs"] / 1e6, 0),
        "latency ms": lambda r: show(r["latency_ms"], 1),
        "img/s, batch of 16": lambda r: show(r["images_per_second"], 0),
        "img/s, half precision": lambda r: show(r.get("images_per_second_half"), 0),
        "score": lambda r: show(r["score"], 3),
    }
    if "images_per_second_half" not in rows[0]:  # measured on CUDA alone
        del columns["img/s, half precision"]
    cells = [[column(row) for column in columns.values()] for row in rows]
    kwargs = {"headers": list(columns), "disable_numparse": True}
    note = (
        f"{rows[0]['images']} images of '{rows[0]['split']}', masks at native size; MMACs (millions"
        " of multiply-accumulates), latency of one image and throughput for square images of the "
        f"input size (500 px where they keep theirs), float32 (CUDA: TF32), on {rows[0]['device']}"
        "; final epoch: mIoU of the last validation; score = 4 mIoU / (1 + millions of parameters)."
    )
    gain_cells = [
        [name, runs, show(mean), pairs or "-", *(show(v, sign=s) for v, s in zip(found, "+-+-"))]
        for name, (runs, mean, pairs, *found) in gains(rows).items()
    ]
    headers = ["network", "runs", "mean mIoU %", "pairs", "gain over none", "standard error",
               "gain, final epoch", "standard error"]  # fmt: skip
    gain_table = tabulate(gain_cells, headers, tablefmt="github", disable_numparse=True)
    table = tabulate(cells, tablefmt="github", **kwargs)
    atomic_save(output / "results.md", f"{table}\n\n{note}\n\n{gain_table}\n")
    atomic_save(output / "results.tex", tabulate(cells, tablefmt="latex_booktabs", **kwargs) + "\n")
    atomic_save(output / "results.json", json.dumps(rows, indent=1, allow_nan=False) + "\n")
    shown = {label: [show(v, 1) for v in values] for label, values in class_bars(rows).items()}
    per_class = tabulate({"IoU %": CLASSES} | shown, "keys", "github", disable_numparse=True)
    atomic_save(output / "per_class.md", per_class + "\n")
    print(f"\n{table}\n\n{note}\n\n{gain_table}\n\ntables and figures in {output}")


# ------------------------------------------------------------------------------------------ figures

def save_figure(figure, file):
    atomic_save(file, lambda temporary: figure.savefig(temporary, format=file.suffix[1:], dpi=90))


def class_bars(rows):
    """{label: IoU of each class in percent}; NaN where the ground truth lacks the class."""
    return {row["label"]: 100 * np.array([*row["iou"].values()], dtype=float) for row in rows}


def draw_class_bars(rows, colours, file):
    figure = Figure((10, 3.4), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(rows)
    axis.set_prop_cycle(color=colours)
    for number, (label, values) in enumerate(class_bars(rows).items()):
        axis.bar(np.arange(NUM_CLASSES) - 0.4 + (number + 0.5) * width, values, width, label=label)
    axis.set_xticks(range(NUM_CLASSES), CLASSES, rotation=45, ha="right")
    axis.set(ylabel="IoU %", xlim=(-0.6, NUM_CLASSES - 0.4))
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=7, ncols=4)
    save_figure(figure, file)


def draw_curves(students, colours, file):
    """Training cross-entropy and val mIoU by epoch, of the students that have a history."""
    figure = Figure((10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, key, name in ((left, "ce", "train cross-entropy"), (right, "val_miou", "val mIoU")):
        for student, colour in zip(students, colours):
            points = [(line["epoch"], line[key]) for line in student.history if key in line]
            axis.plot(*zip(*points), marker=".", markersize=3, color=colour, label=student.label)
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
    if any(student.history for student in students):
        labels = right.get_legend_handles_labels()
        figure.legend(*labels, loc="outside upper center", fontsize=7, ncols=4)
        save_figure(figure, file)


def overlay(image, labels):
    """(H, W, 3) uint8 image under the colours of its labels; background stays, void is hatched."""
    blended = image // 2 + voc_data.voc_palette()[labels] // 2
    y, x = np.indices(labels.shape)
    blended[(labels == VOID) & ((x + y) % 6 < 3)] = 255
    return np.where(labels[..., None] > 0, blended, image)


@torch.inference_mode()
def predict(student, image, device):
    """The labels (H, W) a student gives an (H, W, 3) uint8 image, resized as in `evaluate`."""
    logits = student.network(voc_data.network_input(image[None], student.eval_size, device))
    logits = F.interpolate(logits, size=image.shape[:2], mode="bilinear")
    return logits.max(dim=1).indices[0].cpu().numpy()


def draw_sheet(panels, file, columns, inches=2.3):
    """A sheet of (title, image, labels) panels, each with a legend of the classes it shows."""
    rows, palette = -(-len(panels) // columns), voc_data.voc_palette() / 255
    figure = Figure((inches * columns, inches * rows), layout="constrained")
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.axis("off")
    for (title, image, labels), axis in zip(panels, figure.axes):
        axis.imshow(overlay(image, labels))
        axis.set_title(title, fontsize=8)
        patches = [Patch(color=palette[label], label=CLASSES[label])
                   for label in np.unique(labels) if 0 < label < NUM_CLASSES]  # fmt: skip
        axis.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=6,
                    ncols=3, frameon=False, handlelength=1)  # fmt: skip
    save_figure(figure, file)


def best_and_worst(ious, count):
    """Indices of `count` images: the highest IoU, the lowest, the second highest, and so on."""
    ranked = sorted(ious, key=ious.get, reverse=True)
    return [*dict.fromkeys(index for pair in zip(ranked, ranked[::-1]) for index in pair)][:count]


def evenly_ranked(image_ious, count):
    """Indices of `count` images from the lowest to the highest mean IoU over all students."""
    ranked = sorted(image_ious[0], key=lambda index: sum(ious[index] for ious in image_ious))
    return [*dict.fromkeys(ranked[int((i + 0.5) * len(ranked) / count)] for i in range(count))]


def draw_overlays(args, students, images, device, output):
    """A sheet of successes and failures per student, and one that compares all students."""

    def panels(index, compared):
        image, mask = images[index][..., :3], images[index][..., 3]
        shown = [(images.items[index].id, image, 0 * mask), ("ground truth", image, mask)]
        return shown + [(title, image, predict(s, image, device)) for title, s in compared.items()]

    for student in students:
        sheet = []
        for index in best_and_worst(student.ious, args.num_vis):
            sheet += panels(index, {f"prediction, IoU {student.ious[index]:.2f}": student})
        draw_sheet(sheet, output / f"overlays_{student.label.replace(' ', '_')}.jpg", columns=6)
    sheet = []
    for index in evenly_ranked([student.ious for student in students], args.num_vis // 2):
        sheet += panels(index, {student.label: student for student in students})
    draw_sheet(sheet, output / "overlays_compared.jpg", columns=2 + len(students))


def overlay_images(files, students, device, output):
    """Image and prediction of each student, for images without a mask."""
    if len({file.stem for file in files}) < len(files):
        raise UsageError("two --image files have one name: take them one by one")
    for file in files:
        image = voc_data.read_item(voc_data.Item(file.name, file, None))[..., :3]
        panels = [(file.name, image, np.zeros(image.shape[:2], dtype=np.uint8))]
        panels += [(student.label, image, predict(student, image, device)) for student in students]
        draw_sheet(panels, output / f"image_{file.stem}.jpg", columns=len(panels), inches=5)
        print(f"{file} -> {output / f'image_{file.stem}.jpg'}")


# ------------------------------------------------------------------------------------------- export

def export(students, file):
    """Write a program for torch.export.load: normalised images (N, 3, H, W) of at least 17 px ->
    {"out": logits, and the features "low", "mid" and "high"}."""
    if students[1:] or file.suffix != ".pt2":
        raise UsageError(f"--export {file}: name one --checkpoint and a FILE.pt2")
    network, buffer = StudentWithDict(students[0].network).eval(), io.BytesIO()
    network.requires_grad_(False).to("cpu", memory_format=torch.contiguous_format)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)  # of batch, height and width
    program = torch.export.export(network, (torch.zeros(2, 3, 160, 192),), dynamic_shapes=(sizes,))
    torch.export.save(program, buffer)
    atomic_save(file, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    print(f"{students[0].file} -> {file}, best for images {students[0].eval_size or 'any'} px long")


if __name__ == "__main__":
    voc_data.run(main, get_args_parser().parse_args())
