"""Readers: CIFAR pickles, folders, lists, digits; the cache of decoded images; one clear line for whatever can't be read."""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ltsam_fast.data import DataError, Images, load
from ltsam_fast.data.readers import listing

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def draw(random, height=12, width=12):
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def channels_first(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.fixture
def random(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def tree(tmp_path, random):
    """PNGs in tree/train and tree/test; returns the folder and the pixels by their path in it."""
    root, pixels = tmp_path / "tree", {}
    for split, per_class in (("train", 3), ("test", 2)):
        for name in ("dog", "ant", "cat"):
            for index in range(per_class):
                inside = f"{split}/{name}/{index}.png"
                pixels[inside] = draw(random)
                save(root / inside, pixels[inside])
    return root, pixels


@pytest.fixture
def text_list(tmp_path, random):
    """Lists and images as of ImageNet-LT; returns the list of the training set, the images' folder and the pixels."""
    pixels = [draw(random) for _ in range(6)]
    for split in ("train", "test"):
        lines = []
        for index, image in enumerate(pixels):
            name = f"{split}/n01/an image {index}.png"
            save(tmp_path / "images" / name, image)
            lines.append(f"{name} {index % 3}")
        (tmp_path / f"Tiny_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "Tiny_LT_train.txt", tmp_path / "images", pixels


# CIFAR


class AsPython2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the published files."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}


def dump(path, content, protocol=2, python2=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    if python2:
        file = io.BytesIO()
        AsPython2(file, 2).dump(content)
        # NumPy's module had no underscore then.
        path.write_bytes(file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    else:
        path.write_bytes(pickle.dumps(content, protocol))


CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", 100),
}
KEYS = {"cifar10": (b"labels", b"label_names"), "cifar100": (b"fine_labels", b"fine_label_names")}


def write_cifar(root, kind, random, each=7, **how):
    folder, train, test, meta, classes = CIFAR[kind]
    labels_key, names_key = KEYS[kind]
    written = {}
    for name in (*train, test):
        data = random.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = random.integers(0, classes, each).tolist()
        written[name] = data, labels
        dump(root / folder / name, {b"data": data, labels_key: labels, b"coarse_labels": [0] * each}, **how)
    dump(root / folder / meta, {names_key: [f"class {c}".encode() for c in range(classes)]}, **how)
    return written


@pytest.mark.parametrize("how", [{"python2": True}, *({"protocol": p} for p in range(2, 6))], ids=str)
@pytest.mark.parametrize("kind", CIFAR)
def test_cifar_pickles(tmp_path, kind, how, random):
    written = write_cifar(tmp_path, kind, random, **how)
    folder, train, test, _, classes = CIFAR[kind]
    for source in (tmp_path, tmp_path / folder):
        for split, names in (("train", train), ("test", [test])):
            got = load(source, split)
            assert got.classes == tuple(f"class {c}" for c in range(classes))
            expected = np.concatenate([written[name][0] for name in names]).reshape(-1, 3, 32, 32)
            assert torch.equal(got.pixels, torch.from_numpy(expected))
            assert got.labels.tolist() == [label for name in names for label in written[name][1]]
            assert got.pixels.is_contiguous()


def test_both_versions_in_one_folder_need_a_format(tmp_path, random):
    write_cifar(tmp_path, "cifar10", random)
    write_cifar(tmp_path, "cifar100", random)
    with pytest.raises(DataError, match="both CIFAR-10 and CIFAR-100"):
        load(tmp_path)
    assert len(load(tmp_path, format="cifar10").classes) == 10
    assert len(load(tmp_path, format="cifar100").classes) == 100


class Hostile:
    """Writes a file when unpickled, by one of the ways there are."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["content", "label", "name"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_runs_nothing(tmp_path, where, protocol, random):
    write_cifar(tmp_path, "cifar10", random, each=1)
    target = tmp_path / "run"
    folder = tmp_path / "cifar-10-batches-py"
    hostile = [
        Hostile(os.system, f"touch {target}"),
        Hostile(exec, f"open({str(target)!r}, 'w')"),
        Hostile(os.mkdir, str(target)),
    ]
    for attack in hostile:
        path = folder / ("batches.meta" if where == "name" else "data_batch_1")
        kept = path.read_bytes()
        content = {
            "content": attack,
            "label": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [attack]},
            "name": {b"label_names": [attack] * 10},
        }[where]
        dump(path, content, protocol)
        with pytest.raises(DataError, match=re.escape(str(path)) + ".*it asks for") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        assert not target.exists()
        path.write_bytes(kept)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray", "numpy", "builtins", "_codecs"])
def test_other_names_of_known_modules_are_unknown(tmp_path, module, random):
    write_cifar(tmp_path, "cifar10", random, each=1)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(f"c{module}\nscalar\n(S'x'\ntR.".encode())
    with pytest.raises(DataError, match=rf"it asks for {re.escape(module)}\.scalar"):
        load(tmp_path)


def test_a_pickle_can_not_change_how_the_next_one_is_read(tmp_path, random):
    written = write_cifar(tmp_path, "cifar10", random, each=1)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    kept = path.read_bytes()
    # BUILD with slot state sets attributes of whatever lies on the stack: here of the class that stands in for arrays.
    path.write_bytes(b"cnumpy\nndarray\n(N(S'__setstate__'\ncnumpy\nndarray\ndtb.")
    with pytest.raises(DataError):
        load(tmp_path)
    path.write_bytes(kept)
    assert load(tmp_path).labels[0] == written["data_batch_1"][1][0]


def object_array():
    return np.array([[None] * 3072], dtype=object)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3", None, "no such file"),
        ("batches.meta", None, "no such file"),
        ("data_batch_1", b"", "not a pickle"),
        ("data_batch_1", b"\x80\x02}q\x00(U\x04dat", "not a pickle"),
        ("data_batch_1", b"\xff\xd8\xff\xe0 a photograph", "not a pickle"),
        ("data_batch_1", [1, 2], "no 'data'"),
        ("data_batch_1", {b"data": np.zeros((1, 3072), np.uint8)}, "no 'labels'"),
        ("data_batch_1", {b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "a list of 1 classes"),
        ("data_batch_1", {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, r"image 0 must lie in \[0, 10\), got 10"),
        ("data_batch_1", {b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, r"must lie in \[0, 10\), got -1"),
        ("data_batch_1", {b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, "got 'cat'"),
        ("data_batch_1", {b"data": np.zeros((1, 3000), np.uint8), b"labels": [1]}, r"shape \(N, 3072\), got uint8"),
        ("data_batch_1", {b"data": np.zeros((1, 3072)), b"labels": [1]}, "not of whole numbers"),
        ("data_batch_1", {b"data": object_array(), b"labels": [1]}, "not of whole numbers"),
        ("data_batch_1", {b"data": "pixels", b"labels": [1]}, "got str"),
        ("batches.meta", {b"label_names": [b"a", b"b"]}, "must name 10 classes, got 2"),
        ("batches.meta", {b"label_names": 10}, "list of names"),
    ],
)  # fmt: skip
def test_a_wrong_cifar_file_is_named(tmp_path, random, name, content, message):
    write_cifar(tmp_path, "cifar10", random, each=1)
    path = tmp_path / "cifar-10-batches-py" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else dump(path, content)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}.*{message}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


# Folders


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("below", [False, True])
def test_folder(tree, split, below):
    root, pixels = tree
    got = load(root / split, split) if below else load(root, split)
    assert got.classes == ("ant", "cat", "dog")
    expected = sorted(name for name in pixels if name.startswith(split))
    assert got.counts() == [len(expected) // 3] * 3
    assert torch.equal(got.pixels, torch.stack([channels_first(pixels[name]) for name in expected]))


def test_images_lie_below_their_class_and_other_files_do_not_count(tree, random):
    root, _ = tree
    save(root / "train/ant/more/z.PNG", draw(random))
    (root / "train/ant/Thumbs.db").write_bytes(b"")
    (root / "train/ant/._0.png").write_bytes(b"")
    (root / "train/.cache").mkdir()
    assert load(root).counts() == [4, 3, 3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, random, mode):
    picture = Image.fromarray(draw(random)).convert(mode)
    for name in ("a", "b"):
        path = tmp_path / name / ("0.tif" if mode == "CMYK" else "0.png")
        path.parent.mkdir()
        picture.save(path)
    expected = channels_first(np.array(picture.convert("RGB")))
    assert torch.equal(load(tmp_path).pixels[1], expected)


def tiff(pixels, photometric=1, sample_format=1, bits=None, byte_order="<"):
    """A TIFF of grey values in one strip, as Pillow does not write them all."""
    strip = pixels.tobytes() if isinstance(pixels, np.ndarray) else pixels
    bits = bits or 8 * pixels.itemsize
    tags = {
        256: 8,
        257: 8,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: 8,
        279: len(strip),
        339: sample_format,
    }
    content = struct.pack(byte_order + "2sHI", b"II" if byte_order == "<" else b"MM", 42, 8 + len(strip)) + strip
    content += struct.pack(byte_order + "H", len(tags))
    for tag, value in tags.items():
        content += struct.pack(byte_order + "HHIHH", tag, 3, 1, value, 0)
    return content + struct.pack("I", 0)


def saved(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def packed_12_bits(values):
    pairs = values.reshape(-1, 2).astype(np.uint32)
    words = (pairs[:, 0] << 12) | pairs[:, 1]
    return np.stack([words >> 16, words >> 8 & 255, words & 255], 1).astype(np.uint8).tobytes()


GREY = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
"""16 bits; in 8 they are GREY / 257."""
WIDE = {
    "16 bits.png": saved(GREY, "PNG"),
    "16 bits.tif": saved(GREY, "TIFF"),
    "16 bits.pgm": saved(GREY, "PPM"),
    "text.pgm": b"P2 8 8 65535 " + " ".join(map(str, GREY.flatten())).encode(),
    "4095.pgm": b"P5 8 8 4095 " + (GREY >> 4).astype(">u2").tobytes(),
    "big-endian.tif": tiff(GREY.astype(">u2"), byte_order=">"),
    "white is zero.tif": tiff(65535 - GREY, photometric=0),
    "12 bits.tif": tiff(packed_12_bits(GREY >> 4), bits=12),
}
NARROW = {
    "float.tif": saved(GREY.astype(np.float32) / 65535, "TIFF"),
    "32 bits.tif": saved(GREY.astype(np.int32), "TIFF"),
    "unsigned 32 bits.tif": tiff(GREY.astype("<u4")),
    "signed 16 bits.tif": tiff(GREY.view(np.int16), sample_format=2),
    "signed 8 bits.tif": tiff(GREY.astype(np.uint8).view(np.int8), sample_format=2),
    "float.pfm": saved(GREY.astype(np.float32), "PPM"),
}


def both_ways(tmp_path, content, name):
    """What loads files of this content, from a tree and from a list, without and with a cache."""
    for label, folder in enumerate(("tree/a", "tree/b")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(content)
        with (tmp_path / "list.txt").open("a") as lines:
            lines.write(f"{folder}/{name} {label}\n")
    for source in ("tree", "list.txt"):
        for more in ({}, {"cache": tmp_path / "cache"}, {"size": 8}):
            if source == "list.txt" or not name.endswith(".pfm"):
                yield functools.partial(load, tmp_path / source, **more)


@pytest.mark.parametrize("name", WIDE)
def test_grey_of_more_than_8_bits_is_scaled(tmp_path, name):
    exact = torch.from_numpy(GREY.astype(np.float64)) / 257
    for loads in both_ways(tmp_path, WIDE[name], name):
        for channel in loads().pixels[1].double():
            assert (channel - exact).abs().max() <= 0.57  # rounded, of 12 bits with 16 for 65535 / 4095


def png_16(pixels):
    """A PNG with 16 bits for each of its 2 to 4 channels, which Pillow does not write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_scaled(tmp_path, channels, random):
    pixels = random.integers(0, 65536, (8, 8, channels), dtype=np.uint16)
    exact = torch.from_numpy(pixels / 257).permute(2, 0, 1)
    for loads in both_ways(tmp_path, png_16(pixels), "0.png"):
        found = loads().pixels[1].double()
        assert (found - (exact[:1] if channels == 2 else exact[:3])).abs().max() <= 1  # Pillow takes the high bytes


@pytest.mark.parametrize("name", NARROW)
def test_pixels_without_a_largest_value_are_refused(tmp_path, name):
    for loads in both_ways(tmp_path, NARROW[name], name):
        with pytest.raises(
            DataError, match=rf"a/{re.escape(name)}: no scale to 8 bits .* save it as grey of 8 or 16 bits"
        ):
            loads()


def test_a_premultiplied_grey_is_read(tmp_path):
    grey_and_alpha = np.stack([np.full((8, 8), 100, np.uint8), np.full((8, 8), 255, np.uint8)], 2)
    content = saved(grey_and_alpha, "TIFF").replace(
        struct.pack("<HHIHH", 338, 3, 1, 2, 0), struct.pack("<HHIHH", 338, 3, 1, 1, 0)
    )
    assert Image.open(io.BytesIO(content)).mode == "La"
    for loads in both_ways(tmp_path, content, "0.tif"):
        assert (loads().pixels == 100).all()


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, random, kind, orientation):
    picture, exif = Image.fromarray(draw(random)), Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, {"tif": "TIFF"}.get(kind, kind), exif=exif, **({"lossless": True} if kind == "webp" else {}))
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    turned = [x, x, x.flip(2), x.flip(1, 2), x.flip(1), x.mT, x.mT.flip(2), x.mT.flip(1, 2), x.mT.flip(1), x][
        orientation
    ]
    for loads in both_ways(tmp_path, file.getvalue(), f"0.{kind}"):
        if loads.keywords.get("size") is None:
            assert torch.equal(loads().pixels[1], turned)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16"])
def test_tiffs_of_every_mode_are_turned(tmp_path, mode):
    grey = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(file, "TIFF", exif=exif)
    seen = Image.fromarray(grey) if mode == "I;16" else picture
    expected = channels_first(np.rot90(np.array(seen.convert("RGB")), -1).copy())
    for loads in both_ways(tmp_path, file.getvalue(), "0.tif"):
        if loads.keywords.get("size") is None:
            assert torch.equal(loads().pixels[1], expected)


def test_a_png_whose_exif_is_broken_is_read(tmp_path, random):
    picture, file = Image.fromarray(draw(random)), io.BytesIO()
    picture.save(file, "PNG", exif=b"Exif\0\0XX*\0\x08\0\0\0\x01\0")
    for loads in both_ways(tmp_path, file.getvalue(), "0.png"):
        if loads.keywords.get("size") is None:
            assert torch.equal(loads().pixels[1], channels_first(np.array(picture)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_that_is_broken_turns_nothing(tmp_path, random):
    picture = Image.fromarray(draw(random, 32, 32))
    for index, broken in enumerate((b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0")):
        for name in ("a", "b"):
            (tmp_path / str(index) / name).mkdir(parents=True)
            picture.save(tmp_path / str(index) / name / "0.jpg", exif=broken)
        expected = channels_first(np.array(Image.open(tmp_path / str(index) / "a/0.jpg")))
        assert torch.equal(load(tmp_path / str(index)).pixels[0], expected)


@pytest.mark.parametrize("kind", ["gif", "tif"])
def test_of_several_frames_the_first_one_counts(tmp_path, random, kind):
    frames = [Image.fromarray(draw(random)).convert("P") for _ in range(3)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frames[0].save(tmp_path / name / f"0.{kind}", save_all=True, append_images=frames[1:])
    assert torch.equal(load(tmp_path).pixels[0], channels_first(np.array(frames[0].convert("RGB"))))


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "ppm", "tif", "webp"])
def test_a_file_that_is_cut_off_is_named(tmp_path, random, kind):
    file = io.BytesIO()
    Image.fromarray(draw(random, 64, 64)).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind))
    for loads in both_ways(tmp_path, file.getvalue()[: len(file.getvalue()) * 9 // 10], f"0.{kind}"):
        with pytest.raises(DataError, match=rf"a/0\.{kind}: not a readable image"):
            loads()


def test_size_resizes_the_shorter_side_and_cuts_out_the_centre(tmp_path):
    """Of 80 x 40 pixels the middle half is left, whatever lies beside it."""
    bands = np.zeros((40, 80, 3), np.uint8)
    bands[:, 20:60] = 200
    save(tmp_path / "a/wide.png", bands)
    save(tmp_path / "b/high.png", bands.transpose(1, 0, 2).copy())
    got = load(tmp_path, size=20).pixels
    assert got.shape == (2, 3, 20, 20)
    assert (got[:, :, 1:-1, 1:-1] == 200).all() and got.min() > 150  # the edge is smoothed with what lies beyond
    with pytest.raises(DataError, match=r"high\.png: 40 x 80 pixels where .*wide\.png has 80 x 40; give size="):
        load(tmp_path)


@pytest.mark.parametrize("extent", [(23, 17), (64, 64), (301, 200), (8, 9)])
def test_sizes_other_than_asked_for_become_it(tmp_path, random, extent):
    for name in ("a", "b"):
        save(tmp_path / name / "0.jpg", draw(random, *extent))
    assert load(tmp_path, size=16).pixels.shape == (2, 3, 16, 16)


def test_jpegs_are_what_pillow_decodes(tmp_path, random):
    paths = [save(tmp_path / name / "0.jpg", draw(random, 32, 32)) for name in ("a", "b")]
    expected = torch.stack([channels_first(np.array(Image.open(path))) for path in paths])
    assert torch.equal(load(tmp_path).pixels, expected)


# Lists


def test_list(text_list, tmp_path):
    path, images, pixels = text_list
    for source in (path, tmp_path):
        got = load(source, images=images)
        assert got.classes == ("0", "1", "2")
        assert got.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert torch.equal(got.pixels, torch.stack([channels_first(image) for image in pixels]))
    assert len(load(tmp_path, "test", images=images).labels) == 6
    shutil.move(images / "train", tmp_path / "train")
    assert torch.equal(load(path).pixels, got.pixels)  # by default the paths start where the list lies


def test_a_list_has_as_many_classes_as_asked_for(text_list):
    path, images, _ = text_list
    path.write_text(path.read_text().replace(" 2\n", " 3\n"))
    with pytest.raises(DataError, match=r"Tiny_LT_train\.txt: no image of class 2, but of 3"):
        load(path, images=images)
    assert load(path, images=images, classes=5).counts() == [2, 2, 0, 2, 0]
    with pytest.raises(DataError, match=r"line 3: the label must lie in \[0, 3\).*got 3"):
        load(path, images=images, classes=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/n01/x.png", "expected 'path label', got 'train/n01/x.png'"),
        ("train/n01/x.png cat", "expected 'path label'"),
        ("train/n01/x.png -1", "expected 'path label'"),
        ("train/n01/x.png 1.5", "expected 'path label'"),
        ("train/n01/x.png ٣", "expected 'path label'"),
        ("7", "expected 'path label'"),
        ("train/n01/gone.png 1", "no such file: .*gone.png"),
        ("train/n01 1", "no such file: .*n01"),
        ("train/n01/an image 0.png 99999", r"label must lie in \[0, 70000\).*got 99999"),
    ],
)
def test_a_bad_line_is_named_with_its_number(text_list, line, message):
    path, images, _ = text_list
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "", line, *lines[3:]]))
    with pytest.raises(DataError, match=rf"Tiny_LT_train\.txt, line 5: .*{message}") as caught:
        load(path, images=images, classes=70000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_name_in_a_list_may_hold_whatever_a_file_system_allows(tmp_path, random, newline, start):
    names = [f"a{sign}b{sign}.png" for sign in "\x0b\x0c\x1c\x1d\x1e\x85\xa0\u2028\u2029\u3000\ufeff \r"]
    names.append("\x85leading.png")
    pixels = [draw(random) for _ in names]
    for name, image in zip(names, pixels, strict=True):
        save(tmp_path / name, image)
    lines = newline.join(f"{name} {index % 2}" for index, name in enumerate(names))
    (tmp_path / "list.txt").write_bytes(f"{start}{lines}{newline}{newline}".encode())
    got = load(tmp_path / "list.txt")
    assert got.labels.tolist() == [index % 2 for index in range(len(names))]
    assert torch.equal(got.pixels, torch.stack([channels_first(image) for image in pixels]))


def test_tabs_and_blanks_around_path_and_label(text_list):
    path, images, _ = text_list
    wanted = load(path, images=images).labels
    path.write_text(
        "".join(f" \t{line.rpartition(' ')[0]} \t {line[-1]}\t \n" for line in path.read_text().splitlines())
    )
    assert torch.equal(load(path, images=images).labels, wanted)


@pytest.mark.parametrize("line", [b"x\xff.png 1", "train 1".encode("utf-16"), b"x" * 5000 + b".png 1", b"x\0.png 1"])
def test_a_line_that_can_be_no_path_is_named_with_its_number(text_list, line):
    path, images, _ = text_list
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(
        DataError, match=r"Tiny_LT_train\.txt, line 8: (not a text file in UTF-8|no such file|expected)"
    ):
        load(path, images=images)


# Whatever can't be read


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_class(root):
    shutil.copytree(root / "train/ant", root / "train/bee")


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (shutil.rmtree, {}, "tree: no such file or folder"),
        (None, {"split": "val"}, "tree: no folder 'val' here, only train, test"),
        (lambda r: shutil.rmtree(r / "train"), {}, "no folder 'train' here, only test"),
        (lambda r: truncate(r / "train/cat/1.png"), {}, r"train/cat/1\.png: not a readable image"),
        (lambda r: (r / "train/cat/1.png").write_bytes(b""), {}, r"train/cat/1\.png: not a readable image"),
        (lambda r: (r / "train/cat/1.png").write_text("text"), {}, r"train/cat/1\.png: not a readable image"),
        (lambda r: (r / "train/cat/1.png").write_text("text"), {"size": 8}, r"train/cat/1\.png: not a readable image"),
        (lambda r: [f.unlink() for f in (r / "train/dog").iterdir()], {}, "train/dog: no image in this class's folder"),
        (lambda r: [shutil.rmtree(f) for f in (r / "train").iterdir()], {}, "train: no class folders"),
        (add_class, {"split": "test"}, "test: its classes are not those of .*train; one of them lacks 'bee'"),
        (None, {"classes": 4}, "tree: has 3 classes, not 4"),
        (None, {"format": "cifar10"}, "tree: no cifar-10-batches-py here"),
        (None, {"format": "list"}, "tree: needs one .txt with 'train' in its name, found none"),
        (lambda r: [shutil.rmtree(r / "train" / c) for c in ("ant", "cat")], {}, "has 1 class, at least 2"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_one_clear_line(tree, spoil, arguments, message):
    root, _ = tree
    if spoil:
        spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root, **arguments)
    assert "\n" not in str(caught.value)


def test_asking_for_the_test_set_never_gives_the_training_set(tree, text_list):
    root, _ = tree
    path, images, _ = text_list
    for source, extra in ((root / "train", {}), (path, {"images": images})):
        with pytest.raises(DataError, match="its name doesn't say that it is 'test'"):
            load(source, "test", **extra)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "digits", "format": "jpeg"}, ValueError, "format must be 'auto' or one of digits, "),
        ({"source": "digits", "size": 32}, ValueError, "size must be None for digits"),
        ({"source": "digits", "images": "x"}, ValueError, "images must be None for digits"),
        ({"source": "x", "size": 0}, ValueError, "size must be a whole number >= 1, got 0"),
        ({"source": "x", "classes": 1}, ValueError, "classes must be a whole number >= 2, got 1"),
        ({"source": "digits", "split": "val"}, DataError, "digits: no split 'val'"),
        ({"source": "digits", "classes": 9}, DataError, "digits: has 10 classes, not 9"),
        ({"source": "/nonexistent/x"}, DataError, "/nonexistent/x: no such file or folder"),
        ({"source": "/nonexistent/x.txt", "format": "list"}, DataError, "/nonexistent/x.txt: no such file"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load(**arguments)


# The cache


@pytest.fixture
def decodes(monkeypatch):
    """The names of the files that were decoded."""
    from ltsam_fast.data import decode

    seen, original = [], decode._decode

    def counted(module, path, size):
        seen.append(path.name)
        return original(module, path, size)

    monkeypatch.setattr(decode, "_decode", counted)
    return seen


def test_the_cache_gives_the_same_images_and_decodes_once(tree, tmp_path, decodes):
    root, _ = tree
    plain = {split: load(root, split) for split in ("train", "test")}
    decodes.clear()
    for expected in (9 + 6, 0):
        for split, images in plain.items():
            got = load(root, split, cache=tmp_path / "cache")
            assert torch.equal(got.pixels, images.pixels) and torch.equal(got.labels, images.labels)
        assert len(decodes) == expected
        decodes.clear()
    got.pixels.zero_()  # a private copy: the file stays as it is
    assert torch.equal(load(root, "test", cache=tmp_path / "cache").pixels, plain["test"].pixels)
    assert not decodes


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root, cache: truncate(cache / "pixels"),
        lambda root, cache: truncate(cache / "about.json"),
        lambda root, cache: flip_a_byte(cache / "pixels"),
        lambda root, cache: (cache / "pixels").unlink(),
        lambda root, cache: (cache / "about.json").unlink(),
        lambda root, cache: (cache / "about.json").write_text("[]"),
        lambda root, cache: os.utime(root / "train/cat/1.png", ns=(0, 0)),
        lambda root, cache: save(root / "train/cat/1.png", np.full((12, 12, 3), 7, np.uint8)),
        lambda root, cache: save(root / "train/cat/9.png", np.full((12, 12, 3), 7, np.uint8)),
        lambda root, cache: (root / "train/cat/1.png").unlink(),
        lambda root, cache: (root / "train/cat/1.png").rename(root / "train/dog/1b.png"),
    ],
)
def test_a_stale_or_damaged_cache_is_made_again(tree, tmp_path, decodes, spoil):
    root, _ = tree
    load(root, cache=tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    spoil(root, folder)
    decodes.clear()
    got, expected = load(root, cache=tmp_path / "cache"), load(root)
    assert len(decodes) == 2 * len(expected)
    assert torch.equal(got.pixels, expected.pixels) and got.counts() == expected.counts()
    load(root, cache=tmp_path / "cache")
    assert len(decodes) == 2 * len(expected)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_build_that_was_stopped_does_not_count(tree, tmp_path, monkeypatch):
    from ltsam_fast.data import decode

    root, _ = tree
    with monkeypatch.context() as patch:
        original = decode._decode

        def stopped(module, path, size):
            if path.parent.name == "dog":
                raise KeyboardInterrupt
            return original(module, path, size)

        patch.setattr(decode, "_decode", stopped)
        with pytest.raises(KeyboardInterrupt):
            load(root, cache=tmp_path / "cache")
    assert any(path.name.endswith(".partial") for path in (tmp_path / "cache").iterdir())
    assert torch.equal(load(root, cache=tmp_path / "cache").pixels, load(root).pixels)
    assert not any(path.name.endswith(".partial") for path in (tmp_path / "cache").iterdir())


def test_two_at_once_build_one_cache(tree, tmp_path, decodes):
    root, _ = tree
    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(lambda _: load(root, cache=tmp_path / "cache").pixels, range(4))]
    assert len(decodes) == 9
    assert all(torch.equal(pixels, results[0]) for pixels in results)


