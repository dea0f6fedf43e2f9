"""Finding VOC, its lists, images and masks, the cache, training crops, batches, the sample."""

import argparse
import contextlib
import functools
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import train
import voc_data
from conftest import ROOT
from voc_data import (
    NUM_CLASSES, UNLABELLED, VOID, DataError, Item, TrainDataset, TrainSampler, UsageError,
    VOCDataset, find_voc, list_items, read_image, read_mask, read_split,
)  # fmt: skip

OFFICIAL, DOUBLED = "VOCdevkit/VOC2012", "VOC2012_train_val/VOC2012_train_val"
KAGGLE = "datasets/gopalbhattrai/pascal-voc-2012-dataset"
PLAIN, DOTS, BLANKS, UMLAUT = "2007_000032", "name_jpg.rf.03e8d0f9", "my photo 1", "B\u00e4ume"
PALETTE = voc_data.voc_palette()
LABELS = [[0, 0, 1, 15, 20, VOID]]
BAND, SEEN = 10, 120  # px: of an image for one label; the longest side of what a teacher saw
refused = functools.partial(pytest.raises, DataError)


def noise(height=24, width=36, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def save_mask(file, labels, palette=PALETTE):
    """A palette PNG, as those of VOC; grey where `palette` is None."""
    mask = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    if palette is not None:
        mask.putpalette(np.asarray(palette).ravel().tolist())
    mask.save(file)
    return file


def make_voc(root, train=("2007_000032", "2008_000002"), val=("2008_000003",)):
    """A VOC tree of small images; the label is 1 in their left half."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in (*train, *val):
        Image.fromarray(noise()).save(root / f"JPEGImages/{name}.jpg")
        save_mask(root / f"SegmentationClass/{name}.png", np.tile(np.arange(36) < 18, (24, 1)))
    for split, names in (("train", train), ("val", val)):
        write_list(root, split, "\n".join(names).encode())
    return root


def write_list(root, split, content):
    (root / f"ImageSets/Segmentation/{split}.txt").write_bytes(content)


def checker_flags(root, add_sbd=False, sbd_root=None):
    return argparse.Namespace(data_root=root, add_sbd=add_sbd, sbd_root=sbd_root)


@pytest.mark.parametrize("where, given", [
    (OFFICIAL, OFFICIAL), (OFFICIAL, "VOCdevkit"), (OFFICIAL, "VOCdevkit/"), (OFFICIAL, "."),
    (f"data/{OFFICIAL}", "."), (".", "."), ("pascal", "pascal"), ("VOC2012", "."), (DOUBLED, "."),
    (DOUBLED, "VOC2012_train_val"), (DOUBLED, DOUBLED), (f"pascal-voc/{DOUBLED}", "."),
    (f"{KAGGLE}/{DOUBLED}", "."), (f"Données/日本 VOC/{OFFICIAL}", "Données"),
])  # fmt: skip
def test_layout_is_found_read_and_left_alone(where, given, tmp_path, capsys):
    tree = make_voc(tmp_path / "user" / where)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data_root = voc_data.path(f"{tmp_path / 'user'}/{given}")
    assert find_voc(data_root).samefile(tree)
    voc_data.main(checker_flags(data_root))
    assert "every listed image and mask can be read" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_other_years_test_sets_and_hidden_folders_are_passed_over(tmp_path, monkeypatch):
    for name in ("VOC2007", "VOC2011", "__MACOSX/VOC2012", ".Trash/VOC2012", "A_test"):
        make_voc(tmp_path / "VOCdevkit" / name, ["000032"])
    shutil.rmtree(tmp_path / "VOCdevkit/A_test/SegmentationClass")
    make_voc(tmp_path / "other/data" / OFFICIAL)
    monkeypatch.chdir(tmp_path / "other")
    for root in (tmp_path / "VOCdevkit", Path("nowhere")):  # ./data is no replacement
        with refused(match=rf"{root}.*JPEGImages.*SegmentationClass"):
            find_voc(root)
    tree = make_voc(tmp_path / OFFICIAL)
    assert find_voc(tmp_path).samefile(tree) and find_voc(tmp_path / "VOCdevkit").samefile(tree)


@pytest.mark.parametrize("where", [OFFICIAL, DOUBLED])
def test_kagglehub_cache_is_searched_after_the_data_folder(where, tmp_path, monkeypatch):
    tree = make_voc(tmp_path / "hub" / KAGGLE / "versions/1" / where)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(voc_data, "download", lambda *_: pytest.fail("it downloads"))
    monkeypatch.chdir(tmp_path)
    assert find_voc().samefile(tree)
    own = make_voc(tmp_path / "disk" / OFFICIAL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(own.parent)
    assert find_voc().samefile(own)


def test_download_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    """In place of torchvision's function: it breaks off three times with half a tree."""
    md5, failures = [], [OSError("no route"), RuntimeError("bad md5"), KeyboardInterrupt()]

    def download(*args):
        md5.append(args[4])
        make_voc(Path(args[2]) / OFFICIAL, ["half"] if failures else ["a", "b"])
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr(voc_data, "download_and_extract_archive", download)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    hint = "^[^\n]*no route.*VOCtrainval_11-May-2012.tar.*sample[^\n]*$"
    for shown, words in ((DataError, hint), (DataError, "bad md5"), (KeyboardInterrupt, "^$")):
        with pytest.raises(shown, match=words):
            find_voc()
        assert not Path("data/VOCdevkit").exists()
    assert read_split(find_voc(), "train") == read_split(find_voc(), "train") == ["a", "b"]
    assert md5 == ["6cd6e144f989b92b3379bac3b3de84fd"] * 4


@pytest.mark.parametrize("line, expected", [
    (PLAIN, PLAIN), (f"{DOTS}  1", DOTS), (f"{PLAIN}.jpg", PLAIN), ("v1.png", "v1.png"),
    (f"/JPEGImages/{PLAIN}.jpg /SegmentationClassAug/{PLAIN}.png", PLAIN),
    (f"JPEGImages\\{PLAIN}.jpg SegmentationClass\\{PLAIN}.png", PLAIN),
    (DOTS, DOTS), (f"{DOTS}.jpg", DOTS), (f"/JPEGImages/{DOTS}.jpg /Masks/{DOTS}.png", DOTS),
    (BLANKS, BLANKS), (f"{BLANKS}.jpg", BLANKS), (UMLAUT, UMLAUT), ("Ba\u0308ume.jpg", UMLAUT),
])  # fmt: skip
def test_line_of_a_list_is_an_id_a_file_name_or_a_pair(line, expected, tmp_path):
    """In lists as Windows writes them, of files some of which are named as by a Mac."""
    root = make_voc(tmp_path, [PLAIN, DOTS, BLANKS, "Ba\u0308ume", "v1.png"])
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        write_list(root, "mine", f"{line}\r\n\r\n  {line}\r\n".encode(encoding))
        (item,) = list_items(root, "mine")
        files = [unicodedata.normalize("NFC", file.name) for file in item[1:]]
        assert (item.id, *files) == (expected, f"{expected}.jpg", f"{expected}.png")
        assert voc_data.read_item(item).shape == (24, 36, 4)


def test_lists_that_cannot_be_used_are_refused_by_name(tmp_path):
    root = make_voc(tmp_path, ["a", "b", "c"])
    for name in ("JPEGImages/a.jpg", "SegmentationClass/c.png"):
        (root / name).unlink()
    with refused(match=r"train.* 2 files.*JPEGImages/a\.jpg.*SegmentationClass/c\.png"):
        list_items(root, "train")
    write_list(root, "._val", b"\0\5\x16")  # left by a Mac
    with refused(match=r"trainaug\.txt does not exist[^_]*train[^_]*val"):
        list_items(root, "trainaug")
    for content, words in ((b"\n \r\n", "empty"), (UMLAUT.encode("latin-1"), "UTF-8")):
        write_list(root, "train", content)
        with refused(match=rf"train\.txt.*{words}"):
            list_items(root, "train")


def test_other_files_do_not_take_the_place_of_images_and_masks(tmp_path):
    root = make_voc(tmp_path, ["a", "b", "c"])
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    for name in ("._a.jpg", "a.json", "a.webp", ".ipynb_checkpoints", "__MACOSX"):
        (root / "JPEGImages" / name).write_text("no image")
        (root / "SegmentationClass" / name.replace(".jpg", ".png")).write_text("no mask")
    (root / "JPEGImages/b.jpg").rename(root / "JPEGImages/b.JPG")
    (root / "SegmentationClass/b.png").rename(root / "SegmentationClass/b.PNG")
    (root / "SegmentationClass/c.png").unlink()
    files = [str(file.relative_to(root)) for item in list_items(root, "train") for file in item[1:]]
    assert files == ["JPEGImages/a.jpg", "SegmentationClass/a.png", "JPEGImages/b.JPG",
                     "SegmentationClass/b.PNG", "JPEGImages/c.jpg", "SegmentationClassAug/c.png"]


def test_extra_images_are_those_without_labels(tmp_path):
    root = make_voc(tmp_path / "voc", ["a"], ["b", "c", "d"])
    photos = tmp_path / "photos"
    (photos / "deep/__MACOSX").mkdir(parents=True)
    for name in ("one.JPG", "deep/one.jpg", "deep/two.png", "a.jpg", "._one.jpg", "notes.txt",
                 "deep/__MACOSX/three.jpg"):  # fmt: skip
        Image.fromarray(noise(300, 1000)).save(photos / name, "png")
    extra = voc_data.list_extra_images([Path("voc"), photos], root, {"a", "b"})
    assert [item.id for item in extra] == ["c", "d", "one", "two", "one"]  # two of one name
    assert len({item.image for item in extra}) == 5 and {item.mask for item in extra} == {None}
    pixels = VOCDataset([item for item in extra if item.id == "two"])[0]
    assert pixels.shape == (150, 500, 4)  # as long as the images of VOC
    assert (pixels[..., 3] == UNLABELLED).all() and 100 < pixels[..., :3].mean() < 155
    for folder in ("nowhere", "voc/ImageSets", "voc/JPEGImages"):
        with refused(match=f"extra_images.*{folder}"):
            voc_data.list_extra_images([photos, tmp_path / folder], root, {*"abcd"})


def make_sbd(folder, *names):
    scipy, content = pytest.importorskip("scipy.io"), np.full((24, 36), 7, np.uint8)
    (folder / "cls").mkdir(parents=True)
    for name in names:
        scipy.savemat(folder / f"cls/{name}.mat", {"GTcls": {"Segmentation": content}})
    return folder


def test_masks_of_sbd_make_trainaug_without_val(tmp_path, monkeypatch, capsys):
    root = make_voc(tmp_path / "voc", ["a"], ["b"])
    new = root / "ImageSets/Segmentation/trainaug.txt"
    for name in ("c", "d"):
        Image.fromarray(noise()).save(root / f"JPEGImages/{name}.jpg")
    with refused(match="trainaug.txt does not exist.*--add_sbd makes it"):
        list_items(root, "trainaug")
    sbd = make_sbd(tmp_path / "sbd/benchmark_RELEASE/dataset", *"abcde")
    (root / "SegmentationClassAug").mkdir()
    save_mask(root / "SegmentationClassAug/c.png", np.full((24, 36), 3))
    whole = (sbd / "cls/d.mat").read_bytes()
    (sbd / "cls/d.mat").write_text("no mask")  # a call that breaks off
    with refused(match="d.mat cannot be read"):
        voc_data.main(checker_flags(root, True, tmp_path / "sbd"))
    assert not new.exists()
    (sbd / "cls/d.mat").write_bytes(whole)
    voc_data.main(checker_flags(root, True, tmp_path / "sbd"))  # and checks all lists
    assert "3 images; 1 of SBD are not in this VOC" in capsys.readouterr().out
    labels = {item.id: read_mask(item.mask)[0, 0] for item in list_items(root, "trainaug")}
    assert labels == {"a": 1, "c": 3, "d": 7}  # VOC's own; as it was; new
    with refused(match="exists already"):
        voc_data.main(checker_flags(root, True, tmp_path / "sbd"))
    new.unlink()
    monkeypatch.chdir(tmp_path)
    fake = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(voc_data, "download_and_extract_archive", fake)
    with refused(match="no network.*--sbd_root"):
        voc_data.main(checker_flags(root, True))
    fake.side_effect = lambda *args: make_sbd(args[2] / "benchmark_RELEASE/dataset", "d")
    voc_data.main(checker_flags(root, True))
    assert [item.id for item in list_items(root, "trainaug")] == ["a", "d"]
    assert fake.call_args.args[4] == "82b4d87ceb2ed10f6038a1cba92111cb"
    new.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(match=f"{root} cannot be written.*--data_root"):
        voc_data.main(checker_flags(root, True))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with refused(match="pip install scipy"):
        voc_data.main(checker_flags(root, True))


def test_checker_without_a_list(tmp_path):
    root = make_voc(tmp_path / "voc")
    shutil.rmtree(root / "ImageSets/Segmentation")
    with refused(match="1 problems\n.*train.txt does not exist"):
        voc_data.main(checker_flags(root))


@pytest.mark.parametrize("split", ["train", "val"])
def test_binary_masks_are_refused_by_training_evaluation_and_checker(split, tmp_path):
    """Masks of 0 and 255, as binary tools write them: background and void, no class."""
    root = make_voc(tmp_path / "voc")
    for item in list_items(root, split):
        save_mask(item.mask, 255 * read_mask(item.mask), palette=None)
    flags = f"--data_root {root} --no_pretrained --epochs 1 --batch_size 1 --crop_size 33 "
    flags += f"--workers 0 --device cpu --cache_dir none --save_dir {tmp_path / 'save'}"
    with refused(match="background"):
        train.main(train.get_args_parser().parse_args(flags.split()))
    assert not (tmp_path / "save").exists()
    arguments = torch.nn.Conv2d(3, 21, 1), VOCDataset(list_items(root, split)), 0
    with refused(match="background"):
        voc_data.evaluate(*arguments, torch.device("cpu"))
    with refused(match=f"1 problems\n.*{split}.*background"):
        voc_data.main(checker_flags(root))


GREY, NEGATIVE = np.arange(256)[:, None].repeat(3, axis=1), 255 - PALETTE // 2
OTHER_PERSON = np.where(GREY == 15, 250, PALETTE)
VOID_BLACK = np.vstack([PALETTE[:VOID], [[0, 0, 0]]])
SORTED, MOVED = PALETTE[[0, 1, 15, VOID]], np.roll(PALETTE, 1, axis=0)


@pytest.mark.parametrize("palette, labels, accepted", [
    (PALETTE, LABELS, True), (None, LABELS, True), (GREY, LABELS, True), (NEGATIVE, LABELS, True),
    (PALETTE, [[3, 3]], True), (PALETTE[:21], [[0, 5, 20]], True), (SORTED, [[0, 1]], True),
    (VOID_BLACK, LABELS, True), (VOID_BLACK, [[1, VOID]], True), (MOVED, [[0, 1, 15]], False),
    (SORTED, [[0, 1, 2, 3]], False), (OTHER_PERSON, LABELS, True),
])  # fmt: skip
def test_palette_with_colours_of_voc_elsewhere_is_refused(palette, labels, accepted, tmp_path):
    file = save_mask(tmp_path / "mask.png", labels, palette)
    with contextlib.nullcontext() if accepted else refused(match="mask.png.*palette"):
        assert read_mask(file).tolist() == labels


@pytest.mark.parametrize("break_it, words", [
    (lambda image, mask: Image.fromarray(noise()).save(mask), r"a\.png is a RGB image"),
    (lambda image, mask: Image.new("I;16", (36, 24)).save(mask), r"a\.png is a I;16 image"),
    (lambda image, mask: save_mask(mask, np.full((24, 36), 21), None), r"a\.png.*\b21\b"),
    (lambda image, mask: save_mask(mask, np.full((24, 36), UNLABELLED)), r"a\.png.*\b254\b"),
    (lambda image, mask: save_mask(mask, np.ones((36, 24))), r"a\.png.*a\.jpg.*EXIF"),
    (lambda image, mask: os.truncate(mask, 820), r"a\.png cannot be read"),
    (lambda image, mask: os.truncate(image, 700), r"a\.jpg cannot be read"),
    (lambda image, mask: os.truncate(image, 0), r"a\.jpg cannot be read"),
])  # fmt: skip
def test_broken_file_is_named_by_reader_and_checker(break_it, words, tmp_path):
    root = make_voc(tmp_path, ["a", "b"])
    item = list_items(root, "train")[0]
    break_it(item.image, item.mask)
    with refused(match=f"^[^\n]*{words}[^\n]*$"):
        voc_data.read_item(item)
    write_list(root, "trainval", b"a\nb\n")
    with refused(match=words) as error:
        voc_data.main(checker_flags(root))
    assert len(str(error.value).splitlines()) == 2  # named once, though two lists have it


def test_odd_images_are_read_as_they_are_meant(tmp_path):
    """Grey, 16-bit, with alpha, palette, CMYK, turned by EXIF."""
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)[None].repeat(40, axis=0)
    grey, colour = np.dstack([ramp] * 3), np.dstack([ramp, 255 - ramp, ramp // 2])
    two, exif, deep = Image.fromarray(ramp // 128), Image.Exif(), ramp.astype(np.uint16) * 256 + 7
    two.putpalette([10, 20, 30, 200, 100, 50])
    exif[0x0112] = 6
    for image, expected, options in (
        (ramp, grey, {}), (deep, grey, {}), (np.dstack([colour, ramp]), colour, {}),
        (two, np.where(grey > 127, [200, 100, 50], [10, 20, 30]), {}),
        (colour, np.rot90(colour, -1), {"exif": exif}),
    ):  # fmt: skip
        image = image if image is two else Image.fromarray(image)
        image.save(tmp_path / "image.png", **options)
        assert np.array_equal(read_image(tmp_path / "image.png"), expected)
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - colour).max() < 24


def test_cache_is_made_once_and_anew_when_a_file_changes(voc, tmp_path, monkeypatch):
    items, cache = list_items(voc, "val"), tmp_path / "cache"
    items.append(Item("extra", items[0].image, None))
    decoded, cached = [voc_data.read_item(item) for item in items], VOCDataset(items, cache)
    masks = np.concatenate([read_mask(item.mask)[::4].ravel() for item in items[:8]])
    with monkeypatch.context() as patch:
        patch.setattr(voc_data, "read_item", None)  # nothing can be decoded
        for data in (cached, VOCDataset(items, cache), pickle.loads(pickle.dumps(cached))):
            assert len(data) == 9 and data[8].dtype == np.uint8
            assert all(np.array_equal(data[index], decoded[index]) for index in range(9))
            assert data.class_pixels().tolist() == [(masks == c).sum() for c in range(NUM_CLASSES)]
    Image.fromarray(255 - read_image(items[0].image)).save(items[0].image)
    assert np.array_equal(VOCDataset(items, cache)[0], voc_data.read_item(items[0]))
    os.utime(items[1].mask, ns=(10**18, 10**18))  # another date alone
    VOCDataset(items, cache)
    assert len(list(cache.iterdir())) == 3


def test_full_disk_leaves_no_unfinished_cache(voc, tmp_path, monkeypatch):
    full = mock.Mock(side_effect=OSError(28, "No space left"))
    monkeypatch.setattr(voc_data.np, "save", full)
    with refused(match="^[^\n]*No space left[^\n]*--cache_dir[^\n]*none[^\n]*$"):
        VOCDataset(list_items(voc, "val"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_broken_image_met_by_a_worker_is_named_and_ends_the_process(voc, tmp_path, capfd):
    items = list_items(voc, "val")
    os.truncate(items[5].image, 1500)
    arguments = (lambda args: VOCDataset(items, tmp_path / "cache", workers=1)), None
    child = torch.multiprocessing.get_context("fork").Process(target=voc_data.run, args=arguments)
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 1 and list((tmp_path / "cache").iterdir()) == []
    line = capfd.readouterr().err.splitlines()[0]
    assert "error:" in line and f"{items[5].image} cannot be read" in line


def test_cache_made_by_another_process_and_left_by_a_killed_one(voc, tmp_path, monkeypatch):
    items, cache, read = list_items(voc, "val"), tmp_path / "cache", voc_data.read_item
    VOCDataset(items, cache)
    (folder,) = cache.iterdir()
    complete = shutil.copytree(folder, tmp_path / "complete")
    left = folder.rename(folder.with_suffix(".01234567"))

    def read_slowly(item):
        shutil.copytree(complete, folder, dirs_exist_ok=True)  # the other one is ready
        return read(item)

    monkeypatch.setattr(voc_data, "read_item", read_slowly)
    assert np.array_equal(VOCDataset(items, cache)[3], read(items[3]))
    assert {*cache.iterdir()} == {folder, left}


def label_at(y, x):
    return (y // BAND + 5 * (x // BAND)) % NUM_CLASSES


def places_of_teacher(size, key):
    """Per axis the places in px of an image at which the values of a teacher's map lie: logits in
    the middle of even cells, value i of features at stride * i + 0.5 px of what the teacher saw."""
    stride, places = voc_data.STRIDES[key], []
    for side in size:
        seen = round(side * SEEN / max(size))
        steps = np.arange(-(-seen // stride))
        even, strided = (steps + 0.5) * side / len(steps), (stride * steps + 0.5) * side / seen
        places.append(even if key == "out" else strided)
    return places


def crops(size, seeds):
    """Crops of 70 px of an image whose red is y, green x and blue 255, with masks and maps that
    are functions of the same places; at scale 1 it is 160 px long."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([y, x, np.full_like(x, 255), label_at(y, x)], axis=-1).astype(np.uint8)
    places = {key: places_of_teacher(size, key) for key in voc_data.STRIDES}
    maps = {k: [np.array(np.meshgrid(*p, indexing="ij"), "float16")] for k, p in places.items()}
    crop = {"size": 70, "longest": 160, "scale": (0.5, 2.0), "seen": SEEN}
    return [TrainDataset([image], crop, 0.0, maps)[0, seed] for seed in seeds]


def line(values, shown):
    """Slope and start of the places along the second axis of a crop, without its outer pixels."""
    rows, columns = (np.flatnonzero(shown.any(axis=axis))[2:-2] for axis in (1, 0))
    return np.polyfit(columns + 0.5, values[rows][:, columns].mean(axis=0) + 0.5, 1)


@pytest.mark.parametrize("size", [(250, 250), (240, 150), (65, 65), (40, 120), (50, 40)])
def test_crop_moves_image_mask_and_maps_together(size):
    flipped, compared = set(), dict.fromkeys(voc_data.STRIDES, 0)
    for sample in crops(size, range(12)):
        red, green, blue = sample["image"].double().numpy()
        mask, shown = sample["mask"].numpy(), blue > 250
        assert np.array_equal(mask == VOID, ~shown) and shown.any()
        assert (sample["image"].numpy()[:, ~shown].T == [124, 116, 104]).all()  # ImageNet's mean
        middle = np.abs(np.mod(np.stack([red, green]) + 0.5, BAND) - BAND / 2) < 3.5  # of a band
        clear = shown & middle.all(axis=0)
        expected = label_at(red.round().astype(int), green.round().astype(int))
        assert clear.sum() > 0.2 * shown.sum() and (mask[clear] == expected[clear]).all()
        lines = line(red.T, shown.T), line(green, shown)
        flipped.add(lines[1][0] < 0)
        assert 0.48 < max(size) / 160 / lines[0][0] < 2.1  # the scale
        for key, stride in voc_data.STRIDES.items():
            cells = np.arange(count := -(-70 // stride))
            assert sample[key].shape == (2, count, count) and sample[key].dtype == torch.float16
            at = (cells + 0.5) * 70 / count if key == "out" else stride * cells + 0.5
            wanted = [slope * at + start for slope, start in lines]
            known = zip(wanted, places_of_teacher(size, key))
            y, x = ((place > values[0] + 1) & (place < values[-1] - 1) for place, values in known)
            away = np.stack(np.meshgrid(*wanted, indexing="ij")) - sample[key].double().numpy()
            assert np.abs(away[:, y][:, :, x]).max(initial=0) < 0.6  # px of the image
            compared[key] += y.sum() * x.sum()
    assert flipped == {True, False} and min(compared.values()) > 25


def test_crop_does_not_depend_on_the_size_of_the_file():
    large = Image.fromarray(noise(12, 16)).resize((500, 375), Image.Resampling.BICUBIC)
    images = [np.dstack([image, np.where(np.asarray(image)[..., 0] > 128, 20, 0)]).astype(np.uint8)
              for image in (large, large.resize((400, 300), Image.Resampling.BICUBIC))]  # fmt: skip
    data = TrainDataset(images, {"size": 97, "longest": 160, "scale": (0.5, 2.0), "seen": 0})
    for seed in range(8):
        first, second = (data[index, seed]["image"].double() for index in (0, 1))
        assert (first - second).abs().mean() < 4 < 20 < first.std()
        assert {*data[0, seed]["mask"].unique().tolist()} <= {0, 20, VOID}  # never a mean of both


def test_normalise_is_that_of_torchvision():
    images = np.stack([noise(20, 30, seed) for seed in range(6)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2) // 3 + 85  # so that nothing is clipped
    mean, std = voc_data.IMAGENET_MEAN, voc_data.IMAGENET_STD
    expected = TF.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(voc_data.normalise(images), expected, atol=2e-6, rtol=0)
    jitter = 1 + 0.25 * (2 * torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) - 1)
    for image, factors, got in zip(images, jitter.tolist(), voc_data.normalise(images, jitter)):
        image = TF.adjust_brightness(image.float() / 255, factors[0])
        image = TF.adjust_saturation(TF.adjust_contrast(image, factors[1]), factors[2])
        torch.testing.assert_close(got, TF.normalize(image, mean, std), atol=3e-5, rtol=0)


def keys_of(labelled, unlabelled=0, seed=5, epoch=0, rank=0, world_size=1):
    """The batches of an epoch, four labelled images each: lists of (index, seed)."""
    sampler = TrainSampler(labelled, unlabelled, 4, seed, rank, world_size)
    sampler.epoch = epoch
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


def test_epoch_is_a_shuffle_by_seed_and_epoch():
    orders = [sum(keys_of(24, seed=s, epoch=e), []) for s, e in ((5, 0), (5, 1), (6, 0), (5, 0))]
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(index for index, _ in order) == list(range(24))
    assert len(keys_of(27)) == 6  # three images do not fill a batch
    with pytest.raises(UsageError, match="--batch_size 7"):
        TrainSampler(24, 100, 7, seed=0, rank=0, world_size=4)


def test_unlabelled_images_accompany_labelled_ones_each_once_a_round():
    """24 labelled images and 30 unlabelled, by two processes: 24 of these an epoch."""
    drawn = []
    for epoch in range(5):
        pairs, alone = (sum(zip(*[keys_of(24, count, 5, epoch, rank, 2) for rank in (0, 1)]), ())
                        for count in (30, 0))  # fmt: skip
        assert [batch[:4] for batch in pairs] == [*alone] and {*map(len, pairs)} == {8}
        assert sorted(index for batch in alone for index, _ in batch) == list(range(24))
        drawn += [key for batch in pairs for key in batch[4:]]
    for start in range(0, 120, 30):
        assert sorted(index for index, _ in drawn[start : start + 30]) == list(range(24, 54))
    assert len({seed for _, seed in drawn}) == 120
    pairs = keys_of(24, 24)
    assert any(batch[4:] != [(index + 24, seed) for index, seed in batch[:4]] for batch in pairs)
    assert {index for batch in keys_of(24, 2) for index, _ in batch[4:]} == {24, 25}


def test_batches_depend_neither_on_workers_nor_on_the_global_generator(tiny_voc):
    items = list_items(tiny_voc, "train")
    items.append(Item("extra", items[0].image, None))
    crop = {"size": 65, "longest": 100, "scale": (0.5, 2.0), "seen": 0}
    data, runs = TrainDataset(VOCDataset(items), crop, jitter=0.3), []
    for workers in (0, 2):
        state = torch.manual_seed(workers).get_state()
        sampler = TrainSampler(24, 1, 6, seed=3)
        runs.append(list(voc_data.make_loader(data, workers, 1, batch_sampler=sampler)))
        assert torch.equal(torch.get_rng_state(), state)  # which dropout draws from
    for first, second in zip(*runs, strict=True):
        assert first["image"].shape == (12, 3, 65, 65) and first["jitter"].std() > 0.05
        assert {*first["mask"][6:].unique().tolist()} <= {UNLABELLED, VOID}
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_sample_has_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(voc_data, "SAMPLE_IMAGES", {"train": 6, "trainaug": 9, "val": 4})
    files = []
    for name in "ab":
        monkeypatch.setattr(voc_data, "SAMPLE", tmp_path / name)
        root = find_voc(Path("sample"))
        files.append({p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")})
    assert files[0] == files[1] and len(files[0]) == 2 * (6 + 9 + 4) + 3
    assert len(read_split(root, "trainaug")) == 15 and len(list_items(root, "val")) == 4


def test_run_ends_in_one_line_and_an_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(voc_data.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["/some/where/x.py"])
    for error, code, words in (
        (DataError("Caught DataError\nvoc_data.DataError: a.png"), 1, "x.py: error: a.png\n"),
        (UsageError("choose one"), 2, "x.py: error: choose one\n"), (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "denied", "b"), 1, "x.py: error: [Errno 13] denied: 'b'\n"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            voc_data.run(mock.Mock(side_effect=error), None)
        assert stop.value.code == code and capsys.readouterr().err == words


def test_checker_with_a_home_folder_and_an_output_of_ascii_alone(tmp_path):
    root = make_voc(tmp_path / "home" / UMLAUT, [UMLAUT])
    os.truncate(root / f"JPEGImages/{UMLAUT}.jpg", 300)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "HOME": str(tmp_path / "home")}
    command = [sys.executable, ROOT / "voc_data.py", f"--data_root=~/{UMLAUT}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and r"home/B\xe4ume" in done.stdout
    assert r"B\xe4ume.jpg cannot be read" in done.stderr and "Traceback" not in done.stderr
