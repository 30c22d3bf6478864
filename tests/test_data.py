"""Data sets as they lie on disk: folders, COCO, CIFAR, downloads; bad images; batches."""
import collections
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import wuerstchen as w

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
TEXT = w.TextConfig(vocab_size=1024, length=12, width=64, depth=1, heads=2, mlp_width=128)
MICRO = w.Config(  # a preset whose stages train for some steps in a second
    text_c=TEXT, text_b=TEXT, a=w.VQGANConfig((8, 16), 1, 32, disc_depth=3, disc_width=32),
    compressor=w.CompressorConfig(8, [("fused", 1, 1, 8, 1)] + 4 * [("mbconv", 4, 2, 16, 1)], 64, 0.0),
    b=w.StageBConfig((16, 32, 64), (1, 1, 1), (0, 2, 2), (True, True, True), cond_width=32, dropout=0.0),
    c=w.StageCConfig(width=64, depth=2, heads=2, dropout=0.0))
CLASSES = {"cifar10": "airplane automobile bird cat".split(), "cifar100": "apple aquarium_fish baby bear".split()}


def folder_of(place, count):
    """Small images in two sub-folders, each with two captions in a .txt file."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = place / ("a", "b/c")[i % 2] / f"i{i:03}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(36, 48, 3), dtype=np.uint8)).save(file.with_suffix(".png"))
        file.with_suffix(".txt").write_text(f"image number {i}\n\n another caption of {i}\n")
    return place


def coco_folder(place, images=(("train2017", range(40)), ("val2017", range(40, 44)))):
    (place / "annotations").mkdir(parents=True)
    for split, ids in images:
        (place / split).mkdir()
        (place / "annotations" / f"captions_{split}.json").write_text(json.dumps(dict(
            images=[dict(id=i, file_name=f"{i:03}.jpg") for i in ids],
            annotations=[dict(image_id=i, caption=f" caption\n{k} of {i} ") for i in ids for k in range(2)])))
        for i in set(ids) - {3}:  # not all images are there
            Image.new("RGB", (40, 40)).save(place / split / f"{i:03}.jpg")
    return place


def cifar_folder(place, data="cifar10", count=50):
    """A made-up CIFAR-10 or CIFAR-100 of the classes 0, 1, 2, 3, 0, ..."""
    folder, skip, labels, _ = train.CIFAR[data]
    (place / folder).mkdir(parents=True)
    for file in ("data_batch_1", "data_batch_2", "test_batch") if data == "cifar10" else ("train", "test"):
        records = np.random.default_rng(0).integers(256, size=(count, skip + 3072), dtype=np.uint8)
        records[:, 0] = 7  # CIFAR-100's coarse label
        records[:, skip - 1] = np.arange(count) % 4
        (place / folder / f"{file}.bin").write_bytes(records.tobytes())
    (place / folder / labels).write_text("\n".join(CLASSES[data]) + "\n")
    return place


def open_data(data_dir, data="folder", **changed):
    return train.open_data(Namespace(data_dir=str(data_dir), data=data, **(dict(image_size=32, seed=0) | changed)))


def make_run(place, *options):
    args = train.parse_args(["--run", str(place), "--image-size", "32", "--device", "cpu", "--precision", "float32",
                             *map(str, options)])
    return train.Run(args, train.open_data(args))


def names(items, place):
    return [Path(file).relative_to(place).as_posix() for file, _ in items]


def listed(place, data="folder", **changed):
    """What `open_data` finds -> {name: captions} of both splits, and what it prints"""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        items = [item for split in open_data(place, data, **changed).values() for item in split.items]
    return {Path(file).relative_to(place).as_posix(): captions for file, captions in items}, output.getvalue()


def test_folder_with_captions(tmp_path):
    found, said = listed(folder_of(tmp_path, 30))
    assert len(found) == 30 and found["b/c/i005.png"] == ["image number 5", "another caption of 5"]
    assert "30 images, 30 with captions" in said and said.count("\n") == 1
    file = f"{tmp_path}/b/c/i005.png"
    data = train.Images([(file, found["b/c/i005.png"])], 32)
    assert data[3][1].splitlines() == found["b/c/i005.png"] == list(data.captions())
    assert data[7][0].shape == (32, 32, 3) and data[7][0].dtype == np.uint8


def picture(file, mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), 1).save(file)
    return file


def test_three_ways_to_give_captions(tmp_path):
    """In one folder, each with what can go wrong: an empty file, a row without a file, a folder name with
    underscores."""
    for name in ("x/1.webp", "x/2.tga", "x/3.ppm", "y/z/4.png", "y/z/5.png", "y/6.jp2", "snowy_owl/7.bmp", "8.gif"):
        picture(tmp_path / name)
    (tmp_path / "x/1.TXT").write_text("one\n\n  uno \n")
    (tmp_path / "x/2.txt").write_text("\n \n")
    (tmp_path / "y/metadata.csv").write_text('file_name; caption\n"./z\\4.png"; "four, or\n4"\nz/0.png; zero\n6.jp2;\n')
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name="y/z/5.png", text=["five", 5, "cinq"])) +
                                             '\n[]\n{"file_name": "x/1.webp", "text": "not this"}\n{"file_na\n')
    found, said = listed(tmp_path)
    assert found == {"x/1.webp": ["one", "uno"], "y/z/4.png": ["four, or 4"], "y/z/5.png": ["five", "cinq"],
                     "snowy_owl/7.bmp": ["snowy owl"], "y/6.jp2": ["y"]}
    for words in ("8 images, 5 with captions", "2 of them captioned with the name of a folder",
                  "without captions: 3 (8.gif, x/2", "rows without a file name or a caption: 3 (",
                  "captions of missing images: 1 (z/0.png)"):
        assert words in said


@pytest.mark.parametrize("table, name", [
    ("a,file_name,text,,\n,\u00e9.png,a red, round thing,,\n", "metadata.csv"),  # from a spreadsheet
    ("File_Name , Caption\ne\u0301.png,a red, round thing\n", "metadata.csv"),  # the accent by itself; a comma, spaces
    ("\r\n\ufefffile_name\ttext\r\n\u00e9.png\ta red, round thing\r\n", "METADATA.CSV"),
    ("\tfile_name\ttext\n0\t\u00e9.png\ta red, round thing\n", "metadata.csv"),  # an index without a name
    ("file_name;text\r{place}/\u00e9.png;a red, round thing\r", "metadata.csv"),  # an absolute path; an old Mac's lines
    ('{{"file_name": " ./\u00e9.png", "text": ["a red, round thing"]}}\n' + "[" * 100_000, "metadata.jsonl")])
def test_tables_as_people_write_them(tmp_path, table, name):
    folder_of(tmp_path, 1)
    picture(tmp_path / "\u00e9.png")
    (tmp_path / name).write_text(table.format(place=tmp_path), encoding="utf-8", newline="")
    assert listed(tmp_path)[0]["\u00e9.png"] == ["a red, round thing"]


def test_unreadable_captions_do_not_end_a_run(tmp_path, monkeypatch):
    folder_of(tmp_path, 4)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    read = train.read_text

    def fail(file):
        if file.name in ("metadata.csv", "i001.txt"):
            raise PermissionError(file)
        return read(file)
    monkeypatch.setattr(train, "read_text", fail)
    found, said = listed(tmp_path)
    assert len(found) == 3 and "unreadable files: 2 (b/c/i001.txt, metadata.csv)" in said


@pytest.mark.parametrize("text, encoding", [("grüße, ça va", "utf-8"), ("grüße, ça va", "utf-8-sig"),
                                            ("grüße, ça va", "cp1252"), ("“ein Löwe” – 5 €", "cp1252"),
                                            ("лев и 狮子", "utf-16"), ("狮子", "utf-16"), ("a lion", "utf-16-le"),
                                            ("ein Löwe", "utf-16-be")])
def test_captions_of_any_encoding(tmp_path, text, encoding):
    folder_of(tmp_path, 2)
    picture(tmp_path / "lion.png").with_suffix(".txt").write_bytes(text.encode(encoding))
    (tmp_path / "metadata.jsonl").write_bytes(json.dumps(dict(file_name="b.png", text=text), ensure_ascii=False)
                                              .encode(encoding))
    picture(tmp_path / "b.png")
    found, _ = listed(tmp_path)
    assert found["lion.png"] == found["b.png"] == [text]


def test_captions_are_one_line_of_text(tmp_path):
    assert train.tidy(["a\u2028b\x0b c\x85", " \ufeff\n", None, 3, "\ud83d!"]) == ["a b c", "?!"]
    assert train.tidy("a\tcat ") == ["a cat"] and train.tidy(float("nan")) == train.tidy({}) == []


def test_what_is_not_an_image_of_the_data_set(tmp_path):
    """Hidden files, leftovers of file managers and runs are not seen; links are followed, but not round in circles."""
    folder_of(tmp_path / "data", 4)
    data = tmp_path / "data"
    for name in (".thumbnails/a.png", "a/@eaDir/i000.png/small.jpg", "__MACOSX/a.png", "b/.i001.png",
                 "old/sheets/a_000250.png"):
        picture(data / name)
    for name in ("config.json", "options.json"):
        (data / "old" / name).write_text("{}")
    (data / "a/._i000.txt").write_bytes(b"\0\5\x16\7")
    (data / "notes.md").write_text("words")
    (data / "zero.jpg").touch()
    found, said = listed(data)
    assert len(found) == 4 and "files that Pillow can't open: 2 (notes.md, zero.jpg)" in said
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs links, pipes and names of any bytes")
    os.mkfifo(data / "pipe.png")
    (data / "round").symlink_to(data)
    (data / "aa").symlink_to(data / "b")  # comes before its target, but must not take its place
    (data / "gone.png").symlink_to("nowhere")
    picture(tmp_path / "else/fox/1.png")
    (data / "linked").symlink_to(tmp_path / "else")
    odd = os.fsdecode(b"caf\xe9")
    picture(data / f"{odd}.png").with_suffix(".txt").write_text("coffee")
    found, said = listed(data)
    assert len(found) == 6 and found["linked/fox/1.png"] == ["fox"] and found[f"{odd}.png"] == ["coffee"]
    with pytest.raises(train.UserError, match="is not a folder"):
        listed(data / "none")


@pytest.mark.parametrize("kind", ["folder", "coco"])
def test_splits_are_fixed_and_disjoint(tmp_path, kind, monkeypatch):
    def splits(place):
        return [names(data.items, Path(place).absolute()) for data in open_data(place, kind).values()]

    def fill(count):
        place = tmp_path / str(count)
        return folder_of(place, count) if kind == "folder" else coco_folder(place, [("train2017", range(count))])
    training, testing = splits(fill(100))
    assert not set(training) & set(testing) and len(training + testing) == 100 - (kind == "coco")
    assert 2 <= len(testing) <= 20 and set(training) <= set(splits(fill(130))[0])  # still so with more images
    monkeypatch.chdir(tmp_path / "100")
    assert splits(".") == [training, testing]  # wherever the folder lies


def test_every_epoch_shows_every_image_once_in_a_new_order():
    items = [(np.full((32, 32, 3), i, np.uint8), [str(i)]) for i in range(40)]
    data = train.Images(items, 32, seed=5)
    epochs = [[int(data[i][1]) for i in range(40 * k, 40 * k + 40)] for k in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert all(data[i][0][0, 0, 0] == int(data[i][1]) for i in range(40))
    again, other = train.Images(items, 32, seed=5), train.Images(items, 32, seed=6)
    assert [int(again[i][1]) for i in range(80, 120)] == epochs[2] != [int(other[i][1]) for i in range(80, 120)]


def half_bright(place, count):
    """Images that are bright on the left; the captions of every fourth one say so."""
    place.mkdir()
    for i in range(count):
        Image.fromarray(np.repeat(np.uint8([[255, 0]]), 16, axis=1).repeat(32, axis=0)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"image {i}\n" + ("{} is bright on the Left", "{} is leftover")[i % 4 > 0]
                                        .format(i))
    return place


@pytest.mark.parametrize("flip", ["--flip", "--no-flip"])
def test_batches_have_mirror_images_and_all_captions(tmp_path, flip):
    run = make_run(tmp_path, "--data", "folder", "--data-dir", half_bright(tmp_path / "data", 40), flip)
    seen = [(int(re.search(r"\d+", caption)[0]), caption.startswith("image"), image[16, 2, 0].item() < 0.5)
            for images, captions in run.batches(0, train.Recipe(60, 20, 0)) for image, caption in zip(images, captions)]
    expected = {(i, first, mirrored) for i in {i for i, _, _ in seen} for first in (True, False)
                for mirrored in (False, True)[:1 + (flip == "--flip" and i % 4 > 0)]}
    assert set(seen) == expected and len({i for i, _, _ in seen}) == len(run.train_data.items) > 30
    for part in (1, 2):
        share = np.mean([sample[part] for sample in seen if sample[0] % 4])
        assert 0.45 < share < 0.55 or part == 2 and flip == "--no-flip"
    images, captions = train.examples(run.test_data, 3)
    assert (images[:, 16, 2] == 1).all() and all(caption.startswith("image") for caption in captions)


def test_bad_images_are_skipped_and_named_once(tmp_path, capsys):
    folder_of(tmp_path, 20)
    whole = (tmp_path / "a" / "i000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "none.jpg").write_bytes(b"no image")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 50 kB, 400 million pixels
    for name in ("cut", "none", "bomb"):
        (tmp_path / f"{name}.txt").write_text(name)
    data = open_data(tmp_path)
    assert "files that Pillow can't open: 2 (bomb.png, none.jpg)" in capsys.readouterr().out
    data = train.Images([item for split in data.values() for item in split.items], 32)
    seen = [data[i][1] for i in range(48)]
    assert "cut" not in seen and len({caption.split()[-1] for caption in seen}) == 20
    line, = capsys.readouterr().err.splitlines()
    assert "cut.png" in line and "truncated" in line
    again = train.Images(data.items, 32)
    assert [again[i][1] for i in reversed(range(48))] == seen[::-1]  # whatever was read before
    bad = [item for item in data.items if item[1] == ["cut"]]
    with pytest.raises(train.UserError, match="none of the 2 images can be read"):
        train.Images(bad + bad, 32)[5]


@pytest.mark.parametrize("bad", range(3))
def test_one_image_that_can_be_read_is_kept_for_testing(tmp_path, bad):
    """However many images before it, in the order of names, can't be read, and whichever the hash chooses."""
    for i in range(40):
        file = picture(tmp_path / f"{i:02}.png")
        file.with_suffix(".txt").write_text(f"image {i}")
    chosen = names(open_data(tmp_path)["test"].items, tmp_path)[1:]
    for name in [*chosen, *(f"{i:02}.png" for i in range(bad))]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    data = open_data(tmp_path)
    images, captions = train.examples(data["test"], 8)
    first = next(i for i in range(bad, 40) if f"{i:02}.png" not in chosen)
    assert chosen and set(captions) == {f"image {first}"}
    assert f"{tmp_path}/{first:02}.png" not in dict(data["train"].items)


