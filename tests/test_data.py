"""Reading, the transforms, the dataset and its loaders, the cache, and the synthetic sample."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import voc_data
from voc_data import CLASSES, NUM_CLASSES, UNLABELLED, VOID, DataError, Item, VOCDataset

PADDING = torch.tensor([round(255 * mean) for mean in voc_data.IMAGENET_MEAN])
SIZES = [(40, 50), (50, 200), (65, 65), (160, 97), (220, 240)]  # about a crop of 65
BAND = 6  # pixels of the source for one label, in each direction


# ---------------------------------------------------------- image, mask and teacher map together


def coordinate_sample(height, width):
    """A picture that says where each pixel comes from: red = y, green = x, blue = 255.

    The mask is a function of the same place; so is the teacher's map, (y, x) at a quarter.
    """
    y, x = np.mgrid[:height, :width]
    image = np.stack([y, x, np.full_like(x, 255)], axis=-1).astype(np.uint8)
    rows, columns = (np.arange((side + 3) // 4) + 0.5 for side in (height, width))
    places = np.meshgrid(rows * height / len(rows), columns * width / len(columns), indexing="ij")
    return image, label_at(y, x).astype(np.uint8), np.stack(places).astype(np.float32)


def label_at(y, x):
    return (y // BAND + 5 * (x // BAND)) % NUM_CLASSES


def transformed(size, seed, crop=65, cell=4, jitter=0.0):
    """The sample of `coordinate_sample` after the training transform, drawn from a seed."""
    image, mask, teacher_map = coordinate_sample(*size)
    data = VOCDataset(
        [Item("a", None, None)],
        voc_data.train_transform(crop, (0.5, 2.0), jitter),
        pixels=([image], [mask]),
        teacher_maps={"out": ([teacher_map], cell)},
    )
    return data[0, seed]


def places_shown(sample):
    """(y, x) of the source at each pixel of a crop, and where the crop shows the picture at all."""
    red, green, blue = sample["image"].float()
    return red, green, blue > 250


def inner(shown, by=3):
    """A region without its outermost pixels, which resizing blends with nothing beyond."""
    return -torch.nn.functional.max_pool2d(-shown[None].float(), 2 * by + 1, 1, by)[0] > 0


@pytest.mark.parametrize("size", SIZES)
def test_crop_and_flip_move_image_and_mask_together(size):
    flipped = set()
    for seed in range(12):
        sample = transformed(size, seed)
        y, x, shown = places_shown(sample)
        # A place within a pixel of a border between bands may fall on either side of it.
        off_y, off_x = (torch.remainder(v + 0.5, BAND) for v in (y, x))
        clear = shown & (off_y > 1.5) & (off_y < BAND - 1.5)
        clear &= (off_x > 1.5) & (off_x < BAND - 1.5)
        expected = label_at(y.round().long(), x.round().long())
        assert clear.sum() > 0.05 * shown.sum() > 0
        assert (sample["mask"][clear] == expected[clear]).all()
        middle = x[inner(shown)]
        steps = (x[:, 1:] - x[:, :-1])[shown[:, 1:] & shown[:, :-1]]
        assert middle.numel() and steps.mean().abs() > 0.3
        flipped.add(bool(steps.mean() < 0))
    assert flipped == {True, False}


@pytest.mark.parametrize("cell", [4, 8, 16])
@pytest.mark.parametrize("size", SIZES)
def test_teacher_map_moves_with_the_image(size, cell):
    compared = 0
    for seed in range(12):
        sample = transformed(size, seed, crop=65, cell=cell)
        y, x, shown = places_shown(sample)
        cells = -(-65 // cell)
        assert sample["out"].shape == (2, cells, cells)
        centre = ((torch.arange(cells) + 0.5) * 65 / cells).long()
        at = torch.meshgrid(centre, centre, indexing="ij")
        inside = inner(shown, by=3)[at]
        for seen, said, side in ((y, sample["out"][0], size[0]), (x, sample["out"][1], size[1])):
            # The outermost cells of the map repeat its border; 2.5 px is under half a cell of it.
            away = inside & (said > 3) & (said < side - 3)
            assert ((said - (seen[at] + 0.5))[away].abs() < 2.5).all()
            compared += away.sum()
    assert compared > 30


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_void_in_the_mask_and_the_mean_colour_in_the_image(size):
    padded = 0
    for seed in range(12):
        sample = transformed(size, seed)
        assert sample["image"].shape == (3, 65, 65) and sample["mask"].shape == (65, 65)
        void = sample["mask"] == VOID  # the source has none
        colours = sample["image"].permute(1, 2, 0)
        assert (colours[void] == PADDING).all()
        assert (colours[~void][:, 2] == 255).all() and (~void).any()
        padded += void.any()
    assert padded > 0 if min(size) < 65 else padded < 12


@pytest.mark.parametrize("size", SIZES)
def test_mask_values_are_never_interpolated(size):
    image, _, teacher_map = coordinate_sample(*size)
    mask = np.where(np.indices(size).sum(axis=0) % 7 < 3, 0, 20).astype(np.uint8)
    data = VOCDataset([None], voc_data.train_transform(65), pixels=([image], [mask]))
    found = set()
    for seed in range(12):
        labels = data[0, seed]["mask"]
        assert labels.dtype == torch.uint8
        found |= set(labels.unique().tolist())
    assert {0, 20} <= found <= {0, 20, VOID}


def test_scale_keeps_to_its_range_and_covers_it():
    """Source pixels for each pixel of the crop, 1 / scale, from images that fill the crop."""
    image, mask, _ = coordinate_sample(250, 250)
    data = VOCDataset([None], voc_data.train_transform(65, (0.5, 2.0)), pixels=([image], [mask]))
    scales = []
    for seed in range(60):
        green = data[0, seed]["image"][1].float()
        scales.append(62 / (green[:, -2].mean() - green[:, 1].mean()).abs().item())
    assert 0.47 < min(scales) < 0.65 and 1.5 < max(scales) < 2.2
    assert np.mean(np.array(scales) < 1) == pytest.approx(0.5, abs=0.2)  # even in the logarithm


def test_eval_transform_resizes_the_image_alone():
    sample = {"image": torch.zeros(3, 90, 120, dtype=torch.uint8), "mask": torch.zeros(90, 120)}
    out = voc_data.EvalTransform(60)(sample)
    assert out["image"].shape == (3, 45, 60) and out["mask"].shape == (90, 120)
    assert voc_data.EvalTransform(0)(sample)["image"].shape == (3, 90, 120)


# -------------------------------------------------------------------------------------- CutMix


def test_cutmix_moves_a_rectangle_of_all_that_is_known_of_an_image():
    """Every tensor holds the number of its image, so what came from where can be read off."""
    number = torch.arange(4, dtype=torch.uint8).view(4, 1, 1)
    images = number[:, None].expand(4, 3, 96, 64).contiguous()
    labels = number.expand(4, 96, 64).contiguous()
    maps = {"out": number[:, None].expand(4, 21, 24, 16).half()}
    places = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed_images, mixed, mixed_maps = voc_data.cutmix(images, labels, maps)
        pasted = mixed == (number - 1) % 4
        assert (pasted | (mixed == number)).all()
        assert pasted[0].float().mean() == pytest.approx(0.5, abs=0.02)
        rows, columns = pasted[0].nonzero().T
        assert pasted[0][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        places.add((rows.min().item(), columns.min().item(), rows.max().item()))
        assert (mixed_images == mixed[:, None]).all()
        coarse = mixed[:, None, 1::4, 1::4]
        assert (mixed_maps["out"] == coarse).float().mean() > 0.85  # half a cell at the border
        assert (labels == number).all()  # the batch itself is as it was
        torch.manual_seed(seed)
        assert torch.equal(voc_data.cutmix(images, labels, {})[1], mixed)
    assert len(places) > 15


# --------------------------------------------------------------------------- colour, normalise


def test_colour_and_normalise_are_those_of_torchvision_where_nothing_clips():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 160, (8, 3, 20, 30), dtype=torch.uint8, generator=generator)
    torch.manual_seed(0)
    draw = voc_data.RandomColour(0.2)
    colour = torch.stack([draw({})["colour"] for _ in images])
    assert (colour - 1).abs().max() <= 0.2 and colour.std(dim=0).min() > 0.02
    got = voc_data.normalise(images, colour)
    channels_last = voc_data.normalise(images, colour, torch.channels_last)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(channels_last, got) and got.is_contiguous()
    for image, factors, out in zip(images, colour.tolist(), got):
        expected = TF.to_dtype(image, torch.float32, scale=True)
        expected = TF.adjust_brightness(expected, factors[0])
        expected = TF.adjust_contrast(expected, factors[1])
        expected = TF.adjust_saturation(expected, factors[2])
        assert 0 < expected.min() and expected.max() < 1
        expected = TF.normalize(expected, voc_data.IMAGENET_MEAN, voc_data.IMAGENET_STD)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


def test_normalise_without_colour_is_that_of_torchvision_over_all_bytes():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    expected = TF.normalize(images.float() / 255, voc_data.IMAGENET_MEAN, voc_data.IMAGENET_STD)
    torch.testing.assert_close(voc_data.normalise(images), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        voc_data.normalise(images, torch.ones(2, 3)), expected, atol=1e-5, rtol=0
    )


def test_strong_colour_stays_within_black_and_white():
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    out = voc_data.normalise(images, torch.tensor([[1.9, 1.9, 1.9]] * 4))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (voc_data.IMAGENET_MEAN, voc_data.IMAGENET_STD)
    )
    pixels = out * std + mean
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5


# --------------------------------------------------------------------------- dataset and loaders


@pytest.fixture(scope="module")
def items(tiny_voc):
    return voc_data.list_items(tiny_voc, "train")


@pytest.fixture(scope="module")
def data(items):
    return VOCDataset(items, voc_data.train_transform(65))


def same(first, second):
    """True if two samples, or batches, are equal in every entry."""
    assert first.keys() == second.keys() >= {"image", "mask", "index", "colour"}
    return all(torch.equal(torch.as_tensor(first[k]), torch.as_tensor(second[k])) for k in first)


def test_sample_is_a_function_of_index_and_seed_alone(data):
    first = data[3, 11]
    torch.manual_seed(99)
    data[4, 5]
    torch.rand(17)
    assert same(data[3, 11], first)
    assert not same(data[3, 12], first)


def test_sample_with_a_seed_leaves_the_global_generator_alone(data):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    data[3, 11]
    assert torch.equal(torch.rand(3), expected)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_order_of_the_loader_is_a_function_of_seed_and_epoch(data):
    def order(seed, epoch):
        sampler = voc_data.train_loader(data, 8, 0, seed).sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(keys) for keys in orders}) == 3
    for keys in orders:
        assert sorted(index for index, _ in keys) == list(range(len(data)))
        assert len({seed for _, seed in keys}) == len(data)


def test_batches_do_not_depend_on_the_number_of_workers(data):
    alone = voc_data.train_loader(data, 5, workers=0, seed=3)
    helped = voc_data.train_loader(data, 5, workers=2, seed=3)
    for epoch in (0, 1):
        torch.manual_seed(epoch)  # the global generator must not matter
        first, second = epoch_of(alone, epoch), epoch_of(helped, epoch)
        assert len(first) == len(second) == 24 // 5  # the last, partial batch is dropped
        assert all(same(a, b) for a, b in zip(first, second))


def test_loader_does_not_draw_from_the_generator_that_dropout_uses(data):
    for workers in (0, 2):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        next(iter(voc_data.train_loader(data, 4, workers)))
        assert torch.equal(torch.rand(3), expected)


def test_batch_larger_than_the_data_is_refused(data):
    with pytest.raises(voc_data.UsageError, match="batch_size"):
        voc_data.train_loader(data, 25, 0)


def test_ranks_of_epoch_sampler_share_the_data_without_overlap():
    samplers = [voc_data.EpochSampler(23, 5, rank, 4) for rank in range(4)]
    whole = voc_data.EpochSampler(23, 5)
    for epoch in (0, 3):
        for sampler in (*samplers, whole):
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert [len(share) for share in shares] == [5] * 4 == [len(s) for s in samplers]
        together = [key for share in shares for key in share]
        assert len(set(together)) == 20
        assert set(together) <= set(whole) and len(set(whole)) == 23


@pytest.mark.parametrize("epoch_images", [4, 10, 25])
def test_epochs_of_another_length_go_on_in_the_same_shuffles(epoch_images):
    shuffles = voc_data.EpochSampler(10, 5)
    counted = voc_data.EpochSampler(10, 5, 0, 1, epoch_images)
    assert len(counted) == epoch_images
    keys, expected = [], []
    for epoch in range(10):
        counted.set_epoch(epoch)
        shuffles.set_epoch(epoch)
        keys += counted
        expected += shuffles
    assert keys[:100] == expected[: len(keys)]
    halves = [voc_data.EpochSampler(10, 5, rank, 2, epoch_images) for rank in range(2)]
    for sampler in (*halves, counted):
        sampler.set_epoch(3)
    pairs = [key for pair in zip(*halves) for key in pair]
    assert pairs == list(counted)[: 2 * len(halves[0])]


@pytest.mark.parametrize("length, world_size", [(10, 1), (10, 3), (2, 4)])
def test_shard_sampler_covers_each_item_exactly_once(length, world_size):
    shards = [voc_data.ShardSampler(length, rank, world_size) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]


# ------------------------------------------------------------------------------------- cache


def test_pixel_cache_gives_what_decoding_gives(items, tmp_path):
    extra = Item("extra", items[0].image, None)
    pixels = voc_data.pixel_cache([*items, extra], tmp_path)
    for index, item in enumerate([*items, extra]):
        image, mask = voc_data.read_item(item)
        assert np.array_equal(pixels[0][index], image) and np.array_equal(pixels[1][index], mask)
    transform = voc_data.train_transform(65)
    decoded, kept = VOCDataset(items, transform), VOCDataset(items, transform, pixels)
    assert all(same(decoded[index, 7], kept[index, 7]) for index in range(len(items)))
    assert torch.equal(decoded.pixel_counts(), kept.pixel_counts())


def test_caches_are_mapped_read_only(items, tmp_path):
    """A writable map of a file larger than the memory would be refused by the system."""
    images, _ = voc_data.pixel_cache(items, tmp_path)
    assert not images[0].flags.writeable


def test_pixel_counts_are_those_of_the_masks_without_void_and_unlabelled(items):
    masks = [voc_data.read_item(item)[1][::4] for item in items]
    expected = [sum(int((mask == label).sum()) for mask in masks) for label in range(21)]
    counts = VOCDataset([*items, Item("extra", items[0].image, None)], None).pixel_counts()
    assert counts.tolist() == expected and counts.sum() > 0


def test_pixel_cache_is_filled_once_and_again_when_a_file_changes(items, tmp_path, monkeypatch):
    copies = []
    for item in items[:3]:
        path = tmp_path / item.image.name
        path.write_bytes(item.image.read_bytes())
        copies.append(Item(item.id, path, item.mask))
    voc_data.pixel_cache(copies, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(voc_data, "read_item", None)  # a second filling would fail
        voc_data.pixel_cache(copies, tmp_path / "cache")
    turned = voc_data.read_image(copies[0].image)[:, ::-1]
    Image.fromarray(turned).save(copies[0].image, quality=100, subsampling=0)
    os.utime(copies[0].image, ns=(10**18, 10**18))
    images, _ = voc_data.pixel_cache(copies, tmp_path / "cache")
    assert np.array_equal(images[0], voc_data.read_image(copies[0].image))


def test_cache_that_failed_halfway_leaves_nothing(items, tmp_path):
    broken = tmp_path / "broken.jpg"
    whole = items[1].image.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    wrong = [items[0], Item("broken", broken, None)]
    with pytest.raises(DataError, match="broken.jpg"):
        voc_data.pixel_cache(wrong, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------------------------- reading


def picture(height=12, width=20):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_picture_of_too_many_pixels_is_refused_by_its_name(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="huge.png cannot be read"):
        voc_data.read_image(tmp_path / "huge.png")
    assert voc_data.image_size(Item("huge", tmp_path / "huge.png", None)) == (0, 0)


def test_grey_picture_becomes_three_equal_channels(tmp_path):
    grey = picture()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(voc_data.read_image(tmp_path / "grey.png"), np.stack([grey] * 3, axis=-1))


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    red = np.zeros((16, 16, 3), dtype=np.uint8) + np.array([200, 30, 30], dtype=np.uint8)
    Image.fromarray(red).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    with Image.open(tmp_path / "cmyk.jpg") as file:
        assert file.mode == "CMYK"
    got = voc_data.read_image(tmp_path / "cmyk.jpg")
    assert got.shape == (16, 16, 3) and np.abs(got.astype(int) - red).max() < 8


@pytest.mark.parametrize("orientation, turn", [
    (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)),
    (8, lambda a: np.rot90(a, 1)),
])  # fmt: skip
def test_picture_turned_by_exif_is_read_upright(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(voc_data.read_image(tmp_path / "turned.png"), turn(picture()))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_picture_keeps_its_upper_eight_bits(tmp_path, suffix):
    deep = np.arange(240, dtype=np.uint16).reshape(12, 20) * 257
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    got = voc_data.read_image(tmp_path / f"deep.{suffix}")
    assert got.dtype == np.uint8
    assert np.array_equal(got, np.stack([(deep // 256).astype(np.uint8)] * 3, axis=-1))


def test_picture_with_transparency_or_palette_is_read_as_rgb(tmp_path):
    Image.fromarray(picture()).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(picture()).quantize(64).save(tmp_path / "palette.png")
    assert np.array_equal(voc_data.read_image(tmp_path / "rgba.png"), picture())
    with Image.open(tmp_path / "palette.png") as file:
        expected = np.array(file.convert("RGB"))
    assert np.array_equal(voc_data.read_image(tmp_path / "palette.png"), expected)


def test_mask_is_read_as_class_indices_and_not_as_colours(tiny_voc):
    item = voc_data.list_items(tiny_voc, "val")[0]
    with Image.open(item.mask) as file:
        assert file.mode == "P"
        expected = np.array(file)
    labels = voc_data.read_mask(item.mask)
    assert np.array_equal(labels, expected) and labels.max() == VOID


def save_mask(path, labels, mode="L"):
    Image.fromarray(labels).convert(mode).save(path)
    return path


def test_masks_in_colours_or_with_unknown_labels_are_refused(tmp_path):
    labels = np.zeros((5, 5), dtype=np.uint8)
    with pytest.raises(DataError, match="RGB"):
        voc_data.read_mask(save_mask(tmp_path / "colours.png", labels, "RGB"))
    for wrong in (21, UNLABELLED):
        labels[0, 0] = wrong
        with pytest.raises(DataError, match=f"out of range.*{wrong}"):
            voc_data.read_mask(save_mask(tmp_path / "labels.png", labels))


def test_image_and_mask_of_two_sizes_are_refused(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    mask = save_mask(tmp_path / "m.png", np.zeros((12, 19), dtype=np.uint8))
    with pytest.raises(DataError, match="one size"):
        voc_data.read_item(Item("a", tmp_path / "a.png", mask))


# -------------------------------------------------------------------------------- lists, extras


def make_voc(root, with_mask, without_mask=()):
    """An empty VOC folder with small pictures under the given ids."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for image_id in (*with_mask, *without_mask):
        Image.fromarray(picture()).save(root / "JPEGImages" / f"{image_id}.jpg")
    for image_id in with_mask:
        save_mask(root / "SegmentationClass" / f"{image_id}.png", np.ones((12, 20), dtype=np.uint8))
    return root


