"""PASCAL VOC 2012 (https://doi.org/10.1007/s11263-014-0733-5): data, metric, shared helpers.

    python voc_data.py --data_root DIR                read all listed images, count their classes
    python voc_data.py --data_root DIR --add_sbd      add the masks of SBD and the list trainaug
"""

import argparse
import functools
import hashlib
import os
import re
import shutil
import signal
import sys
import unicodedata
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor".split()
)
NUM_CLASSES = len(CLASSES)
VOID = 255  # a pixel without a label: object borders, and padding
UNLABELLED = 254  # a pixel of an image without a mask; never in a file
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVAL_PIXELS = {"cpu": 1}  # in a batch of evaluate, elsewhere 3 million: launches cost time there
STRIDES = {"out": 4, "low": 4, "mid": 8, "high": 16}  # of a student's logits and features


def voc_palette():
    """The VOC colour map, (256, 3) uint8: bit 3k + c of the label is bit 7 - k of channel c."""
    bits = np.arange(256)[:, None, None] >> np.arange(24).reshape(8, 3) & 1  # (label, k, c)
    return np.packbits(bits, axis=1)[:, 0]


# -------------------------------------------------------------------------- errors, flags and files

class DataError(Exception):
    """A file is missing or broken: a message for people, exit status 1."""


class UsageError(DataError):
    """Flags that cannot work together: exit status 2."""


def run(main, args):
    """Call `main(args)`; where flags, data or memory are at fault, end in one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook; a terminal may lack a character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: use smaller images or batches, or --device cpu")
    except (DataError, OSError) as error:
        message = str(error).rsplit("DataError: ", 1)[-1].strip()  # less the traceback of a worker
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:  # DataLoader workers end with this process, which torch would report as crashes
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGTERM), signal.SIG_DFL)


def path(text):
    return Path(text).expanduser()  # an argparse type: ~ works in --flag=~/folder too


def in_range(low, high=1e9, kind=int):
    """argparse type: a number from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be in {low}..{high:g}, not {text}")
        return kind(text)

    return number


def add_data_flags(flag):
    """Add, by `flag = parser.add_argument`, what all scripts share."""
    flag("--data_root", type=path, help="VOC 2012, or 'sample' (default: found or downloaded)")
    flag("--val_split", default="val", help="list in ImageSets/Segmentation")
    flag("--workers", type=in_range(0), default=min(4, os.cpu_count() or 1))
    flag("--device", help="cuda, mps or cpu (default: the best there is)")