@pytest.mark.parametrize("name", ["{}.png", "x/{:03}.jpg", "class {}/1.webp", "IMG_{}.jpeg"])
def test_neighbours_are_not_kept_for_testing_together(tmp_path, name):
    for folder, count in (("all", 160), ("two", 2)):
        rows = [f"{name.format(i)},{i}" for i in range(count)]
        for i in range(count):
            picture(tmp_path / folder / name.format(i))
        (tmp_path / folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    testing = [int(captions[0]) // 10 for _, captions in open_data(tmp_path / "all")["test"].items]
    assert 4 <= len(testing) <= 20 and max(map(testing.count, testing)) <= 4
    assert [len(data.items) for data in open_data(tmp_path / "two").values()] == [1, 1]


def test_one_image_is_too_few(tmp_path):
    folder_of(tmp_path, 1)
    picture(tmp_path / "silent.png")
    with pytest.raises(train.UserError, match="too few images with captions: 2 images, 1 .*without captions.*silent"):
        open_data(tmp_path)
    folder_of(tmp_path, 2)
    assert [len(data.items) for data in open_data(tmp_path).values()] == [1, 1]


def test_coco_with_splits_and_a_subset(tmp_path):
    coco_folder(tmp_path)
    training, testing = (open_data(tmp_path, "coco")[split].items for split in ("train", "test"))
    assert [len(training), len(testing)] == [39, 4] and all("/val2017/" in path for path, _ in testing)
    assert training[0] == (f"{tmp_path}/train2017/000.jpg", ["caption 0 of 0", "caption 1 of 0"])


def test_coco_and_its_look_alikes(tmp_path):
    """Annotation files apply to the images that are there; odd entries and files of another kind are reported."""
    coco_folder(tmp_path / "part")
    shutil.rmtree(tmp_path / "part/train2017")
    found, said = listed(tmp_path / "part", "coco")
    assert len(found) == 4 and "captions of missing images: 40 (000.jpg, 001.jpg, 002.jpg, ...)" in said
    other = tmp_path / "other"
    for i in range(6):
        picture(other / f"images/{i}.png")
    (other / "annotations").mkdir()
    (other / "annotations/captions_all.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(dict(
        images=[*(dict(id=str(i), file_name=f"{i}.png") for i in range(5)), 7, dict(id=9)],
        annotations=[*(dict(image_id=i, caption=text) for i, text in enumerate(["a", " b ", None, 4, ["c", "d"]])),
                     dict(caption="e"), None])).encode())
    for name, content in (("captions_list", []), ("captions_count", dict(images=5, annotations=9)), ("instances", {})):
        (other / f"annotations/{name}.json").write_text(json.dumps(content))
    (other / "captions_cut.json").write_text('{"images": [')
    found, said = listed(other, "coco")
    assert found == {"images/0.png": ["a"], "images/1.png": ["b"], "images/4.png": ["c", "d"]}
    assert "file name or a caption: 4 (annotations/captions_all.json)" in said
    assert "images without captions: 3 (" in said
    assert all(f"captions_{name}.json" in said for name in ("list", "count", "cut")) and "instances" not in said
    for i, name in enumerate(("images/cats/1.png", "images/dogs/1.png")):  # equal names in two folders
        picture(other / name)
        (other / f"annotations/captions_{i}.json").write_text(json.dumps(dict(
            images=[dict(id=1, file_name=name.partition("/")[2])], annotations=[dict(image_id=1, caption=name)])))
    found, said = listed(other, "coco")
    assert found["images/cats/1.png"] == ["images/cats/1.png"] and found["images/dogs/1.png"] == ["images/dogs/1.png"]
    shutil.rmtree(other / "images/cats")
    shutil.rmtree(other / "images/dogs")
    (other / "val").mkdir()
    for i, name in enumerate(("images/5.png", "val/9.png")):  # found by its name alone; then one in val/
        (other / "annotations/captions_val.json").write_text(json.dumps(dict(
            images=[dict(id=1, file_name=name.rpartition("/")[2])], annotations=[dict(image_id=1, caption="v")])))
        data = train.open_data(Namespace(data="coco", data_dir=str(other), image_size=32, seed=0))
        assert str(other / name) not in dict(data["train"].items) and str(other / name) in dict(data["test"].items)
        picture(other / "val/9.png")
    with pytest.raises(train.UserError, match="too few .*: 7 images, 0 with captions; .*without captions"):
        shutil.rmtree(other / "annotations")
        listed(other, "coco")


