"""Keyed random numbers: a function of their key and of nothing else."""

import pytest
import torch

from nvae.core.randomness import derived_seed, generator, keyed_normal, keyed_uniform, reseed

SHAPES = [(4, 3, 2, 2), (4, 3, 4, 4)]


def test_a_seed_is_a_function_of_the_key() -> None:
    assert derived_seed(1, "noise", 7) == derived_seed(1, "noise", 7)


def test_a_seed_of_a_known_key_never_changes() -> None:
    """Recorded: runs and figures of the past can be repeated."""
    assert derived_seed(0, "noise", 0) == 9144587515262914129


def test_seeds_of_different_keys_differ() -> None:
    keys = [(seed, stream, index) for seed in range(3) for stream in ("a", "b") for index in range(2000)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)


def test_seeds_fit_a_signed_64_bit_integer() -> None:
    assert all(0 <= derived_seed(i) < 2**63 for i in range(200))


def test_generators_start_at_their_key() -> None:
    first, second = (torch.rand(5, generator=generator("cpu", 3, "x")) for _ in range(2))
    assert torch.equal(first, second)


def test_the_global_generator_starts_at_its_key_as_by_torch() -> None:
    torch.manual_seed(derived_seed(3, "x"))
    expected = torch.rand(5)
    reseed(torch.device("cpu"), 3, "x")
    assert torch.equal(torch.rand(5), expected)


def test_an_image_draws_the_same_in_any_batch() -> None:
    whole = keyed_normal(SHAPES, [5, 6, 7, 8], 0, "noise", "cpu")
    parts = [keyed_normal([(2, *s[1:]) for s in SHAPES], pair, 0, "noise", "cpu") for pair in ([5, 6], [7, 8])]
    for group, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(group, torch.cat([first, second]))


def test_uniform_numbers_are_the_same_in_any_batch() -> None:
    whole = keyed_uniform((4, 3, 5), [9, 2, 7, 1], 0, "pixels", "cpu")
    assert torch.equal(whole[[3, 0]], keyed_uniform((2, 3, 5), [1, 9], 0, "pixels", "cpu"))


def test_draws_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    keyed_normal(SHAPES, range(4), 0, "noise", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [(1, "noise", [0]), (0, "else", [0]), (0, "noise", [1])])
def test_another_seed_stream_or_image_draws_differently(other: tuple[int, str, list[int]]) -> None:
    seed, stream, indices = other
    base = keyed_normal([(1, 3, 4, 4)], [0], 0, "noise", "cpu")[0]
    assert not torch.equal(base, keyed_normal([(1, 3, 4, 4)], indices, seed, stream, "cpu")[0])


def test_groups_of_one_image_are_not_copies_of_each_other() -> None:
    first, second = keyed_normal([(1, 2, 4, 4), (1, 2, 4, 4)], [0], 0, "noise", "cpu")
    assert not torch.equal(first, second)


def test_draws_over_images_are_standard_normal() -> None:
    draws = keyed_normal([(3000, 20)], range(3000), 0, "noise", "cpu")[0]
    assert abs(float(draws.mean())) < 4 / 60_000**0.5
    assert float(draws.var()) == pytest.approx(1, abs=4 * (2 / 60_000) ** 0.5)
    assert float((draws[:-1] * draws[1:]).mean()) == pytest.approx(0, abs=4 / 60_000**0.5)


def test_uniform_draws_lie_in_the_unit_interval() -> None:
    draws = keyed_uniform((2000, 10), range(2000), 0, "pixels", "cpu")
    assert draws.min() >= 0
    assert draws.max() < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=4 / (12 * 20_000) ** 0.5)


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    """Against Python's integers; the generator started at 0 begins with 0xE220A8397B1DCDAF (Steele et al. 2014)."""

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mixed(golden) == 0xE220A8397B1DCDAF
    key = mixed((derived_seed(3, "pixels") + (41 + 1) * golden) % 2**64)
    expected = [(mixed((key + e * golden) % 2**64) >> 40) / 2**24 for e in range(1, 7)]
    assert keyed_uniform((1, 2, 3), [41], 3, "pixels", "cpu").flatten().tolist() == expected


def test_uniform_draws_of_neighbouring_images_and_elements_are_not_correlated() -> None:
    draws = keyed_uniform((500, 400), range(500), 0, "pixels", "cpu") - 0.5
    error = 4 / 12 / 200_000**0.5
    assert abs(float((draws[1:] * draws[:-1]).mean())) < error
    assert abs(float((draws[:, 1:] * draws[:, :-1]).mean())) < error
