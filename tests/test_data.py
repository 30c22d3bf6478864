"""Every kind of data set, from files as they lie on disk; odd pictures, bad ones, hostile ones."""
import csv
import hashlib
import http.server
import io
import itertools
import json
import tarfile
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from wuerstchen import STAGES

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
QUICK = ["--image-size", "32", "--steps", "2", "--batch-size", "4", "--cache", "64"]
RED, BLUE = (200, 40, 30), (30, 60, 200)


def options(**changed):
    return Namespace(**(dict(data_dir=None, image_size=32, seed=0, crop="centre", flip=False) | changed))


def bmp(colour, size=(40, 40)):
    return Image.new("RGB", size, colour)


def odd_pictures(folder):
    """Pictures of every kind that people have, all red in the middle but for the grey one. -> {name: colour}"""
    folder.mkdir(parents=True, exist_ok=True)
    red = bmp(RED)
    red.save(folder / "plain.png")
    red.save(folder / "photo.JPG", quality=95)
    red.save(folder / "web.webp", lossless=True)
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.save(folder / "clear.png")
    half = Image.new("RGBA", (40, 40), (*RED, 255))
    half.save(folder / "opaque.png")
    palette = red.quantize(4)
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_clear.png", transparency=palette.getpixel((20, 20)))
    Image.new("L", (40, 40), 90).save(folder / "grey.png")
    Image.new("LA", (40, 40), (90, 255)).save(folder / "grey_alpha.png")
    Image.new("1", (40, 40), 1).save(folder / "one_bit.png")
    Image.fromarray(np.full((40, 40), 90 * 257, np.uint16)).save(folder / "grey16.png")
    red.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    red.save(folder / "frames.gif", save_all=True, append_images=[bmp(BLUE)])
    turned = bmp(BLUE, (80, 40))  # lies on its side: red is on top once it stands upright
    turned.paste(RED, (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    turned.save(folder / "turned.png", exif=exif)
    white, grey = (255, 255, 255), (90, 90, 90)
    return {"plain.png": RED, "photo.JPG": RED, "web.webp": RED, "clear.png": white, "opaque.png": RED,
            "palette.png": RED, "palette_clear.png": white, "grey.png": grey, "grey_alpha.png": grey,
            "one_bit.png": white, "grey16.png": grey, "cmyk.jpg": RED, "frames.gif": RED, "turned.png": None}


def folder_of(path, count, sub=("",)):
    """count small pictures with captions in .txt, in several sub-folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = path / sub[i % len(sub)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(36, 48, 3), dtype=np.uint8)).save(place / f"p{i:03}.png")
        (place / f"p{i:03}.txt").write_text(f"picture number {i}\n")
    return path


def write_shards(path, count, shards=1, damage=()):
    """WebDataset shards: jpg, txt and json a sample, as img2dataset writes them."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for s in range(shards):
        with tarfile.open(path / f"{s:05}.tar", "w") as tar:
            for i in range(s, count, shards):
                jpg = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(jpg, "jpeg")
                parts = {"jpg": jpg.getvalue()[:40 if i in damage else None], "txt": f"sample {i}".encode(),
                         "json": json.dumps({"caption": f"sample {i}", "key": i}).encode()}
                if i % 3 == 1:  # some sets have the caption in the .json only
                    del parts["txt"]
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{i:09}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def tar_set(path, split="train"):
    return train.Tar(path, split, 32, 0, random_crop=False, flip=False)


def pictures_of(found, size=32, seed=0):
    return train.Pictures(found, size, seed, random_crop=False, flip=False)


def names(found):
    return [Path(path).name for path, _ in found]


# Folders


def test_odd_pictures_look_as_in_a_viewer(tmp_path):
    colours = odd_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": name, "text": f"this is {name}"}) + "\n" for name in colours))
    seen = {}
    for split in ("train", "test"):
        data = pictures_of(train.folder(tmp_path, split))
        for picture, caption in map(data.__getitem__, range(len(data))):
            seen[caption.removeprefix("this is ")] = picture
        assert not data.skipped
    assert seen.keys() == colours.keys()
    for name, colour in colours.items():
        assert seen[name].shape == (32, 32, 3) and seen[name].dtype == np.uint8
        if colour:
            assert np.abs(seen[name][16, 16].astype(int) - colour).max() <= 8, name
    assert np.abs(seen["turned.png"][2, 16].astype(int) - RED).max() <= 8
    assert np.abs(seen["turned.png"][29, 16].astype(int) - BLUE).max() <= 8


@pytest.mark.parametrize("kind", ["metadata.jsonl", "captions.csv", "captions.tsv", "header.csv"])
def test_caption_lists(tmp_path, kind):
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    files = [f"p{i}.png" for i in range(20)]
    for name in files:
        bmp(RED).save(place / name)
    rows = [(f"er/{name}", f'a "red", {name}') for name in files] + [("er/p3.png", "another of p3")]
    if kind == "metadata.jsonl":
        text = "".join(json.dumps(dict(file_name=name, text=text)) + "\n" for name, text in rows)
    else:
        file = io.StringIO()
        csv.writer(file, delimiter="\t" if kind.endswith("tsv") else ",").writerows(
            [("filename", "caption")] * (kind == "header.csv") + rows)
        text = file.getvalue()
    (tmp_path / "deep" / kind.replace("header", "captions")).write_text(text)
    found = train.folder(tmp_path, "train") + train.folder(tmp_path, "test")
    assert sorted(names(found)) == sorted(files)
    for path, captions in found:
        name = Path(path).name
        assert captions == f'a "red", {name}' + ("\nanother of p3" if name == "p3.png" else "")
    data = pictures_of([found[names(found).index("p3.png")]])
    assert {data.caption(i) for i in range(20)} == {'a "red", p3.png', "another of p3"}
    (tmp_path / "deep" / kind.replace("header", "captions")).write_text('{"no": "names"}\n"')
    with pytest.raises(ValueError, match="not a list of file names and captions"):
        train.folder(tmp_path, "train")


def test_splits_are_fixed_and_apart(tmp_path):
    folder_of(tmp_path, 100, ("a", "b/c"))
    train_names, test_names = (names(train.folder(tmp_path, split)) for split in ("train", "test"))
    assert len(train_names) + len(test_names) == 100 and not set(train_names) & set(test_names)
    assert 1 <= len(test_names) <= 15
    folder_of(tmp_path, 130, ("a", "b/c"))
    more = train.folder(tmp_path, "train")
    assert set(train_names) <= set(names(more)) and train.folder(tmp_path, "train") == more


def test_every_pass_shows_every_picture_once_in_a_new_order(tmp_path):
    source = train.folder(folder_of(tmp_path, 40), "train")
    data = pictures_of(source, seed=5)
    passes = [[data.caption(i) for i in range(k * len(source), (k + 1) * len(source))] for k in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) and passes[0] != passes[1] != passes[2]
    assert len(set(passes[0])) == len(source)
    again = pictures_of(source, seed=5)
    assert (again[70][0] == data[70][0]).all() and again[70][1] == data[70][1]


def test_crop_and_flip(tmp_path):
    ramp = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3))
    rng = np.random.default_rng(0)
    still = train.prepare(Image.fromarray(ramp), 50, rng, False, False)
    assert still.shape == (50, 50, 3) and (still == ramp[:, 25:75]).all()
    cut = [train.prepare(Image.fromarray(ramp), 50, rng, True, False) for _ in range(50)]
    assert len({c[0, 0, 0] for c in cut}) > 20 and all(c[0, 49, 0] - c[0, 0, 0] == 49 for c in cut)
    flipped = [train.prepare(Image.fromarray(ramp), 50, rng, False, True)[0, 0, 0] for _ in range(60)]
    assert set(flipped) == {25, 74} and 10 < flipped.count(74) < 50
    tall = train.prepare(Image.fromarray(ramp.transpose(1, 0, 2)), 25, rng, False, False)
    assert tall.shape == (25, 25, 3)