def test_lists_may_be_bare_ids_or_the_pairs_of_deeplab(tmp_path):
    root = make_voc(tmp_path, ["2007_000032", "2007_000039"])
    folder = root / "ImageSets" / "Segmentation"
    (folder / "train.txt").write_text("2007_000032\n2007_000039\n\n")
    (folder / "trainaug.txt").write_text(
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\r\n"
        "/JPEGImages/2007_000039.jpg /SegmentationClassAug/2007_000039.png\r\n"
    )
    expected = ["2007_000032", "2007_000039"]
    assert voc_data.read_split(root, "train") == voc_data.read_split(root, "trainaug") == expected
    assert voc_data.list_items(root, "trainaug") == voc_data.list_items(root, "train")


def test_aug_masks_fill_in_and_the_official_mask_wins(tmp_path):
    root = make_voc(tmp_path, ["official"], ["added"])
    (root / "SegmentationClassAug").mkdir()
    for image_id in ("official", "added"):
        save_mask(root / f"SegmentationClassAug/{image_id}.png", np.zeros((12, 20), dtype=np.uint8))
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("official\nadded\n")
    folders = [item.mask.parent.name for item in voc_data.list_items(root, "trainaug")]
    assert folders == ["SegmentationClass", "SegmentationClassAug"]


