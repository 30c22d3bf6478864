"""Every way of drawing, for what it promises; on a small model with random weights."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample as script
from small import make_model, make_run, one_core, shapes
from train import to_picture
from wuerstchen import FAST_TIMES, add_noise, alpha_bar, normal_noise, sample, timesteps

PROMPTS = ["a small red circle", "a big blue star", "a green cross above a pink circle"]
FEW = dict(steps_c=4, steps_b=3)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run, and pictures and masks beside it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", model)
    for name, image in zip("ab", shapes(2)):
        to_picture(image).save(run / f"{name}.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    for name, mask in dict(half=half, black=0 * half, small=half[:32, 16:48]).items():
        Image.fromarray(mask).save(run / f"{name}.png")
    return run


def draw(run, *command):
    """What sample.py writes -> array (H, W, 3)"""
    script.main([*map(str, command), "--run", str(run), "--out", str(run / "out.png"), "--steps-c", "4",
                 "--steps-b", "3"])
    return np.array(Image.open(run / "out.png")).astype(int)


def close(x, y):
    """Equal but for rounding, which differs from batch to batch."""
    return x.shape == y.shape and (x - y).abs().max() < 1e-3


def perfect(picture):
    """A network that knows the one picture there is."""
    def network(x, t):
        signal = alpha_bar(t).view(-1, 1, 1, 1)
        return (x - signal.sqrt() * picture) / (1 - signal).sqrt()
    return network


# Seeds, times, callbacks: the loop.


def test_a_picture_keeps_to_its_seed_in_every_batch(model):
    together = model.generate(PROMPTS, seed=[5, 6, 7], **FEW)
    for i, prompt in enumerate(PROMPTS):
        assert close(model.generate([prompt], seed=5 + i, **FEW), together[i:i + 1])
    assert close(model.generate(PROMPTS[::-1], seed=[7, 6, 5], **FEW).flip(0), together)
    assert not close(model.generate(PROMPTS[:1], seed=6, **FEW), together[:1])
    with pytest.raises(ValueError, match="3 pictures, but 2 seeds"):
        model.generate(PROMPTS, seed=[1, 2])


def test_picture_i_of_a_command_has_the_seed_plus_i(run):
    grid = draw(run, *PROMPTS[:2], "--count", 2, "--seed", 8)
    for i, prompt in enumerate([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]):
        top, left = 4 + i // 2 * 68, 4 + i % 2 * 68
        alone = draw(run, prompt, "--seed", 8 + i)
        assert abs(alone - grid[top:top + 64, left:left + 64]).max() <= 1
    assert abs(draw(run, PROMPTS[0], "--seed", 9) - draw(run, PROMPTS[0], "--seed", 8)).max() > 1


def test_own_timesteps(model, run):
    assert timesteps([0.9, 0.5, 0], "cpu").tolist() == pytest.approx([0.9, 0.5, 0])
    even = model.generate(PROMPTS, seed=0, steps_c=4, steps_b=2)
    assert torch.equal(model.generate(PROMPTS, seed=0, steps_c=[1, 0.75, 0.5, 0.25, 0], steps_b=[1, 0.5, 0]), even)
    seen = []
    model.generate(PROMPTS[:1], steps_c=FAST_TIMES, steps_b=1, seed=0, callback=lambda *now: seen.append(now))
    assert len(seen) == 29 + 1
    plain = draw(run, PROMPTS[0])
    assert (draw(run, PROMPTS[0], "--timesteps", "1,0.75,0.5,0.25,0") == plain).all()
    assert (draw(run, PROMPTS[0], "--timesteps", "1,0.9,0.1,0") != plain).any()


@pytest.mark.parametrize("bad", [[1, 0.5], [0.5, 1, 0], [1, 0.5, 0.5, 0], [1.1, 0.5, 0], [1, 0.5, -0.1], [0], [],
                                 [1, float("nan"), 0]])
def test_bad_timesteps(bad):
    with pytest.raises(ValueError, match="timesteps must fall from at most 1 to 0, not"):
        timesteps(bad, "cpu")
    with pytest.raises(ValueError, match="at least 1 step"):
        timesteps(0, "cpu")


def test_callback(model):
    """Called after every step of both stages, with what they take the clean latents for."""
    seen, picture = [], torch.linspace(-1, 1, 12).view(1, 2, 3, 2)
    sample(perfect(picture), (4, 2, 3, 2), timesteps(5, "cpu"), (), callback=lambda *now: seen.append(now))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t.item() for _, t, _ in seen] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    for _, _, x in seen:
        torch.testing.assert_close(x, picture.expand(4, 2, 3, 2), atol=2e-3, rtol=0)
    seen.clear()
    model.generate(PROMPTS, seed=0, callback=lambda step, t, x, stage: seen.append((stage, step, x.shape)), **FEW)
    assert seen == [("c", i, (3, 2, 2, 16)) for i in range(4)] + [("b", i, (3, 16, 16, 4)) for i in range(3)]


def test_callback_sees_semantic_latents_as_the_compressor_gives_them(model):
    seen = []
    semantic = model.sample_c(PROMPTS, generator=torch.Generator().manual_seed(0), sampler="ddim",
                              callback=lambda step, t, x: seen.append(x))
    assert (seen[-1] - semantic).std() < 0.05 * semantic.std()


def test_start_is_noised_to_the_first_time():
    seen, start = [], torch.randn(2, 3, 4, 5)
    sample(lambda x, t: seen.append(x) or x, start.shape, torch.tensor([0.4, 0]), (), start=start,
           generator=torch.Generator().manual_seed(1))
    noise = normal_noise(start.shape, torch.Generator().manual_seed(1), "cpu")
    torch.testing.assert_close(seen[0], add_noise(start, noise, torch.tensor([0.4, 0.4])))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_kept_latents_are_put_back_at_the_level_of_each_step(sampler):
    seen, known, mask = [], torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 1) > 0.5
    times = torch.tensor([1, 0.7, 0.3, 0])
    x = sample(lambda x, t: seen.append(x) or 0.9 * x, known.shape, times, (), sampler=sampler, keep=(known, mask),
               generator=torch.Generator().manual_seed(1))
    noise = normal_noise(known.shape, torch.Generator().manual_seed(1), "cpu")
    for t, now in list(zip(times, seen))[1:]:
        there = add_noise(known, noise, t.expand(2))
        assert torch.equal(torch.where(mask, now, 0), torch.where(mask, there, 0))
        assert not torch.isclose(now, there)[~mask.expand_as(now)].any()
    assert torch.equal(torch.where(mask, x, 0), torch.where(mask, known, 0))


# From pictures.


def test_redraw_goes_from_the_reconstruction_to_plain_drawing(model):
    images = shapes(3)
    plain, rebuilt = model.generate(PROMPTS, seed=2, **FEW), model.reconstruct(images, PROMPTS, seed=2, **FEW)[1]
    assert torch.equal(model.redraw(images, PROMPTS, 0, seed=2, **FEW), rebuilt)
    assert torch.equal(model.redraw(images, PROMPTS, 1, seed=2, **FEW), plain)
    half = model.redraw(images, PROMPTS, 0.5, seed=2, **FEW)
    assert not close(half, rebuilt) and not close(half, plain)
    assert not close(half, model.redraw(images.flip(0), PROMPTS, 0.5, seed=2, **FEW))  # the picture matters


def test_redraw_begins_at_its_strength(model):
    for strength, times in ((0.6, [0.6, 0.5, 0.25]), (0.5, [0.5, 0.25]), (0.1, [0.1])):
        seen = []
        model.redraw(shapes(1), PROMPTS[:1], strength, seed=2, **FEW,
                     callback=lambda step, t, x, stage: seen.append((stage, t.item())))
        assert [t for stage, t in seen if stage == "c"] == pytest.approx(times)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="strength must be between 0 and 1"):
            model.redraw(shapes(1), PROMPTS[:1], bad)


def test_redraw_with_little_noise_stays_close(model):
    """What C begins with is the picture's semantic latents, in C's units."""
    semantic = model.compress(shapes(3)).detach()
    model_c = model.sample_c(PROMPTS, steps=[1, 0], start=semantic, strength=0.002, guidance=1, sampler="ddim",
                             generator=torch.Generator().manual_seed(0))
    assert (model_c - semantic).abs().max() < 0.2 * semantic.std()


def test_vary_keeps_the_semantic_latents(model, monkeypatch):
    image, given = shapes(1), []
    sample_b = model.sample_b
    monkeypatch.setattr(model, "sample_b", lambda semantic, *more, **o: given.append(semantic) or
                        sample_b(semantic, *more, **o))
    varied = model.vary(image.expand(3, -1, -1, -1), seed=[1, 2, 3], **FEW)
    torch.testing.assert_close(given[0], model.compress(image).expand(3, -1, -1, -1))
    assert not close(varied[:1], varied[1:2]) and not close(varied[1:2], varied[2:])
    assert close(varied[1:2], model.reconstruct(image, seed=2, **FEW)[1])


def test_mix_ends_in_the_reconstructions(model):
    images = shapes(2)
    strip = model.mix(images, 5, seed=4, **FEW)
    assert len(strip) == 5
    for end, image in ((strip[:1], images[:1]), (strip[-1:], images[1:])):
        assert close(end, model.reconstruct(image, seed=4, **FEW)[1])
    middle = model.generate([""], start=model.compress(images).mean(dim=0, keepdim=True), strength=0, seed=4, **FEW)
    assert close(strip[2:3], middle) and not close(strip[1:2], middle) and not close(strip[:1], strip[-1:])


def halves():
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :, 32:], masks[1, 40:, :20] = True, True
    return masks


def test_fill_leaves_the_rest(model):
    images, masks = shapes(2), halves()
    filled = model.fill(images, masks, PROMPTS[:2], seed=1, **FEW)
    by_a = model.a.decode(model.a.encode(images)).detach().clamp(0, 1)
    near = F.max_pool2d(masks[:, None].float(), 41, 1, 20)[:, 0].bool()
    assert near.float().mean() < 0.9
    assert (filled - by_a)[~near].abs().max() < 1e-5  # beyond the reach of Stage A's decoder: exactly
    away, error = (filled - images)[~masks].abs().mean(), (by_a - images)[~masks].abs().mean()
    assert away < 1.1 * error
    again = model.fill(images, masks, PROMPTS[:2], seed=2, **FEW)
    assert (filled - again)[masks].abs().mean() > 0.01 and (filled - again)[~near].abs().max() < 1e-5


def test_fill_all_is_plain_drawing_and_fill_nothing_is_stage_a(model):
    images = shapes(2)
    everything = torch.ones(2, 64, 64, dtype=torch.bool)
    plain = model.generate(PROMPTS[:2], seed=1, **FEW)
    assert torch.equal(model.fill(images, everything, PROMPTS[:2], seed=1, **FEW), plain)
    by_a = model.a.decode(model.a.encode(images)).detach().clamp(0, 1)
    torch.testing.assert_close(model.fill(images, ~everything, PROMPTS[:2], **FEW), by_a)
    with pytest.raises(ValueError, match="the mask is 64x32 pixels, the picture 64x64"):
        model.fill(images, everything[:, :32], PROMPTS[:2])


def test_fill_redraws_the_cells_that_the_mask_touches(model, monkeypatch):
    masks, given = torch.zeros(1, 64, 64, dtype=torch.bool), {}
    masks[0, 31, 45] = True
    monkeypatch.setattr(model, "generate", lambda prompts, **options: given.update(options))
    model.fill(shapes(1), masks, [""])
    assert (~given["keep_c"][1]).nonzero().tolist() == [[0, 0, 1, 0]]
    assert (~given["keep_b"][1]).nonzero().tolist() == [[0, 7, 11, 0]]
    torch.testing.assert_close(given["keep_c"][0], model.compress(shapes(1)))
    torch.testing.assert_close(given["keep_b"][0] * model.a.scale, model.a.encode(shapes(1)))


def test_fill_keeps_semantic_cells_too(model, monkeypatch):
    images, given, sample_b = shapes(2), [], model.sample_b
    monkeypatch.setattr(model, "sample_b", lambda semantic, *more, **o: given.append(semantic) or
                        sample_b(semantic, *more, **o))
    model.fill(images, halves(), PROMPTS[:2], seed=1, **FEW)
    same = (given[0] - model.compress(images)).abs().amax(dim=-1) < 1e-4
    assert same.tolist() == [[[True, False], [True, False]], [[True, True], [False, True]]]


def test_film_ends_in_the_picture(model):
    options = dict(steps_c=5, steps_b=3)
    film = model.film(PROMPTS[:2], [3, 4], steps_film=3, **options)
    assert len(film) == 5 + 1 and all(frame.shape == (2, 64, 64, 3) for frame in film)
    picture = model.generate(PROMPTS[:2], seed=[3, 4], **options)
    assert torch.equal(film[-1], picture)
    # Drawn from the same noise, the last estimate is all but the picture.
    other = model.generate(PROMPTS[:2], seed=[5, 6], **options)
    assert (film[-2] - picture).abs().mean() < 0.2 * (other - picture).abs().mean()
    assert (film[0] - film[-1]).abs().mean() > 3 * (film[-2] - film[-1]).abs().mean()


# The script.


def test_the_script_draws_each_way(run):
    gif = run / "film.gif"
    assert (draw(run, PROMPTS[0], "--film", gif, "--seed", 3) == draw(run, PROMPTS[0], "--seed", 3)).all()
    with Image.open(gif) as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
    a, b, strip = run / "a.png", run / "b.png", lambda n: (64 + 8, n * 68 + 4, 3)
    rebuilt = draw(run, "--reconstruct", a, b)
    assert rebuilt.shape[0] > 3 * 68 and rebuilt.shape[1] == 2 * 68 + 4
    assert (rebuilt[4:68, 4:68] == np.array(Image.open(a))).all()
    rebuilt = rebuilt[2 * 68 + 4:3 * 68, 4:68]
    varied, mixed = draw(run, "--vary", a), draw(run, "--mix", a, b)
    assert varied.shape == strip(4) and mixed.shape == strip(7)
    for drawn in (varied, mixed):
        assert abs(drawn[4:68, 4:68] - rebuilt).max() <= 1
    assert draw(run, "--mix", a, b, "--count", 3).shape == strip(3)
    prompt = PROMPTS[1]
    assert abs(draw(run, "--redraw", a, prompt, "--strength", 1) - draw(run, prompt)).max() <= 1
    assert abs(draw(run, "--redraw", a, prompt) - draw(run, "--redraw", a, prompt, "--strength", 0.6)).max() == 0
    filled = draw(run, "--fill", a, run / "half.png", prompt, "--seed", 1)
    assert abs(filled - draw(run, "--fill", a, run / "half.png", prompt, "--seed", 2))[:, :12].max() <= 1
    assert draw(run, "--fill", a, run / "half.png", prompt, "--height", 64, "--width", 96).shape == (64, 96, 3)


@pytest.mark.parametrize("command, message", [
    ("cat --timesteps 1,0.5", "timesteps must fall from at most 1 to 0, not 1, 0.5"),
    ("--fill a.png small.png cat", "small.png must be as large as the picture"),
    ("--fill a.png black.png cat", "black.png has no white"),
    ("--fill a.png options.json cat", "can't read"),
    ("--redraw a.png cat --strength 1.5", "strength must be between 0 and 1, not 1.5"),
    ("--vary a.png --height 100", "picture sides must be multiples of 32, not 100x64"),
    ("--mix a.png none.png", "can't read"),
])
def test_bad_input(run, command, message, monkeypatch):
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match=message) as caught:
        script.main([*command.split(), "--run", ".", "--steps-b", "1"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command, message", [
    ("--fill a.png half.png", "--fill needs a PROMPT"), ("--redraw a.png", "--redraw needs a PROMPT"),
    ("--vary a.png --mix a.png b.png", "not allowed with"), ("cat --timesteps 1,x,0", "invalid times value"),
    ("cat --official . --score", "need a run of one's own"), ("--score --score-count 1", "at least 2"),
    ("cat --film film.xyz", "no such folder, or no kind of picture: film.xyz"), ("cat --out none/a.png", "none/a.png")])
def test_bad_commands(command, message, capsys):
    with pytest.raises(SystemExit):
        script.main(command.split())
    assert message in capsys.readouterr().err.splitlines()[-1]