def choose_device(name):
    """The torch device of a name or, for None, the best there is."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name not in (None, "cpu", best.type):
        raise UsageError(f"--device {name} is not available here: leave it out for {best.type}")
    return torch.device(name) if name else best


def atomic_save(file, content):
    """Write a text, or call `content(path)`; whatever happens, the old file or the new is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        write = content if callable(content) else lambda f: f.write_text(content, "utf-8")
        write(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save: RuntimeError on a full disk
        raise DataError(f"could not write {file} ({error}); an older one is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------- finding and reading VOC

Item = namedtuple("Item", "id image mask")  # paths; mask None: an unlabelled image
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")  # a mask in both: that of the last


def find_voc(data_root=None):
    """The folder that holds JPEGImages, at most seven levels below `data_root`.

    "sample" makes the synthetic sample; None looks in the usual places, then downloads (2 GB)."""
    if str(data_root) == "sample":
        return make_sample()
    kagglehub = path(os.environ.get("KAGGLEHUB_CACHE", "~/.cache/kagglehub"))
    places = [Path("data"), Path("/content/data"), Path("/kaggle/input"), kagglehub]
    for place in [data_root] if data_root else places:
        for folder, names, _ in os.walk(place, followlinks=True):
            found = {"JPEGImages", "ImageSets"} <= {*names} and {*names} & {*MASK_FOLDERS}
            if found and not re.search(r"VOC20(0\d|1[01])$", folder):  # other years
                return Path(folder)
            deep = len(Path(folder).relative_to(place).parts) >= 7
            names[:] = sorted(n for n in names if not deep and not n.startswith((".", "__")))
    if data_root is None:
        voc = DATASET_YEAR_DICT["2012"]
        return download(voc, voc["base_dir"], Path("data/VOC2012"), "--data_root DIR (or sample)")
    raise DataError(f"{data_root} has no JPEGImages, SegmentationClass, ImageSets: is it unpacked?")


def download(archive, inner, target, flag):
    """Download a {"url", "md5"} by torchvision; its folder `inner` becomes `target` when it is
    complete. An archive that is beside it already is used."""
    unpacked, url = target.with_name(f".{target.name}"), archive["url"]
    print(f"{target} is not there: downloading {url}")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        download_and_extract_archive(url, target.parent, unpacked, None, archive["md5"])
        (unpacked / inner).rename(target)
    except (OSError, RuntimeError) as error:
        raise DataError(f"the download failed ({error}): unpack {url}, use {flag}") from error
    return target


def add_sbd(root, sbd_root=None):
    """Add the masks of SBD (https://doi.org/10.1109/ICCV.2011.6126343) to a VOC tree, as PNGs in
    SegmentationClassAug, and the list "trainaug": train and SBD without val. SBD is downloaded
    (1.4 GB) where no copy is given. No file is replaced; an interrupted call can be repeated."""
    try:
        from scipy.io import loadmat  # not in requirements.txt
    except ImportError as error:
        raise DataError("the masks of SBD are .mat files: pip install scipy") from error
    new, folder = root / "ImageSets/Segmentation/trainaug.txt", sbd_root or Path("data/SBD")
    if new.exists():
        raise DataError(f"{new} exists already: to make it from SBD, move it away")
    train, val = read_split(root, "train"), {*read_split(root, "val")}
    if not os.access(root, os.W_OK):  # as in /kaggle/input
        raise DataError(f"{root} cannot be written: copy it and name the copy, --data_root")
    if not sbd_root and not folder.is_dir():
        download(vars(SBDataset), "benchmark_RELEASE/dataset", folder, "--sbd_root DIR")
    masks = {file.stem: file for file in folder.glob("**/cls/*.mat") if file.stem not in val}
    if not masks:
        raise DataError(f"{folder} has no masks of SBD (cls/*.mat)")
    names = sorted(masks.keys() & dict(image_files(root / "JPEGImages")))
    for name in tqdm(names, "SBD", leave=False, disable=None):
        file = root / MASK_FOLDERS[0] / f"{name}.png"
        if not file.exists():
            try:
                mask = Image.fromarray(loadmat(masks[name])["GTcls"]["Segmentation"][0, 0])
                mask.putpalette(voc_palette().ravel().tolist())
            except Exception as error:  # scipy raises many kinds for a broken file
                raise DataError(f"{masks[name]} cannot be read ({error})") from error
            atomic_save(file, lambda temporary: mask.save(temporary, "png"))
    ids = list(dict.fromkeys(train + names))
    atomic_save(new, "\n".join(ids) + "\n")
    print(f"{new} has {len(ids)} images; {len(masks) - len(names)} of SBD are not in this VOC")


def image_id(name):
    """The id in a file name: only an image suffix is cut off, for ids may contain dots."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix


def image_files(folder, pattern="*"):
    """[(id, image file)] of a folder, .png before .jpg, without the hidden copies of a Mac."""
    files = [file for file in folder.glob(pattern) if file.suffix.lower() in IMAGE_SUFFIXES]
    files = [f for f in files if not re.search(r"(^|[/\\])(\.|__)", str(f.relative_to(folder)))]
    return [(image_id(file.name), file) for file in sorted(files, reverse=True)]


def read_split(root, split, known=()):
    """The ids of a list; a line is a `known` id, or begins with a file name as in DeepLab's."""
    file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not file.is_file():
        lists = sorted(other.stem for other in file.parent.glob("[!.]*.txt"))
        hint = "; python voc_data.py --add_sbd makes it" if split == "trainaug" else ""
        raise DataError(f"{file} does not exist; the lists of this data set: {lists}{hint}")
    try:  # PowerShell writes UTF-16; Windows editors put a byte order mark in front
        is_utf_16 = file.read_bytes()[:1] in (b"\xff", b"\xfe")
        text = file.read_text("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text file in UTF-8 ({error})") from error
    ids = []
    for line in filter(None, map(str.strip, unicodedata.normalize("NFC", text).splitlines())):
        name = image_id(line.replace("\\", "/").split()[0].rsplit("/", 1)[-1])
        ids.append(next((whole for whole in (line, image_id(line)) if whole in known), name))
    if not ids:
        raise DataError(f"{file} is empty: it should hold one image id a line")
    return list(dict.fromkeys(ids))


def list_items(root, split):
    """The items of a split; DataError where an image or a mask is missing."""
    images = dict(image_files(root / "JPEGImages"))
    masks = dict(m for f in MASK_FOLDERS for m in image_files(root / f, "*.[pP][nN][gG]"))
    ids = read_split(root, split, known=images)
    missing = [f"JPEGImages/{name}.jpg" for name in ids if name not in images]
    missing += [f"SegmentationClass/{name}.png" for name in ids if name not in masks]
    if missing:
        raise DataError(f"the list '{split}' of {root} lacks {len(missing)} files: {missing[:3]}")
    return [Item(name, images[name], masks[name]) for name in ids]


def list_extra_images(folders, root, used):
    """Unlabelled items: images below the folders ("voc": JPEGImages) with ids not in `used`."""
    items = []
    for folder in folders:
        files = image_files(root / "JPEGImages" if str(folder) == "voc" else folder, "**/*")
        new = [Item(name, file, None) for name, file in reversed(files) if name not in used]
        if not new:
            raise DataError(f"--extra_images {folder}: there is no unlabelled image there")
        items += new
    return items


def read_image(file):
    """Read an image as RGB, (H, W, 3) uint8; grey, CMYK, 16-bit and EXIF-rotated ones too."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: keep the upper eight
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise DataError(f"{file} cannot be read as an image ({error})") from error


def read_mask(file):
    """Read a palette or grey PNG of class indices, (H, W) uint8 of 0..20 and 255."""
    try:
        with Image.open(file) as image:
            mode, palette, labels = image.mode, image.getpalette() or [], np.array(image)
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise DataError(f"{file} cannot be read as a mask ({error})") from error
    if mode not in ("P", "L"):
        raise DataError(f"{file} is a {mode} image; a mask is an 8-bit PNG of class indices")
    present = [label for label, count in enumerate(image.histogram()) if count and label != VOID]
    allowed = {*range(NUM_CLASSES), VOID}
    index_of = {tuple(colour): index for index, colour in enumerate(voc_palette().tolist())}
    meant = [index_of.get(tuple(palette[3 * label : 3 * label + 3])) for label in present]
    if meant != present and {*meant} <= allowed and len({*meant}) == len(meant):
        raise DataError(f"{file} has VOC's colours at other indices: did a tool sort its palette?")
    if not {*present} <= allowed:
        raise DataError(f"{file} has values besides 0..20 and 255: {[*{*present} - allowed][:8]}")
    return labels


def read_item(item):
    """(H, W, 4) uint8, RGB and label; an unlabelled image is at most 500 px long, as VOC's are."""
    image, labels = Image.fromarray(read_image(item.image)), UNLABELLED
    if item.mask is None:
        image.thumbnail((500, 500))
    else:
        labels = Image.fromarray(read_mask(item.mask))
        if labels.size != image.size:
            raise DataError(f"{item.mask} is {labels.size} but {item.image} {image.size}, after "
                            "its EXIF rotation if any: they must have one size")  # fmt: skip
    image.putalpha(labels)  # one call, twice as fast as numpy's
    return np.array(image)


# -------------------------------------------------------------------------- the data set, its crops

class ArrayFile:
    """Arrays of one dtype and many shapes in one file, each memory-mapped when it is read."""

    def __init__(self, folder, dtype):
        self.file, self.dtype = str(folder / "values.bin"), np.dtype(dtype)
        self.shapes = np.load(folder / "shapes.npy").astype(np.int64)
        self.starts = np.cumsum([0, *self.shapes.prod(axis=1)]) * self.dtype.itemsize

    def __getitem__(self, index):  # mode "c": what torch might write would stay in memory
        return np.memmap(self.file, self.dtype, "c", self.starts[index], tuple(self.shapes[index]))


def cached_arrays(kind, cache_dir, items, dtype, settings, arrays):
    """An ArrayFile of the `arrays`, iterated over and written if it is not there yet. Its folder,
    named for files (paths, sizes, dates) and settings, appears when it is complete."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in [file for item in items for file in (item.image, item.mask) if file]:
        digest.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    folder = cache_dir / f"{kind}-{digest.hexdigest()[:16]}"
    temporary, shapes = folder.with_suffix(f".{os.urandom(4).hex()}"), []
    try:
        if not folder.is_dir():
            temporary.mkdir(parents=True, exist_ok=True)
            with open(temporary / "values.bin", "wb") as file:
                for array in tqdm(arrays, kind, len(items), leave=False, disable=None):
                    file.write(np.ascontiguousarray(array, dtype).data)
                    shapes.append(array.shape)
            np.save(temporary / "shapes.npy", shapes)
            temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise DataError(f"could not write {folder} ({error}): try --cache_dir none") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ArrayFile(folder, dtype)


class VOCDataset(Dataset):
    """Items as (H, W, 4) uint8, RGB and label; with a `cache_dir` decoded once, into a file."""

    def __init__(self, items, cache_dir=None, workers=0):
        self.items, self.cache = items, None
        if cache_dir:
            decoded = DataLoader(self, None, num_workers=workers, worker_init_fn=ignore_ctrl_c)
            self.cache = cached_arrays("images", cache_dir, items, np.uint8, None, decoded)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.cache[index] if self.cache else read_item(self.items[index])

    def class_pixels(self):
        """Pixels per class, (21,) int64, in every fourth row of the masks."""
        counts = np.zeros(256, dtype=np.int64)
        for index in [i for i, item in enumerate(self.items) if item.mask]:
            mask = self.cache[index][..., 3] if self.cache else read_mask(self.items[index].mask)
            counts += np.bincount(mask[::4].ravel(), minlength=256)
        return check_classes(torch.from_numpy(counts[:NUM_CLASSES]))


def check_classes(pixels):
    """Pixels per class, (21,), as they are; DataError if they are all background."""
    if not pixels[1:].any():
        raise DataError("no mask has a class besides background (255, as in binary masks, is void)")
    return pixels


def ignore_ctrl_c(worker_id):
    """Worker init: ignore Ctrl-C; the main process stops its workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@functools.cache  # one for all validations: a signal while workers start or end could be lost
def make_loader(dataset, workers, batch_size=None, **more):
    """A DataLoader with persistent workers and a random generator of its own."""
    more |= {"persistent_workers": workers > 0, "worker_init_fn": ignore_ctrl_c}
    return DataLoader(dataset, batch_size, num_workers=workers, generator=torch.Generator(), **more)


def draw_window(length, size, zoom, position):
    """One axis of a crop: (start, cut, out, reach). The pixels start to start + cut of the image,
    scaled by `zoom`, become out to out + reach of the crop; the rest is padding."""
    cut = min(length, max(1, round(size / zoom)))
    reach = size if cut < length else min(size, max(1, round(length * zoom)))
    return round(position * (length - cut)), cut, round(position * (size - reach)), reach


def random_crop(pixels, maps, seen, size, longest, scale, generator):
    """Scale, crop, pad and flip an image, its mask and the teacher's maps in the same way.

    The longest side becomes `longest` px times a random factor in `scale`. The image is cropped
    before it is resized, so its size costs nothing. Padding is the ImageNet mean, and VOID.

    Args:
        pixels: (4, H, W) uint8, RGB and label.
        maps: {key of STRIDES: (C, h, w)}, of a teacher that saw the image `seen` px long.

    Returns:
        image (3, size, size), mask (size, size), both uint8, {key: (C, n, n)}, n = size / stride.
    """
    at_scale, at_y, at_x, at_flip = torch.rand(4, generator=generator).tolist()
    height, width = pixels.shape[-2:]
    factor = scale[0] * (scale[1] / scale[0]) ** at_scale  # log-uniform
    zoom, flip = factor * longest / max(height, width), at_flip < 0.5
    windows = [draw_window(height, size, zoom, at_y), draw_window(width, size, zoom, at_x)]
    start, cut, out, reach = zip(*windows)
    target = (..., *(slice(first, first + length) for first, length in zip(out, reach)))
    window = TF.crop(pixels, *start, *cut)[None].contiguous(memory_format=torch.channels_last)
    image = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1).repeat(1, size, size)
    image[target] = F.interpolate(window, reach, mode="bilinear", antialias=True)[0, :3]
    mask = torch.full((size, size), VOID, dtype=torch.uint8)
    mask[target] = F.interpolate(window[:, 3:], reach, mode="nearest-exact")
    maps = {key: crop_map(values, key, windows, (height, width), seen, size, flip)
            for key, values in maps.items()}  # fmt: skip
    return (image.flip(-1), mask.flip(-1), maps) if flip else (image, mask, maps)


def crop_map(values, key, windows, image_size, seen, size, flip):
    """Sample a teacher's map of the whole image where the student has its values in the crop.

    Logits ("out") lie at the centres of cells that divide the image evenly. Features come from
    strided convolutions, whose value i lies at stride * i + 0.5 px, in both networks."""
    stride, box = STRIDES[key], []
    count = -(-size // stride)  # rounded up, as strided convolutions do
    for axis, (start, cut, out, reach) in enumerate(windows):
        if key == "out":  # step and first: distance and place of the values, in px of the crop
            step, first, shift = size / count, size / count / 2, 0
            per_pixel = values.shape[axis + 1] / image_size[axis]  # values per px of the image
        else:
            step, first, shift = stride, 0.5, 0.5 - 0.5 / stride
            per_pixel = seen / max(image_size) / stride
        if flip and axis == 1:
            first = size - first - (count - 1) * step
        zoom = cut / reach  # px of the image per px of the crop
        begin = start + (first - step / 2 - out) * zoom
        box.append((begin * per_pixel + shift, (begin + count * step * zoom) * per_pixel + shift))
    (top, bottom), (left, right) = box
    boxes = [torch.tensor([[left, top, right, bottom]])]
    out = roi_align(values[None].float(), boxes, count, sampling_ratio=1, aligned=True)[0]
    return (out.flip(-1) if flip else out).to(values.dtype)


class TrainDataset(Dataset):
    """Crops of a VOCDataset. A key is (index, seed): neither workers nor order change a sample.
    `crop`: keywords of `random_crop`; `maps`: {key: ArrayFile} of the teacher."""

    def __init__(self, images, crop, jitter=0.0, maps=None):
        self.images, self.crop, self.jitter, self.maps = images, crop, jitter, maps or {}

    def __getitem__(self, key):
        index, seed = key
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.from_numpy(self.images[index]).permute(2, 0, 1)
        maps = {key: torch.from_numpy(array[index]) for key, array in self.maps.items()}
        image, mask, maps = random_crop(pixels, maps, **self.crop, generator=generator)
        jitter = 1 + self.jitter * (2 * torch.rand(3, generator=generator) - 1)
        return {"image": image, "mask": mask, "jitter": jitter, **maps}


@functools.lru_cache(maxsize=4)
def shuffled(length, seed, number):
    """Shuffle `number` of the indices below `length`, each with a seed: [(index, seed)]."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    order = torch.randperm(length, generator=generator).tolist()
    return list(zip(order, torch.randint(2**62, (length,), generator=generator).tolist()))


class TrainSampler(Sampler):
    """Batches of `batch_size` labelled and, where there are any, as many unlabelled images.

    An epoch is a pass over the labelled images, less an incomplete batch; unlabelled ones are drawn
    without repetition until all were seen. Batches depend on seed, epoch and rank alone."""

    def __init__(self, labelled, unlabelled, batch_size, seed, rank=0, world_size=1):
        self.labelled, self.unlabelled, self.seed, self.epoch = labelled, unlabelled, seed, 0
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        if len(self) == 0:
            raise UsageError(f"--batch_size {batch_size}: a process has fewer labelled images")

    def __len__(self):
        return self.labelled // (self.batch_size * self.world_size)

    def __iter__(self):
        labelled = shuffled(self.labelled, self.seed, self.epoch)
        for step in range(len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            batch = labelled[first : first + self.batch_size]
            first += self.epoch * len(self) * self.world_size * self.batch_size
            for position in range(first, first + self.batch_size) if self.unlabelled else ():
                number, place = divmod(position, self.unlabelled)  # in successive shuffles
                index, seed = shuffled(self.unlabelled, self.seed + 50_000, number)[place]
                batch.append((self.labelled + index, seed))
            yield batch


def normalise(images, jitter=None):
    """(N, 3, H, W) uint8 -> float32, channels_last, with ImageNet's mean and deviation. `jitter`
    (N, 3): factors of brightness, contrast and saturation, in this order, clamped at the end."""
    images = images.float() / 255
    if jitter is not None:
        brightness, contrast, saturation = jitter.view(-1, 3, 1, 1, 1).unbind(1)
        images = images * brightness
        mean_grey = TF.rgb_to_grayscale(images).mean(dim=(2, 3), keepdim=True)
        images = torch.lerp(mean_grey, images, contrast)
        images = torch.lerp(TF.rgb_to_grayscale(images), images, saturation).clamp_(0, 1)
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD)):
        images[:, channel].sub_(mean).div_(std)  # no tensor has to be copied to the device
    return images.contiguous(memory_format=torch.channels_last)


def network_input(pixels, longest, device):
    """RGB of images (N, H, W, 3 or 4), uint8 -> normalised (N, 3, h, w), max(h, w) being `longest`
    px or, for 0, their own."""
    pixels = torch.as_tensor(pixels).to(device)[..., :3].permute(0, 3, 1, 2)
    factor = longest / max(pixels.shape[-2:]) if longest else 1
    size = [max(1, round(side * factor)) for side in pixels.shape[-2:]]
    return normalise(TF.resize(pixels, size))


# ---------------------------------------------------------------------------- the metric, the speed

class ConfusionMatrix:
    """Pixels by (true class, predicted class) over a whole split; its string is the report."""

    def __init__(self, device="cpu"):
        self.counts = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)

    def update(self, target, prediction):
        """Add two label maps of one shape; pixels whose target is no class are left out."""
        known = target < NUM_CLASSES
        pairs = torch.where(known, target.long() * NUM_CLASSES + prediction, 0).flatten()
        self.counts.view(-1).index_add_(0, pairs, known.flatten().long())  # no wait, as in bincount

    @property
    def iou(self):
        """Intersection over union per class, (C,) float64; NaN where the truth lacks the class."""
        counts = self.counts.cpu().double()
        truth, hits = counts.sum(dim=1), counts.diag()
        return torch.where(truth > 0, hits / (truth + counts.sum(dim=0) - hits), torch.nan)

    @property
    def miou(self):
        return self.iou.nanmean().item()  # over the classes of the ground truth

    @property
    def pixel_accuracy(self):
        return self.counts.diag().sum().item() / self.counts.sum().item()

    def __str__(self):
        rows = dict(zip(CLASSES, self.iou.tolist())) | {"mIoU": self.miou}
        rows["pixel accuracy"] = self.pixel_accuracy
        return tabulate(rows.items(), headers=("class", "IoU"), floatfmt=".4f")


def batches_of_one_size(samples, pixels):
    """Group (index, image) pairs into batches, a list each, of images of one shape that have so
    many pixels together, or fewer at the end and where 16 times as many wait."""
    waiting = defaultdict(list)
    for index, image in samples:
        waiting[tuple(image.shape)].append((index, image))
        areas = {shape: len(batch) * shape[0] * shape[1] for shape, batch in waiting.items()}
        largest = max(areas, key=areas.get)
        if areas[largest] >= pixels or sum(areas.values()) >= 16 * pixels:
            yield waiting.pop(largest)
    yield from waiting.values()


@torch.inference_mode()
def evaluate(model, images, eval_size, device, workers=0, on_image=None):
    """ConfusionMatrix and mean cross-entropy of a network, image -> logits, over a VOCDataset.

    Images are resized to a longest side of `eval_size` px (0: their own), logits to their masks.
    Ranks share the images, all return the sums. `on_image` gets index, mask (H, W), prediction."""
    model.eval()
    matrix, sums = ConfusionMatrix(device), torch.zeros(2, device=device)  # sums: loss, pixels
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shard = range(rank, len(images), world_size)
    pinned = device.type == "cuda"
    loader = make_loader(images, 0 if images.cache else workers, sampler=shard, pin_memory=pinned)
    for batch in batches_of_one_size(zip(shard, loader), EVAL_PIXELS.get(device.type, 3_000_000)):
        pixels = torch.stack([torch.as_tensor(p).to(device, non_blocking=pinned) for _, p in batch])
        target = pixels[..., 3]  # of (N, H, W, 4)
        logits = model(network_input(pixels, eval_size, device)).float()
        logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear")
        prediction = logits.max(dim=1).indices  # on a CPU faster than argmax
        matrix.update(target, prediction)
        loss = F.cross_entropy(logits, target.long(), ignore_index=VOID, reduction="sum")
        sums += torch.stack([loss, (target != VOID).sum()])
        for (index, _), *maps in zip(batch, target, prediction) if on_image else ():
            on_image(index, *maps)
    if dist.is_initialized():
        dist.all_reduce(matrix.counts)
        dist.all_reduce(sums)
    check_classes(matrix.counts.sum(dim=1))
    return matrix, (sums[0] / sums[1]).item()


@torch.inference_mode()
def measure_speed(model, device, size, batch_size=16):
    """MACs of one square image, its latency, the throughput of a batch; on CUDA in float16 too."""
    from torch.utils.benchmark import Timer  # slow to import
    threads, on_cuda = torch.get_num_threads(), device.type == "cuda"
    batch = torch.zeros(batch_size, 3, size, size).to(device, memory_format=torch.channels_last)

    def seconds(images):
        timer = Timer("model(x)", globals={"model": model, "x": images}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=1).median

    with FlopCounterMode(display=False) as counter:
        model(batch[:1])
    speed = {"device": torch.cuda.get_device_name() if on_cuda else f"{device}, {threads} threads",
             "macs": counter.get_total_flops() // 2, "latency_ms": 1000 * seconds(batch[:1]),
             "images_per_second": batch_size / seconds(batch)}  # fmt: skip
    with torch.autocast(device.type, torch.float16, enabled=on_cuda):
        return speed | ({"images_per_second_half": batch_size / seconds(batch)} if on_cuda else {})


# ---------------------------------------------------------------- the synthetic sample, the checker

SAMPLE = Path(__file__).resolve().parent / "voc_sample" / "v2"
SAMPLE_IMAGES = {"train": 60, "trainaug": 300, "val": 80}  # trainaug: beside those of train


def make_sample():
    """Draw the synthetic sample, if it is not there yet, and return its folder, a VOC tree."""
    if (SAMPLE / "ImageSets/Segmentation/val.txt").is_file():  # the last to be written
        return SAMPLE
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (SAMPLE / folder).mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(2012), []
    for split, count in SAMPLE_IMAGES.items():
        names = [f"sample_{split}_{n:04d}" for n in range(count)] + names * (split == "trainaug")
        for name in names[:count]:
            image, mask = draw_sample(rng)
            image.save(SAMPLE / f"JPEGImages/{name}.jpg", quality=92)
            mask.save(SAMPLE / f"SegmentationClass/{name}.png")
        atomic_save(SAMPLE / f"ImageSets/Segmentation/{split}.txt", "\n".join(names) + "\n")
    return SAMPLE


def draw_sample(rng):
    """An image and its mask: polygons in noise; a class is one of five hues times four textures."""
    width, height = rng.integers(96, 161, size=2).tolist()
    image, (y, x) = rng.uniform(50, 200, 3), np.mgrid[:height, :width]
    mask = Image.new("P", (width, height))
    mask.putpalette(voc_palette().ravel().tolist())
    for label in rng.integers(1, NUM_CLASSES, size=rng.integers(1, 4)).tolist():
        circle = *(rng.uniform(0.15, 0.85, 2) * mask.size).tolist(), rng.uniform(14, 32)
        polygon = circle, int(rng.integers(3, 9)), rng.uniform(0, 90)
        shape = Image.new("1", mask.size)
        ImageDraw.Draw(mask).regular_polygon(*polygon, fill=label, outline=VOID, width=2)
        ImageDraw.Draw(shape).regular_polygon(*polygon, fill=1)
        dark = (0 * x, x, y, x + y)[label % 4] // 4 % 2  # plain, stripes of two kinds, diagonals
        hue = label % 5 / 5 + rng.normal(0, 0.05) + np.array([0, 1 / 3, 2 / 3])
        colour = (127 + 127 * np.cos(2 * np.pi * hue)) * rng.uniform(0.4, 1)
        image = np.where(np.asarray(shape)[..., None], colour * (1 - 0.5 * dark[..., None]), image)
    image = (image + rng.normal(0, 20, image.shape)).clip(0, 255)
    return Image.fromarray(image.astype(np.uint8)), mask


def main(args):
    """Read every listed image and mask, print images per class and all that is wrong."""
    root, problems, table = find_voc(args.data_root), set(), {"images with": CLASSES}
    if args.add_sbd or args.sbd_root:
        add_sbd(root, args.sbd_root)
    for split in sorted(f.stem for f in root.glob("ImageSets/Segmentation/[!.]*.txt")) or ["train"]:
        images_with = np.zeros(256, dtype=np.int64)
        try:
            for item in tqdm(list_items(root, split), split, leave=False, disable=None):
                try:
                    images_with[np.unique(read_item(item)[..., 3])] += 1
                except DataError as error:
                    problems.add(str(error))
            check_classes(images_with[:NUM_CLASSES])
        except DataError as error:
            problems.add(f"list '{split}': {error}")
        table[split] = images_with[:NUM_CLASSES]
    print(f"VOC 2012 at {root}\n{tabulate(table, headers='keys')}")
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} problems", *sorted(problems)]))
    print("every listed image and mask can be read")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check a VOC 2012 data set.")
    parser.add_argument("--data_root", type=path, help="where VOC 2012 is, or 'sample'")
    parser.add_argument("--add_sbd", action="store_true", help="add the list trainaug, with masks")
    parser.add_argument("--sbd_root", type=path, metavar="DIR", help="the same, with a copy of SBD")
    run(main, parser.parse_args())
