"""Every way to generate and edit images keeps its promises, with a small model of random weights."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample as script
import train
from small import BLUE, RED, last_words, make_model, make_run, odd_images, one_core, shapes  # noqa: F401
from wuerstchen import add_noise, generators, normal_noise, sample

PROMPTS = ["a small red circle", "a big blue star", "a green cross above a pink circle"]
FEW = dict(steps=(4, 3))
OTHER = dict(negative="a red star", guidance=(3.0, 1.5), sampler="ddim")  # than the defaults


@pytest.fixture(scope="module")
def model():
    return make_model().requires_grad_(False)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run, with images and a mask beside it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", model)
    for name, image in zip("ab", shapes(2)):
        script.to_pil(image).save(run / f"{name}.png")
    Image.fromarray(np.uint8([[0] * 32 + [255] * 32] * 64)).save(run / "half.png")
    (run / "cut.png").write_bytes((run / "a.png").read_bytes()[:-100])
    return run


def run_sample(run, *command):  # what sample.py writes -> array (H, W, 3)
    script.main([*map(str, command), *f"--run {run} --out {run}/out.png --steps-c 4 --steps-b 3".split()])
    return np.array(Image.open(run / "out.png")).astype(int)


def close(x, y):  # equal but for rounding, which differs from batch to batch
    return x.shape == y.shape and (x - y).abs().max() < 1e-3


def spy(monkeypatch, model, name):
    """-> a list that will hold arguments, options and result of each call of one of the model's methods"""
    calls, method = [], getattr(model, name)
    monkeypatch.setattr(model, name, lambda *args, **options: calls.append(
        (args, options, method(*args, **options))) or calls[-1][2])
    return calls


def test_a_seed_gives_the_same_image_in_every_batch(model):
    together = model.generate(PROMPTS, seed=[5, 6, 7], **FEW)
    for i, prompt in enumerate(PROMPTS):
        assert close(model.generate([prompt], seed=5 + i, **FEW), together[i:i + 1])
    assert close(model.generate(PROMPTS[::-1], seed=[7, 6, 5], **FEW).flip(0), together)
    assert not close(model.generate(PROMPTS[:1], seed=6, **FEW), together[:1])
    with pytest.raises(ValueError, match="3 images, but 2 seeds"):
        model.generate(PROMPTS, seed=[1, 2])


def test_guidance_is_the_runs_unless_given(run, monkeypatch):
    model = script.Wuerstchen.load(run)
    assert model.config.guidance == [2.0, 1.0]
    usual = model.generate(PROMPTS, seed=1, **FEW)
    assert torch.equal(model.generate(PROMPTS, guidance=(2.0, 1.0), seed=1, **FEW), usual)
    model.config.guidance = (3.0, 1.5)
    other, images = model.generate(PROMPTS, seed=1, **FEW), shapes(3)
    assert torch.equal(model.generate(PROMPTS, guidance=(3.0, 1.5), seed=1, **FEW), other) and not close(other, usual)
    for options in (dict(strength=0), dict(strength=0.5)):
        first, same = (script.redraw(model, images, PROMPTS, seed=1, **FEW, **options, **more)
                       for more in ({}, dict(guidance=(3.0, 1.5))))
        assert torch.equal(first, same)
    monkeypatch.setattr(script.Wuerstchen, "load", lambda *args: model)
    given = run_sample(run, "a star", "--seed", 1, "--cfg", 3, "--cfg-b", 1.5)
    assert (run_sample(run, "a star", "--seed", 1) == given).all()


@pytest.mark.parametrize("options", [FEW, FEW | OTHER])
def test_redraw_goes_from_reconstruct_to_generate(model, options):
    images, options = shapes(3), dict(seed=2, guidance=(4.0, 1.0)) | options
    _, varied = model.reconstruct(images, PROMPTS, **options | dict(steps=3, guidance=options["guidance"][1]))
    generated = model.generate(PROMPTS, **options)
    assert torch.equal(script.redraw(model, images, PROMPTS, 0, **options), varied)
    assert torch.equal(script.redraw(model, images, PROMPTS, 1, **options), generated)
    half = script.redraw(model, images, PROMPTS, 0.5, **options)
    assert not close(half, varied) and not close(half, generated)
    assert not close(half, script.redraw(model, images.flip(0), PROMPTS, 0.5, **options))  # the image matters


