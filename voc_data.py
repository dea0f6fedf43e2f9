"""PASCAL VOC 2012 semantic segmentation: the data and the metric, in one file.

In the order of the file: the classes and the palette; errors and signals; finding, downloading and
checking the data in whatever folders people have it; a synthetic sample that needs no download;
reading one image with its mask; the decode-once cache; transforms that move image, mask and teacher
maps together; the dataset and its loaders; the confusion matrix and `evaluate`. Then what the
scripts share: devices and the cost of a network, files that are written whole, overlays.

    python voc_data.py --data_root DIR     checks every file of a data set and counts its classes
    python voc_data.py --download          gets VOC 2012 (2 GB) into ./data
    python voc_data.py --data_root sample  the same check on the synthetic sample

Reference: Everingham et al. 2015, The PASCAL Visual Object Classes Challenge: A Retrospective,
https://doi.org/10.1007/s11263-014-0733-5
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tabulate import tabulate
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
NUM_CLASSES = len(CLASSES)
VOID = 255  # a pixel without a label: object borders, and padding
UNLABELLED = 254  # ours, never in a file: a real pixel of an image that has no ground truth
VOC_SIZE = 500  # longest side of VOC's pictures, in pixels
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
JPEG_SUFFIXES = (".jpg", ".jpeg")
IMAGE_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".bmp", ".webp")
# What pillow raises for a broken picture; the last two for broken EXIF tags of a turned one.
UNREADABLE = (
    OSError, SyntaxError, ValueError, Image.DecompressionBombError, TypeError, struct.error
)  # fmt: skip


def voc_palette():
    """The VOC colour map, `(256, 3)` uint8: bit k of the label goes to bit 7-k/3 of channel k%3."""
    labels = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return palette


# ------------------------------------------------------------------------------------- errors


class DataError(Exception):
    """Something on disk is missing or broken. The message is for a person; exit status 1."""


class UsageError(Exception):
    """A flag, or flags that do not go together. The message is for a person; exit status 2."""


def run_script(main, args):
    """Run `main(args)`; end in one line on stderr and a status, never in a traceback, on errors of
    use (2), of data, the file system or a GPU's memory (1), and on Ctrl-C or SIGTERM (130, 143)."""
    before = signal.signal(signal.SIGTERM, end_quietly)
    name = Path(sys.argv[0]).name
    try:
        main(args)
    except UsageError as error:
        sys.exit(fail(name, error, 2))
    except (DataError, OSError) as error:
        sys.exit(fail(name, error, 1))
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if out_of_memory(error):
            hint = "Use smaller images (--crop_size, --eval_size) or --batch_size, or --device cpu"
            sys.exit(fail(name, f"out of memory ({str(error).splitlines()[0]}) {hint}", 1))
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        if "Terminated" in str(error):  # a SIGTERM to the whole group may reach a worker first
            sys.exit(143)
        hint = (
            "Most likely memory ran out, or /dev/shm, which docker run --shm-size=2g makes larger. "
            "Use fewer --workers; 0 needs no such process"
        )
        sys.exit(fail(name, f"{str(error).splitlines()[0].strip()} {hint}", 1))
    finally:
        signal.signal(signal.SIGTERM, before)


def out_of_memory(error):
    """True for an error that says so; not all devices have torch's own class of it."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of a flag that has one and does not name it."""

    def _get_help_string(self, action):
        named = action.default in (None, False) or "default" in action.help
        return action.help if named else super()._get_help_string(action)


def check_flags(args, rules):
    """Refuse the first flag whose rule, `(name, holds, what it must be)`, does not hold.

    Raises:
        UsageError: with the flag, what it must be and what it is. Infinity and NaN never do.
    """
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} must be a finite number, not {value}")
    for name, holds, wanted in rules:
        if not holds:
            raise UsageError(f"--{name} must be {wanted}, not {getattr(args, name)}")


OFF = (None, 0, "none")  # a setting of such a value (False is 0) is as if there were none


def end_quietly(*_):
    """On SIGTERM: leave by way of SystemExit, so that a run can say where it stopped."""
    if hasattr(signal, "SIGCHLD"):  # loader workers may end first; that is no news
        signal.signal(signal.SIGCHLD, lambda *_: None)
    sys.exit(143)


@contextlib.contextmanager
def signals_held():
    """Let Ctrl-C and SIGTERM wait for the end of the block.

    For the start of processes: what a handler raises in a hook around a fork, Python drops
    ("Exception ignored in"), and the run would go on as if nobody had asked it to end.
    """
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():  # no other hears of signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def fail(name, error, status):
    """Print the error as one line and give the status back."""
    # A DataLoader worker hands its error over inside a traceback; only the message is wanted.
    message = re.split(r"(?:DataError|UsageError|OSError): ", str(error))[-1].strip()
    print(f"{name}: error: {message}", file=sys.stderr)
    return status


# ---------------------------------------------------------------------- finding VOC on this disk

LOOKED_IN_BY_DEFAULT = ("data", "/content/data/VOC2012_train_val", "/content/data")
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
ARCHIVE_SUFFIXES = (".tar", ".zip", ".gz", ".tgz", ".7z", ".rar")
INCOMPLETE = "incomplete_download"
HOW_TO_GET_VOC = """Ways to get it:
  python voc_data.py --download                         the official tar (2 GB) into ./data
  {url}
                                                        the same by hand: unpack it into ./data
  kaggle datasets download gopalbhattrai/pascal-voc-2012-dataset --unzip -p data
                                                        the Kaggle copy, into ./data
  --data_root DIR                                       a copy that you have, in any usual layout
  --data_root sample                                    a small synthetic data set, no download"""


def find_voc(data_root=None, download=False):
    """Find a VOC 2012 tree and return the folder that holds `JPEGImages`.

    Args:
        data_root: where to look: the parent of `VOCdevkit`, `VOCdevkit`, `VOC2012`, a flat folder,
            or one above them (Kaggle doubles folders), up to three above `JPEGImages`' own.
            "sample" makes the synthetic sample. None looks in `./data`, in Colab's `/content/data`
            and in kagglehub's cache.
        download: when nothing is found and no `data_root` is given, download VOC into `./data`.

    Raises:
        DataError: nothing usable was found; the message lists where it looked and what to do.
    """
    if data_root == "sample":
        return make_sample()
    places = [Path(data_root)] if data_root else default_places()
    for place in places:
        found = sorted(voc_folders(place), key=lambda folder: not has_masks(folder))
        if found and has_masks(found[0]):
            return found[0]
        if found and data_root:
            raise DataError(
                f"{found[0]} has images but no {MASK_FOLDERS[0]} folder, so no ground truth "
                "(VOC's test set ships without it). Point --data_root at the train/val part."
            )
    if download and not data_root:
        return download_voc(Path("data"))
    raise DataError(not_found_message(places))


