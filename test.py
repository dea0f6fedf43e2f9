"""Measure trained students on PASCAL VOC 2012 and write the tables and pictures of a report.

    python test.py                                          every best_model_*.pth of checkpoints/
    python test.py --checkpoint checkpoints/best_model_ultracompact_response.pth
    python test.py --visualize --num_vis 8                  overlays: successes and failures
    python test.py --checkpoint A.pth --image photo.jpg     overlays of your own photographs

Model and mode are read from each checkpoint. Tables go to --output_dir (report/, or a folder in it
for a selection) as results.md, .tex, .csv and .json; with them per_class.md, per_class_iou.png, and
training_curves.png where the histories of training lie beside the checkpoints. Several checkpoints
of one model and mode are summed up in runs.md: mean and standard deviation over seeds, a row for
each group of other settings.

score = 4 * mIoU / (1 + parameters in millions)
"""

import argparse
import csv
import io
import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

import voc_data
from kd_losses import KD_MODES, STUDENTS, load_student
from voc_data import CLASSES, NUM_CLASSES, DataError, UsageError, write_whole


def get_args_parser():
    parser = argparse.ArgumentParser(
        description="Measure trained students on VOC 2012; write tables and overlays.",
        formatter_class=voc_data.HelpFormatter,
    )
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--checkpoint", nargs="+", metavar="FILE",
        help="checkpoints to test (default: every best_model_*.pth in --save_dir)",
    )  # fmt: skip
    group.add_argument("--save_dir", default="checkpoints", help="where training wrote them")
    group.add_argument("--model", choices=STUDENTS, help="test only this model")

    group = parser.add_argument_group("data")
    group.add_argument("--data_root", help="where VOC 2012 is, in any usual layout, or 'sample'")
    group.add_argument("--val_split", default="val", help="list in ImageSets/Segmentation")
    group.add_argument(
        "--eval_size", type=int, help="longest side of the image on its way in, 0 for its own "
        "(default: as in the checkpoint's training)",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="loader processes"
    )

    group = parser.add_argument_group("pictures")
    group.add_argument("--visualize", action="store_true", help="write overlays")
    group.add_argument("--num_vis", type=int, default=8, help="images in a sheet: best and worst")
    group.add_argument(
        "--image", nargs="+", metavar="PATH", help="photographs or folders of them: write "
        "overlays, measure nothing",
    )  # fmt: skip
    group.add_argument(
        "--photo_size", type=int, help="longest side of an --image on its way in (default: as in "
        "the checkpoint's validation, 512 where that took images as they were)",
    )  # fmt: skip

    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", help="where tables and pictures go (default: report; for a selection, by "
        "--checkpoint or --model, a folder of its own in it)",
    )  # fmt: skip
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    group.add_argument("--speed_size", type=int, default=512, help="side of the image for latency")
    group.add_argument("--speed_repeats", type=int, default=50, help="timed runs for the latency")
    return parser


def main(args):
    check_args(args)
    device = voc_data.choose_device(args.device)
    output = Path(args.output_dir or default_output(args))
    voc_data.check_writable(output, "--output_dir")
    students = load_students(args, device)
    if args.image:
        overlay_photographs(args, students, device, output)
        return
    root = voc_data.find_voc(args.data_root, download=True)
    items = voc_data.list_items(root, args.val_split)
    costs = measure_costs(args, students, device)
    for student in students:
        student.doubt = doubt(student.settings, args.val_split, items, root)
        student.unfinished = unfinished(student)
    rows = [measure(args, student, items, device, costs[student.model]) for student in students]
    add_gains(rows)
    rows += teacher_rows(output, like=rows[0])
    write_tables(rows, output, f"{len(items)} images of '{args.val_split}'")
    draw_per_class(rows, output / "per_class_iou.png")
    draw_training_curves(students, output / "training_curves.png")
    if args.visualize:
        visualize(args, students, rows, items, device, output)