def test_extra_images_are_found_in_subfolders_and_have_no_labels(tmp_path):
    root = make_voc(tmp_path / "voc", ["a"])
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    for name in ("one.JPG", "two.png", "a.jpg"):
        Image.fromarray(picture()).save(photos / name)
    (photos / "notes.txt").write_text("no picture")
    items = voc_data.list_extra_images(photos.parent, root, excluded={"a"})
    assert [(item.id, item.mask) for item in items] == [("one", None), ("two", None)]
    image, labels = voc_data.read_item(items[1])
    assert np.array_equal(image, picture()) and (labels == UNLABELLED).all()


def test_padding_of_extra_images_is_void_and_the_rest_unlabelled(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "one.png")
    items = voc_data.list_extra_images(tmp_path, tmp_path, excluded=())
    mask = VOCDataset(items, voc_data.train_transform(65))[0, 1]["mask"]
    assert set(mask.unique().tolist()) == {UNLABELLED, VOID}


def test_extra_images_voc_are_those_without_a_mask(tmp_path):
    root = make_voc(tmp_path, ["with"], ["without", "in_val"])
    items = voc_data.list_extra_images("voc", root, excluded={"in_val"})
    assert [(item.id, item.mask) for item in items] == [("without", None)]


def test_photograph_of_a_camera_is_scaled_down_to_the_size_of_voc(tmp_path):
    """But for those with a mask, which must keep the size of it."""
    Image.fromarray(picture(900, 1200)).save(tmp_path / "a.png")
    Image.new("L", (1200, 900)).save(tmp_path / "mask.png")
    photograph = Item("a", tmp_path / "a.png", None)
    image, labels = voc_data.read_item(photograph)
    assert image.shape == (375, 500, 3) and labels.shape == (375, 500)
    assert voc_data.image_size(photograph) == (500, 375)
    with_mask = photograph._replace(mask=tmp_path / "mask.png")
    assert voc_data.read_item(with_mask)[0].shape == (900, 1200, 3)
    assert voc_data.image_size(with_mask) == (1200, 900)


