"""Every diffusion formula against values worked out by hand, and the order of the random numbers."""
import math

import pytest
import torch
from torch.testing import assert_close

from test_networks import CONFIG
from wuerstchen import (Wuerstchen, add_noise, alpha_bar, ddim_step, ddpm_step, diffusion_loss, generators,
                        normal_noise, predict_x0, sample, timesteps, training_times)


def by_hand(t, s=0.008):
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def test_alpha_bar():
    expected = [0.9999, by_hand(0.25), 0.493844, by_hand(0.75), 0.0001]  # clamped at both ends
    assert_close(alpha_bar(torch.linspace(0, 1, 5)), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_add_noise_and_predict_x0():
    x0, eps, t, some = torch.full((2, 1), 2.0), torch.full((2, 1), -1.0), torch.tensor([0.0, 0.7]), by_hand(0.7)
    expected = [2 * math.sqrt(0.9999) - math.sqrt(0.0001), 2 * math.sqrt(some) - math.sqrt(1 - some)]
    assert_close(add_noise(x0, eps, t)[:, 0], torch.tensor(expected))
    assert_close(predict_x0(torch.tensor(expected[1]), eps[1], t[1]), x0[1])


def test_training_times(monkeypatch):
    assert (training_times(100_000, "cpu") == 1).float().mean().item() == pytest.approx(0.075, abs=0.005)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 0.5, 1.0]))
    assert_close(training_times(3, "cpu").sort()[0], torch.tensor([0.001, 0.541, 1.0]))


def test_p2_weight():
    """(1 + signal/noise)^-1 is 1 - alpha_bar."""
    predicted = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]])  # squared errors 1 and 4/3
    loss = diffusion_loss(torch.zeros(2, 3), predicted, torch.tensor([0.5, 1.0]))
    assert loss.tolist() == pytest.approx([(1 - by_hand(0.5)) * 1, (1 - 0.0001) * 4 / 3], rel=1e-5)


def test_steps():
    x, eps, z, t, t_next = map(torch.tensor, (0.7, 0.3, -0.5, 0.8, 0.6))
    now, after, alpha = by_hand(0.8), by_hand(0.6), by_hand(0.8) / by_hand(0.6)
    mean = (0.7 - (1 - alpha) * 0.3 / math.sqrt(1 - now)) / math.sqrt(alpha)
    std = math.sqrt((1 - alpha) * (1 - after) / (1 - now))
    assert ddpm_step(x, eps, t, t_next, z).item() == pytest.approx(mean + std * -0.5, rel=1e-5)
    assert ddpm_step(x, eps, t, 0 * t, z) == ddpm_step(x, eps, t, 0 * t, 0 * z)  # the last step adds no noise
    expected = math.sqrt(after) * (0.7 - math.sqrt(1 - now) * 0.3) / math.sqrt(now) + math.sqrt(1 - after) * 0.3
    assert ddim_step(x, eps, t, t_next).item() == pytest.approx(expected, rel=1e-5)


def test_timesteps():
    assert timesteps(4, "cpu").tolist() == [1, 0.75, 0.5, 0.25, 0]
    fast = [i / 57 for i in range(57, 37, -1)] + [i / 15 for i in range(9, -1, -1)]  # 19 steps to 2/3, 10 more to 0
    assert_close(timesteps("fast", "cpu"), torch.tensor(fast))


def test_noise_and_its_generators():
    """Drawn in NCHW order; with a list of seeds, an image does not depend on what else is in the batch."""
    draw = lambda seed: normal_noise((2, 3, 4, 5), generators(seed, 2), "cpu").permute(0, 3, 1, 2)
    randn = lambda seed, count: torch.randn(count, 5, 3, 4, generator=torch.Generator().manual_seed(seed))
    assert generators(None, 2) is None and not torch.equal(draw(None), draw(None))
    assert torch.equal(draw(0), randn(0, 2)) and torch.equal(draw([7, 0]), torch.cat([randn(7, 1), randn(0, 1)]))
    for seeds in ([1], [1, 2, 3]):
        with pytest.raises(ValueError, match=f"2 images, but {len(seeds)} seeds"):
            generators(seeds, 2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_with_a_perfect_network_finds_x0(sampler):
    x0 = torch.linspace(-1, 1, 12).view(1, 2, 3, 2)
    network = lambda x, t, _: (x - alpha_bar(t[0]).sqrt() * x0) / (1 - alpha_bar(t[0])).sqrt()
    x = sample(network, torch.randn(4, 2, 3, 2), timesteps(20, "cpu"), (), sampler=sampler)
    assert_close(x, x0.expand(4, 2, 3, 2), atol=0.05, rtol=0)


@pytest.mark.parametrize("guidance, factors", [(0, (0.5, 3)), (0.5, (0.75, 2.5)), (1, (1, 2)), (4, (2.5, -1))])
def test_guidance_by_hand(guidance, factors):
    """eps is x times the condition: 1 and 2, unconditional 0.5 and 3. factors: 0.5 + guidance·0.5, 3 - guidance·1"""
    seen, x, times = [], torch.tensor([10.0, 20.0]).view(2, 1, 1, 1), torch.tensor([0.6, 0.0])
    network = lambda x, t, c: seen.append(t) or x * c.view(-1, 1, 1, 1)
    conditions = torch.tensor([1.0, 2.0] if guidance == 1 else [1, 2, 0.5, 3])
    expected = ddpm_step(x, x * torch.tensor(factors).view(2, 1, 1, 1), *times, 0)
    assert_close(sample(network, x, times, conditions, guidance), expected)
    assert_close(seen, [times[0].expand(len(conditions))])


def test_after_step_replaces_x():
    seen, x, times = [], torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.9, 0.5, 0.0])
    after_step = lambda *now: seen.append(now) or 5 * now[0]
    end = sample(lambda x, *_: 0.3 * x, x, times, (), sampler="ddim", after_step=after_step)
    for now, t, t_next in zip(seen, times[:-1], times[1:], strict=True):
        assert_close(now, (ddim_step(x, 0.3 * x, t, t_next), predict_x0(x, 0.3 * x, t), t_next))
        x = 5 * now[0]
    assert torch.equal(end, x)


def test_generate_draws_random_numbers_in_a_fixed_order():
    """Stage C's start, then one draw per step, the unused last one too; then the same for Stage B."""
    model, seen = Wuerstchen(CONFIG, lambda prompts: (torch.zeros(2, 8).long(), torch.ones(2, 8) > 0)).eval(), []
    model.b.predict_eps = model.c.predict_eps = lambda x, t, conditions: seen.append(x) or 0.1 * x
    model.generate(["", ""], steps=(3, 2), guidance=(1, 1), seed=3)
    generator, expected = torch.Generator().manual_seed(3), []
    for times, shape in ((timesteps(3, "cpu"), (2, 2, 2, 6)), (timesteps(2, "cpu"), (2, 16, 16, 4))):
        x = normal_noise(shape, generator, "cpu")
        for t, t_next in zip(times[:-1], times[1:]):
            expected.append(x)
            x = ddpm_step(x, 0.1 * x, t, t_next, normal_noise(shape, generator, "cpu"))
    assert_close(seen, expected)