def default_places():
    """Where VOC is looked for without `--data_root`."""
    cache = Path(os.environ.get("KAGGLEHUB_CACHE", "~/.cache/kagglehub")).expanduser()
    kaggle = sorted(cache.glob("datasets/*/*/versions/*"), reverse=True)
    return [Path(place) for place in LOOKED_IN_BY_DEFAULT] + kaggle


def voc_folders(place, depth=3):
    """Folders at or below `place` that hold VOC 2012 images and lists, nearest first."""
    level = [Path(place)]
    for _ in range(depth + 1):
        below = []
        for folder in level:
            parts = (folder / "JPEGImages", folder / "ImageSets/Segmentation")
            if all(map(os.path.isdir, parts)):  # False where it may not be read; Path's may raise
                if not re.fullmatch(r"VOC20(0\d|1[01])", folder.name):  # other years
                    yield folder
                continue
            below += subfolders(folder)
        level = below


def subfolders(folder):
    """The folders inside a folder, sorted; none where it cannot be read."""
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []
    return [folder / name for name in inside if name != INCOMPLETE and not name.startswith(".")]


def has_masks(folder):
    """True if a VOC folder has ground truth."""
    return any(os.path.isdir(folder / masks) for masks in MASK_FOLDERS)


def not_found_message(places):
    """What to tell someone whose data was not found."""
    lines = ["VOC 2012 was not found. Looked in:"]
    for place in places:
        lines.append(f"  {place}" + ("" if os.path.exists(place) else " (does not exist)"))
    for archive in [archive for place in places for archive in archives(place)]:
        lines.append(f"{archive} was never unpacked: unpack it there, then run this again.")
    return "\n".join(lines) + "\n" + HOW_TO_GET_VOC.format(url=DATASET_YEAR_DICT["2012"]["url"])


def archives(place):
    """Archives at `place` or one folder below it, that someone may have forgotten to unpack."""
    if place.is_file():
        return [place] if place.suffix in ARCHIVE_SUFFIXES else []
    files = [file for folder in [place, *subfolders(place)] for file in folder.glob("*")]
    return [file for file in files if file.suffix in ARCHIVE_SUFFIXES and file.is_file()]


def download_voc(folder):
    """Download VOC 2012 train/val (2 GB) by torchvision into `folder`, md5-checked.

    A download that was cut off starts again; the unpacked tree appears under its name only when it
    is whole.
    """
    voc, target = DATASET_YEAR_DICT["2012"], folder / "VOCdevkit" / "VOC2012"
    if target.exists():
        if not any(map(has_masks, voc_folders(target, depth=0))):
            raise DataError(
                f"{target} is there already, but has not all of JPEGImages, ImageSets/Segmentation "
                f"and {MASK_FOLDERS[0]}: move it away, then run this again"
            )
        print(f"{target} is there already")
        return target
    print(f"downloading VOC 2012 from {voc['url']} into {folder}")
    unpacked = folder / INCOMPLETE
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        download_and_extract_archive(
            voc["url"], folder, unpacked, filename=voc["filename"], md5=voc["md5"]
        )
    except (OSError, RuntimeError) as error:
        raise DataError(f"the download failed ({error}).\n{not_found_message([folder])}") from error
    target.parent.mkdir(exist_ok=True)
    (unpacked / "VOCdevkit" / "VOC2012").rename(target)
    shutil.rmtree(unpacked)
    return target


def read_split(root, split):
    """The image ids of `ImageSets/Segmentation/<split>.txt`.

    Lines may be bare ids, or the `/JPEGImages/ID.jpg /SegmentationClassAug/ID.png` of DeepLab's
    trainaug list.

    Raises:
        DataError: the list is missing or empty.
    """
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        raise DataError(f"{path} does not exist; the splits of this data set: {known}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows puts a mark in front
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file ({error})") from error
    ids = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path} is empty: it should hold one image id a line")
    return ids


# -------------------------------------------------------------------------- the synthetic sample

SAMPLE_VERSION = 1
SAMPLE_COUNTS = {"train": 240, "val": 60}


def make_sample(folder=None):
    """Make the synthetic sample, if it is not there yet, and return its folder.

    Twenty kinds of object, one for each VOC class: five shapes times four textures, so that neither
    the shape nor the texture alone tells the class; the colour helps but wanders. The ground is a
    noisy gradient with scratches. VOC layout, palette PNG masks with void borders, JPEG images of
    many sizes. The same bytes on every machine with the same Pillow; a few seconds, no network.
    """
    folder = folder or Path(__file__).resolve().parent / "voc_sample" / f"v{SAMPLE_VERSION}"
    return cached(folder, draw_samples, hint="the sample is made beside voc_data.py")


