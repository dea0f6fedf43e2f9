"""The layouts in which people have VOC 2012: each found, read whole, and left as it was.

Every tree is made on the fly and is tiny; the network is never used.
"""

import hashlib
import http.server
import os
import re
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.utils as torchvision_utils
from PIL import Image

import train
import voc_data

OFFICIAL = "VOCdevkit/VOC2012"
DOUBLED = "VOC2012_train_val/VOC2012_train_val"

LAYOUTS = {  # name: (where the VOC folder lies, what --data_root says)
    "official, VOC2012 itself": (OFFICIAL, OFFICIAL),
    "official, VOCdevkit": (OFFICIAL, "VOCdevkit"),
    "official, the parent": (OFFICIAL, "."),
    "official, the parent's parent": (f"data/{OFFICIAL}", "."),
    "official, with a slash at the end": (OFFICIAL, "VOCdevkit/"),
    "flat": (".", "."),
    "flat, under another name": ("pascal", "pascal"),
    "flat, from its parent": ("pascal", "."),
    "VOC2012 without VOCdevkit": ("VOC2012", "."),
    "Kaggle, the outer folder's parent": (DOUBLED, "."),
    "Kaggle, the outer folder": (DOUBLED, "VOC2012_train_val"),
    "Kaggle, the inner folder": (DOUBLED, DOUBLED),
    "Kaggle, in a folder of its own": (f"pascal-voc-2012-dataset/{DOUBLED}", "."),
    "spaces and non-ASCII letters": (
        f"Données de thèse/日本 VOC/{OFFICIAL}", "Données de thèse",
    ),
}


def make_tree(folder, ids=("2007_000032", "2008_000002"), splits=("train", "val"), masks=True):
    """A VOC folder with one image a split and, unless told otherwise, its masks."""
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Main").mkdir()
    (folder / "Annotations").mkdir()
    (folder / "JPEGImages").mkdir()
    if masks:
        (folder / "SegmentationClass").mkdir()
    for number, (image_id, split) in enumerate(zip(ids, splits)):
        pixels = np.full((24, 36, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{image_id}.jpg")
        if masks:
            mask = Image.fromarray(np.full((24, 36), number + 1, dtype=np.uint8))
            mask.putpalette(voc_data.voc_palette().ravel().tolist())
            mask.save(folder / f"SegmentationClass/{image_id}.png")
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text(f"{image_id}\n")
    return folder


def snapshot(folder):
    """Every path below a folder with its date, size and rights."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        stat = path.lstat()
        size = stat.st_size if path.is_file() else None
        found[path.relative_to(folder)] = (stat.st_mtime_ns, size, stat.st_mode)
    return found


def check(data_root, capsys):
    """`python voc_data.py --data_root ...` in this process; what it printed."""
    arguments = [] if data_root is None else ["--data_root", str(data_root)]
    voc_data.main(voc_data.get_args_parser().parse_args(arguments))
    return capsys.readouterr().out


def archive_of(tree, path, inside):
    """A tar or zip of a tree, under `inside`."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(tree.rglob("*")):
                archive.write(file, f"{inside}/{file.relative_to(tree)}")
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(tree, inside)
    return path


# --------------------------------------------------------------------------- trees that are found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_found_read_and_left_alone(name, tmp_path, capsys):
    where, given = LAYOUTS[name]
    user = tmp_path / "user"
    tree = make_tree(user / where)
    before = snapshot(user)
    data_root = f"{user / given}/" if given.endswith("/") else user / given
    assert voc_data.find_voc(data_root).samefile(tree)
    assert "every listed image and mask is readable and whole" in check(data_root, capsys)
    assert snapshot(user) == before


def test_link_to_the_data(tmp_path):
    tree = make_tree(tmp_path / "disk" / OFFICIAL)
    (tmp_path / "data").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert voc_data.find_voc(tmp_path / "data").samefile(tree)


def test_relative_data_root(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "my data" / OFFICIAL)
    monkeypatch.chdir(tmp_path)
    assert voc_data.find_voc("my data").samefile(tree)


@pytest.mark.parametrize("doubled", [True, False])
def test_separate_train_val_and_test_folders(doubled, tmp_path, capsys, monkeypatch):
    """Colab: /content/data with both parts; the one with masks is taken, from any of the roots."""
    content = tmp_path / "content/data"
    inner = "VOC2012_train_val" if doubled else "."
    tree = make_tree(content / "VOC2012_train_val" / inner)
    inner = "VOC2012_test" if doubled else "."
    make_tree(content / "VOC2012_test" / inner, ["2008_000001"], ["test"], masks=False)
    before = snapshot(content)
    assert voc_data.find_voc(content).samefile(tree)
    assert voc_data.find_voc(content.parent).samefile(tree)
    assert voc_data.find_voc(content / "VOC2012_train_val").samefile(tree)
    places = tuple(
        place.replace("/content", str(tmp_path / "content"))
        for place in voc_data.LOOKED_IN_BY_DEFAULT
    )
    assert any(place.startswith("/content") for place in voc_data.LOOKED_IN_BY_DEFAULT)
    monkeypatch.setattr(voc_data, "LOOKED_IN_BY_DEFAULT", places)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "no cache"))
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert voc_data.find_voc().samefile(tree)
    assert "train (1)" in check(None, capsys)
    assert snapshot(content) == before and not list(empty.iterdir())