def default_output(args):
    """`report` holds the comparison of all; a selection must not take its place."""
    if args.checkpoint:
        more = f"_and_{len(args.checkpoint) - 1}_more" if len(args.checkpoint) > 1 else ""
        return Path("report", Path(args.checkpoint[0]).stem + more)
    return Path("report", args.model) if args.model else Path("report")


def check_args(args):
    """Refuse values that cannot work, before anything is read or written."""
    rules = [
        ("num_vis", args.num_vis >= 2, "at least 2"),
        ("eval_size", not args.eval_size or args.eval_size >= 33, "0, or at least 33"),
        ("photo_size", args.photo_size is None or args.photo_size >= 33, "at least 33"),
        ("speed_size", args.speed_size >= 33, "at least 33"),
        ("speed_repeats", args.speed_repeats >= 1, "at least 1"),
        ("workers", args.workers >= 0, "0 or more"),
    ]
    voc_data.check_flags(args, rules)


# ---------------------------------------------------------------------------------- the students


class Tested:
    """A student that is tested: its network, and what its checkpoint says of it."""

    def __init__(self, path, device):
        self.path = Path(path)
        network, checkpoint = load_student(path)
        expected = {
            "num_classes": checkpoint.get("num_classes", NUM_CLASSES) == NUM_CLASSES,
            "kd_mode": checkpoint.get("kd_mode") in KD_MODES,
            "settings": isinstance(checkpoint.get("settings", {}), dict),
        }
        for key, right in expected.items():
            if not right:
                raise DataError(f"{path} cannot be tested: its {key} is {checkpoint.get(key)!r}")
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        network = voc_data.fold_batch_norm(network)  # the same outputs, faster
        self.network = network.to(device, memory_format=torch.channels_last)
        self.model, self.kd_mode = checkpoint["model"], checkpoint["kd_mode"]
        self.run = f"{self.model}_{self.kd_mode}"
        self.eval_size = checkpoint.get("eval_size", 0)
        self.settings = checkpoint.get("settings", {})
        self.seed = self.settings.get("seed")
        self.label = self.run  # load_students tells the seeds of one run apart


def load_students(args, device):
    """The students to test, in the order of the table.

    Raises:
        DataError: there are no checkpoints, or one cannot be read.
        UsageError: `--model` and a named checkpoint disagree.
    """
    paths = args.checkpoint or sorted(Path(args.save_dir).glob("best_model_*.pth"))
    students = [Tested(path, device) for path in paths]
    if args.model and args.checkpoint:
        for student in students:
            if student.model != args.model:
                raise UsageError(f"{student.path} holds {student.model}, not --model {args.model}")
    if args.model:
        students = [student for student in students if student.model == args.model]
    if not students:
        raise DataError(
            f"there is no best_model_{args.model or ''}*.pth in {args.save_dir}: train one with "
            "train.py, or name it with --checkpoint"
        )
    models = list(STUDENTS)
    students.sort(key=lambda s: (models.index(s.model), KD_MODES.index(s.kd_mode), str(s.path)))
    times_seen = Counter()
    for student in students:
        times_seen[student.run] += 1
        if times_seen[student.run] > 1:
            student.label += f"_{times_seen[student.run]}"
        if args.eval_size is not None:
            student.eval_size = args.eval_size
    return students


# ------------------------------------------------------------------------------------ measuring


def measure_costs(args, students, device):
    """{model: its cost}: once for each, for what it costs does not depend on its weights."""
    costs = {}
    for student in students:
        if student.model not in costs:
            cost = voc_data.measure_cost(
                student.network, device, args.speed_size, args.speed_repeats
            )
            cost["parameters"] = student.parameters  # as trained, not as folded
            costs[student.model] = cost
    return costs