@pytest.mark.parametrize("data, name, baby", [("cifar10", "automobile", "a photo of a bird"),
                                              ("cifar100", "aquarium fish", "a photo of a baby")])
def test_cifar(tmp_path, data, name, baby):
    (folder, skip, _, _), left_out = train.CIFAR[data], collections.defaultdict(list)
    found = train.list_cifar(data, cifar_folder(tmp_path, data), left_out)
    items, testing = found["train"], found["test"]
    assert items[1][1] == [name, f"an {name}", f"a photo of an {name}", f"a picture of an {name}",
                           f"a small photo of an {name}"] and baby in items[2][1]
    files = sorted(file for file in tmp_path.rglob("*.bin") if "test" not in file.name)
    records = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).reshape(-1, skip + 3072)
    assert len(items) == len(records) and len(testing) == 50
    for i in (0, len(items) - 1):
        planes = [records[i, skip + 1024 * c:][:1024].reshape(32, 32) for c in range(3)]
        assert (items[i][0] == np.dstack(planes)).all()
    assert set(left_out["missing or incomplete files"]) == set(train.CIFAR[data][-1])  # 50 images are not all
    whole = files[0].read_bytes()
    for damaged in (whole[:-7], bytes([200] * len(whole))):
        files[0].write_bytes(damaged)
        with pytest.raises(train.UserError, match=f"{files[0].name} is cut short or damaged: --download"):
            open_data(tmp_path, data)
    files[0].unlink()
    (tmp_path / folder / f"test{'_batch' * (data == 'cifar10')}.bin").unlink()
    with pytest.raises(train.UserError, match=r"too few images .*missing or incomplete files: \d \(test"):
        open_data(tmp_path, data)
    (tmp_path / folder).rename(tmp_path / f"cifar-{data[5:]}-batches-py")
    message = "only cifar-10+-batches-py, the Python version: .*; --download fetches the binary version"
    with pytest.raises(train.UserError, match=message):
        open_data(tmp_path, data)