def test_voc2007_beside_voc2012(tmp_path):
    make_tree(tmp_path / "VOCdevkit/VOC2007", ["000032"], ["train"])
    tree = make_tree(tmp_path / OFFICIAL)
    for data_root in (tmp_path, tmp_path / "VOCdevkit"):
        assert voc_data.find_voc(data_root).samefile(tree)


def test_voc2007_alone_is_not_taken_for_voc2012(tmp_path):
    make_tree(tmp_path / "VOCdevkit/VOC2007", ["000032"], ["train"])
    with pytest.raises(voc_data.DataError, match="VOC 2012 was not found"):
        voc_data.find_voc(tmp_path)


def test_augmented_masks_beside_the_official_ones(tmp_path):
    """SBD's SegmentationClassAug: DeepLab's trainaug list is read, official masks come first."""
    tree = make_tree(tmp_path / OFFICIAL)
    shutil.copytree(tree / "SegmentationClass", tree / "SegmentationClassAug")
    more = "2009_000001"
    shutil.copy(tree / "JPEGImages/2007_000032.jpg", tree / f"JPEGImages/{more}.jpg")
    shutil.copy(
        tree / "SegmentationClass/2007_000032.png", tree / f"SegmentationClassAug/{more}.png"
    )
    (tree / "ImageSets/Segmentation/trainaug.txt").write_text(
        f"/JPEGImages/{more}.jpg /SegmentationClassAug/{more}.png\n"
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n\n"
    )
    items = voc_data.list_items(voc_data.find_voc(tmp_path), "trainaug")
    assert [item.id for item in items] == [more, "2007_000032"]
    folders = [item.mask.parent.name for item in items]
    assert folders == ["SegmentationClassAug", "SegmentationClass"]


def test_kagglehub_cache(tmp_path, monkeypatch):
    cache = tmp_path / "kaggle cache"
    tree = make_tree(
        cache / "datasets/gopalbhattrai/pascal-voc-2012-dataset/versions/1" / DOUBLED
    )
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(cache))
    monkeypatch.setattr(voc_data, "LOOKED_IN_BY_DEFAULT", ("data",))
    monkeypatch.chdir(tmp_path)
    before = snapshot(cache)
    assert voc_data.find_voc().samefile(tree)
    assert snapshot(cache) == before


