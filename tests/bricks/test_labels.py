"""Class vectors start silent, and labels are dropped by an image's own noise."""

import torch

from nvae.bricks.labels import UNKNOWN, ClassVectors, partly_unknown


def test_class_vectors_start_as_if_no_class_were_known() -> None:
    assert not ClassVectors(3, 4)(torch.tensor([0, 2, UNKNOWN])).any()


def test_an_unknown_class_adds_nothing_and_learns_nothing() -> None:
    vectors = ClassVectors(3, 4)
    with torch.no_grad():
        vectors.weight.fill_(1.0)
    found = vectors(torch.tensor([0, UNKNOWN]))
    assert found.shape == (2, 4, 1, 1)
    assert bool((found[0] == 1).all()) and not found[1].any()
    found[1].sum().backward()
    assert vectors.weight.grad is not None and not vectors.weight.grad.any()


def test_the_share_of_labels_asked_for_is_dropped() -> None:
    labels, noise = torch.arange(100_000) % 7, torch.randn(100_000, 1, 2, 2)
    for share in (0.0, 0.1, 0.5):
        dropped = (partly_unknown(labels, noise, share) == UNKNOWN).double().mean()
        assert abs(float(dropped) - share) < 4 * 0.5 / 100_000**0.5


def test_the_images_that_keep_their_label_keep_it_unchanged() -> None:
    labels, noise = torch.arange(1000) % 7, torch.randn(1000, 1, 2, 2)
    found = partly_unknown(labels, noise, 0.5)
    assert torch.equal(found[found != UNKNOWN], labels[found != UNKNOWN])


def test_an_images_own_noise_decides() -> None:
    labels, noise = torch.arange(100) % 7, torch.randn(100, 1, 2, 2)
    together, order = partly_unknown(labels, noise, 0.5), torch.randperm(100)
    assert torch.equal(partly_unknown(labels[order], noise[order], 0.5), together[order])


def test_what_is_dropped_owes_nothing_to_how_large_the_noise_is() -> None:
    noise = torch.randn(100_000, 1)
    dropped = partly_unknown(torch.zeros(100_000, dtype=torch.int64), noise, 0.5) == UNKNOWN
    assert abs(float(noise[dropped].mean() - noise[~dropped].mean())) < 4 * 2 / 100_000**0.5
    assert abs(float(noise[dropped].std() - noise[~dropped].std())) < 4 * 2 / 100_000**0.5
