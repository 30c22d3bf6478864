"""The tour: every picture is made and in the page, even for a model that generates nothing sensible."""
import re

import pytest
import torch
from PIL import Image

import tour
from small import make_model, make_run, one_core  # noqa: F401


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("runs") / "random", tmp_path_factory.mktemp("tour")
    make_run(folder, make_model())
    (folder / "sheets").mkdir()
    for step in (1, 2, 3, 4):
        Image.new("RGB", (8, 8)).save(folder / "sheets" / f"c_{step:06d}.png")
    tour.main(["a <big> red star", "--run", str(folder), "--out", str(out)])
    return out, (out / "index.html").read_text("utf-8")


def test_every_picture_is_in_the_page(page):
    out, text = page
    pictures = sorted(out.glob("*.png"))
    for number in range(1, len(tour.STATIONS) + 1):
        assert [path for path in pictures if path.name.startswith(f"{number}_")], number
    assert text.count('<img alt="') == len(pictures) and text.count("<h2>") == len(tour.STATIONS)
    assert "a &lt;big&gt; red star" in text and 'alt=""' not in text
    assert not re.search(r'(src|href)="(?!data:image/png)', text)  # nothing from elsewhere
    assert all(f"Stage C at step {i}." in text for i in (1, 3, 4))


def test_links_name_the_line_of_each_function(page):
    links = re.findall(r"(\w+\.py|tokenizer/__init__\.py): ([\w.]+) \(line (\d+)\)", page[1])
    assert len(links) >= 20
    for file, name, line in links:
        here = (tour.HERE / file).read_text("utf-8").splitlines()[int(line) - 1:][:3]
        assert any(re.search(rf"(def|class) {name.split('.')[-1]}\b", one) for one in here), (file, name, line)


def test_colours_and_tables():
    shades = tour.colours(torch.tensor([1.0, 0.0, -1.0, -5.0]), 1)
    assert shades[1].tolist() == [1, 1, 1] and shades[0, 0] > shades[0, 2] and shades[2, 2] > shades[2, 0]
    assert torch.equal(shades[2], shades[3])
    image = tour.table(torch.tensor([[1.0, -1.0]]), ["row"], ["a", "b"])
    red, blue = (image.getpixel((image.width - x, image.height - 4)) for x in (90, 40))
    assert red[0] > 1.5 * red[2] and blue[2] > 1.5 * blue[0]