def measure(args, student, items, device, cost):
    """Everything about one student, as plain values; prints its per-class table."""
    data = voc_data.VOCDataset(items, voc_data.EvalTransform(student.eval_size))
    ious = {}

    def remember(index, labels, prediction):
        value = voc_data.image_iou(labels.cpu(), prediction.cpu())
        if not math.isnan(value):  # an image that is all void has none
            ious[items[index].id] = value

    result = voc_data.evaluate(
        student.network, voc_data.eval_loader(data, args.workers), device, on_image=remember
    )
    matrix = result.matrix
    row = voc_data.result_row(result, cost, args.val_split, student.eval_size, device)
    print(f"\n{student.path} ({result.images} images of '{args.val_split}')\n{matrix}")
    for note in filter(None, (student.doubt, student.unfinished)):
        print(f"note: this network {note}")
    return {
        "model": student.model, "kd_mode": student.kd_mode, "checkpoint": str(student.path),
        "seed": student.seed, "settings": student.settings, **row, "doubt": student.doubt,
        "unfinished": student.unfinished, "image_iou": ious,
    }  # fmt: skip


def doubt(settings, split, items, root):
    """Why the images of a split may be no test for a network; None where it cannot know them."""
    if settings.get("allow_val_in_train"):
        return "was trained with --allow_val_in_train: it may know these images"
    kept_apart = settings.get("val_split", split)
    if kept_apart == split:
        return None
    try:
        unknown = set(voc_data.read_split(root, kept_apart))
    except DataError:  # its list is not in this tree
        unknown = set()
    if unknown.issuperset(item.id for item in items):
        return None
    return f"was kept apart from '{kept_apart}', not from '{split}': it may know these images"


def unfinished(student):
    """What to say of a run that is to go on; None where it is not, or nothing is known of it.

    With --patience a run may be at its end before its last epoch.
    """
    planned, file = student.settings.get("epochs"), history_of(student)
    if not planned or student.settings.get("patience") or not file.is_file():
        return None
    done = len(file.read_text().splitlines())
    return f"has had {done} of its {planned} epochs so far" if done < planned else None


def add_gains(rows):
    """Set each row's "gain" in points of mIoU: over the mean of the `none` rows like it."""
    for row in rows:
        alone = alone_like(row, rows)
        row["gain"] = 100 * (row["miou"] - statistics.mean(alone)) if alone else None


def alone_like(row, rows):
    """mIoUs of the `none` rows of the same model and settings, but those of distillation.

    A run that was longer, or had other labels or crops, is no measure of what the teacher gave; nor
    is one that is not finished, on either side.
    Photographs without masks count as the teacher's gift, where they do not make an epoch longer.
    """
    mine = KD_SETTINGS
    if not row.get("settings", {}).get("epoch_images"):
        mine = KD_SETTINGS - {"extra_images", "data_key"}
    return [
        other["miou"] for other in rows
        if (other["model"], other["kd_mode"]) == (row["model"], "none")
        and not (row.get("unfinished") or other.get("unfinished"))
        and choices(other, mine) == choices(row, mine)
    ]  # fmt: skip


def teacher_rows(folder, like):
    """The rows that test_pretrained_fcn.py left in the folder of the tables, measured as `like`."""
    taken = []
    for path in sorted(folder.glob("teacher_*.json")):
        row = read_json(path.read_text(), path)
        if all(row.get(name) == like[name] for name in ("split", "images", "device", "speed_size")):
            taken.append(row)
        else:
            print(f"{path} was measured on another split, device or --speed_size: not in the table")
    return taken


