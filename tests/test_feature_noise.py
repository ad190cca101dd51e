"""Noise modes: what is added to a latent, in which order times are walked, and that DDIM inversion inverts."""

import pytest
import torch

from dive_lib.feature_noise import MODES, Noise, fixed_noise, free_noise, invert, noisy_latents, time_steps
from dive_lib.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


def images(count=3, seed=0):
    return torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) / 127.5 - 1


def clean(count=3):
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def gaussian(z, t):
    """The ideal prediction for data that are standard normal: under it DDIM leaves a latent as it is."""
    return (1 - float(SCHEDULE.alphas_cumprod[t])) ** 0.5 * z


def never(z, t):
    raise AssertionError("the network is not needed here")


def at(mode, times, predict=never, **settings):
    return noisy_latents(clean(), images(), times, Noise(mode, **settings), SCHEDULE, predict)


def test_ddpm_adds_the_noise_of_the_published_seed_to_every_image():
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(8888))
    expected = SCHEDULE.add_noise(clean(), noise.expand(3, -1, -1, -1), torch.full((3,), 400))
    assert torch.equal(at("ddpm", [400]), expected) and torch.equal(fixed_noise((4, 4, 4)), noise)
    assert not torch.equal(at("ddpm", [400], seed=1), expected)


def test_uniform_noise_is_the_same_at_every_place():
    added = at("uniform", [400]) - SCHEDULE.add_noise(clean(), torch.zeros(3, 4, 4, 4), torch.full((3,), 400))
    torch.testing.assert_close(added, added[:1, :, :1, :1].expand(3, 4, 4, 4))
    assert len(added[0, :, 0, 0].unique()) == 4


def test_ddim_inv_adds_nothing():
    assert torch.equal(at("ddim_inv", [700]), clean())


def test_free_noise_belongs_to_the_image_and_not_to_its_place():
    noise = free_noise(images(), (4, 4, 4))
    assert torch.equal(free_noise(images()[1:2], (4, 4, 4)), noise[1:2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(free_noise(images() + 1e-5, (4, 4, 4)), noise), "rounding of a pixel changes nothing"
    assert not torch.equal(free_noise(images(), (4, 4, 4), draw=1), noise)


def test_true_inversion_follows_the_network():
    asked = []

    def watched(z, t):
        asked.append(t)
        return gaussian(z, t)

    z = at("ddim_inversion", [500], watched, steps=5)
    assert asked == [0, 100, 200, 300, 400]
    torch.testing.assert_close(z, clean(), atol=0.6, rtol=0)
    errors = [(at("ddim_inversion", [500], gaussian, steps=steps) - clean()).abs().max() for steps in (5, 50, 500)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01, "more steps follow the path more closely"
    assert torch.equal(at("ddim_inversion", [0], never), clean())


def test_inversion_and_sampling_are_each_others_opposite():
    z = at("ddim_inversion", [300], gaussian, steps=300)
    back = invert(z, 300, 0, 300, SCHEDULE, gaussian, clean=False)
    torch.testing.assert_close(back, clean(), atol=0.02, rtol=0)


@pytest.mark.parametrize("mode, times, calls", [("ddpm", (600, 300, 100), [600, 300]), ("free", (600, 100), [600]),
                                                ("ddim_inv", (100, 300), [100])])
def test_several_times_are_walked_by_ddim(mode, times, calls):
    asked = []

    def watched(z, t):
        asked.append(t)
        return gaussian(z, t)

    assert at(mode, times, watched).isfinite().all() and asked == calls


@pytest.mark.parametrize("t, mode, message", [
    (1000, "ddpm", "0 to 999"), (-1, "ddpm", "0 to 999"), ((), "ddpm", "one or more"),
    ((100, 300), "ddpm", r"walks through \(300, 100\)"), ((300, 100), "ddim_inv", r"\(100, 300\)"),
    ((300, 300), "ddpm", "walks through")])
def test_bad_time_steps_are_refused(t, mode, message):
    with pytest.raises(ValueError, match=message):
        time_steps(t, Noise(mode), 1000)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode 'ddpm_schedule'.*" + ", ".join(MODES)):
        Noise("ddpm_schedule")
    with pytest.raises(ValueError, match="steps >= 1"):
        Noise(steps=0)