def test_data_folder_of_the_current_directory_comes_first(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    make_tree(cache / "datasets/gopalbhattrai/pascal-voc-2012-dataset/versions/1" / DOUBLED)
    tree = make_tree(tmp_path / "data" / OFFICIAL)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    assert voc_data.find_voc().samefile(tree)


def test_training_on_a_read_only_tree(tmp_path, monkeypatch):
    """A whole training with every cache on: nothing at all changes in the user's data."""
    user = tmp_path / "user"
    ids = [f"2007_{number:06d}" for number in range(3)]
    tree = make_tree(user / OFFICIAL, ids, ["train", "val", "more"])
    (tree / "ImageSets/Segmentation/train.txt").write_text(f"{ids[0]}\n{ids[2]}\n")
    folders = [path for path in [user, *user.rglob("*")] if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    before = snapshot(user)
    monkeypatch.chdir(tmp_path)
    try:
        train.main(
            train.get_args_parser().parse_args(
                f"--data_root {user} --no_pretrained --epochs 1 --batch_size 2 --crop_size 33 "
                "--workers 0 --device cpu".split()
            )
        )
        assert snapshot(user) == before
        assert (tmp_path / "checkpoints/best_model_ultracompact_none.pth").is_file()
    finally:
        for path in folders:
            path.chmod(0o755)


# ------------------------------------------------------------------------- trees that are refused


def refusal(data_root):
    """The message with which a place is refused."""
    with pytest.raises(voc_data.DataError) as error:
        voc_data.find_voc(data_root)
    return str(error.value)


def test_test_set_says_it_has_no_ground_truth(tmp_path):
    test_set = make_tree(tmp_path / "VOC2012_test/VOC2012_test", ["2008_000001"], ["test"], False)
    before = snapshot(tmp_path)
    for data_root in (tmp_path, tmp_path / "VOC2012_test", test_set):
        message = refusal(data_root)
        assert "no ground truth" in message and str(test_set) in message
        assert "\n" not in message
    assert snapshot(tmp_path) == before


def test_images_without_lists_say_what_is_missing(tmp_path):
    """JPEGs and masks alone, without ImageSets: not VOC yet, and nothing is guessed."""
    tree = make_tree(tmp_path / OFFICIAL)
    shutil.rmtree(tree / "ImageSets")
    assert "not found" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["VOCtrainval_11-May-2012.tar", "archive.zip", "VOCtrainval.tar.gz", "voc.tgz"]
)
@pytest.mark.parametrize("given", ["the folder", "the file", "the parent"])
def test_archive_never_unpacked(name, given, tmp_path):
    folder = tmp_path / "downloads"
    tree = make_tree(tmp_path / "made" / OFFICIAL)
    folder.mkdir()
    path = archive_of(tree, folder / name, OFFICIAL)
    shutil.rmtree(tmp_path / "made")
    before = snapshot(folder)
    message = refusal({"the folder": folder, "the file": path, "the parent": tmp_path}[given])
    assert any(name in line and "never unpacked" in line for line in message.splitlines())
    assert snapshot(folder) == before


def test_archive_beside_the_unpacked_tree_is_no_matter(tmp_path):
    tree = make_tree(tmp_path / OFFICIAL)
    archive_of(tree, tmp_path / "VOCtrainval_11-May-2012.tar", OFFICIAL)
    assert voc_data.find_voc(tmp_path).samefile(tree)


@pytest.mark.parametrize("given", ["an empty folder", "no folder", "nothing"])
def test_nothing_found_says_where_it_looked_and_what_to_do(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setattr(voc_data, "LOOKED_IN_BY_DEFAULT", ("data", str(tmp_path / "content/data")))
    (tmp_path / "here").mkdir()
    data_root = {"an empty folder": "here", "no folder": "nowhere", "nothing": None}[given]
    message = refusal(data_root)
    looked_in = [data_root] if data_root else ["data", str(tmp_path / "content/data")]
    for place in looked_in:
        assert re.search(rf"^\s+{re.escape(place)}\b", message, re.MULTILINE), message
    assert ("does not exist" in message) == (data_root != "here")
    assert voc_data.DATASET_YEAR_DICT["2012"]["url"] in message
    assert "kaggle datasets download" in message
    assert "--data_root sample" in message
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_named_folder_is_never_replaced_by_another_place_or_a_download(tmp_path, monkeypatch):
    """A wrong --data_root is an error, even where ./data has the real thing."""
    make_tree(tmp_path / "data" / OFFICIAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(voc_data, "download_voc", lambda folder: pytest.fail("it downloaded"))
    with pytest.raises(voc_data.DataError, match="wrong"):
        voc_data.find_voc("wrong", download=True)


def test_missing_split_names_the_lists_there_are(tmp_path):
    tree = make_tree(tmp_path / OFFICIAL)
    with pytest.raises(voc_data.DataError, match="trainaug.txt does not exist.*train, val"):
        voc_data.list_items(tree, "trainaug")


# ------------------------------------------------------------------------------------- download


class TarServer(http.server.ThreadingHTTPServer):
    """Serves one file on this machine's own loopback; `sent` bytes of it if that is set."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), TarHandler)
        self.content, self.sent = content, None
        self.url = f"http://127.0.0.1:{self.server_port}/VOCtrainval_11-May-2012.tar"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class TarHandler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET with the file of its server."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A small stand-in for the official tar and its server; `./data` is the only place to look."""
    tree = make_tree(tmp_path / "made" / OFFICIAL)
    content = archive_of(tree.parent, tmp_path / "made/voc.tar", "VOCdevkit").read_bytes()
    tar_server = TarServer(content)
    known = {
        "url": tar_server.url, "filename": "VOCtrainval_11-May-2012.tar",
        "md5": hashlib.md5(content).hexdigest(), "base_dir": OFFICIAL,
    }  # fmt: skip
    shutil.rmtree(tmp_path / "made")
    monkeypatch.setitem(voc_data.DATASET_YEAR_DICT, "2012", known)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setattr(voc_data, "LOOKED_IN_BY_DEFAULT", ("data",))
    monkeypatch.chdir(tmp_path)
    yield tar_server
    tar_server.shutdown()
    tar_server.server_close()


def assert_whole(data):
    """The download is there, is found again, and left nothing unfinished."""
    found = voc_data.find_voc()
    assert found.resolve() == (data / OFFICIAL).resolve()
    assert [item.id for item in voc_data.list_items(found, "train")] == ["2007_000032"]
    assert not (data / voc_data.INCOMPLETE).exists()


def test_download(server, tmp_path, monkeypatch):
    found = voc_data.find_voc(None, download=True)
    assert found.samefile(tmp_path / "data" / OFFICIAL)
    assert_whole(tmp_path / "data")
    monkeypatch.setattr(voc_data, "download_voc", lambda folder: pytest.fail("downloaded twice"))
    assert voc_data.find_voc(None, download=True).samefile(found)


def test_download_with_a_wrong_md5_is_refused(server, tmp_path):
    server.content += b"more"
    with pytest.raises(voc_data.DataError, match="download failed"):
        voc_data.download_voc(Path("data"))
    assert not (tmp_path / "data/VOCdevkit").exists()
    with pytest.raises(voc_data.DataError):
        voc_data.find_voc()


def test_download_that_was_cut_off_starts_again(server, tmp_path):
    """Half a tar under its final name, and half an unpacked tree."""
    data = tmp_path / "data"
    data.mkdir()
    half = server.content[: len(server.content) // 2]
    (data / "VOCtrainval_11-May-2012.tar").write_bytes(half)
    make_tree(data / voc_data.INCOMPLETE / OFFICIAL, ["stale"], ["train"])
    voc_data.find_voc(None, download=True)
    assert_whole(data)


def test_connection_lost_in_the_middle(server, tmp_path):
    server.sent = len(server.content) // 2
    with pytest.raises(voc_data.DataError, match="download failed"):
        voc_data.find_voc(None, download=True)
    assert not (tmp_path / "data/VOCdevkit").exists()
    server.sent = None
    voc_data.find_voc(None, download=True)
    assert_whole(tmp_path / "data")


def test_interrupted_unpacking_starts_again(server, tmp_path, monkeypatch):
    """Ctrl-C while the tar is unpacked: half a tree never counts as data."""
    extract = tarfile.TarFile.extractall

    def half(self, path=".", members=None, **kwargs):
        files = self.getmembers()
        extract(self, path, files[: len(files) - 2], **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "extractall", half)
        with pytest.raises(KeyboardInterrupt):
            voc_data.find_voc(None, download=True)
    assert (tmp_path / "data" / voc_data.INCOMPLETE).exists(), "the interruption came too early"
    with pytest.raises(voc_data.DataError, match="not found"):
        voc_data.find_voc()
    voc_data.find_voc(None, download=True)
    assert_whole(tmp_path / "data")


def test_download_beside_voc2007(server, tmp_path):
    """./data/VOCdevkit is there already, with another year in it."""
    other = make_tree(tmp_path / "data/VOCdevkit/VOC2007", ["000032"], ["train"])
    before = snapshot(other)
    voc_data.find_voc(None, download=True)
    assert_whole(tmp_path / "data")
    assert snapshot(other) == before


def test_asking_for_the_download_again(server, tmp_path):
    """`python voc_data.py --download` twice: the second is no error, and the data stays whole."""
    for _ in range(2):
        voc_data.main(voc_data.get_args_parser().parse_args(["--download"]))
        assert_whole(tmp_path / "data")


def test_download_over_a_tree_that_is_not_whole_is_refused(server, tmp_path):
    """What `tar` left when it was interrupted, or the test set alone: neither used nor replaced."""
    tree = make_tree(tmp_path / "data" / OFFICIAL, masks=False)
    before = snapshot(tree)
    for ask in (lambda: voc_data.find_voc(None, download=True),
                lambda: voc_data.download_voc(tmp_path / "data")):  # fmt: skip
        with pytest.raises(voc_data.DataError, match="is there already, but has not all"):
            ask()
    assert snapshot(tree) == before
    args = voc_data.get_args_parser().parse_args(["--download", "--data_root", str(tmp_path)])
    with pytest.raises(voc_data.UsageError, match="leave --data_root out"):
        voc_data.main(args)


def test_unreachable_server_says_what_to_do(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(voc_data.DataError, match="download failed") as error:
        voc_data.find_voc(None, download=True)
    assert "--data_root sample" in str(error.value)
    assert not (tmp_path / "data/VOCdevkit").exists()


def test_download_is_checked_by_md5_before_it_is_unpacked(server, monkeypatch):
    """The check is torchvision's: assert that it is asked to, with the md5 of the table."""
    seen = []
    original = torchvision_utils.check_integrity
    monkeypatch.setattr(
        torchvision_utils, "check_integrity",
        lambda path, md5=None: seen.append(md5) or original(path, md5),
    )  # fmt: skip
    voc_data.download_voc(Path("data"))
    assert voc_data.DATASET_YEAR_DICT["2012"]["md5"] in seen
    assert os.path.exists("data/VOCdevkit")