def draw_samples(folder):
    """Fill a folder with the sample."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(2012)
    for split, count in SAMPLE_COUNTS.items():
        ids = [f"sample_{split}_{number:04d}" for number in range(count)]
        for image_id in ids:
            save_sample(folder, image_id, *draw_sample(rng))
        list_file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        list_file.write_text("\n".join(ids) + "\n")


def draw_sample(rng):
    """One synthetic picture: `(image (H, W, 3) uint8, labels (H, W) uint8)`."""
    height, width = rng.integers(96, 161, size=2)
    ramp = np.linspace(0, 1, width)[None, :, None] * rng.uniform(-60, 60, 3)
    image = rng.uniform(60, 190, 3) + ramp + np.zeros((height, width, 3))
    scratches = Image.new("L", (int(width), int(height)))
    for _ in range(8):
        ends = rng.uniform(0, 1, 4) * [width, height, width, height]
        ImageDraw.Draw(scratches).line(list(ends), fill=int(rng.integers(20, 90)), width=2)
    image += np.asarray(scratches)[..., None] * rng.choice([-1, 1])
    labels = np.zeros((height, width), dtype=np.uint8)
    for _ in range(rng.integers(1, 4)):
        draw_object(rng, image, labels, label=int(rng.integers(1, NUM_CLASSES)))
    image += rng.normal(0, 10, image.shape)
    labels[label_borders(labels)] = VOID
    return image.clip(0, 255).astype(np.uint8), labels


def draw_object(rng, image, labels, label):
    """Paint one object of a class into image and labels, in place."""
    height, width = labels.shape
    radius = rng.uniform(16, 36)
    centre = rng.uniform(0.15, 0.85, 2) * [width, height]
    inside = shape_mask((label - 1) % 5, centre, radius, rng.uniform(-0.3, 0.3), labels.shape)
    y, x = np.mgrid[:height, :width]
    period, phase = rng.integers(6, 10), rng.integers(0, 10)
    stripes = {
        0: np.ones_like(x, dtype=float),  # plain
        1: ((x + phase) // (period // 2)) % 2,  # upright stripes
        2: ((y + phase) // (period // 2)) % 2,  # level stripes
        3: ((x + phase) // (period // 2) + (y + phase) // (period // 2)) % 2,  # checks
    }[(label - 1) // 5]
    hue = (label * 0.618 + rng.normal(0, 0.08)) % 1.0
    wave = 127 + 127 * np.cos(2 * math.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    colour = wave * rng.uniform(0.5, 1.0)
    texture = colour * (0.45 + 0.55 * stripes[..., None])
    image[inside] = texture[inside]
    labels[inside] = label


def shape_mask(kind, centre, radius, turn, size):
    """Where a circle, square, triangle, star or cross lies: `(H, W)` bool."""
    canvas = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    if kind == 0:
        (x, y), r = centre, radius * 0.9
        draw.ellipse([x - r, y - r, x + r, y + r], fill=1)
    else:
        corners, dent = {1: (4, 1.0), 2: (3, 1.0), 3: (10, 0.45), 4: (12, 1.0)}[kind]
        angles = turn + 2 * math.pi * np.arange(corners) / corners
        reach = np.where(np.arange(corners) % 2, dent, 1.0)
        if kind == 4:  # a cross: every third corner of twelve lies near the middle
            angles += np.tile([-0.25, 0.0, 0.25], 4)
            reach = np.tile([1.0, 0.4, 1.0], 4)
        points = centre + radius * (reach * [np.cos(angles), np.sin(angles)]).T
        draw.polygon([tuple(point) for point in points], fill=1)
    return np.asarray(canvas)


def label_borders(labels):
    """Pixels within two of another label, as the void borders of VOC: `(H, W)` bool."""
    padded = np.pad(labels, 2, mode="edge")
    height, width = labels.shape
    shifted = [
        padded[2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
        for dy, dx in [(-2, 0), (2, 0), (0, -2), (0, 2), (-1, -1), (1, 1), (-1, 1), (1, -1)]
    ]
    return np.any([other != labels for other in shifted], axis=0)


def save_sample(folder, image_id, image, labels):
    """Write an image as JPEG and its labels as a palette PNG."""
    Image.fromarray(image).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=92)
    mask = Image.fromarray(labels)
    mask.putpalette(voc_palette().ravel().tolist())  # makes it a palette picture
    mask.save(folder / "SegmentationClass" / f"{image_id}.png")


# ----------------------------------------------------------------- reading an image and its mask


class Item(NamedTuple):
    """One picture of a data set; `mask` is None where there is no ground truth."""

    id: str
    image: Path
    mask: Path | None


def read_image(path):
    """Read a picture as RGB, `(H, W, 3)` uint8; grey, CMYK, 16-bit and EXIF-rotated ones too.

    Raises:
        DataError: the file is missing, truncated or no picture.
    """
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits a pixel: keep the upper eight
                return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(picture.convert("RGB"))
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error


def scale_down(image, longest):
    """An `(H, W, 3)` uint8 picture whose longest side is at most `longest` px; never larger."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest))
    return np.array(picture)


def read_mask(path):
    """Read a mask as labels, `(H, W)` uint8 of 0..20 and 255.

    Raises:
        DataError: the file is missing or broken, is not a palette or grey 8-bit PNG, or holds
            labels that VOC does not have.
    """
    try:
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.array(picture)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a mask ({error})") from error
    if mode not in ("P", "L"):
        raise DataError(
            f"{path} is a {mode} picture; a mask must be an 8-bit palette (or grey) PNG whose "
            "values are class indices"
        )
    if ((labels >= NUM_CLASSES) & (labels != VOID)).any():
        wrong = np.unique(labels[(labels >= NUM_CLASSES) & (labels != VOID)])
        raise DataError(
            f"{path} has labels out of range ({', '.join(map(str, wrong[:8]))}); VOC has "
            f"0..{NUM_CLASSES - 1} and {VOID} for void"
        )
    return labels


def read_item(item):
    """Image and labels of an item, `(H, W, 3)` and `(H, W)` uint8; UNLABELLED without a mask.

    A photograph without a mask may come from any camera: it is scaled down to the size of VOC's
    pictures, for which `--scale` and `--crop_size` are meant.

    Raises:
        DataError: a file is broken, or the two differ in size.
    """
    image = read_image(item.image)
    if item.mask is None:
        image = scale_down(image, VOC_SIZE)
        return image, np.full(image.shape[:2], UNLABELLED, dtype=np.uint8)
    mask = read_mask(item.mask)
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{item.mask} is {mask.shape[1]}x{mask.shape[0]} but {item.image} is "
            f"{image.shape[1]}x{image.shape[0]}: image and mask must have one size"
        )
    return image, mask


def list_items(root, split):
    """The items of a split, each with its mask (the official one where there are two).

    Raises:
        DataError: an id of the list has no image or no mask.
    """
    items, missing = find_items(root, split)
    if missing:
        raise DataError(
            f"{len(missing)} files of split '{split}' are missing, among them "
            f"{', '.join(map(str, missing[:3]))}; `python voc_data.py --data_root ...` lists all"
        )
    return items


def find_items(root, split):
    """The whole items of a split, and the paths of the files that the others lack."""
    images = {path.stem: path for path in reversed(pictures_in(root / "JPEGImages"))}
    masks = {}
    for folder in reversed(MASK_FOLDERS):
        masks |= {path.stem: path for path in (root / folder).glob("*.png")}
    items, missing = [], []
    for image_id in read_split(root, split):
        if image_id in images and image_id in masks:
            items.append(Item(image_id, images[image_id], masks[image_id]))
        if image_id not in images:
            missing.append(root / "JPEGImages" / f"{image_id}.jpg")
        if image_id not in masks:
            missing.append(root / MASK_FOLDERS[0] / f"{image_id}.png")
    return items, missing


def pictures_in(folder, pattern="*"):
    """The pictures of a folder, told by their names, JPEGs first; with "**/*" those below it too.

    Hidden ones are left out: an archive from a Mac has a `._NAME.jpg` for each, Jupyter copies.
    """
    pictures = []
    for path in Path(folder).glob(pattern):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
            pictures.append(path)
    return sorted(pictures, key=lambda path: (path.suffix.lower() not in JPEG_SUFFIXES, path))


def list_extra_images(folder, root, excluded):
    """Pictures without ground truth, for the distillation term alone.

    Args:
        folder: a folder of pictures, searched with its subfolders; or "voc" for every JPEG of the
            VOC tree at `root` that has no mask.
        root: the VOC tree.
        excluded: ids that are left out (those of val and of the training list).
    """
    if folder != "voc" and not Path(folder).is_dir():
        raise DataError(f"--extra_images {folder} is not a folder (or 'voc')")
    files = pictures_in(root / "JPEGImages") if folder == "voc" else pictures_in(folder, "**/*")
    items = [Item(path.stem, path, None) for path in files]
    if folder == "voc":
        with_mask = {path.stem for name in MASK_FOLDERS for path in (root / name).glob("*.png")}
        items = [item for item in items if item.id not in with_mask]
    items = [item for item in items if item.id not in excluded]
    if not items:
        raise DataError(f"--extra_images {folder}: no picture without ground truth was found there")
    return items