def test_a_process_that_stands_still_is_not_waited_for(tree, tmp_path, monkeypatch):
    """But one that decodes is, for as long as it does."""
    root, _ = tree
    load(root, cache=tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    monkeypatch.setattr("ltsam_fast.data.decode._PATIENCE", 1.0)
    lock = pytest.importorskip("filelock").FileLock(folder.with_name(f"{folder.name}.lock"))
    with lock, pytest.raises(DataError, match=r"\.lock: the process that has it has decoded nothing for 1 s: end it"):
        load(root, cache=tmp_path / "cache")
    pixels = folder.with_name(f"{folder.name}.partial") / "pixels"
    pixels.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waits = pool.submit(load, root, cache=tmp_path / "cache")
            for number in range(30):
                pixels.write_bytes(bytes(number))
                time.sleep(0.1)
            assert not waits.done()
        assert torch.equal(waits.result().pixels, load(root).pixels)


def test_sizes_and_splits_have_caches_of_their_own(tree, tmp_path, decodes):
    root, _ = tree
    for _ in range(2):
        for arguments in ({}, {"size": 8}, {"split": "test"}):
            load(root, cache=tmp_path / "cache", **arguments)
    assert len(decodes) == 9 + 9 + 6


def test_progress_is_shown_in_a_terminal(tree, capsys, monkeypatch):
    pytest.importorskip("rich")
    load(tree[0], progress=True)
    assert not capsys.readouterr().out.strip()
    monkeypatch.setenv("FORCE_COLOR", "1")
    load(tree[0], progress=True)
    assert "9/9" in capsys.readouterr().out


@pytest.mark.parametrize("cache", [False, True])
def test_broken_images_may_be_left_out(cache, tree, tmp_path, decodes, caplog):
    root, pixels = tree
    options = {"cache": tmp_path / "cache"} if cache else {}
    whole = load(root, skip_broken=True, **options)
    assert whole.left_out == () and len(whole) == 9
    for name in ("ant/0", "dog/2"):
        (root / f"train/{name}.png").write_bytes(b"nix")
    with pytest.raises(DataError, match="ant/0.png: not a readable image: .*; skip_broken leaves"):
        load(root, **options)
    assert not caplog.records
    found = load(root, skip_broken=True, **options)
    assert [line.partition(": ")[0] for line in found.left_out] == [
        str(root / f"train/{name}.png") for name in ("ant/0", "dog/2")
    ]
    assert "left out: 2, the first is" in caplog.text
    kept = [1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(found.pixels, whole.pixels[kept]) and torch.equal(found.labels, whole.labels[kept])
    part = listing_of(root, True, **options).take(torch.tensor([7, 0, 4, 2])).read()
    assert torch.equal(part.pixels, whole.pixels[[7, 4, 2]]) and part.labels.tolist() == [2, 1, 0]
    assert [line for line in part.left_out if "ant/0.png" in line] == [*part.left_out] != []
    with pytest.raises(DataError, match="ant/0.png: not a readable image: .*; skip_broken leaves"):
        load(root, **options)
    for index in (1, 2):
        (root / f"train/ant/{index}.png").write_bytes(b"nix")
    with pytest.raises(DataError, match="no image of class 'ant' can be read"):
        load(root, skip_broken=True, **options)


def listing_of(root, skip_broken=False, cache=None):
    nothing = {"format": "auto", "images": None, "size": None, "classes": None, "progress": False}
    return listing(root, "train", **nothing, cache=cache, skip_broken=skip_broken)


def test_where_no_image_can_be_read(tree, tmp_path):
    for path in tree[0].glob("train/*/*"):
        path.write_bytes(b"nix")
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError, match="0.png: not a readable image"):
            load(tree[0], cache=cache, skip_broken=True)


def test_only_what_is_taken_is_decoded(tree, decodes):
    root, _ = tree
    whole = load(root)
    decodes.clear()
    first = listing_of(root)
    assert first.counts() == [3, 3, 3] and len(first) == 9 and not decodes
    part = first.take(torch.tensor([8, 2, 0, 5])).take(torch.tensor([3, 0]))
    assert part.counts() == [0, 1, 1] and not decodes
    assert torch.equal(part.read().pixels, whole.pixels[[5, 8]]) and len(decodes) == 2


def test_many_blocks_keep_their_order(tree, monkeypatch):
    from ltsam_fast.data import decode

    expected = load(tree[0]).pixels
    monkeypatch.setattr(decode, "_BLOCK", 2)
    assert torch.equal(load(tree[0]).pixels, expected)


# What readers give


def test_images_check_themselves_and_take():
    pixels, labels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1), torch.tensor([0, 2, 2, 0])
    images = Images(pixels, labels, ("a", "b", "c"))
    assert images.counts() == [2, 0, 2] and len(images) == 4
    part = images.take(torch.tensor([3, 1]))
    assert (
        part.pixels.flatten().tolist() == [3, 1] and part.labels.tolist() == [0, 2] and part.classes == images.classes
    )
    part.pixels.zero_()
    assert images.pixels.flatten().tolist() == [0, 1, 2, 3]
    for arguments, error, message in (
        ((pixels.float(), labels, ("a",) * 3), TypeError, "pixels must be torch.uint8"),
        ((pixels, labels.int(), ("a",) * 3), TypeError, "labels must be torch.int64"),
        ((pixels[0], labels, ("a",) * 3), ValueError, "pixels must have 4 dimensions"),
        ((pixels[:3], labels, ("a",) * 3), ValueError, "one for each of 3 images, got 4"),
        ((pixels, labels, ("a",) * 2), ValueError, r"\[0, 2\)"),
    ):
        with pytest.raises(error, match=message):
            Images(*arguments)