@pytest.mark.parametrize("strength, times", [(0.6, [0.6, 0.5, 0.25, 0]), (0.5, [0.5, 0.25, 0]), (0.1, [0.1, 0])])
def test_redraw_starts_at_its_strength(model, monkeypatch, strength, times):
    calls = spy(monkeypatch, model, "sample_c")
    script.redraw(model, shapes(1), PROMPTS[:1], strength, seed=[2], **FEW)
    x, seen, *_ = calls[0][0]
    noise = normal_noise(x.shape, generators(2, 1), "cpu")
    clean = (model.compress(shapes(1)) - model.c.latent_mean) / model.c.latent_std
    torch.testing.assert_close(x, add_noise(clean, noise, torch.tensor([strength])))
    assert seen.tolist() == pytest.approx(times)


def test_reconstruct_keeps_the_semantic_latents(model, monkeypatch):
    image, calls = shapes(1), spy(monkeypatch, model, "sample_b")
    _, varied = model.reconstruct(image.expand(3, -1, -1, -1), PROMPTS[:1] * 3, seed=[1, 2, 3], steps=3)
    torch.testing.assert_close(calls[0][0][2], model.compress(image).expand(3, -1, -1, -1))
    assert not close(varied[:1], varied[1:2]) and not close(varied[1:2], varied[2:])
    assert close(varied[1:2], model.reconstruct(image, PROMPTS[:1], seed=2, steps=3)[1])


def test_the_ends_of_mix_are_reconstructions(model):
    images, options = shapes(2), dict(steps=3, negative="a red star", guidance=1.5)
    mixed = script.mix(model, images, PROMPTS[0], 5, seed=4, **options)
    for i, image in ((0, images[:1]), (4, images[1:])):
        assert close(mixed[i:i + 1], model.reconstruct(image, PROMPTS[:1], seed=4, **options)[1])
    middle = model.from_semantic(model.compress(images).mean(dim=0, keepdim=True), PROMPTS[:1],
                                 generator=generators(4, 1), **options)
    assert close(mixed[2:3], middle) and not close(mixed[1:2], middle) and not close(mixed[:1], mixed[-1:])


def test_fill_leaves_the_rest_unchanged(model):
    images, masks = shapes(2), torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :, 32:], masks[1, 40:, :20] = True, True
    filled = script.fill(model, images, masks, PROMPTS[:2], seed=1, **FEW)
    by_a = model.a.decode(model.a.encode(images)).clamp(0, 1)
    near = torch.max_pool2d(masks[:, None].float(), 41, 1, 20)[:, 0].bool()
    assert near.float().mean() < 0.9 and (filled - by_a)[~near].abs().max() < 1e-5  # beyond the reach of A's decoder
    assert (filled - images)[~masks].abs().mean() < 1.1 * (by_a - images)[~masks].abs().mean()
    again = script.fill(model, images, masks, PROMPTS[:2], seed=2, **FEW)
    assert (filled - again)[masks].abs().mean() > 0.01 and (filled - again)[~near].abs().max() < 1e-5


@pytest.mark.parametrize("options", [FEW, FEW | OTHER])
def test_fill_all_is_generate_and_fill_nothing_is_stage_a(model, options):
    images, everything = shapes(2), torch.ones(2, 64, 64, dtype=torch.bool)
    filled = script.fill(model, images, everything, PROMPTS[:2], seed=1, **options)
    assert torch.equal(filled, model.generate(PROMPTS[:2], seed=1, **options))
    by_a = model.a.decode(model.a.encode(images)).clamp(0, 1)
    torch.testing.assert_close(script.fill(model, images, ~everything, PROMPTS[:2], **options), by_a)


def test_fill_generates_the_cells_that_the_mask_touches(model, monkeypatch):
    masks, images = torch.zeros(1, 64, 64, dtype=torch.bool), shapes(1)
    masks[0, 31, 45] = True
    c, b = spy(monkeypatch, model, "sample_c"), spy(monkeypatch, model, "sample_b")
    script.fill(model, images, masks, [""], **FEW)
    for ((x, *_), options, generated), known, cell in (
            (c[0], model.compress(images), [0, 0, 1]), (b[0], model.a.encode(images), [0, 7, 11])):
        there = options["after_step"](torch.full_like(x, torch.nan), None, torch.tensor(0.0))
        free = there.isnan().all(dim=-1)
        assert free.nonzero().tolist() == [cell] and not there[~free].isnan().any()
        torch.testing.assert_close(generated[~free], known[~free])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_kept_latents_are_put_back_at_the_noise_level_of_each_step(sampler):
    seen, known, noise, mask = [], *torch.randn(2, 2, 3, 4, 5), torch.rand(2, 3, 4, 1) > 0.5
    times = torch.tensor([1, 0.7, 0.3, 0])
    x = sample(lambda x, t, conditions: seen.append(x) or 0.9 * x, noise, times, (), sampler=sampler,
               after_step=script.keep(known, mask, noise))
    for t, now in list(zip(times, seen))[1:]:
        there = add_noise(known, noise, t.expand(2))
        assert torch.equal(torch.where(mask, now, 0), torch.where(mask, there, 0))
        assert not torch.isclose(now, there)[~mask.expand_as(now)].any()
    assert torch.equal(torch.where(mask, x, 0), torch.where(mask, known, 0))