def test_extra_images_that_are_not_there_are_an_error(tmp_path):
    root = make_voc(tmp_path / "voc", ["with"])
    for folder in (tmp_path / "absent", "voc"):
        with pytest.raises(DataError, match="extra_images"):
            voc_data.list_extra_images(folder, root, excluded=())


# -------------------------------------------------------------------------------------- sample


def test_sample_has_the_same_bytes_each_time(tmp_path):
    first, second = (voc_data.make_sample(tmp_path / name) for name in "ab")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 2 * sum(voc_data.SAMPLE_COUNTS.values()) + 2
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing unfinished


def test_sample_is_whole_and_has_all_classes_void_and_many_sizes(sample_root, capsys):
    assert voc_data.check_data(sample_root, ["train", "val"]) == []
    table = capsys.readouterr().out
    assert all(name in table for name in CLASSES)
    ids = [set(voc_data.read_split(sample_root, split)) for split in ("train", "val")]
    assert not ids[0] & ids[1]
    for split in ("train", "val"):
        masks = [voc_data.read_mask(i.mask) for i in voc_data.list_items(sample_root, split)]
        assert set(np.concatenate([np.unique(m) for m in masks])) == {*range(NUM_CLASSES), VOID}
        assert len({mask.shape for mask in masks}) > 20