# ------------------------------------------------------------------------ caches: decode once

CACHE_VERSION = 3  # raise it when the content of a cache changes
# The caches are mapped read-only: a writable private map of a file that is larger than the memory
# is refused. torch warns once that it cannot mark such an array; nothing writes into one.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


class ArrayStore:
    """Arrays of one dtype and many shapes in one memory-mapped file; picklable, read-only.

    Only the pages that are touched take memory, and the system may take them back at any time.
    """

    def __init__(self, folder, name):
        self.path = folder / f"{name}.bin"
        self.shapes = np.load(folder / f"{name}.shapes.npy")
        self.dtype = np.dtype((folder / f"{name}.dtype").read_text())
        self.ends = np.cumsum(self.shapes.prod(axis=1, dtype=np.int64))
        self.memory = None
        if self.path.stat().st_size != self.ends[-1] * self.dtype.itemsize:
            raise DataError(f"{folder} is not whole: delete it; it is made again")

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        if self.memory is None:  # opened in the process that reads
            self.memory = np.memmap(self.path, self.dtype, mode="r").view(np.ndarray)
        shape = self.shapes[index]
        end = self.ends[index]
        return self.memory[end - shape.prod() : end].reshape(shape)

    def __getstate__(self):
        return self.__dict__ | {"memory": None}


class ArrayStoreWriter:
    """Writes the files of an `ArrayStore`, one array after another."""

    def __init__(self, folder, name, dtype):
        self.folder, self.name, self.dtype, self.shapes = folder, name, np.dtype(dtype), []
        self.file = open(folder / f"{name}.bin", "wb")

    def append(self, array):
        """Add one array; every array of a store has the same number of dimensions."""
        self.shapes.append(array.shape)
        self.file.write(np.ascontiguousarray(array, dtype=self.dtype).data)

    def close(self):
        """Finish the files, on the disk itself."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        shapes = io.BytesIO()
        np.save(shapes, np.array(self.shapes, dtype=np.int64))
        write_whole(shapes.getbuffer(), self.folder / f"{self.name}.shapes.npy")
        write_whole(self.dtype.str.encode(), self.folder / f"{self.name}.dtype")


def fingerprint(items, *more):
    """A key for what is computed from these files: names, sizes and dates, and `more` settings."""
    digest = hashlib.sha256(repr(more).encode())
    for item in items:
        for path in (item.image, item.mask):
            if path is not None:
                stat = path.stat()
                digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def cached(folder, fill, hint="free some room there, or name another --cache_dir"):
    """Return `folder`, filled by `fill(folder)` if it is not there; whole or absent, never half.

    Several processes may fill it at once, each a copy of its own; the first to end wins.

    Raises:
        OSError: it could not be written; the message ends with the hint.
    """
    remove_abandoned(folder.parent, f"{folder.name}.*.tmp")
    if folder.is_dir():
        return folder
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(".tmp", f"{folder.name}.", folder.parent))
        fill(unfinished)
        unfinished.rename(folder)
    except BaseException as error:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if not folder.is_dir():  # else another was faster
            reason = error.strerror or error
            raise OSError(f"{folder} could not be written ({reason}): {hint}") from error
    return folder


def remove_abandoned(folder, pattern, seconds=600):
    """Remove the unfinished caches in a folder that nobody has written to for so long."""
    for unfinished in folder.glob(pattern):
        with contextlib.suppress(OSError):
            written = max(path.stat().st_mtime for path in (unfinished, *unfinished.iterdir()))
            if time.time() - written > seconds:
                shutil.rmtree(unfinished)


def has_room(cache_dir, needed):
    """True if the disk has `needed` bytes to spare, without the leavings of killed runs in it."""
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    for pattern in ("pixels-*.tmp", "teacher-*.tmp"):
        remove_abandoned(Path(cache_dir), pattern)
    return needed <= 0.9 * shutil.disk_usage(cache_dir).free


def pixel_cache(items, cache_dir, workers=0):
    """Decode every item once into a memory-mapped file of uint8 pixels.

    Takes 4 bytes a pixel on disk: 0.75 MB for a VOC image, 8 GB for the 10,582 of trainaug.
    Returns `(images, masks)`, two `ArrayStore`s; None where the disk has no room for it.
    """
    folder = Path(cache_dir) / f"pixels-{fingerprint(items, CACHE_VERSION)}"
    if not folder.is_dir():
        needed = 4 * sum(math.prod(image_size(item)) for item in items)
        if not has_room(cache_dir, needed):
            print(f"the pixel cache needs {needed / 1e9:.1f} GB, and {cache_dir} has less: "
                  "decoding in every epoch (slower, the same pictures)")  # fmt: skip
            return None

    def fill(unfinished):
        images = ArrayStoreWriter(unfinished, "images", np.uint8)
        masks = ArrayStoreWriter(unfinished, "masks", np.uint8)
        decoded = WorkerLoader(RawPictures(items), workers, batch_size=None)
        broken = []
        for pictures in tqdm(
            decoded, "decoding once", len(items), unit="img", leave=False, disable=None
        ):
            if isinstance(pictures, str):
                broken.append(pictures)
            elif not broken:  # else only the other broken files are looked for
                images.append(pictures[0].numpy())
                masks.append(pictures[1].numpy())
        images.close()
        masks.close()
        refuse_broken(broken)

    cached(folder, fill)
    return ArrayStore(folder, "images"), ArrayStore(folder, "masks")


def refuse_broken(problems):
    """Raise one DataError for all that is wrong with some files, if anything is."""
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(f"{len(problems)} broken files:\n  " + "\n  ".join(problems))


def image_size(item):
    """The sides that `read_item` gives its image, by its header; (0, 0) if that cannot be read."""
    try:
        with Image.open(item.image) as picture:
            sides = picture.size
    except UNREADABLE:  # reading it will say what is wrong
        return (0, 0)
    shrink = min(1, VOC_SIZE / max(sides)) if item.mask is None else 1
    return tuple(max(1, round(side * shrink)) for side in sides)


class RawPictures(Dataset):
    """Decoded items, `(image (H, W, 3), mask (H, W))` uint8; of a broken one what is wrong."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        try:
            return tuple(torch.from_numpy(array) for array in read_item(self.items[index]))
        except DataError as error:
            return str(error)


# ----------------------------------------------------------------------------------- transforms


