"""Every formula of the diffusion against values worked out by hand."""
import math

import pytest
import torch

from wuerstchen import (add_noise, alpha_bar, ddim_step, ddpm_step, diffusion_loss, normal_noise, sample,
                        training_times)


def by_hand(t, s=0.008):
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2


def test_alpha_bar():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    expected = [0.9999, by_hand(0.25), by_hand(0.5), by_hand(0.75), 0.0001]  # clamped at both ends
    torch.testing.assert_close(alpha_bar(t), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert alpha_bar(torch.tensor(0.5)).item() == pytest.approx(0.493844, abs=1e-5)
    assert (alpha_bar(torch.linspace(0, 1, 100)).diff() <= 0).all()


def test_add_noise():
    x, noise, t = torch.tensor([[2.0], [2.0]]), torch.tensor([[-1.0], [-1.0]]), torch.tensor([0.0, 0.5])
    half = by_hand(0.5)
    expected = [2 * math.sqrt(0.9999) - math.sqrt(0.0001), 2 * math.sqrt(half) - math.sqrt(1 - half)]
    torch.testing.assert_close(add_noise(x, noise, t)[:, 0], torch.tensor(expected))


def test_training_times():
    t = training_times(100_000, "cpu")
    assert t.min().item() == pytest.approx(0.001, abs=1e-4) and t.max() == 1
    assert (t == 1).float().mean().item() == pytest.approx(0.081 / 1.08, abs=0.005)  # of U·1.08 + 0.001 beyond 1
    assert t.median().item() == pytest.approx(0.541, abs=0.01)


def test_p2_weight():
    """(1 + signal/noise)^-1 is 1 - alpha_bar."""
    noise, t = torch.zeros(2, 3), torch.tensor([0.5, 1.0])
    predicted = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]])  # squared errors 1 and 4/3
    expected = ((1 - by_hand(0.5)) * 1 + (1 - 0.0001) * 4 / 3) / 2
    assert diffusion_loss(noise, predicted, t).item() == pytest.approx(expected, rel=1e-5)


def test_ddpm_step():
    x, noise, fresh = torch.tensor([0.7]), torch.tensor([0.3]), torch.tensor([-0.5])
    now, after = by_hand(0.8), by_hand(0.6)
    alpha = now / after
    mean = (0.7 - (1 - alpha) * 0.3 / math.sqrt(1 - now)) / math.sqrt(alpha)
    std = math.sqrt((1 - alpha) * (1 - after) / (1 - now))
    step = ddpm_step(x, noise, torch.tensor(0.8), torch.tensor(0.6), fresh)
    assert step.item() == pytest.approx(mean + std * -0.5, rel=1e-5)
    # The last step adds no noise.
    last = [ddpm_step(x, noise, torch.tensor(0.2), torch.tensor(0.0), f) for f in (fresh, fresh + 9)]
    assert last[0] == last[1]


def test_ddim_step():
    x, noise = torch.tensor([0.7]), torch.tensor([0.3])
    now, after = by_hand(0.8), by_hand(0.6)
    clean = (0.7 - math.sqrt(1 - now) * 0.3) / math.sqrt(now)
    step = ddim_step(x, noise, torch.tensor(0.8), torch.tensor(0.6))
    assert step.item() == pytest.approx(math.sqrt(after) * clean + math.sqrt(1 - after) * 0.3, rel=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_with_a_perfect_network_finds_the_picture(sampler):
    """Where every picture is the same, the noise is known exactly and sampling must arrive there."""
    picture = torch.linspace(-1, 1, 12).view(1, 2, 3, 2)

    def network(x, t):
        signal = alpha_bar(t).view(-1, 1, 1, 1)
        return (x - signal.sqrt() * picture) / (1 - signal).sqrt()

    x = sample(network, (4, 2, 3, 2), torch.linspace(1, 0, 21), (), sampler=sampler)
    torch.testing.assert_close(x, picture.expand(4, 2, 3, 2), atol=0.05, rtol=0)


def test_guidance_extrapolates_from_the_unconditional():
    seen = []

    def network(x, t, condition):
        seen.append(condition)
        return condition.view(-1, 1, 1, 1).expand_as(x)

    times = torch.tensor([1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    guided = sample(network, (2, 1, 1, 1), times, (torch.tensor([1.0, 2.0, 0.5, 0.5]),), 4.0, generator)
    generator = torch.Generator().manual_seed(0)
    plain = sample(network, (2, 1, 1, 1), times, (torch.tensor([0.5 + 4 * 0.5, 0.5 + 4 * 1.5]),), 1.0, generator)
    torch.testing.assert_close(guided, plain)
    assert len(seen[0]) == 4 and len(seen[1]) == 2


def test_random_numbers_come_in_one_order():
    """First the start, then one draw a step, the unused last one too, all in NCHW order."""
    shape, generator = (2, 3, 4, 5), torch.Generator().manual_seed(3)
    sample(lambda x, t: x, shape, torch.linspace(1, 0, 4), (), generator=generator)
    reference = torch.Generator().manual_seed(3)
    for _ in range(4):
        torch.randn(2, 5, 3, 4, generator=reference)
    assert torch.equal(torch.randn(7, generator=generator), torch.randn(7, generator=reference))
    drawn = normal_noise(shape, torch.Generator().manual_seed(5), "cpu")
    expected = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn.permute(0, 3, 1, 2), expected)
