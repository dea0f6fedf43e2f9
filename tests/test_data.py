"""Finding VOC, its lists, images and masks, the cache, training crops, batches, the sample."""

import argparse
import errno
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import train
import voc_data
from voc_data import (
    NUM_CLASSES, UNLABELLED, VOID, DataError, Item, TrainDataset, TrainSampler, UsageError,
    VOCDataset, find_voc, list_items, read_image, read_mask, read_split,
)  # fmt: skip

OFFICIAL, DOUBLED = "VOCdevkit/VOC2012", "VOC2012_train_val/VOC2012_train_val"
PALETTE = voc_data.voc_palette()


def noise(height=24, width=36, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def save_mask(file, labels, palette=PALETTE):
    """A palette PNG, as those of VOC; grey where `palette` is None."""
    mask = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    if palette is not None:
        mask.putpalette(np.asarray(palette).ravel().tolist())
    mask.save(file)
    return file


def make_voc(root, train=("2007_000032", "2008_000002"), val=("2008_000003",), unlabelled=()):
    """A VOC tree of small images; labels are 1 in their left half."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    labels = np.where(np.arange(36) < 18, 1, 0)[None].repeat(24, axis=0)
    for split, names in (("train", train), ("val", val), ("", unlabelled)):
        for name in names:
            Image.fromarray(noise()).save(root / f"JPEGImages/{name}.jpg")
            if split:
                save_mask(root / f"SegmentationClass/{name}.png", labels)
        if split:
            list_file(root, split).write_text("\n".join(names) + "\n", "utf-8")
    return root


def list_file(root, split):
    return root / f"ImageSets/Segmentation/{split}.txt"


def check(root):
    """What `python voc_data.py --data_root` does."""
    voc_data.main(argparse.Namespace(data_root=root))


def contents(folder):
    """{path: (date, size)} of all below a folder."""
    paths = [folder, *folder.rglob("*")]
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.stat().st_size) for p in paths}


# ------------------------------------------------------------------------------- finding VOC


@pytest.mark.parametrize("where, given", [
    (OFFICIAL, OFFICIAL), (OFFICIAL, "VOCdevkit"), (OFFICIAL, "VOCdevkit/"), (OFFICIAL, "."),
    (f"data/{OFFICIAL}", "."), (".", "."), ("pascal", "pascal"), ("VOC2012", "."), (DOUBLED, "."),
    (DOUBLED, "VOC2012_train_val"), (DOUBLED, DOUBLED), (f"pascal-voc-2012-dataset/{DOUBLED}", "."),
    (f"datasets/gopalbhattrai/pascal-voc-2012-dataset/{DOUBLED}", "."),
    (f"Données de thèse/日本 VOC/{OFFICIAL}", "Données de thèse"),
])  # fmt: skip
def test_layout_is_found_read_and_left_alone(where, given, tmp_path, capsys):
    tree = make_voc(tmp_path / "user" / where)
    before = contents(tmp_path)
    data_root = voc_data.path(f"{tmp_path / 'user'}/{given}")
    assert find_voc(data_root).samefile(tree)
    check(data_root)
    assert "every listed image and mask can be read" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_other_years_test_sets_and_hidden_folders_are_passed_over(tmp_path):
    for year in ("VOC2007", "VOC2011"):
        make_voc(tmp_path / "VOCdevkit" / year, ["000032"])
    for name in ("__MACOSX", ".Trash"):
        make_voc(tmp_path / "VOCdevkit" / name / "VOC2012")
    shutil.rmtree(make_voc(tmp_path / "VOCdevkit/A_test") / "SegmentationClass")
    with pytest.raises(DataError, match="JPEGImages"):
        find_voc(tmp_path)
    tree = make_voc(tmp_path / OFFICIAL)
    assert find_voc(tmp_path).samefile(tree) and find_voc(tmp_path / "VOCdevkit").samefile(tree)


@pytest.mark.parametrize("linked", ["data", "data/VOCdevkit", "data/VOCdevkit/VOC2012"])
def test_data_may_lie_behind_a_link(linked, tmp_path, monkeypatch):
    tree = make_voc(tmp_path / "disk/data" / OFFICIAL)
    (tmp_path / linked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / linked).symlink_to(tmp_path / "disk" / linked)
    monkeypatch.chdir(tmp_path)
    assert find_voc().samefile(tree) and find_voc(Path("data")).samefile(tree)


@pytest.mark.parametrize("where", [OFFICIAL, DOUBLED])
def test_kagglehub_cache_is_searched_after_the_data_folder(where, tmp_path, monkeypatch):
    version = tmp_path / "hub/datasets/gopalbhattrai/pascal-voc-2012-dataset/versions/1"
    tree = make_voc(version / where)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert find_voc().samefile(tree)
    own = make_voc(tmp_path / "data" / OFFICIAL)
    assert find_voc().samefile(own)


def test_folder_without_voc_is_named_and_never_replaced_by_another(tmp_path, monkeypatch):
    make_voc(tmp_path / "data" / OFFICIAL)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (Path("empty"), Path("nowhere")):
        with pytest.raises(DataError, match=rf"{folder}.*JPEGImages.*SegmentationClass"):
            find_voc(folder)


def test_download_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """In place of torchvision's download: it breaks off with half a tree, then succeeds."""
    calls, failures = [], [OSError("no route"), RuntimeError("bad md5"), KeyboardInterrupt()]

    def download(url, folder, unpacked, name, md5):
        calls.append((url, name, md5))
        if failures:
            make_voc(Path(unpacked) / OFFICIAL, ["half"], ["half"])
            raise failures.pop(0)
        make_voc(Path(unpacked) / OFFICIAL)

    monkeypatch.setattr(voc_data, "download_and_extract_archive", download)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    for words in ("no route", "bad md5"):
        with pytest.raises(DataError, match=f"{words}.*VOCtrainval_11-May-2012.tar.*sample") as e:
            find_voc()
        assert "\n" not in str(e.value) and not Path("data/VOCdevkit").exists()
    with pytest.raises(KeyboardInterrupt):
        find_voc()
    assert not Path("data/VOCdevkit").exists()
    assert find_voc().samefile(tmp_path / "data" / OFFICIAL)
    assert read_split(find_voc(), "train") == ["2007_000032", "2008_000002"]
    assert len(calls) == 4 and calls[3][2] == "6cd6e144f989b92b3379bac3b3de84fd"
    assert sorted(p.name for p in Path("data").iterdir() if not p.name[0] == ".") == ["VOCdevkit"]


# ------------------------------------------------------------------------------------- lists

IDS = ["2007_000032", "name_jpg.rf.03e8d0f9", "my photo 1", "B\u00e4ume", "v1.png"]


@pytest.mark.parametrize("line, expected", [
    ("2007_000032", IDS[0]), ("2007_000032  1", IDS[0]), ("2007_000032.jpg", IDS[0]),
    ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", IDS[0]),
    ("JPEGImages\\2007_000032.jpg SegmentationClass\\2007_000032.png", IDS[0]),
    ("name_jpg.rf.03e8d0f9", IDS[1]), ("name_jpg.rf.03e8d0f9.jpg", IDS[1]),
    ("/JPEGImages/name_jpg.rf.03e8d0f9.jpg /SegmentationClass/name_jpg.rf.03e8d0f9.png", IDS[1]),
    ("my photo 1", IDS[2]), ("my photo 1.jpg", IDS[2]), ("Ba\u0308ume", IDS[3]),
    ("B\u00e4ume.jpg", IDS[3]), ("v1.png", IDS[4]), ("v1.png.jpg", IDS[4]),
])  # fmt: skip
def test_line_of_a_list_is_an_id_a_file_name_or_a_pair(line, expected, tmp_path):
    root = make_voc(tmp_path, IDS)
    list_file(root, "mine").write_text(f"{line}\n", "utf-8")
    (item,) = list_items(root, "mine")
    assert item.id == expected and item.image.name == f"{expected}.jpg"
    assert item.mask.name == f"{expected}.png"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_windows_and_files_of_a_mac(encoding, form, tmp_path):
    name = voc_data.unicodedata.normalize(form, "B\u00e4ume")
    root = make_voc(tmp_path, ["2007_000032", name])
    text = "2007_000032\r\n\r\n  B\u00e4ume\r\n2007_000032\r\n"
    list_file(root, "train").write_bytes(text.encode(encoding))
    items = list_items(root, "train")
    assert [item.id for item in items] == ["2007_000032", "B\u00e4ume"]  # each once
    assert voc_data.read_item(items[1]).shape == (24, 36, 4)


def test_lists_that_cannot_be_used_are_refused_by_name(tmp_path):
    root = make_voc(tmp_path)
    (list_file(root, "._val")).write_bytes(b"\0\5\x16")
    for text, words in ((b"\n \r\n", "empty"), ("B\u00e4ume\n".encode("latin-1"), "UTF-8")):
        list_file(root, "train").write_bytes(text)
        with pytest.raises(DataError, match=rf"train\.txt.*{words}"):
            list_items(root, "train")
    with pytest.raises(DataError, match=r"trainaug\.txt does not exist.*train.*val") as error:
        list_items(root, "trainaug")
    assert "._val" not in str(error.value)


def test_missing_files_are_counted_and_named(tmp_path):
    root = make_voc(tmp_path, ["a", "b", "c"])
    (root / "JPEGImages/a.jpg").unlink()
    (root / "SegmentationClass/c.png").unlink()
    with pytest.raises(DataError, match=r"2 files.*JPEGImages/a\.jpg.*SegmentationClass/c\.png"):
        list_items(root, "train")


def test_files_beside_images_and_masks_do_not_take_their_place(tmp_path):
    root = make_voc(tmp_path, ["a", "b"])
    for name in ("._a.jpg", "a.json", "a.png", ".ipynb_checkpoints", "__MACOSX"):
        (root / "JPEGImages" / name).write_text("no image")
        (root / "SegmentationClass" / name.replace(".jpg", ".png")).write_text("no mask")
    save_mask(root / "SegmentationClass/a.png", np.zeros((24, 36)))
    (root / "JPEGImages/b.jpg").rename(root / "JPEGImages/b.JPG")
    (root / "SegmentationClass/b.png").rename(root / "SegmentationClass/b.PNG")
    files = [(item.image.name, item.mask.name) for item in list_items(root, "train")]
    assert files == [("a.jpg", "a.png"), ("b.JPG", "b.PNG")]


def test_augmented_masks_fill_in_and_the_official_mask_wins(tmp_path):
    root = make_voc(tmp_path, ["official", "added"])
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    (root / "SegmentationClass/added.png").unlink()
    folders = [item.mask.parent.name for item in list_items(root, "train")]
    assert folders == ["SegmentationClass", "SegmentationClassAug"]


def test_extra_images_are_those_without_labels(tmp_path):
    root = make_voc(tmp_path / "voc", ["a"], ["b"], unlabelled=["c", "d"])
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    for name in ("one.JPG", "deep/two.png", "a.jpg", "._one.jpg", "notes.txt"):
        Image.fromarray(noise(900, 1200)).save(photos / name, "png")
    extra = voc_data.list_extra_images([Path("voc"), photos], root, {"a", "b"})
    assert sorted((item.id, item.mask) for item in extra) == [
        ("c", None), ("d", None), ("one", None), ("two", None)]  # fmt: skip
    pixels = VOCDataset(extra)[[item.id for item in extra].index("two")]
    assert pixels.shape == (375, 500, 4)  # as large as those of VOC
    assert (pixels[..., 3] == UNLABELLED).all() and 100 < pixels[..., :3].mean() < 155
    (tmp_path / "empty").mkdir()
    for folder, used in (("empty", ()), ("nowhere", ()), ("voc/JPEGImages", "abcd")):
        with pytest.raises(DataError, match=f"extra_images.*{folder}"):
            voc_data.list_extra_images([photos, tmp_path / folder], root, {*used})


# --------------------------------------------------------------------------- masks and images


def train_here(root, *flags):
    """The start of a training on the CPU, without ImageNet weights and cache."""
    text = f"--data_root {root} --no_pretrained --epochs 1 --batch_size 1 --crop_size 33"
    text += f" --workers 0 --device cpu --cache_dir none --save_dir {root.parent / 'save'}"
    train.main(train.get_args_parser().parse_args([*text.split(), *flags]))


@pytest.mark.parametrize("split", ["train", "val"])
def test_binary_masks_are_refused_by_training_evaluation_and_checker(split, tmp_path):
    """Masks of 0 and 255, as binary tools write them: background and void, no class."""
    root = make_voc(tmp_path / "voc")
    for item in list_items(root, split):
        save_mask(item.mask, 255 * read_mask(item.mask), palette=None)
    with pytest.raises(DataError, match="background"):
        train_here(root)
    assert not (tmp_path / "save").exists()
    with pytest.raises(DataError, match="background"):
        flat = torch.nn.Conv2d(3, NUM_CLASSES, 1)
        voc_data.evaluate(flat, VOCDataset(list_items(root, split)), 0, torch.device("cpu"))
    with pytest.raises(DataError, match=f"1 problems\n.*{split}.*background"):
        check(root)


def palette_of(colours):
    """VOC's palette with {index: colour} changed."""
    changed = PALETTE.copy()
    changed[list(colours)] = list(colours.values())
    return changed


LABELS = [[0, 0, 1, 15, 20, VOID]]
CYCLED = palette_of({1: PALETTE[15], 15: PALETTE[20], 20: PALETTE[1]})
SORTED = palette_of({index: PALETTE[label] for index, label in enumerate((0, 1, 15, VOID))})


@pytest.mark.parametrize("palette, labels, accepted", [
    (PALETTE, LABELS, True), (None, LABELS, True), (PALETTE, [[3, 3]], True),
    (PALETTE[:21], [[0, 5, 20]], True), (np.arange(256)[:, None].repeat(3, axis=1), LABELS, True),
    (np.random.default_rng(1).integers(1, 64, (256, 3)) * 3 + 2, LABELS, True),
    (palette_of({VOID: (0, 0, 0)}), LABELS, True), (palette_of({VOID: (0, 0, 0)}), [[1, VOID]], True),
    (palette_of({VOID: (255, 255, 255)}), LABELS, True), (CYCLED, LABELS, False),
    (SORTED, [[0, 1, 2, 3]], False), (SORTED, [[0, 1]], True), (PALETTE[::-1], [[0, 1]], True),
])  # fmt: skip
def test_only_palettes_with_the_colours_of_voc_elsewhere_are_refused(
    palette, labels, accepted, tmp_path
):
    file = save_mask(tmp_path / "mask.png", labels, palette)
    if accepted:
        assert read_mask(file).tolist() == labels
    else:
        with pytest.raises(DataError, match="mask.png.*palette"):
            read_mask(file)


def rewrite(file, change):
    """Replace the bytes of a file by a part of them."""
    file.write_bytes(change(file.read_bytes()))


BROKEN = {  # what is done to a mask and an image of 36x24, and what the message says
    "colours": (lambda image, mask: Image.fromarray(noise()).save(mask), "a.png is a RGB image"),
    "one bit": (lambda image, mask: Image.new("1", (36, 24)).save(mask), "a.png is a 1 image"),
    "16 bits": (lambda i, mask: Image.new("I;16", (36, 24)).save(mask), "a.png is a I;16 image"),
    "label 21": (lambda i, mask: save_mask(mask, np.full((24, 36), 21), None), "a.png.*21"),
    "label 254": (lambda i, mask: save_mask(mask, np.full((24, 36), 254)), "a.png.*254"),
    "size": (lambda i, mask: save_mask(mask, np.ones((36, 24))), "a.png.*a.jpg.*EXIF"),
    "cut mask": (lambda i, mask: rewrite(mask, lambda b: b[:-30]), "a.png cannot be read"),
    "cut image": (lambda image, m: rewrite(image, lambda b: b[:-200]), "a.jpg cannot be read"),
    "empty image": (lambda image, m: rewrite(image, lambda b: b""), "a.jpg cannot be read"),
    "no image": (lambda image, m: rewrite(image, lambda b: b"<html>"), "a.jpg cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_by_reader_and_checker(name, tmp_path):
    root = make_voc(tmp_path, ["a", "b"])
    (item, _) = list_items(root, "train")
    break_it, words = BROKEN[name]
    break_it(item.image, item.mask)
    with pytest.raises(DataError, match=words) as error:
        voc_data.read_item(item)
    assert "\n" not in str(error.value)
    shutil.copy(list_file(root, "train"), list_file(root, "trainval"))
    with pytest.raises(DataError, match=words) as error:
        check(root)
    assert str(error.value).count(str(item.mask.parent.parent)) <= 2  # once, though listed twice


def saved(file, image, **options):
    image.save(file, **options)
    return read_image(file)


def test_odd_images_are_read_as_they_are_meant(tmp_path):
    """Grey, 16-bit, with alpha, palette, CMYK, turned by EXIF."""
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)[None].repeat(40, axis=0)
    grey = ramp[..., None].repeat(3, axis=2)
    assert np.array_equal(saved(tmp_path / "grey.png", Image.fromarray(ramp)), grey)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert np.array_equal(saved(tmp_path / "deep.png", deep), grey)
    colour = np.dstack([ramp, 255 - ramp, ramp // 2])
    alpha = Image.fromarray(np.dstack([colour, ramp]))
    assert np.array_equal(saved(tmp_path / "alpha.png", alpha), colour)
    two = Image.fromarray((ramp > 99).astype(np.uint8))
    two.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.where((ramp > 99)[..., None], [200, 100, 50], [10, 20, 30])
    assert np.array_equal(saved(tmp_path / "palette.png", two), expected)
    cmyk = saved(tmp_path / "cmyk.jpg", Image.fromarray(colour).convert("CMYK"), quality=95)
    assert np.abs(cmyk.astype(int) - colour).max() < 24
    exif = Image.Exif()
    for orientation, turned in ((3, colour[::-1, ::-1]), (6, np.rot90(colour, -1))):
        exif[0x0112] = orientation
        read = saved(tmp_path / "turned.png", Image.fromarray(colour), exif=exif)
        assert np.array_equal(read, turned)


# ----------------------------------------------------------------------------------- the cache


def test_cached_images_are_those_decoded_and_can_be_pickled(tiny_voc, tmp_path):
    items = list_items(tiny_voc, "val")
    items.append(Item("extra", items[0].image, None))
    cached, decoded = VOCDataset(items, tmp_path / "cache"), VOCDataset(items)
    for data in (cached, pickle.loads(pickle.dumps(cached))):
        assert len(data) == 9
        for index in range(9):
            assert data[index].dtype == np.uint8 and np.array_equal(data[index], decoded[index])
    masks = np.concatenate([read_mask(item.mask)[::4].ravel() for item in items[:8]])
    expected = [(masks == label).sum() for label in range(NUM_CLASSES)]
    assert cached.class_pixels().tolist() == decoded.class_pixels().tolist() == expected


def test_cache_is_made_once_and_anew_when_a_file_changes(voc, tmp_path, monkeypatch):
    items, cache = list_items(voc, "val"), tmp_path / "cache"
    VOCDataset(items, cache)
    with monkeypatch.context() as patch:
        patch.setattr(voc_data, "read_item", None)  # nothing can be decoded
        VOCDataset(items, cache)
    turned = 255 - read_image(items[0].image)
    for file, image in ((items[0].image, turned), (items[1].image, read_image(items[1].image))):
        size, date = file.stat().st_size, file.stat().st_mtime_ns
        Image.fromarray(image).save(file, quality=100)
        rewrite(file, lambda b: b if len(b) == size else b)
        os.utime(file, ns=(date + 10**9, date + 10**9))
    data = VOCDataset(items, cache)
    assert np.array_equal(data[0][..., :3], read_image(items[0].image))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_leaves_no_unfinished_cache(workers, voc, tmp_path):
    items = list_items(voc, "val")
    rewrite(items[5].image, lambda b: b[: len(b) // 2])
    with pytest.raises(DataError, match=items[5].image.name):
        VOCDataset(items, tmp_path / "cache", workers)
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_is_one_line_that_says_what_to_do(voc, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(voc_data.np, "save", full)
    with pytest.raises(DataError, match="No space left.*--cache_dir none") as error:
        VOCDataset(list_items(voc, "val"), tmp_path / "cache")
    assert "\n" not in str(error.value) and list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--cache_dir"):
        VOCDataset(list_items(voc, "val"), tmp_path / "file" / "cache")


def test_two_processes_may_make_one_cache(voc, tmp_path, monkeypatch):
    """The other one, with another process id, is ready in the middle of this one."""
    items, cache, read = list_items(voc, "val"), tmp_path / "cache", voc_data.read_item

    def read_after_the_other(item):
        monkeypatch.setattr(voc_data, "read_item", read)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            VOCDataset(items, cache)
        return read(item)

    monkeypatch.setattr(voc_data, "read_item", read_after_the_other)
    data = VOCDataset(items, cache)
    assert np.array_equal(data[3], read(items[3])) and len(list(cache.iterdir())) == 1


def test_what_a_killed_process_left_is_no_hindrance(voc, tmp_path):
    """In a container the next process often has the same id."""
    items, cache = list_items(voc, "val"), tmp_path / "cache"
    VOCDataset(items, cache)
    (folder,) = cache.iterdir()
    folder.rename(folder.with_suffix(f".{os.getpid()}"))
    assert np.array_equal(VOCDataset(items, cache)[3], voc_data.read_item(items[3]))


# ------------------------------------------------------------------------------ training crops

BAND = 6  # px of the image for one label, in both directions
SIZES = [(250, 250), (240, 150), (65, 65), (40, 120), (50, 40)]


class Maps:
    """In place of the cache of a teacher's maps: the same for each image."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        return self.values


def coordinate_image(height, width):
    """Pixels (H, W, 4): red is y, green is x, blue 255; the label is a function of the place."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(x, 255), label_at(y, x)], axis=-1).astype(np.uint8)


def label_at(y, x):
    return (y // BAND + 5 * (x // BAND)) % NUM_CLASSES


def places_of_teacher(height, width, seen, key):
    """For each value of a teacher's map the place (y, x) in px of the image, (2, h, w) float16.

    Logits lie in the middle of even cells, value i of features at stride * i + 0.5 px of the
    teacher's input, whose longest side is `seen`.
    """
    stride, places = voc_data.STRIDES[key], []
    for side in (height, width):
        input_side = round(side * seen / max(height, width))
        steps = np.arange(-(-input_side // stride))
        even, strided = (steps + 0.5) * side / len(steps), (stride * steps + 0.5) * side / input_side
        places.append(even if key == "out" else strided)
    return np.stack(np.meshgrid(*places, indexing="ij")).astype(np.float16), places


def crops(size, seen=120, crop=65, longest=160, scale=(0.5, 2.0), seeds=range(12)):
    """Samples of one coordinate image, with a map of places for each key."""
    images = [coordinate_image(*size)]
    maps = {key: Maps(places_of_teacher(*size, seen, key)[0]) for key in voc_data.STRIDES}
    settings = {"size": crop, "longest": longest, "scale": scale, "seen": seen}
    return [TrainDataset(images, settings, 0.0, maps)[0, seed] for seed in seeds]


def line(values, shown):
    """Slope and value at 0 of the places along one axis of a crop, at edges of pixels.

    `values`: places (crop, crop) along the second axis; `shown`: no padding. The outermost pixels,
    which resizing blends with nothing beyond, are left out.
    """
    columns = np.flatnonzero(shown.any(axis=0))[2:-2]
    rows = np.flatnonzero(shown.any(axis=1))[2:-2]
    return np.polyfit(columns + 0.5, values[rows][:, columns].mean(axis=0) + 0.5, 1)


@pytest.mark.parametrize("size", SIZES)
def test_crop_moves_image_mask_and_maps_together(size):
    flipped, compared = set(), dict.fromkeys(voc_data.STRIDES, 0)
    for sample in crops(size):
        red, green, blue = sample["image"].double().numpy()
        mask, shown = sample["mask"].numpy(), blue > 250
        assert np.array_equal(mask == VOID, ~shown) and shown.any()
        padding = sample["image"].permute(1, 2, 0)[torch.from_numpy(~shown)]
        assert (padding == torch.tensor([124, 116, 104])).all()  # the ImageNet mean
        # Within 1.5 px of a border between bands, the label may be that of either side.
        inner = [(np.mod(v + 0.5, BAND) > 1.5) & (np.mod(v + 0.5, BAND) < 4.5) for v in (red, green)]
        clear = shown & inner[0] & inner[1]
        expected = label_at(red.round().astype(int), green.round().astype(int))
        assert clear.sum() > 0.1 * shown.sum() and (mask[clear] == expected[clear]).all()
        lines = line(red.T, shown.T), line(green, shown)
        flipped.add(lines[1][0] < 0)
        for key, stride in voc_data.STRIDES.items():
            count = -(-65 // stride)
            assert sample[key].shape == (2, count, count) and sample[key].dtype == torch.float16
            cells = np.arange(count)
            at = (cells + 0.5) * 65 / count if key == "out" else stride * cells + 0.5
            for axis, (slope, first) in enumerate(lines):
                said = sample[key][axis].double().numpy()
                said = said.mean(axis=1 - axis)
                wanted = slope * at + first
                known = places_of_teacher(*size, 120, key)[1][axis]
                within = (wanted > known[0] + 1) & (wanted < known[-1] - 1)
                assert np.abs(said - wanted)[within].max(initial=0) < 0.6
                compared[key] += within.sum()
    assert flipped == {True, False} and min(compared.values()) > 10


def test_scale_keeps_to_its_range_and_is_even_in_the_logarithm():
    """Px of the crop for each px of an image that is shown 160 px long at scale 1."""
    scales = []
    for sample in crops((250, 250), seeds=range(80)):
        red, _, blue = sample["image"].double().numpy()
        scales.append(250 / 160 / line(red.T, blue.T > 250)[0])
    assert 0.49 < min(scales) < 0.6 and 1.65 < max(scales) < 2.05
    assert 0.3 < np.mean(np.array(scales) < 1) < 0.7


def test_crop_does_not_depend_on_the_size_of_the_file():
    small = Image.fromarray(noise(12, 16)).resize((500, 375), Image.Resampling.BICUBIC)
    images = [np.dstack([np.asarray(small.resize(size, Image.Resampling.BOX)), np.zeros(size[::-1])])
              .astype(np.uint8) for size in ((500, 375), (400, 300))]  # fmt: skip
    data = TrainDataset(images, {"size": 97, "longest": 160, "scale": (0.5, 2.0), "seen": 0})
    other = []
    for seed in range(8):
        first, second, third = (data[key]["image"].double() for key in ((0, seed), (1, seed), (0, 99)))
        assert (first - second).abs().mean() < 4
        other.append((first - third).abs().mean())
    assert min(other) > 12


# ----------------------------------------------------------------------- samples and batches


def test_normalise_is_that_of_torchvision():
    images = torch.from_numpy(np.stack([noise(20, 30, seed) for seed in range(6)]))
    images = images.permute(0, 3, 1, 2) // 3 + 85  # nothing is clipped on the way
    mean, std = voc_data.IMAGENET_MEAN, voc_data.IMAGENET_STD
    expected = TF.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(voc_data.normalise(images), expected, atol=2e-6, rtol=0)
    jitter = 1 + 0.25 * (2 * torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) - 1)
    for image, factors, got in zip(images, jitter.tolist(), voc_data.normalise(images, jitter)):
        image = TF.adjust_brightness(image.float() / 255, factors[0])
        image = TF.adjust_saturation(TF.adjust_contrast(image, factors[1]), factors[2])
        torch.testing.assert_close(got, TF.normalize(image, mean, std), atol=3e-5, rtol=0)
    strong = voc_data.normalise(images, torch.full((6, 3), 3.0)).permute(0, 2, 3, 1)
    strong = strong * torch.tensor(std) + torch.tensor(mean)
    assert -1e-5 < strong.min() < 1e-5 and 1 - 1e-5 < strong.max() < 1 + 1e-5


def keys_of(labelled, unlabelled=0, batch_size=4, seed=5, epoch=0, rank=0, world_size=1):
    sampler = TrainSampler(labelled, unlabelled, batch_size, seed, rank, world_size)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_epoch_is_a_shuffle_by_seed_and_epoch():
    orders = [sum(keys_of(24, seed=s, epoch=e), []) for s, e in ((5, 0), (5, 1), (6, 0), (5, 0))]
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(index for index, _ in order) == list(range(24))
        assert len({seed for _, seed in order}) == 24
    assert len(keys_of(27)) == 6  # 3 images do not fill a batch
    with pytest.raises(UsageError, match="--batch_size 25"):
        TrainSampler(24, 100, 25, 0)
    with pytest.raises(UsageError, match="--batch_size 7"):
        TrainSampler(24, 100, 7, 0, rank=0, world_size=4)


def test_unlabelled_images_come_in_pairs_with_labelled_ones_each_once_a_round():
    """24 labelled images and 30 unlabelled, by two processes: 24 of these an epoch."""
    drawn = []
    for epoch in range(5):
        ranks = [keys_of(24, 30, epoch=epoch, rank=rank, world_size=2) for rank in (0, 1)]
        alone = [keys_of(24, epoch=epoch, rank=rank, world_size=2) for rank in (0, 1)]
        for batch, without in zip(sum(ranks, []), sum(alone, [])):
            assert batch[:4] == without and len(batch) == 8
            assert all(24 <= index < 54 for index, _ in batch[4:])
        labelled = [index for batch in sum(alone, []) for index, _ in batch]
        assert sorted(labelled) == list(range(24))
        drawn += [key for step in zip(*ranks) for batch in step for key in batch[4:]]
    for start in range(0, 120, 30):
        assert sorted(index for index, _ in drawn[start : start + 30]) == list(range(24, 54))
    assert len({seed for _, seed in drawn}) == 120
    assert len(keys_of(24, 2)) == 6 and {i for b in keys_of(24, 2) for i, _ in b[4:]} == {24, 25}


def test_batches_depend_neither_on_workers_nor_on_the_global_generator(tiny_voc):
    items = list_items(tiny_voc, "train")
    items.append(Item("extra", items[0].image, None))
    crop = {"size": 65, "longest": 100, "scale": (0.5, 2.0), "seen": 0}
    data, runs = TrainDataset(VOCDataset(items), crop, jitter=0.3), []
    for workers in (0, 2):
        torch.manual_seed(workers)
        sampler = TrainSampler(24, 1, 6, seed=3)
        batches = list(voc_data.make_loader(data, workers, 1, batch_sampler=sampler))
        assert torch.equal(torch.rand(3), torch.manual_seed(workers) and torch.rand(3))  # dropout's
        runs.append(batches)
    for first, second in zip(*runs, strict=True):
        assert first["image"].shape == (12, 3, 65, 65) and first["jitter"].std() > 0.05
        assert {*first["mask"][6:].unique().tolist()} <= {UNLABELLED, VOID}
        assert all(torch.equal(first[key], second[key]) for key in first)


# ------------------------------------------------------------------- the sample, files, scripts


def test_sample_has_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(voc_data, "SAMPLE_IMAGES", {"train": 6, "trainaug": 9, "val": 4})
    files = []
    for name in "ab":
        monkeypatch.setattr(voc_data, "SAMPLE", tmp_path / name)
        root = find_voc(Path("sample"))
        files.append({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.*")})
    assert files[0] == files[1] and len(files[0]) == 2 * (6 + 9 + 4) + 3
    ids = {split: {*read_split(root, split)} for split in ("train", "trainaug", "val")}
    assert len(ids["trainaug"]) == 15 and ids["train"] < ids["trainaug"]
    assert not ids["val"] & ids["trainaug"]


def test_sample_has_all_classes_in_train_and_val(sample_root, capsys):
    check(sample_root)
    out = capsys.readouterr().out
    for name in voc_data.CLASSES:
        (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == [name]]
        assert min(map(int, row[1:])) > 0


def test_failed_save_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "new" / "a.txt"
    voc_data.atomic_save(file, "old ä")
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos"), KeyboardInterrupt()):

        def fail(path, error=error):
            path.write_text("half")
            raise error

        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError):
            voc_data.atomic_save(file, fail)
        assert file.read_text("utf-8") == "old ä" and list(file.parent.iterdir()) == [file]
    voc_data.atomic_save(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("error, code, words", [
    (DataError("a.png is broken"), 1, "x.py: error: a.png is broken\n"),
    (DataError("Caught DataError in worker\nvoc_data.DataError: a.png is broken"), 1,
     "x.py: error: a.png is broken\n"),
    (UsageError("choose one"), 2, "x.py: error: choose one\n"),
    (PermissionError(13, "denied", "b.txt"), 1, "x.py: error: [Errno 13] denied: 'b.txt'\n"),
    (KeyboardInterrupt(), 130, ""), (torch.OutOfMemoryError(), "error: out of GPU memory", ""),
])  # fmt: skip
def test_run_ends_in_one_line_and_an_exit_status(error, code, words, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(voc_data.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["/some/where/x.py"])
    with pytest.raises(SystemExit) as stop:
        voc_data.run(fail, None)
    assert str(stop.value.code).startswith(str(code)) and capsys.readouterr().err == words
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        voc_data.run(lambda args: 1 / 0, None)


def test_checker_as_a_person_runs_it(tmp_path, run_script):
    """In a terminal of ASCII, with ~ in a path, on data without and with a broken file."""
    make_voc(tmp_path / "home/B\u00e4ume", ["\u00e4"])
    settings = {"PYTHONIOENCODING": "ascii", "HOME": str(tmp_path / "home")}
    done = run_script("voc_data.py", "--data_root=~/B\u00e4ume", env=settings)
    assert done.returncode == 0 and r"B\xe4ume" in done.stdout and "Traceback" not in done.stderr
    assert [line.split() for line in done.stdout.splitlines()][4] == ["aeroplane", "1", "1"]
    rewrite(tmp_path / "home/B\u00e4ume/JPEGImages/\u00e4.jpg", lambda b: b[:300])
    done = run_script("voc_data.py", "--data_root=~/B\u00e4ume", env=settings)
    assert done.returncode == 1 and r"\xe4.jpg cannot be read" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "cwd/~").exists()