class TeacherMap(tv_tensors.Image):
    """What a teacher said of a whole image, `(C, h, w)` float: logits or features, coarse.

    It covers the same rectangle as its image, so every geometric transform moves it along. `cell`
    is the number of pixels of a training crop for each value that the crop gets of it.
    """

    cell = 1


PADDING_COLOUR = torch.tensor([round(255 * m) for m in IMAGENET_MEAN], dtype=torch.uint8)
PADDING_COLOUR = PADDING_COLOUR.view(3, 1, 1)


def nearest(length, new_length):
    """Which of `length` pixels is nearest to each of `new_length` over the same extent."""
    return ((np.arange(new_length) + 0.5) * (length / new_length)).astype(np.int64)


class RandomScaledCrop(v2.Transform):
    """Scale an image at random, cut a square out of it, padded where it does not reach, and flip.

    The square is cut before it is scaled, so a crop costs the same however large the image is.
    Images are resized bilinearly (antialiased), masks by nearest neighbour, teacher maps are
    resampled to one value for each `cell` pixels of the crop. Padding is the ImageNet mean in
    images and void in masks. The flip is part of it because a transform of its own would take a
    tenth of the time of a sample for taking the dict apart and putting it together again.

    Args:
        size: side of the crop in pixels.
        scale: (smallest, largest) factor on the image's own size.
        flip: how often left and right are exchanged, 0..1.
    """

    def __init__(self, size, scale=(0.5, 2.0), flip=0.5):
        super().__init__()
        self.size, self.scale, self.flip = size, scale, flip

    def make_params(self, flat_inputs):
        image = next(x for x in flat_inputs if type(x) is tv_tensors.Image)
        height, width = image.shape[-2:]
        at_scale, at_y, at_x, at_flip = torch.rand(4).tolist()
        smallest, largest = self.scale
        scale = smallest * (largest / smallest) ** at_scale
        top, window_h, out_top, out_h = self.window(height, scale, at_y)
        left, window_w, out_left, out_w = self.window(width, scale, at_x)
        return {
            "image_size": (height, width),
            "source": (top, left, window_h, window_w),
            "target": (out_top, out_left, out_h, out_w),
            "flip": at_flip < self.flip,
        }

    def window(self, length, scale, position):
        """Along one axis: where to cut, how much, where it goes in the crop, how long it gets.

        `position` in 0..1 places the crop in an image that is larger, the image in a crop that is
        larger.
        """
        cut = min(length, max(1, round(self.size / scale)))
        reach = self.size if cut < length else min(self.size, max(1, round(length * scale)))
        start = round(position * (length - cut))
        return start, cut, round(position * (self.size - reach)), reach

    def transform(self, inpt, params):
        if isinstance(inpt, TeacherMap):
            return self.resample(inpt, params)
        is_mask = isinstance(inpt, tv_tensors.Mask)
        top, left, height, width = params["source"]
        out_top, out_left, out_h, out_w = params["target"]
        # Plain tensors from here: the dispatch of tv_tensors would cost as much as the work.
        window = inpt.as_subclass(torch.Tensor)[..., top : top + height, left : left + width]
        if is_mask:
            rows, columns = nearest(height, out_h), nearest(width, out_w)
            out = torch.from_numpy(window.numpy()[rows][:, columns])  # 10x faster than in torch
            padded = torch.tensor(VOID, dtype=out.dtype).expand(self.size, self.size)
        else:
            out = F.interpolate(window[None], (out_h, out_w), mode="bilinear", antialias=True)[0]
            padded = PADDING_COLOUR.expand(3, self.size, self.size)
        if (out_h, out_w) != (self.size, self.size):
            padded = padded.clone()
            padded[..., out_top : out_top + out_h, out_left : out_left + out_w] = out
            out = padded
        return tv_tensors.wrap(out.flip(-1) if params["flip"] else out, like=inpt)

    def resample(self, teacher_map, params):
        """The part of a map that the crop shows, one value for each cell of the crop."""
        cells = -(-self.size // teacher_map.cell)  # rounded up, as a network's strides are
        axes = []
        for axis in (0, 1):
            start, cut = params["source"][axis], params["source"][axis + 2]
            out_start, reach = params["target"][axis], params["target"][axis + 2]
            ends = []  # the centres of the first and the last cell, -1..1 over the image
            for centre in (0.5 * self.size / cells, (cells - 0.5) * self.size / cells):
                pixel = start + (centre - out_start) * cut / reach
                ends.append(2 * pixel / params["image_size"][axis] - 1)
            axes.append(torch.linspace(*ends, cells))
        if params["flip"]:
            axes[1] = axes[1].flip(0)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)  # (h, w, xy)
        values = teacher_map.as_subclass(torch.Tensor)[None].float()
        out = F.grid_sample(values, grid[None], padding_mode="border", align_corners=False)[0]
        return TeacherMap(out.to(teacher_map.dtype))


class RandomColour(v2.Transform):
    """Draw the factors of a mild colour jitter, "colour": brightness, contrast, saturation.

    Only drawn here; `normalise` applies them to a whole batch at once, on the device.
    """

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, sample):
        factors = 1 + self.strength * (2 * torch.rand(3) - 1)
        return sample | {"colour": factors}


def train_transform(crop_size, scale=(0.5, 2.0), colour_jitter=0.3):
    """Scale, crop, flip (image, mask and teacher maps together), and draw a colour jitter."""
    return v2.Compose([RandomScaledCrop(crop_size, scale), RandomColour(colour_jitter)])


class EvalTransform:
    """Scale the image, never the mask, so that its longest side is `eval_size`; 0 keeps it."""

    def __init__(self, eval_size=0):
        self.eval_size = eval_size

    def __call__(self, sample):
        return sample | {"image": resize_longest(sample["image"], self.eval_size)}


def resize_longest(image, longest):
    """Resize a `(C, H, W)` picture so that its longest side is `longest` px; 0 keeps it."""
    height, width = image.shape[-2:]
    if not longest or max(height, width) == longest:
        return image
    factor = longest / max(height, width)
    return TF.resize(image, [max(1, round(height * factor)), max(1, round(width * factor))])


def cutmix(images, labels, teacher_maps):
    """Give each image of a batch a rectangle of the one before it, its labels and teacher maps too.

    The rectangle has half the area of the image, any place and aspect ratio up to 2, the same in
    the whole batch. A network that is shown few pictures very often cannot remember these: they are
    new every time. (`torchvision.transforms.v2.CutMix` mixes labels of whole images.)

    Yun et al. 2019, CutMix, https://arxiv.org/abs/1905.04899; for segmentation, French et al. 2020,
    https://arxiv.org/abs/1906.01916

    Args:
        images: (N, 3, H, W).
        labels: (N, H, W).
        teacher_maps: {key: (N, C, h, w)} of the same extent, at any resolution.

    Returns:
        the three, mixed, in new tensors.
    """
    power, at_y, at_x = torch.rand(3).tolist()
    sides = 0.5**power, 0.5 ** (1 - power)  # height and width, as shares of the image's
    starts = at_y * (1 - sides[0]), at_x * (1 - sides[1])

    def mixed(value):
        rows, columns = (
            slice(round(start * length), round((start + side) * length))
            for start, side, length in zip(starts, sides, value.shape[-2:])
        )
        value = value.clone()
        value[..., rows, columns] = value[..., rows, columns].roll(1, dims=0)
        return value

    return mixed(images), mixed(labels), {key: mixed(v) for key, v in teacher_maps.items()}