# -------------------------------------------------------------------------------------- overlay


@pytest.mark.parametrize("empty", ["SegmentationClass", "ImageSets/Segmentation"])
def test_check_of_a_tree_without_masks_or_lists_fails(empty, tmp_path):
    root = make_voc(tmp_path, ["a"])
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    for path in (root / empty).iterdir():
        path.unlink()
    args = voc_data.get_args_parser().parse_args(["--data_root", str(root)])
    with pytest.raises(DataError, match="no list whose images have masks"):
        voc_data.main(args)


def test_overlay_blends_objects_by_half_keeps_background_and_hatches_void():
    image = picture(24, 30)
    labels = np.zeros((24, 30), dtype=np.uint8)
    labels[:8, :10], labels[8:16, :10], labels[16:, :] = 15, 20, VOID
    before = image.copy()
    out = voc_data.overlay(image, labels)
    assert np.array_equal(image, before) and out.dtype == np.uint8 and out.shape == image.shape
    assert np.array_equal(out[labels == 0], image[labels == 0])
    for label, colour in ((15, (192, 128, 128)), (20, (0, 64, 128))):
        half = (image[labels == label].astype(int) + colour) / 2
        assert np.abs(out[labels == label] - half).max() <= 1
    white = (out[labels == VOID] == 255).all(axis=1)
    assert 0.3 < white.mean() < 0.7  # stripes: some white, between them the picture itself
    assert np.array_equal(out[labels == VOID][~white], image[labels == VOID][~white])
    assert voc_data.objects_in(labels) == [15, 20]


