"""Data sets as they lie on disk: folders, COCO, CIFAR, downloads; bad images; batches."""
import hashlib
import http.server
import io
import json
import re
import tarfile
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
    folder, _, _, skip, labels = train.CIFAR[data]
    (place / folder).mkdir(parents=True)
    for file in ("data_batch_1", "data_batch_2", "test_batch") if data == "cifar10" else ("train", "test"):
        records = np.random.default_rng(0).integers(256, size=(count, skip + 3072), dtype=np.uint8)
        records[:, 0] = 7  # CIFAR-100's coarse label
        records[:, skip - 1] = np.arange(count) % 4
        (place / folder / f"{file}.bin").write_bytes(records.tobytes())
    (place / folder / labels).write_text("\n".join(CLASSES[data]) + "\n")
    return place


def open_data(split="train", **changed):
    return train.open_data(Namespace(**(dict(data_dir=None, image_size=32, seed=0) | changed)), split)


def make_run(place, *options):
    return train.Run(train.parse_args(["--run", str(place), "--image-size", "32", "--device", "cpu", "--precision",
                                       "float32", *map(str, options)]))


def test_folder_with_captions(tmp_path):
    folder_of(tmp_path, 30)
    (tmp_path / "photo.JPG").write_bytes(b"")
    found = dict(train.list_folder(tmp_path, "train") + train.list_folder(tmp_path, "test"))
    file = f"{tmp_path}/b/c/i005.png"
    assert len(found) == 31 and found[f"{tmp_path}/photo.JPG"] == []
    assert found[file] == ["image number 5", "another caption of 5"]
    data = train.Images([(file, found[file])], 32)
    assert data[3][1].splitlines() == found[file] == list(data.captions())
    assert data[7][0].shape == (32, 32, 3) and data[7][0].dtype == np.uint8
    with pytest.raises(FileNotFoundError, match="no images"):
        train.list_folder(tmp_path / "none", "train")


@pytest.mark.parametrize("kind", ["folder", "coco"])
def test_splits_are_fixed_and_disjoint(tmp_path, kind, monkeypatch):
    def splits(place):
        lists = [getattr(train, f"list_{kind}")(place, split) for split in ("train", "test")]
        return [[Path(path).name for path, _ in items] for items in lists]

    def fill(count):
        place = tmp_path / str(count)
        return folder_of(place, count) if kind == "folder" else coco_folder(place, [("train2017", range(count))])
    training, testing = splits(fill(100))
    assert not set(training) & set(testing) and len(training + testing) == 100 - (kind == "coco")
    assert 2 <= len(testing) <= 20 and set(training) <= set(splits(fill(130))[0])  # they stay when images join
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
    Image.new("RGB", (40, 40)).save(tmp_path / "silent.png")
    reasons = {"cut.png": "truncated", "none.jpg": "cannot identify", "bomb.png": "decompression bomb",
               "silent.png": "no caption"}
    data = train.Images(train.list_folder(tmp_path, "train") + train.list_folder(tmp_path, "test"), 32)
    seen = [data[i][1] for i in range(48)]
    assert not {"cut", "none", "bomb"} & set(seen) and len({caption.split()[-1] for caption in seen}) == 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(any(name in line and reason in line for line in lines) for name, reason in reasons.items())
    again = train.Images(data.items, 32)
    assert [again[i][1] for i in reversed(range(48))] == seen[::-1]  # whatever was read before
    bad = [item for item in data.items if Path(item[0]).name in reasons]
    data = train.Images(bad + data.items[:3], 32)
    with pytest.raises(ValueError, match="more than half of the images are of no use"):
        [data[i] for i in range(7)]


def test_one_image_is_too_few(tmp_path):
    folder_of(tmp_path, 1)
    with pytest.raises(ValueError, match="needs at least two images"):
        open_data(data="folder", data_dir=tmp_path)
    folder_of(tmp_path, 2)
    assert [len(open_data(split, data="folder", data_dir=tmp_path).items) for split in ("train", "test")] == [1, 1]
    with pytest.raises(ValueError, match="needs --data-dir"):
        open_data(data="coco")


def test_coco_with_splits_and_a_subset(tmp_path):
    coco_folder(tmp_path)
    training, testing = (train.list_coco(tmp_path, split) for split in ("train", "test"))
    assert [len(training), len(testing)] == [39, 4] and all("/val2017/" in path for path, _ in testing)
    assert training[0] == (f"{tmp_path}/train2017/000.jpg", ["caption 0 of 0", "caption 1 of 0"])
    with pytest.raises(FileNotFoundError, match="captions_"):
        train.list_coco(tmp_path / "train2017", "train")


@pytest.mark.parametrize("data, name, baby", [("cifar10", "automobile", "a photo of a bird"),
                                              ("cifar100", "aquarium fish", "a photo of a baby")])