def normalise(images, colour=None, memory_format=torch.contiguous_format):
    """Bytes to what the network reads, on the device of `images`.

    Args:
        images: (N, 3, H, W) uint8.
        colour: None, or (N, 3) factors of brightness, contrast and saturation, each a blend as in
            `torchvision.transforms.v2.ColorJitter` (with black, the mean grey, the pixel's grey).
            The three and the normalisation are one 3x3 matrix and one offset for each image.
        memory_format: of the result.

    Returns:
        (N, 3, H, W) float32, normalised with ImageNet's mean and standard deviation.
    """
    mean, std, grey, identity = colour_constants(images.device)
    if colour is None:
        out = ((images.flatten(2) - mean) / std).view(images.shape)
        return out.contiguous(memory_format=memory_format)
    colour = colour.view(-1, 3, 1, 1)
    brightness, contrast, saturation = colour.unbind(1)  # (N, 1, 1)
    saturate = saturation * identity + (1 - saturation) * grey.expand(3, 3)
    matrix = saturate * contrast * brightness / std
    towards_grey = saturate.sum(dim=2, keepdim=True) * (1 - contrast) * brightness / std
    out = torch.empty(images.shape, device=images.device, memory_format=memory_format)
    # One by one on a CPU: its cache holds an image, but no batch. All at once elsewhere.
    step = 1 if images.device.type == "cpu" else len(images)
    for part in (slice(start, start + step) for start in range(0, len(images), step)):
        pixels = images[part].flatten(2).float()  # (step, 3, H*W)
        mean_grey = (grey @ pixels.mean(dim=2).T).view(-1, 1, 1)
        offset = towards_grey[part] * mean_grey - mean / std
        mapped = torch.baddbmm(offset, matrix[part], pixels)
        for channel, (m, s) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD)):
            mapped[:, channel].clamp_(-m / s, (1 - m) / s)  # to black and white
        out[part] = mapped.view_as(out[part])
    return out


@functools.cache
@torch.inference_mode(False)  # used in training too
def colour_constants(device):
    """Mean and std (3, 1) of ImageNet in 0..255, the weights of grey (3,) and the identity (3, 3).

    Kept on the device: a copy to a GPU in every step would make the host wait for it.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1) * 255
    grey = torch.tensor([0.2989, 0.587, 0.114], device=device)
    return mean, std, grey, torch.eye(3, device=device)


# ---------------------------------------------------------------------------- dataset and loaders


class VOCDataset(Dataset):
    """Items as samples: dicts of "image", "mask", "index" and the teacher maps by name.

    Args:
        items: from `list_items` and `list_extra_images`.
        transform: takes and returns such a dict.
        pixels: None to decode each time, or the two stores of `pixel_cache`.
        teacher_maps: {name: (ArrayStore with one map for each item, `cell` of `TeacherMap`)}.

    A key is an index, or `(index, seed)`: then the transform draws from that seed alone, so a
    sample does not depend on how many workers there are, nor on what ran before it.
    """

    def __init__(self, items, transform, pixels=None, teacher_maps=None):
        self.items, self.transform = items, transform
        self.pixels, self.teacher_maps = pixels, teacher_maps or {}

    def __len__(self):
        return len(self.items)

    def pixel_counts(self):
        """Pixels of each class in the masks, `(NUM_CLASSES,)` int64; every 4th row is counted."""
        counts = np.zeros(256, dtype=np.int64)
        for index, item in enumerate(self.items):
            if item.mask is not None:
                mask = self.pixels[1][index] if self.pixels else read_mask(item.mask)
                counts += np.bincount(mask[::4].ravel(), minlength=256)
        return torch.from_numpy(counts[:NUM_CLASSES])

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        if self.pixels:
            image, mask = (store[index] for store in self.pixels)
        else:
            image, mask = read_item(self.items[index])
        sample = {
            "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "index": index,
        }
        for name, (store, cell) in self.teacher_maps.items():
            sample[name] = TeacherMap(torch.from_numpy(store[index]))
            sample[name].cell = cell
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return self.transform(sample)


class EpochSampler(Sampler):
    """A shuffle of the data for each epoch, split over processes, with a seed for each sample.

    Everything follows from `(seed, epoch)`: a run that resumes at an epoch sees what it would have
    seen. `set_epoch` before each epoch. The ranks share the data without overlap; what does not
    divide by their number is left out of the epoch.

    An epoch takes `epoch_images` of an endless row of shuffles, one after the other; by default as
    many as there are, so that each epoch is one shuffle.
    """

    def __init__(self, length, seed, rank=0, world_size=1, epoch_images=None):
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch_images, self.epoch = epoch_images or length, 0

    def set_epoch(self, epoch):
        """Choose the shuffle of this epoch."""
        self.epoch = epoch

    def __len__(self):
        return self.epoch_images // self.world_size

    def __iter__(self):
        first, skipped = divmod(self.epoch * self.epoch_images, self.length)
        keys = self.shuffle(first)[skipped:]
        while len(keys) < self.epoch_images:
            first += 1
            keys += self.shuffle(first)
        keys = keys[: len(self) * self.world_size]
        return iter(keys[self.rank :: self.world_size])

    def shuffle(self, number):
        """All indices in the order of one of the shuffles, each with a seed: [(index, seed)]."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
        order = torch.randperm(self.length, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.length,), generator=generator).tolist()
        return list(zip(order, seeds))


class ShardSampler(Sampler):
    """Every `world_size`-th item from `rank` on: over all ranks, each item exactly once."""

    def __init__(self, length, rank=0, world_size=1):
        self.indices = range(rank, length, world_size)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


class WorkerLoader(DataLoader):
    """A DataLoader with its own random numbers, whose workers start and end without a noise."""

    def __init__(self, dataset, workers, **more):
        super().__init__(
            dataset,
            num_workers=workers,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # or it would draw from the generator that dropout uses
            **more,
        )

    def __iter__(self):
        with signals_held():
            return super().__iter__()