def test_overlay_leaves_unlabelled_pixels_as_they_are():
    image = picture()
    labels = np.full(image.shape[:2], UNLABELLED, dtype=np.uint8)
    assert np.array_equal(voc_data.overlay(image, labels), image)


def test_teacher_map_is_neither_taken_for_the_image_nor_for_a_mask():
    """The crop is drawn from the size of the image, though the map is an image for torchvision."""
    assert issubclass(voc_data.TeacherMap, tv_tensors.Image)
    image, mask, teacher_map = coordinate_sample(120, 90)
    sample = {
        "out": voc_data.TeacherMap(torch.from_numpy(teacher_map)),  # before the image
        "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
        "mask": tv_tensors.Mask(torch.from_numpy(mask)),
    }
    sample["out"].cell = 4
    out = voc_data.train_transform(65)(sample)
    assert out["image"].shape == (3, 65, 65) and out["mask"].shape == (65, 65)
    assert out["out"].shape == (2, 17, 17) and out["out"].dtype == torch.float32


def test_two_processes_may_fill_one_cache(tmp_path):
    """Each fills a copy of its own; the first to end wins, and no copy is left over."""
    folder = tmp_path / "cache" / "key"

    def fill(name, meanwhile=lambda: None):
        def write(unfinished):
            (unfinished / "content").write_text(name)
            meanwhile()

        return write

    faster = fill("faster")
    voc_data.cached(folder, fill("slower", lambda: voc_data.cached(folder, faster)))
    assert (folder / "content").read_text() == "faster"
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_abandoned_copy_of_a_cache_is_removed_and_a_fresh_one_is_not(tmp_path):
    old, fresh = tmp_path / "key.1.tmp", tmp_path / "key.2.tmp"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "part").write_text("half")
    for path in (old / "part", old):
        os.utime(path, (1, 1))
    voc_data.cached(tmp_path / "key", lambda unfinished: None)
    assert not old.exists() and fresh.exists()


def test_abandoned_caches_do_not_count_against_the_room(tmp_path):
    """Of other images or settings too; nothing else in the folder is touched."""
    for name in ("teacher-abc.1.tmp", "pixels-abc.2.tmp", "mine.tmp", "teacher-abc"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    assert voc_data.has_room(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.tmp", "teacher-abc"]