def read_json(text, path):
    """The value of a JSON text that this project wrote to `path`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not whole ({error}): delete it or make it again") from error


# --------------------------------------------------------------------------------------- tables

# Settings of a run that say where it ran, how often it was looked at, and the seed: not a choice of
# what to compute (amp_dtype is what --amp came to there). And those that only distillation has.
NO_CHOICES = {
    "seed", "save_dir", "cache_dir", "data_root", "workers", "device", "resume", "overwrite",
    "pixel_cache", "val_every", "patience", "checkpoint_interval", "amp_dtype",
}  # fmt: skip
KD_SETTINGS = {
    "kd_mode", "teacher", "teacher_weights", "teacher_cache", "teacher_size", "temperature",
    "alpha", "beta", "kd_levels", "extra_images", "data_key", "teacher_digest",
}  # fmt: skip
COLUMNS = (
    # heading, how to show it
    ("model", lambda r: r["model"]),
    ("KD", lambda r: r["kd_mode"]),
    ("input px", lambda r: r["eval_size"] or "own"),
    ("mIoU %", lambda r: f"{100 * r['miou']:.2f}"),
    ("gain", lambda r: "" if r.get("gain") is None else show_gain(r["gain"])),
    ("pixel acc. %", lambda r: f"{100 * r['pixel_accuracy']:.2f}"),
    ("parameters", lambda r: f"{r['parameters']:,}"),
    ("MMACs", lambda r: f"{r['macs'] / 1e6:.0f}"),
    ("latency ms", lambda r: f"{r['latency_ms']:.1f} ± {r['latency_spread_ms'] / 2:.1f}"),
    ("FPS", lambda r: f"{r['fps']:.0f}"),
    ("score", lambda r: f"{r['score']:.3f}"),
)


def write_tables(rows, output, what):
    """Print the comparison, and write it with its values as .md, .tex, .csv and .json."""
    cells = [[show(row) for _, show in COLUMNS] for row in rows]
    headings = [heading for heading, _ in COLUMNS]
    layout = {"headers": headings, "disable_numparse": True}
    print(f"\n{tabulate(cells, tablefmt='simple', **layout)}")
    size = rows[0]["speed_size"]
    note = (
        f"mIoU on {what}, against masks at native size (input px: longest side of the image on its "
        "way in); gain over `none` in mIoU points, where a run with the same settings but those of "
        "distillation is in the table; MACs and latency (students with BatchNorm folded; median ± "
        f"half the interquartile range) for one {size} x {size} image on {rows[0]['device']}; "
        "score = 4 mIoU / (1 + millions of parameters)."
    )
    notes = [note]
    for key, heading in (("doubt", "No test"), ("unfinished", "Not finished")):
        notes += [f"{heading}: {r['model']} {r['kd_mode']} {r[key]}." for r in rows if r.get(key)]
    note = "\n\n".join(dict.fromkeys(notes))
    write_text(f"{tabulate(cells, tablefmt='github', **layout)}\n\n{note}\n", output / "results.md")
    latex = tabulate(cells, tablefmt="latex_booktabs", **layout).replace("±", r"$\pm$")
    write_text(latex + "\n", output / "results.tex")
    write_csv(rows, output / "results.csv")
    write_text(voc_data.strict_json(rows), output / "results.json")
    names = [f"{row['model']} {row['kd_mode']}" for row in rows]
    per_class = [[c, *(percent(row["iou"][c]) for row in rows)] for c in CLASSES]
    per_class.append(["mean", *(percent(row["miou"]) for row in rows)])
    table = tabulate(per_class, headers=["IoU %", *names], tablefmt="github", disable_numparse=True)
    write_text(table + "\n", output / "per_class.md")
    write_runs_table([row for row in rows if row["kd_mode"] != "teacher"], output / "runs.md")
    print(f"tables in {output}/: results.md .tex .csv .json, per_class.md")


def show_gain(points):
    """A difference with its sign; 0 is +0.00, never -0.00."""
    return f"{round(points, 2) + 0.0:+.2f}"


def percent(value):
    """A share as a percentage; a dash for NaN (None, once it has been through JSON)."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def write_csv(rows, path):
    """One line a network, plain numbers, the IoU of each class at the end."""
    table = io.StringIO()
    plain = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*plain, *(f"iou_{name}" for name in CLASSES)])
    for row in rows:
        writer.writerow([*(row.get(key, "") for key in plain), *row["iou"].values()])
    write_text(table.getvalue(), path)


def write_text(text, path):
    """Write a text file, whole or not at all."""
    write_whole(text.encode(), path)