@pytest.mark.parametrize("options", [{}, OTHER])
def test_film_ends_in_the_image_of_generate(model, monkeypatch, options):
    options, calls, seen = dict(steps=(5, 4), size=(64, 96)) | options, spy(monkeypatch, model, "from_semantic"), []
    film = script.film(model, PROMPTS[:2], [3, 4], **options)
    assert len(film) == 5 + 1 and all(frame.shape == (2, 64, 96, 3) for frame in film)
    generated = model.generate(PROMPTS[:2], seed=[3, 4], after_step=lambda x, x0, t: seen.append(x0) or x, **options)
    assert torch.equal(film[-1], generated)
    for (args, *_), x0 in zip(calls[:5], seen):
        torch.testing.assert_close(args[0], x0 * model.c.latent_std + model.c.latent_mean)
    other = model.generate(PROMPTS[:2], seed=[5, 6], **options)
    # The last estimate, with the same noise.
    assert (film[-2] - generated).abs().mean() < 0.2 * (other - generated).abs().mean()


@pytest.mark.parametrize("side, rows", [(64, 2), (640, 1)])  # large images are generated one at a time
def test_image_i_of_a_command_has_the_seed_plus_i(run, side, rows):
    size, images = ["--height", side, "--width", side, "--steps-b", 1], []
    grid = run_sample(run, *PROMPTS[:rows], "--count", 2, "--seed", 8, *size)
    for i in range(2 * rows):
        top, left = (4 + place * (side + 4) for place in divmod(i, 2))
        images.append(grid[top:top + side, left:left + side])
        assert abs(run_sample(run, PROMPTS[i // 2], "--seed", 8 + i, *size) - images[i]).max() <= 1
    assert abs(images[0] - images[1]).max() > 1


def test_the_script_runs_each_mode(run, model):
    a, b, half, prompt, right = *(run / f"{x}.png" for x in ("a", "b", "half")), PROMPTS[1], torch.arange(64) >= 32
    given, options = [model, shapes(1)], dict(prompts=[prompt], seed=5, **FEW, **OTHER)
    for command, generated in {
            (): model.generate(**options),
            ("--fast",): model.generate(**options | dict(steps=("fast", 3))),
            ("--height", 64, "--width", 96): model.generate(size=(64, 96), **options),
            ("--vary", a, "--count", 1): model.reconstruct(*given[1:], **options | dict(steps=3, guidance=1.5))[1],
            ("--redraw", a): script.redraw(*given, strength=0.6, **options),
            ("--redraw", a, "--strength", 0.3): script.redraw(*given, strength=0.3, **options),
            ("--fill", a, half): script.fill(*given, right.expand(1, 64, 64), **options)}.items():
        written = run_sample(run, prompt, *command, "--seed", 5, "--negative", OTHER["negative"], "--cfg", 3,
                             "--cfg-b", 1.5, "--sampler", "ddim")
        assert abs(written - np.array(script.to_pil(generated[0]))).max() <= 1, command
    assert run_sample(run, "--fill", a, half, prompt, "--height", 64, "--width", 96).shape == (64, 96, 3)
    assert (run_sample(run, prompt, "--film", run / "film.gif") == run_sample(run, prompt)).all()
    assert (film := Image.open(run / "film.gif")).n_frames == 5 and film.info["loop"] == 0
    reconstructed = run_sample(run, "--reconstruct", a, b)
    assert (reconstructed[4:68, 4:68] == np.array(Image.open(a))).all()
    told, untold = run_sample(run, prompt, "--reconstruct", a)[140:204, 4:68], reconstructed[140:204, 4:68]
    assert abs(told - run_sample(run, prompt, "--vary", a, "--count", 1)).max() <= 1 < abs(told - untold).max()
    for command, count in ((["--vary", a], 4), (["--mix", a, b], 7), (["--mix", a, b, "--count", 3], 3)):
        generated = run_sample(run, *command)
        assert generated.shape == (72, count * 68 + 4, 3) and abs(generated[4:68, 4:68] - untold).max() <= 1


def test_a_sheet_that_its_format_can_t_hold_is_written_as_png(run, monkeypatch):
    save = Image.Image.save

    def small(image, file, *args, **options):
        if image.width > 100 and str(file).endswith(".webp"):
            raise ValueError("over 16383 pixels")
        save(image, file, *args, **options)
    monkeypatch.setattr(Image.Image, "save", small)
    script.main(f"star circle --run {run} --out {run}/wide.webp --steps-c 1 --steps-b 1".split())
    assert Image.open(run / "wide.webp.png").width == 2 * 68 + 4


def test_a_prompt_that_is_too_long_is_reported(run, capsys):
    run_sample(run, PROMPTS[0], PROMPTS[1] + 30 * " and" + " a pink star")
    said, = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "24 tokens" in said and 'left out: "and ' in said and said.endswith('and a pink star"')


@pytest.mark.parametrize("command, message", [
    ("", "nothing to generate"), ("--redraw a.png", "nothing to generate"),
    ("--vary a.png --mix a.png b.png", "allowed"), ("a b --mix a.png b.png", "one PROMPT at most"),
    ("--fill a.png half.png cat --device mps", "--device mps: PyTorch"),
    ("cat --run none", "no none/config.json: train this run first"), ("--vary none.png", "none.png"),
    ("--vary options.json", "options.json"), ("--fill a.png cut.png cat", "truncated"),
    ("--vary a.png --height 100", "sides must be multiples of 32, not 100x64"),
    ("--fill a.png wide.png cat", "wide.png and a.png differ in aspect ratio: 200x100 and 64x64 pixels")])
def test_bad_commands_get_one_clear_line(run, command, message, monkeypatch):
    monkeypatch.chdir(run)
    Image.new("L", (200, 100)).save("wide.png")
    assert message in last_words("sample.py", "--run", ".", "--steps-c", 1, *filter(None, command.split(" ")))


def test_odd_images_look_as_in_a_viewer(tmp_path):
    for name, colour in odd_images(tmp_path).items():
        image = np.array(script.load_image(tmp_path / name, (32, 32))).astype(int)
        assert image.shape == (32, 32, 3)
        for x, y, expected in ((2, 16, colour), (29, 16, colour)) if colour else ((16, 2, RED), (16, 29, BLUE)):
            assert abs(image[y, x] - expected).max() <= 8, name
    assert script.load_image(np.zeros((20, 60, 3), np.uint8), (20, 40)).size == (40, 20)


@pytest.mark.parametrize("size", [(90, 60), (45, 30), (271, 180)])
def test_a_mask_is_scaled_and_cut_like_its_image(tmp_path, size):
    """White is generated anew; black and transparent pixels are kept, in all image modes."""
    Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
    white = (Image.new("L", size), Image.new("L", size, 255))
    for mask in white:
        mask.paste(255, (size[0] // 2, 0, *size))  # the right half
    clear = white[1].copy().convert("RGBA")
    clear.putalpha(white[0])  # white, but transparent on the left
    for mask in (white[0], white[0].convert("1"), white[0].convert("RGB"), clear, clear.convert("LA")):
        mask.save(tmp_path / "mask.png")
        loaded = script.load_mask(tmp_path / "image.png", tmp_path / "mask.png", (32, 32))
        assert loaded.shape == (32, 32) and loaded[:, 17:].all() and not loaded[:, :15].any()


def test_plot():
    """Points lie where the axes say, on a frame from (60, 24) to (450, 316)."""
    red, blue = (215, 48, 31), (43, 108, 176)  # of the first curve and the second
    for log, middle, height in ((False, 10, 24), (True, 10 ** 0.5, 170)):
        curves = {"a": [(0, 1), (50, middle), (100, 10)], "b": [(0, 1), (100, 1)]}
        image = train.plot(curves, "x", "y", log)
        assert image.getpixel((449, 25)) == red and image.getpixel((255, height)) == red
        assert image.getpixel((200, 316 if log else 287)) == blue  # an axis that is not logarithmic begins at 0
        circled = train.plot(curves, "x", "y", log, circles={"b": [(50, 10)]})
        assert [circled.getpixel((x, 24)) for x in (252, 255, 258)] == [blue, (255, 255, 255), blue]
    assert train.plot({"one": [(3, 3)]}, "x", "y").getpixel((447, 24)) == red  # a single point is a circle


def test_fill_needs_latents(model):
    tokens = SimpleNamespace(config=replace(model.config, b=replace(model.config.b, token_width=8)))
    with pytest.raises(script.UserError, match="tokens"):
        script.fill(tokens, torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64) > 0, ["a red star"])