@pytest.mark.parametrize("kind, count", [("coco", 24), ("cifar10", 12_000)])
def test_real_data(kind, count):
    if not (SHARED / kind).exists():
        pytest.skip(f"needs {SHARED / kind}")
    data, test = open_data(SHARED / kind, kind, image_size=64).values()
    assert len(data.items) + len(test.items) == count and all(len(captions) > 3 for _, captions in data.items)
    image, caption = data[0]
    assert image.shape == (64, 64, 3) and image.std() > 10 and len(caption) > 2


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(data, {archive: folder to pack}, sha256) lets a local server offer a data set's archives -> list of what is
    fetched from it"""
    fetched = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            fetched.append(self.path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def offer(data, archives, sha256=None):
        urls = {}
        for name, folder in archives.items():
            stem, _, kind = name.partition(".")
            packed = Path(shutil.make_archive(tmp_path / stem, {"tar.gz": "gztar"}.get(kind, kind), folder.parent,
                                              folder.name))
            urls[f"http://127.0.0.1:{server.server_port}/{name}"] = (
                sha256 or hashlib.sha256(packed.read_bytes()).hexdigest())
        monkeypatch.setitem(train.DOWNLOADS, data, urls)
        return fetched
    yield offer
    server.shutdown()
    server.server_close()


@pytest.fixture
def serve_cifar(serve, tmp_path, monkeypatch):
    """The same for a small CIFAR-100."""
    folder, skip, labels, _ = train.CIFAR["cifar100"]
    made = cifar_folder(tmp_path / "made", "cifar100") / folder
    monkeypatch.setitem(train.CIFAR, "cifar100", (folder, skip, labels, {path.name: 50 for path in made.glob("*.bin")}))
    return lambda sha256=None: serve("cifar100", {"cifar-100-binary.tar.gz": made}, sha256)


def test_download(serve_cifar, tmp_path):
    """Nothing is fetched twice, and what was interrupted is done again."""
    fetched, place = serve_cifar(), tmp_path / "data" / "new"
    archive, train_file = place / "cifar-100-binary.tar.gz", place / train.CIFAR["cifar100"][0] / "train.bin"

    def again(expected):
        train.download("cifar100", place)
        assert len(train.list_cifar("cifar100", place, {})["train"]) == 50 and len(fetched) == expected
    again(1)
    whole = archive.read_bytes()
    archive.unlink()
    again(1)  # all is there
    archive.write_bytes(whole)
    train_file.write_bytes(train_file.read_bytes()[:100])
    again(1)  # half unpacked
    train_file.unlink()
    archive.write_bytes(whole[:-10])
    again(2)  # half fetched


def test_download_of_coco(serve, tmp_path, monkeypatch):
    """The captions of train2017 come too, but not its images; one in ten of val2017 is kept for testing."""
    made = coco_folder(tmp_path / "made", (("train2017", range(400, 420)), ("val2017", range(4, 304))))
    monkeypatch.setattr(train, "COCO_IMAGES", 300)
    fetched = serve("coco", {"annotations_trainval2017.zip": made / "annotations", "val2017.zip": made / "val2017"})
    place = tmp_path / "data"
    train.download("coco", place)
    assert sorted(path.name for path in place.iterdir()) == ["annotations", "annotations_trainval2017.zip", "val2017",
                                                             "val2017.zip"]
    (place / "val2017" / "007.jpg").unlink()
    train.download("coco", place)  # unpacks again
    train.download("coco", place)
    assert len(fetched) == 2
    data = open_data(place, "coco")
    assert len(data["train"].items) + len(data["test"].items) == 300 and 20 < len(data["test"].items) < 45


def test_a_download_that_fails_leaves_nothing(serve_cifar, tmp_path, monkeypatch):
    serve_cifar(sha256="0" * 64)
    with pytest.raises(OSError, match="can't fetch http.*invalid hash"):
        train.download("cifar100", tmp_path / "data")
    monkeypatch.setitem(train.DOWNLOADS, "cifar100", {"http://127.0.0.1:9/cifar.tar.gz": "0" * 64})
    with pytest.raises(OSError, match="can't fetch http.*refused"):
        train.download("cifar100", tmp_path / "data")
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("kind", ["shapes", "folder"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_resume_where_they_stopped(tmp_path, kind, workers):
    folder_of(tmp_path / "data", 30)
    (tmp_path / "data/b/c/i005.png").write_bytes(b"bad")

    def batches(first):
        place = ["--data-dir", tmp_path / "data"] if kind == "folder" else []
        run = make_run(tmp_path, "--data", kind, *place, "--flip", "--workers", workers)
        return list(run.batches(first, train.Recipe(10, 8, 0)))
    before = torch.get_rng_state()
    whole, late = batches(0), batches(7)
    assert torch.equal(torch.get_rng_state(), before)  # otherwise, a resumed run would see other noise
    assert len(whole) == 10 and all(images.shape == (8, 32, 32, 3) and images.max() <= 1 for images, _ in whole)
    for (images, captions), (same, same_captions) in zip(whole[7:], late, strict=True):
        assert torch.equal(images, same) and captions == same_captions


@pytest.mark.parametrize("kind, make, options", [("folder", folder_of, ["--workers", "2", "--no-flip"]),
                                                 ("coco", coco_folder, []), ("cifar10", cifar_folder, []),
                                                 ("cifar100", lambda place: cifar_folder(place, "cifar100"), [])])
def test_every_format_trains(tmp_path, kind, make, options, monkeypatch):
    place = make(tmp_path / "data", 20) if kind == "folder" else make(tmp_path / "data")
    monkeypatch.setitem(train.PRESETS, "cifar" if kind in train.CIFAR else "photos", MICRO)
    train.main(["--run", str(tmp_path / "run"), "--data", kind, "--data-dir", str(place), "--image-size", "32",
                "--steps", "2", "--batch-size", "4", "--cache", "64", *options])
    assert {path.stem for path in (tmp_path / "run").glob("*.pt")} == {*train.TRAIN, "clip"}