def quiet_worker(_):
    """Set up a loader worker: the main process ends it on Ctrl-C, without a traceback of its thread
    that hands memory over. Errors of the data reach the main process another way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


def check_batch_size(batch_size, images, world_size=1):
    """Refuse an epoch of `images` images that has not one batch for each process.

    Raises:
        UsageError: it has not.
    """
    if images // world_size < batch_size:
        raise UsageError(
            f"--batch_size {batch_size} is more than the {images // world_size} training images "
            "that an epoch has for each process"
        )


def train_loader(
    dataset, batch_size, workers, seed=0, rank=0, world_size=1, epoch_images=None, pin_memory=False
):
    """Shuffled full batches; call `loader.sampler.set_epoch(epoch)` before each epoch.

    Raises:
        UsageError: there are fewer images than one batch needs.
    """
    sampler = EpochSampler(len(dataset), seed, rank, world_size, epoch_images)
    check_batch_size(batch_size, sampler.epoch_images, world_size)
    return WorkerLoader(
        dataset,
        workers,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )


def eval_loader(dataset, workers, rank=0, world_size=1):
    """One image at a time, at its own size, in order; this rank's share."""
    sampler = ShardSampler(len(dataset), rank, world_size)
    return WorkerLoader(
        dataset, workers, batch_size=1, sampler=sampler, persistent_workers=workers > 0
    )


# --------------------------------------------------------------------------------------- metric