def write_runs_table(rows, path):
    """Mean and standard deviation over the seeds of each model, mode and choice of settings.

    Written where some model and mode comes more than once. Settings are named where they differ
    between the rows of one model and mode; "gain" is over `none` with the same settings but those
    of distillation. No deviation where a seed comes twice: two epochs of one run are no two runs.
    """
    variants = {(row["model"], row["kd_mode"]) for row in rows}
    if len(variants) == len(rows):
        return
    groups = defaultdict(list)
    for row in rows:
        groups[row["model"], row["kd_mode"], differing_settings(row, rows)].append(row)
    cells = []
    for (model, mode, settings), members in groups.items():
        values = [100 * row["miou"] for row in members]
        alone = alone_like(members[0], rows)
        gain = show_gain(statistics.mean(values) - 100 * statistics.mean(alone)) if alone else ""
        seeds = {member["seed"] for member in members}
        repeated = len(seeds) == len(values) > 1
        spread = f"{statistics.stdev(values):.2f}" if repeated else "-"
        each = " ".join(f"{value:.2f}" for value in values)
        mean = f"{statistics.mean(values):.2f}"
        cells.append([model, mode, settings, len(values), mean, spread, gain, each])
    headings = ["model", "KD", "settings", "n", "mean mIoU %", "std", "gain", "each"]
    table = tabulate(cells, headings, tablefmt="github", disable_numparse=True)
    print(f"\n{table}")
    write_text(table + "\n", path)


def choices(row, but=()):
    """The settings of a row that say what its run computed, without those named in `but`.

    What is off is left out, as it was before there was such a setting.
    """
    settings = row.get("settings", {})
    names = (name for name in settings if name not in NO_CHOICES | set(but))
    return {name: settings[name] for name in names if settings[name] not in voc_data.OFF}


def differing_settings(row, rows):
    """The choices of a row that other rows of its model and mode made otherwise, as text."""
    others = [r for r in rows if (r["model"], r["kd_mode"]) == (row["model"], row["kd_mode"])]
    mine = choices(row)
    names = {name for other in others for name in choices(other) | mine
             if choices(other).get(name) != mine.get(name)}  # fmt: skip
    return ", ".join(f"{name} {mine.get(name, 'off')}" for name in sorted(names))


# -------------------------------------------------------------------------------------- pictures


def draw_per_class(rows, path):
    """A bar chart of the IoU of each class, one colour a network."""
    figure, axis = voc_data.pyplot().subplots(figsize=(10, 3.4), layout="constrained")
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        places = [place + (number - (len(rows) - 1) / 2) * width for place in range(len(CLASSES))]
        heights = [100 * (row["iou"][name] or 0) for name in CLASSES]
        axis.bar(places, heights, width, label=f"{row['model']} {row['kd_mode']}")
    axis.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axis.set(ylabel="IoU %", xlim=(-0.6, len(CLASSES) - 0.4))
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=7, ncols=min(4, len(rows)))
    voc_data.write_figure(figure, path)


def history_of(student):
    """Where the history of a student's run lies, if it is still there.

    That of best_model_X.pth and of epoch_20_X.pth is history_X.jsonl; that of kept_X.pth, a file
    that somebody renamed, can only be kept_history_X.jsonl.
    """
    prefix = student.path.stem.removesuffix(student.run)
    if re.fullmatch(r"best_model_|epoch_\d+_", prefix):
        prefix = ""
    return student.path.with_name(f"{prefix}history_{student.run}.jsonl")