# Bad pictures


def bad_folder(path, good, bad):
    folder_of(path, good)
    for i in range(bad):
        name = path / f"bad{i:03}"
        if i % 3 == 0:  # cut off
            data = (path / "p000.png").read_bytes()
            name.with_suffix(".png").write_bytes(data[:len(data) // 2])
            name.with_suffix(".txt").write_text("cut off")
        elif i % 3 == 1:
            name.with_suffix(".jpg").write_bytes(b"not a picture")
            name.with_suffix(".txt").write_text("no picture")
        else:
            bmp(RED).save(name.with_suffix(".png"))  # no caption
    return path


def test_bad_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    bad_folder(tmp_path / "data", 60, 4)
    train.main(["--run", str(tmp_path / "run"), "--data", "folder", "--data-dir", str(tmp_path / "data"), *QUICK])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = {row["skipped"]: row["why"] for row in rows if "skipped" in row}
    bad = {str(path) for path in (tmp_path / "data").glob("bad*.?[np]g")}
    in_training = bad & {path for path, _ in train.folder(tmp_path / "data", "train")}
    assert len(bad) == 4 and in_training and in_training <= set(skipped) <= bad and all(skipped.values())
    assert skipped.get(str(tmp_path / "data" / "bad002.png"), "no caption") == "no caption"
    assert f"can't be used: {len(skipped)} pictures" in capsys.readouterr().out


def test_too_many_bad_pictures_stop_training(tmp_path):
    bad_folder(tmp_path / "data", 30, 9)
    with pytest.raises(ValueError, match="more than a tenth of the pictures can't be used"):
        train.main(["--run", str(tmp_path / "run"), "--data", "folder", "--data-dir", str(tmp_path / "data"), *QUICK])
    assert "skipped" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_nothing_but_bad_pictures(tmp_path):
    tmp_path.joinpath("x.png").write_bytes(b"no")
    tmp_path.joinpath("y.png").write_bytes(b"no")
    data = pictures_of(train.folder(tmp_path, "test"))
    with pytest.raises(ValueError, match="in a row can't be used"):
        data[0]


def test_one_picture_is_too_few(tmp_path):
    args = options(data="folder", data_dir=folder_of(tmp_path, 1))
    with pytest.raises(ValueError, match="needs two pictures"):
        train.open_data(args, "train")


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 50 kB; 400 million pixels
    (tmp_path / "bomb.txt").write_text("boom")
    folder_of(tmp_path, 20)
    data = pictures_of([(f"{tmp_path}/bomb.png", "boom"), *train.folder(tmp_path, "train")])
    for i in range(len(data)):
        data[i]
    assert {name for name, _ in data.skipped} == {f"{tmp_path}/bomb.png"} and "decompression bomb" in data.skipped[0][1]


# Shards


def test_shards_show_every_sample_once_a_pass(tmp_path):
    write_shards(tmp_path, 100, shards=3)
    captions = {}
    for split in ("train", "test"):
        data = tar_set(tmp_path, split)
        count = sum(1 for shard in data.shards for _ in data.samples(shard))
        one, two = ([caption for _, caption in itertools.islice(tar_set(tmp_path, split).stream(skip=skip), count)]
                    for skip in (0, count))
        assert sorted(one) == sorted(two) and len(set(one)) == count and (count < 20 or one != two)
        captions[split] = set(one)
    assert len(captions["train"] | captions["test"]) == 100 and not captions["train"] & captions["test"]
    picture, _ = next(data.stream())
    assert picture.shape == (32, 32, 3)


@pytest.mark.parametrize("shards, parts", [(6, 3), (2, 4), (1, 3)])
def test_shards_are_split_without_overlap(tmp_path, shards, parts):
    write_shards(tmp_path, 90, shards)
    found = []
    for part in range(parts):
        data = tar_set(tmp_path)
        epoch = itertools.takewhile(lambda sample, seen=set(): sample not in seen and not seen.add(sample),
                                    (sample[1] for sample in data.order(part, parts)))
        found.append(set(epoch))
    everything = {sample[1] for shard in data.shards for sample in data.samples(shard)}
    assert set.union(*found) == everything and sum(map(len, found)) == len(everything)


def test_places_of_shards(tmp_path):
    write_shards(tmp_path / "x", 30, shards=3)
    named = tar_set(str(tmp_path / "x" / "{00000..00002}.tar"))
    assert named.shards == tar_set(tmp_path / "x").shards and len(named.shards) == 3
    assert tar_set(tmp_path / "x" / "00001.tar").shards == [str(tmp_path / "x" / "00001.tar")]
    with pytest.raises(FileNotFoundError, match="00003.tar"):
        tar_set(str(tmp_path / "x" / "{00000..00003}.tar"))
    with pytest.raises(FileNotFoundError, match="no .tar in"):
        tar_set(tmp_path)


def test_damaged_shards_and_samples(tmp_path):
    write_shards(tmp_path, 60, shards=2, damage=(7, 20))
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[:len(whole) // 2 + 100])
    data = tar_set(tmp_path)
    captions = [caption for _, caption in itertools.islice(data.stream(), 100)]
    assert "sample 7" not in captions and len(set(captions)) > 30
    assert any("000000020" in name for name, _ in data.skipped)
    (tmp_path / "00000.tar").write_bytes(b"no tar")
    (tmp_path / "00001.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="no samples for process 1 of 1"):
        next(tar_set(tmp_path).stream())


# Batches, and going on with them


@pytest.mark.parametrize("kind", ["folder", "tar", "tar with bad samples", "shapes"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_they_broke_off(tmp_path, kind, workers):
    if kind == "folder":
        folder_of(tmp_path, 50)
    elif kind != "shapes":
        write_shards(tmp_path, 50, 2, damage=(3, 4, 11) if "bad" in kind else ())

    def batches(first):
        data = train.open_data(options(data=kind[:6].split()[0], data_dir=tmp_path, crop="random", flip=True))
        feed = train.Batches(data, 6, first, 15, 0, 1)
        return [(pictures, captions) for pictures, captions, _ in
                torch.utils.data.DataLoader(feed, batch_size=None, num_workers=workers)]

    whole = batches(0)
    assert len(whole) == 15 and all(len(captions) == 6 for _, captions in whole)
    for first in (1, 7, 14):
        for (pictures, captions), (same, same_captions) in zip(whole[first:], batches(first), strict=True):
            assert torch.equal(pictures, same) and captions == same_captions


@pytest.mark.parametrize("kind", ["shapes", "folder"])
def test_processes_share_a_batch(tmp_path, kind):
    folder_of(tmp_path, 50)
    def batches(rank, ranks):
        data = train.open_data(options(data=kind, data_dir=tmp_path))
        return [captions for _, captions, _ in train.Batches(data, 8, 2, 6, rank, ranks)]
    shares = [batches(rank, 4) for rank in range(4)]
    for i, whole in enumerate(batches(0, 1)):
        assert sum((share[i] for share in shares), []) == whole


# Every format through every stage


@pytest.mark.parametrize("kind", ["folder", "tar", "coco", "cifar10", "cifar100"])
def test_every_format_trains(tmp_path, kind):
    data = tmp_path / "data"
    if kind == "folder":
        odd_pictures(data / "odd")
        for name in data.rglob("*.*"):
            name.with_suffix(".txt").write_text(f"a picture called {name.stem}")
        folder_of(data / "even", 20)
    elif kind == "tar":
        write_shards(data, 30, 2)
    elif kind == "cifar100":
        make_cifar100(data / "cifar-100-binary")
    else:
        data = SHARED / kind
        if not data.exists():
            pytest.skip(f"needs the real pictures of {data}")
    workers = ["--workers", "2"] if kind in ("tar", "folder") else []
    train.main(["--run", str(tmp_path / "run"), "--data", kind, "--data-dir", str(data), *QUICK, *workers])
    assert {path.stem for path in (tmp_path / "run").glob("*.pt")} >= set(STAGES)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("skipped" in row for row in rows)


def test_coco_takes_one_of_the_captions_each_time(tmp_path):
    if not (SHARED / "coco").exists():
        pytest.skip(f"needs the real pictures of {SHARED / 'coco'}")
    found = {split: train.coco(SHARED / "coco", split) for split in ("train", "test")}
    assert sum(map(len, found.values())) == 24 and len(found["test"]) >= 1
    listed = json.loads((SHARED / "coco" / "annotations" / "captions_train2017.json").read_text())
    files = {image["id"]: image["file_name"] for image in listed["images"]}
    for entry in found["train"]:
        data, own = pictures_of([entry], 64), {" ".join(note["caption"].split()) for note in listed["annotations"]
                                               if entry[0].endswith(files[note["image_id"]])}
        assert {data.caption(i) for i in range(60)} == own and len(own) >= 4
    picture, _ = data[0]
    assert picture.shape == (64, 64, 3) and picture.std() > 10


def test_coco_with_splits_and_a_subset(tmp_path):
    for split, ids in (("train2017", range(10)), ("val2017", range(10, 14))):
        (tmp_path / split).mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(dict(
            images=[dict(id=i, file_name=f"{i}.jpg") for i in ids],
            annotations=[dict(image_id=i, caption=f" caption\n{k} of {i} ") for i in ids for k in range(2)])))
        for i in ids:
            if i != 3:  # a subset: not all pictures are there
                bmp(RED).save(tmp_path / split / f"{i}.jpg")
    training, testing = (train.coco(tmp_path, split) for split in ("train", "test"))
    assert [len(training), len(testing)] == [9, 4] and all("val2017/" in path for path, _ in testing)
    assert training[0] == (f"{tmp_path}/train2017/0.jpg", "caption 0 of 0\ncaption 1 of 0")
    with pytest.raises(FileNotFoundError, match="captions_"):
        train.coco(tmp_path / "train2017", "train")


CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def make_cifar(folder, count=50):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = rng.integers(256, size=(count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")


def test_cifar_folder_and_archive_agree(tmp_path):
    make_cifar(tmp_path / "x" / "cifar-10-batches-bin")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    places = [tmp_path / "x", tmp_path / "x" / "cifar-10-batches-bin", tmp_path / "cifar-10-binary.tar.gz", tmp_path]
    sets = [pictures_of(train.cifar(place, "train", "cifar10"), 64, seed=1) for place in places]
    for i in (0, 7, 49, 50, 123):
        picture, caption = sets[0][i]
        assert picture.shape == (64, 64, 3) and any(name in caption for name in CLASSES)
        for other in sets[1:]:
            assert (other[i][0] == picture).all() and other[i][1] == caption
    raw = np.fromfile(tmp_path / "x" / "cifar-10-batches-bin" / "data_batch_1.bin", np.uint8).reshape(-1, 3073)
    data = pictures_of(train.cifar(tmp_path / "x", "train", "cifar10"))
    seen = {data[i][0].tobytes() for i in range(50)}
    assert seen == {r[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for r in raw}  # every picture once an epoch
    record = [data[3][0].tobytes() == r[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for r in raw].index(True)
    assert CLASSES[raw[record, 0]] in data.caption(3)


def test_cifar10_trains_through_every_stage(tmp_path):
    make_cifar(tmp_path / "data" / "cifar-10-batches-bin")
    train.main(["--run", str(tmp_path / "run"), "--data", "cifar10", "--data-dir", str(tmp_path / "data"),
                "--image-size", "32", "--steps", "2", "--batch-size", "4", "--cache", "16"])
    assert all((tmp_path / "run" / f"{stage}.pt").exists() for stage in STAGES)
    with pytest.raises(ValueError, match="was begun with --data cifar10"):
        train.main(["--run", str(tmp_path / "run"), "--data", "shapes"])


def make_cifar100(folder):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train.bin", "test.bin"):
        records = rng.integers(256, size=(40, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = 1, np.arange(40) % 4
        (folder / name).write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\nbear\n")
    (folder / "coarse_label_names.txt").write_text("fruit\nanimal\n")


def test_cifar100_has_fine_labels(tmp_path):
    make_cifar100(tmp_path / "cifar-100-binary")
    found = train.cifar(tmp_path, "train", "cifar100")
    assert found[1][1].split("\n")[3] == "a picture of an aquarium fish" and found[2][1].split("\n")[1] == "a baby"
    data = pictures_of(found[:1])
    assert {data.caption(i) for i in range(40)} == {
        "apple", "an apple", "a photo of an apple", "a picture of an apple", "a small photo of an apple"}
    raw = np.fromfile(tmp_path / "cifar-100-binary" / "train.bin", np.uint8).reshape(40, 3074)
    assert (found[5][0] == raw[5, 2:].reshape(3, 32, 32).transpose(1, 2, 0)).all()


# Archives and downloads


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/wuerstchen_evil.txt", "link"])
def test_no_member_of_an_archive_leaves_the_folder(tmp_path, name):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "cifar-100-binary.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../../.."
        tar.addfile(member, io.BytesIO(b""))
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="can't be unpacked|holds no"):
        train.cifar(tmp_path / "data", "train", "cifar100")
    assert {path for path in tmp_path.rglob("*")} == before and not Path("/tmp/wuerstchen_evil.txt").exists()


class Server(http.server.BaseHTTPRequestHandler):
    """A file server that breaks off `breaks` times after half of what was asked for."""
    data, breaks, asked, ranges = b"", 0, [], True

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if self.ranges else 0
        self.asked.append(start)
        if start >= len(self.data):
            return self.send_error(416)
        rest = self.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.breaks:
            type(self).breaks -= 1
            rest = rest[:len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    make_cifar100(tmp_path / "made" / "cifar-100-binary")
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-100-binary", "cifar-100-binary")
    Server.data, Server.breaks, Server.asked, Server.ranges = (tmp_path / "made.tar.gz").read_bytes(), 0, [], True
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    folder, archive, _, *rest = train.CIFAR["cifar100"]
    monkeypatch.setitem(train.CIFAR, "cifar100", (folder, archive, hashlib.md5(Server.data).hexdigest(), *rest))
    monkeypatch.setattr(train, "CIFAR_URL", f"http://127.0.0.1:{serving.server_port}/")
    yield Server
    serving.shutdown()


def test_download_goes_on_where_it_broke_off(server, tmp_path, capfd):
    server.breaks = 2
    command = ["tokenizer", "--run", str(tmp_path / "run"), "--data", "cifar100", "--data-dir", str(tmp_path / "data"),
               "--download", *QUICK]
    for _ in range(2):
        with pytest.raises(OSError, match="the same command goes on"):
            train.main(command)
    train.main(command)
    assert server.asked[0] == 0 and 0 < server.asked[1] < server.asked[2] < len(server.data)
    assert (tmp_path / "data" / "cifar-100-binary.tar.gz").read_bytes() == server.data
    assert "cifar-100-binary.tar.gz" in capfd.readouterr().err  # the bar
    train.main(command)  # nothing is fetched twice
    assert len(server.asked) == 3


def test_download_without_ranges_and_with_a_finished_part(server, tmp_path):
    server.ranges = False
    part = tmp_path / "x.tar.gz.part"
    part.write_bytes(server.data[:100])
    md5 = hashlib.md5(server.data).hexdigest()
    train.download(train.CIFAR_URL + "x", tmp_path / "x.tar.gz", md5)
    assert (tmp_path / "x.tar.gz").read_bytes() == server.data
    server.ranges = True
    part.write_bytes(server.data)  # killed before it was renamed
    (tmp_path / "x.tar.gz").unlink()
    train.download(train.CIFAR_URL + "x", tmp_path / "x.tar.gz", md5)
    assert (tmp_path / "x.tar.gz").read_bytes() == server.data


def test_a_download_with_another_md5_is_deleted(server, tmp_path):
    with pytest.raises(ValueError, match="MD5"):
        train.download(train.CIFAR_URL + "x", tmp_path / "x.tar.gz", "0" * 32)
    assert not list(tmp_path.glob("x*"))