class ConfusionMatrix:
    """Counts of (true class, predicted class) over a whole split; its string is the report."""

    def __init__(self, num_classes=NUM_CLASSES, device="cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, target, prediction):
        """Add the pixels of `target` (any shape, labels, VOID left out) and `prediction`."""
        classes = len(self.counts)
        known = (target >= 0) & (target < classes)
        pairs = torch.where(known, target.to(torch.int64) * classes + prediction, classes**2)
        counts = torch.bincount(pairs.flatten(), minlength=classes**2 + 1)[:-1]  # last: unknown
        self.counts += counts.view(classes, classes)

    def reduce_over_processes(self):
        """Sum the counts of all processes; exact, they are integers."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)

    @property
    def iou(self):
        """Intersection over union of each class, `(C,)` float64; NaN for a class that the ground
        truth does not have."""
        counts = self.counts.cpu().double()
        truth, hits = counts.sum(dim=1), counts.diag()
        union = truth + counts.sum(dim=0) - hits
        return torch.where(truth > 0, hits / union, torch.nan)

    @property
    def miou(self):
        """Mean IoU over the classes present, in 0..1; NaN if nothing was counted."""
        return self.iou.nanmean().item()

    @property
    def pixel_accuracy(self):
        """Share of the non-void pixels that are right, in 0..1."""
        return (self.counts.diag().sum() / self.counts.sum()).item()

    def __str__(self):
        names = CLASSES if len(self.counts) == NUM_CLASSES else range(len(self.counts))
        rows = [
            (name, "absent" if math.isnan(value) else f"{value:.4f}")
            for name, value in zip(names, self.iou.tolist())
        ]
        rows += [("mIoU", f"{self.miou:.4f}"), ("pixel accuracy", f"{self.pixel_accuracy:.4f}")]
        return tabulate(rows, headers=("class", "IoU"), colalign=("left", "right"))


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    matrix: ConfusionMatrix
    loss: float  # mean cross-entropy over the non-void pixels
    images: int


@torch.inference_mode()
def evaluate(model, loader, device, on_image=None):
    """Run a network over a split and count.

    One image at a time: the logits are upsampled to the mask's own size, the mask is never resized.
    Under `torch.distributed`, each rank runs its share and all return the sums.

    Args:
        model: maps (1, 3, H, W) normalised images to (1, C, H, W) logits.
        loader: from `eval_loader`.
        on_image: called with (index, labels (H, W), prediction (H, W)) of each image.
    """
    was_training = model.training
    model.eval()
    matrix = ConfusionMatrix(device=device)
    exact = torch.float32 if torch.device(device).type == "mps" else torch.float64
    sums = torch.zeros(3, dtype=exact, device=device)  # loss, pixels, images
    for sample in loader:
        image, target = sample["image"].to(device), sample["mask"].to(device)
        logits = model(normalise(image)).float()
        if logits.shape[-2:] != target.shape[-2:]:
            logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear")
        prediction = logits.max(dim=1).indices  # on a CPU several times faster than argmax
        matrix.update(target, prediction)
        loss = F.cross_entropy(logits, target.long(), ignore_index=VOID, reduction="sum")
        sums += torch.stack([loss, (target != VOID).sum(), torch.ones_like(loss)]).to(exact)
        if on_image:
            on_image(int(sample["index"]), target[0], prediction[0])
    model.train(was_training)
    matrix.reduce_over_processes()
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, pixels, images = sums.tolist()
    if not pixels:
        raise DataError(f"the masks of all {images:.0f} images are void: nothing to measure")
    return Evaluation(matrix, loss / pixels, int(images))


# ------------------------------------------------------------------------- the cost of a network


def measure_cost(model, device, size=512, repeats=50):
    """Parameters, MACs and latency of a network for one `size` x `size` image.

    Latency is taken over `repeats` runs after a warm-up, with the device synchronised around each.

    Returns:
        dict of "parameters", "macs", "latency_ms" (median), "latency_spread_ms" (the middle half of
        the runs, third minus first quartile), "fps" (1000 / median), "speed_size".
    """
    image = torch.zeros(1, 3, size, size, device=device)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    image = image.contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for run in range(repeats + 10):
            synchronise(device)
            start = time.perf_counter()
            model(image)
            synchronise(device)
            if run >= 10:
                times.append(1000 * (time.perf_counter() - start))
    first, median, third = np.percentile(times, (25, 50, 75)).tolist()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2, "latency_ms": median,
        "latency_spread_ms": third - first, "fps": 1000 / median, "speed_size": size,
    }  # fmt: skip


def fold_batch_norm(model):
    """Fold each BatchNorm of a network in eval mode into the convolution before it, in place.

    The outputs stay the same up to rounding; there is one pass over memory less for each layer.
    """
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for place, (conv, norm) in enumerate(zip(list(module), list(module)[1:])):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[place] = fuse_conv_bn_eval(conv, norm)
                    module[place + 1] = nn.Identity()
    return model


def score(miou, parameters):
    """4 * mIoU / (1 + parameters in millions); mIoU in 0..1."""
    return 4 * miou / (1 + parameters / 1e6)


def result_row(result, cost, split, eval_size, device):
    """What the tables show of an `Evaluation` and the cost of its network, as plain values."""
    matrix = result.matrix
    return {
        "miou": matrix.miou, "pixel_accuracy": matrix.pixel_accuracy, "loss": result.loss,
        "iou": dict(zip(CLASSES, matrix.iou.tolist())),
        "score": score(matrix.miou, cost["parameters"]), **cost, "images": result.images,
        "split": split, "eval_size": eval_size, "device": device_name(device),
    }  # fmt: skip


def synchronise(device):
    """Wait until the device has done what it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def device_name(device):
    """The hardware of a device, for people."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def choose_device(name=None, local_rank=0):
    """The torch device of a name, or the best there is; of several GPUs, number `local_rank`.

    Raises:
        UsageError: there is no such device here.
    """
    if name is None:
        on_mac = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if on_mac else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("cuda, mps and cpu are supported")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} is not available here ({reason})") from error
    return device


# ---------------------------------------------------------------------------------------- files


COLAB_DRIVE = Path("/content/drive")  # where Colab mounts Google Drive


def check_writable(folder, flag):
    """Refuse a folder that cannot be written, before the work whose results go there; makes none.

    Raises:
        DataError: for want of the right, or because Google Drive is not mounted in Colab, where a
            plain folder of its name would be lost with the runtime.
    """
    place = Path(folder).absolute()
    on_drive = COLAB_DRIVE.parent.is_dir() and place.is_relative_to(COLAB_DRIVE)
    if on_drive and not COLAB_DRIVE.is_mount():
        raise DataError(
            f"{flag} {folder}: Google Drive is not mounted at {COLAB_DRIVE}. Mount it first "
            "(from google.colab import drive; drive.mount), or name a folder elsewhere"
        )
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise DataError(f"{flag} {folder} cannot be written: name another folder")


def write_whole(data, path):
    """Write bytes so that a kill at any moment leaves the old file or the new one, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is as it was.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if not isinstance(error, OSError):  # Ctrl-C, for one
            raise
        raise OSError(
            f"could not write {path} ({error.strerror or error}); what was there before is whole"
        ) from error


def strict_json(value):
    """The JSON text of plain values; NaN, which JSON does not have, becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def pyplot():
    """matplotlib's pyplot, drawing into files; imported when it is needed, for it is slow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def write_figure(figure, path):
    """Save and close a matplotlib figure, whole or not at all; the suffix gives the format."""
    kind = Path(path).suffix[1:]
    buffer = io.BytesIO()
    quality = {"pil_kwargs": {"quality": 80}} if kind in ("jpg", "jpeg") else {}
    figure.savefig(buffer, format=kind, dpi=80 if quality else 100, **quality)  # small sheets
    pyplot().close(figure)
    write_whole(buffer.getbuffer(), path)


# -------------------------------------------------------------------------------------- overlays


def overlay(image, labels):
    """Blend a picture with the colours of its labels at 50 %; background stays, void is hatched.

    `(H, W, 3) uint8, (H, W) labels -> (H, W, 3) uint8`.
    """
    blended = image.copy()
    objects = (labels > 0) & (labels < NUM_CLASSES)
    blended[objects] = (image[objects] // 2) + (voc_palette()[labels[objects]] // 2)
    y, x = np.indices(labels.shape)
    hatched = (labels == VOID) & ((x + y) % 6 < 3)
    blended[hatched] = 255
    return blended


def image_iou(labels, prediction):
    """Mean IoU of one picture over the classes in its ground truth, 0..1; NaN if all is void."""
    matrix = ConfusionMatrix()
    matrix.update(torch.as_tensor(labels), torch.as_tensor(prediction))
    return matrix.miou


def overlay_sheet(rows, path, titles=None, inches=2.3):
    """Save a sheet of pictures; each row is a list of `(title, (H, W, 3) picture, labels shown)`.

    Each picture is `inches` wide. A legend under each row names the classes that it shows, in their
    colours.
    """
    plt = pyplot()
    from matplotlib.patches import Patch

    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(inches * columns, 0.98 * inches * len(rows)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for row, row_axes in zip(rows, axes):
        for (title, picture, shown), axis in zip(row, row_axes):
            axis.imshow(picture)
            axis.set_title(title, fontsize=8)
            patches = [
                Patch(color=voc_palette()[label] / 255, label=CLASSES[label])
                for label in sorted(shown)
            ]
            if patches:
                axis.legend(
                    handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.01), fontsize=6,
                    ncols=3, frameon=False, handlelength=1, columnspacing=0.8,
                )  # fmt: skip
    if titles:
        figure.suptitle(titles, fontsize=10)
    write_figure(figure, path)


def objects_in(labels):
    """The classes in a label map, without background and void."""
    return [int(label) for label in np.unique(labels) if 0 < label < NUM_CLASSES]


# ------------------------------------------------------------------------------- python voc_data


def check_data(root, splits):
    """Read every file of the splits, print counts by class, and return the problems found."""
    problems, columns = [], []
    for split in splits:
        try:
            items, missing = find_items(root, split)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += [f"{path} is listed, but missing" for path in missing]
        images_with = np.zeros(NUM_CLASSES, dtype=np.int64)
        for item in tqdm(items, f"checking {split}", unit="img", leave=False, disable=None):
            try:
                present = np.unique(read_item(item)[1])
                images_with[present[present < NUM_CLASSES]] += 1
            except DataError as error:
                problems.append(str(error))
        columns.append([f"{split} ({len(read_split(root, split))})", *images_with])
    header, *rows = zip(("images with", *CLASSES), *columns)
    print(tabulate(rows, headers=header))
    return list(dict.fromkeys(problems))


def splits_with_masks(root):
    """The lists of a data set, but for those without any ground truth (VOC's test)."""
    splits = sorted(path.stem for path in (root / "ImageSets" / "Segmentation").glob("*.txt"))
    masks = {path.stem for name in MASK_FOLDERS for path in (root / name).glob("*.png")}

    def has_none(split):
        try:
            return masks.isdisjoint(read_split(root, split))
        except DataError:  # a broken list: its check says what is wrong
            return False

    without = list(filter(has_none, splits))
    if without:
        print(f"not checked, for they have no ground truth: {', '.join(without)}")
    return [split for split in splits if split not in without]


def get_args_parser():
    parser = argparse.ArgumentParser(
        description="Check a VOC 2012 data set, or get it.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--data_root", help="where VOC 2012 is, or 'sample'")
    parser.add_argument("--splits", nargs="+", help="lists to check (default: all there are)")
    parser.add_argument("--download", action="store_true", help="download VOC into ./data")
    return parser


def main(args):
    if args.download and args.data_root:
        raise UsageError("--download puts VOC into ./data: leave --data_root out")
    root = download_voc(Path("data")) if args.download else find_voc(args.data_root)
    print(f"VOC 2012 at {root}")
    splits = args.splits or splits_with_masks(root)
    if not splits:
        raise DataError(
            f"{root} has no list whose images have masks: are ImageSets/Segmentation/*.txt and "
            f"{MASK_FOLDERS[0]}/*.png there?"
        )
    refuse_broken(check_data(root, splits))
    print("every listed image and mask is readable and whole")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