def draw_training_curves(students, path):
    """Loss and val mIoU by epoch of every student whose history lies beside its checkpoint."""
    histories = {}
    for student in students:
        file = history_of(student)
        if file.is_file():
            lines = [read_json(line, file) for line in file.read_text().splitlines()]
            histories[student.label] = lines
    if not histories:
        return
    figure, (left, right) = voc_data.pyplot().subplots(
        1, 2, figsize=(10, 3.4), layout="constrained"
    )
    for run, lines in histories.items():
        validated = [line for line in lines if "val_miou" in line]
        left.plot([line["epoch"] for line in lines], [line["ce"] for line in lines], label=run)
        right.plot(
            [line["epoch"] for line in validated], [100 * line["val_miou"] for line in validated],
            marker=".", label=run,
        )  # fmt: skip
    left.set(xlabel="epoch", ylabel="train cross-entropy, with its class weights")
    right.set(xlabel="epoch", ylabel="val mIoU %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(fontsize=7)
    voc_data.write_figure(figure, path)


def visualize(args, students, rows, items, device, output):
    """For each student a sheet of its best and worst images; one sheet that compares them all."""
    by_id = {item.id: item for item in items}
    ious = [row["image_iou"] for row in rows[: len(students)]]
    for student, iou in zip(students, ious):
        ranked = sorted(iou, key=iou.get, reverse=True)
        best, worst = ranked[: args.num_vis // 2], ranked[::-1][: args.num_vis // 2]
        sheet = []
        for pair in zip(best, worst):
            panels = []
            for image_id in pair:
                title = f"prediction, IoU {iou[image_id]:.2f}"
                panels += panels_of(by_id[image_id], {title: student}, device)
            sheet.append(panels)
        path = output / f"overlays_{student.label}.jpg"
        voc_data.overlay_sheet(sheet, path, f"{student.label}: best images (left), worst (right)")
        print(f"overlays in {path}")
    ranked = sorted(ious[0], key=lambda image_id: sum(iou[image_id] for iou in ious))
    count = args.num_vis // 2
    step = max(1, len(ranked) // count)
    chosen = ranked[step // 2 :: step][:count]  # from the worst to the best, evenly
    by_name = {student.label.replace("_", " "): student for student in students}
    sheet = [panels_of(by_id[image_id], by_name, device) for image_id in chosen]
    path = output / "overlays_compared.jpg"
    voc_data.overlay_sheet(sheet, path)
    print(f"overlays in {path}")


def panels_of(item, students, device):
    """Panels of one image for `overlay_sheet`: image, ground truth, each student's prediction."""
    image, labels = voc_data.read_item(item)
    panels = [
        (item.id, image, []),
        ("ground truth", voc_data.overlay(image, labels), voc_data.objects_in(labels)),
    ]
    for title, student in students.items():
        prediction = predict(student, image, student.eval_size, device)
        shown = voc_data.objects_in(prediction)
        panels.append((title, voc_data.overlay(image, prediction), shown))
    return panels


@torch.inference_mode()
def predict(student, image, size, device):
    """The labels a student gives an `(H, W, 3)` uint8 picture, `(H, W)`, at the picture's size."""
    pixels = voc_data.resize_longest(torch.from_numpy(image).permute(2, 0, 1), size)
    logits = student.network(voc_data.normalise(pixels[None].to(device)))
    if logits.shape[-2:] != image.shape[:2]:  # as `evaluate` does, so that the IoU is of this
        logits = F.interpolate(logits, size=image.shape[:2], mode="bilinear")
    return logits[0].argmax(dim=0).cpu().numpy()


def overlay_photographs(args, students, device, output):
    """Write picture | prediction for each photograph and student."""
    paths = []
    for given in map(Path, args.image):
        paths += voc_data.pictures_in(given) if given.is_dir() else [given]
    if not paths:
        raise DataError(f"--image {' '.join(args.image)}: there is no picture")
    written = set()
    for path in paths:
        # More pixels than these would take memory, and not be seen.
        image = voc_data.scale_down(voc_data.read_image(path), 1024)
        panels = [(path.name, image, [])]
        for student in students:
            size = args.photo_size or student.eval_size or 512
            labels = predict(student, image, size, device)
            title = f"{student.model} {student.kd_mode}"
            panels.append((title, voc_data.overlay(image, labels), voc_data.objects_in(labels)))
        target, again = output / f"photo_{path.stem}.jpg", 2
        while target in written:
            target, again = output / f"photo_{path.stem}_{again}.jpg", again + 1
        written.add(target)
        voc_data.overlay_sheet([panels], target, inches=6)
        print(f"{path} -> {target}")


if __name__ == "__main__":
    voc_data.run_script(main, get_args_parser().parse_args())