def test_cifar(tmp_path, data, name, baby):
    found, skip = train.list_cifar(cifar_folder(tmp_path, data), "train", data), train.CIFAR[data][3]
    assert found[1][1] == [name, f"an {name}", f"a photo of an {name}", f"a picture of an {name}",
                           f"a small photo of an {name}"] and baby in found[2][1]
    files = [file.read_bytes() for file in sorted(tmp_path.rglob("*.bin")) if "test" not in file.name]
    records = np.frombuffer(b"".join(files), np.uint8).reshape(-1, skip + 3072)
    assert len(found) == len(records) and len(train.list_cifar(tmp_path, "test", data)) == 50
    for i in (0, len(found) - 1):
        planes = [records[i, skip + 1024 * c:][:1024].reshape(32, 32) for c in range(3)]
        assert (found[i][0] == np.dstack(planes)).all()
    with pytest.raises(FileNotFoundError, match="--download fetches it"):
        train.list_cifar(tmp_path / "none", "train", data)


@pytest.mark.parametrize("kind, count", [("coco", 24), ("cifar10", 12_000)])
def test_real_data(kind, count):
    if not (SHARED / kind).exists():
        pytest.skip(f"needs {SHARED / kind}")
    data, test = (open_data(split, data=kind, data_dir=SHARED / kind, image_size=64) for split in ("train", "test"))
    assert len(data.items) + len(test.items) == count and all(len(captions) > 3 for _, captions in data.items)
    image, caption = data[0]
    assert image.shape == (64, 64, 3) and image.std() > 10 and len(caption) > 2


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(member) packs an archive, with one more member if given, for a local server -> list of what is fetched"""
    fetched, (folder, archive, _, *rest) = [], train.CIFAR["cifar100"]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            fetched.append(self.path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(train, "CIFAR_URL", f"http://127.0.0.1:{server.server_port}/")

    def pack(member=None, sha256=None):
        with tarfile.open(tmp_path / archive, "w:gz") as tar:
            tar.add(cifar_folder(tmp_path / "made", "cifar100") / folder, folder)
            if member:
                tar.addfile(member, io.BytesIO(b""))
        sha256 = sha256 or hashlib.sha256((tmp_path / archive).read_bytes()).hexdigest()
        monkeypatch.setitem(train.CIFAR, "cifar100", (folder, archive, sha256, *rest))
        return fetched
    yield pack
    server.shutdown()
    server.server_close()


def test_download(serve, tmp_path):
    fetched, place = serve(), tmp_path / "data" / "new"
    for _ in range(2):  # nothing is fetched twice
        train.download("cifar100", place)
    assert fetched == ["/cifar-100-binary.tar.gz"] and len(train.list_cifar(place, "train", "cifar100")) == 50


def test_a_download_with_another_hash_is_refused(serve, tmp_path):
    serve(sha256="0" * 64)
    with pytest.raises(Exception, match="invalid hash"):
        train.download("cifar100", tmp_path / "data")
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("name, target", [("../evil", None), ("link", "../.."), ("link", "/tmp")])
def test_no_member_of_an_archive_leaves_the_folder(serve, tmp_path, name, target):
    member = tarfile.TarInfo(name)
    if target:
        member.type, member.linkname = tarfile.SYMTYPE, target
    serve(member)
    with pytest.raises(tarfile.FilterError):
        train.download("cifar100", tmp_path / "data")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "data" / "link").is_symlink()


@pytest.mark.parametrize("kind", ["shapes", "folder"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_go_on_where_they_broke_off(tmp_path, kind, workers):
    folder_of(tmp_path / "data", 30)
    (tmp_path / "data/b/c/i005.png").write_bytes(b"bad")

    def batches(first):
        place = ["--data-dir", tmp_path / "data"] if kind == "folder" else []
        run = make_run(tmp_path, "--data", kind, *place, "--flip", "--workers", workers)
        return list(run.batches(first, train.Recipe(10, 8, 0)))
    before = torch.get_rng_state()
    whole, late = batches(0), batches(7)
    assert torch.equal(torch.get_rng_state(), before)  # else a run that goes on would learn from other noise
    assert len(whole) == 10 and all(images.shape == (8, 32, 32, 3) and images.max() <= 1 for images, _ in whole)
    for (images, captions), (same, same_captions) in zip(whole[7:], late, strict=True):
        assert torch.equal(images, same) and captions == same_captions


@pytest.mark.parametrize("kind, make, options", [("folder", folder_of, ["--workers", "2", "--no-flip"]),
                                                 ("coco", coco_folder, []), ("cifar10", cifar_folder, [])])
def test_every_format_trains(tmp_path, kind, make, options, monkeypatch):
    place = make(tmp_path / "data", 20) if kind == "folder" else make(tmp_path / "data")
    monkeypatch.setitem(train.PRESETS, "cifar" if kind == "cifar10" else "tiny", MICRO)
    train.main(["--run", str(tmp_path / "run"), "--data", kind, "--data-dir", str(place), "--image-size", "32",
                "--steps", "2", "--batch-size", "4", "--cache", "64", *options])
    assert {path.stem for path in (tmp_path / "run").glob("*.pt")} == {*train.TRAIN, "clip"}
