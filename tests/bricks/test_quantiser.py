"""Vector quantisation: the choice, its gradients, and how codebooks learn (spec_vqvae §2)."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from nvae.bricks.quantiser import (
    GRADIENTS,
    AveragedQuantiser,
    LearnedQuantiser,
    QuantiserConfig,
    after_update,
    build_quantiser,
    discard,
    exact_products,
    nearest,
    perplexity,
    squared_distances,
)
from nvae.core.distributed import rank, world_size

CODES, DIM = 6, 3


def averaged(**fields: Any) -> AveragedQuantiser:
    """A small quantiser in training mode."""
    quantiser = build_quantiser(QuantiserConfig(codes=CODES, dim=DIM, **{"decay": 0.9, **fields}))
    assert isinstance(quantiser, AveragedQuantiser)
    return quantiser.train()


def images(batch: int = 4, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, DIM, 2, 2, generator=torch.Generator().manual_seed(seed))


def state(quantiser: AveragedQuantiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantiser.state_dict().items()}


def assert_same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, others[name], msg=lambda text, name=name: f"{name}: {text}")


# -------------------------------------------------------------------------------------------------------- the choice


def test_distances_are_those_of_the_definition() -> None:
    v, e = torch.randn(7, DIM).double(), torch.randn(CODES, DIM).double()
    torch.testing.assert_close(squared_distances(v, e), torch.cdist(v, e).square())


def test_the_lowest_index_wins_a_tie() -> None:
    codebook = torch.tensor([[5.0], [1.0], [1.0], [-1.0]])
    assert nearest(torch.tensor([[0.9], [0.0]]), codebook).tolist() == [1, 1]


def test_blocks_of_rows_choose_as_one_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    v, e = torch.randn(10, DIM), torch.randn(CODES, DIM)
    whole = nearest(v, e)
    monkeypatch.setattr("nvae.bricks.quantiser.ROWS", 3)
    assert torch.equal(nearest(v, e), whole)


def test_autocast_does_not_move_a_choice() -> None:
    quantiser = averaged().eval()
    codes = torch.tensor([1.0, 1.001])  # bfloat16 holds only one of them
    quantiser.codebook.copy_(torch.cat([codes, torch.full((CODES - 2,), 9.0)])[:, None].expand(-1, DIM))
    v = torch.full((1, DIM, 1, 1), 1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantised = quantiser(v)
    assert quantised.indices.item() == 1
    assert quantised.output.dtype == torch.float32


def test_within_exact_products_nothing_rounds_and_afterwards_all_is_as_it_was() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with exact_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def test_choices_and_values_keep_the_places_of_a_map() -> None:
    quantiser = averaged().eval()
    indices = torch.randint(CODES, (2, 3, 5))
    quantised = quantiser(quantiser.values(indices))
    assert torch.equal(quantised.indices, indices)
    assert torch.equal(quantised.output, quantiser.values(indices))


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_output_is_the_code(gradient: Any) -> None:
    quantiser = averaged(gradient=gradient)
    v = images().requires_grad_()
    quantised = quantiser(v)
    torch.testing.assert_close(quantised.output, quantiser.values(quantised.indices))


def test_straight_through_hands_the_gradient_on_unchanged() -> None:
    v, w = images().requires_grad_(), torch.randn(4, DIM, 2, 2)
    (averaged()(v).output * w).sum().backward()
    assert torch.equal(v.grad, w)


def test_rotation_turns_the_gradient_with_the_vector_and_scales_it() -> None:
    v, e, g = (torch.randn(1, DIM).double() for _ in range(3))
    v.requires_grad_()
    (GRADIENTS["rotation"](v, e) * g).sum().backward()
    ratio = e.norm() / v.detach().norm()
    torch.testing.assert_close(v.grad.norm(), ratio * g.norm())
    along_v = (v.grad * v.detach()).sum() / v.detach().norm()
    along_e = (g * e).sum() / e.norm()
    torch.testing.assert_close(along_v, ratio * along_e)


def test_commitment_pulls_vectors_only_and_the_codebook_loss_codes_only() -> None:
    quantiser = LearnedQuantiser(QuantiserConfig(codes=CODES, dim=DIM, learning="gradient"))
    v = images().requires_grad_()
    quantised = quantiser(v)
    error = v.detach() - quantiser.values(quantised.indices).detach()
    torch.testing.assert_close(quantised.commitment.detach(), error.square().mean())
    torch.testing.assert_close(quantised.codebook.detach(), error.square().mean())
    pulled_v, pulled_e = torch.autograd.grad(
        quantised.commitment, [v, quantiser.codebook], retain_graph=True, allow_unused=True
    )
    torch.testing.assert_close(pulled_v, 2 * error / error.numel())
    assert pulled_e is None
    pulled_v, pulled_e = torch.autograd.grad(quantised.codebook, [v, quantiser.codebook], allow_unused=True)
    assert pulled_v is None
    assert pulled_e.abs().sum() > 0


def test_a_rotation_of_a_vector_of_zeros_stays_finite() -> None:
    v = torch.zeros(1, DIM, requires_grad=True)
    GRADIENTS["rotation"](v, torch.ones(1, DIM)).sum().backward()
    assert v.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- averages


def noted(quantiser: AveragedQuantiser, v: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and sums of a batch, by a loop."""
    indices = quantiser.eval()(v).indices
    quantiser.train()
    rows, counts, sums = v.movedim(1, -1).reshape(-1, DIM), torch.zeros(CODES), torch.zeros(CODES, DIM)
    for row, index in zip(rows, indices.flatten().tolist(), strict=True):
        counts[index] += 1
        sums[index] += row
    return counts, sums


def test_a_training_pass_changes_nothing_and_the_update_everything_once() -> None:
    quantiser = averaged(restart=0)
    before, v = state(quantiser), images()
    counts, sums = noted(quantiser, v)
    quantiser(v)
    assert_same(state(quantiser), before)
    after_update([quantiser], 0, 0, 0.0)
    torch.testing.assert_close(quantiser.averages()[0], counts)
    torch.testing.assert_close(quantiser.averages()[1], sums)
    after = state(quantiser)
    after_update([quantiser], 0, 1, 0.0)
    assert_same(state(quantiser), after)


def test_debiased_averages_forget_their_start() -> None:
    quantiser = averaged(restart=0)
    for step in range(5):
        quantiser.update(torch.full((CODES,), 7.0), torch.full((CODES, DIM), 14.0))
        size, total = quantiser.averages()
        torch.testing.assert_close(size, torch.full((CODES,), 7.0))
        torch.testing.assert_close(total, torch.full((CODES, DIM), 14.0))
        assert quantiser.updates == step + 1


@pytest.mark.parametrize(
    ("averages", "chosen", "unchosen"), [("debiased", 1, 0), ("from_one", 1, 1), ("from_zero", 1 / (1 - 0.9), 0.9e5)]
)
def test_what_becomes_of_codes_of_which_one_is_not_chosen(averages: Any, chosen: float, unchosen: float) -> None:
    quantiser = averaged(averages=averages, restart=0)
    start, counts = quantiser.codebook.clone(), torch.ones(CODES)
    counts[0] = 0
    quantiser.update(counts, counts[:, None] * start)
    torch.testing.assert_close(quantiser.codebook[1:], chosen * start[1:], rtol=1e-3, atol=0)
    torch.testing.assert_close(quantiser.codebook[0], unchosen * start[0], rtol=1e-3, atol=0)


def test_evaluation_takes_note_of_nothing() -> None:
    quantiser = averaged().eval()
    quantiser(images())
    assert not quantiser.noted
    assert after_update([quantiser], 0, 0, 0.0) == [{}]


def test_an_update_that_was_not_made_leaves_no_trace() -> None:
    one, other = averaged(), averaged()
    other.load_state_dict(one.state_dict())
    other(images(seed=1))
    discard([other])
    for quantiser in (one, other):
        quantiser(images())
        after_update([quantiser], 0, 0, 0.0)
    assert_same(state(one), state(other))


def test_accumulation_equals_one_batch() -> None:
    one, other = averaged(), averaged()
    other.load_state_dict(one.state_dict())
    for step in range(3):
        v = images(8, seed=step)
        one(v)
        for part in v.split(2):
            other(part)
        after_update([one], 0, step, 0.0)
        after_update([other], 0, step, 0.0)
    assert_same(state(one), state(other))


def two_levels() -> tuple[AveragedQuantiser, AveragedQuantiser]:
    torch.manual_seed(3)
    levels = averaged(), averaged(averages="from_one")
    levels[0].codebook[0] = 100.0  # is restarted
    return levels


def train(levels: tuple[AveragedQuantiser, ...], rank: int, world: int, micro_batches: int) -> list[Any]:
    """Three updates on the images that fall to a rank; the last one's metrics."""
    for step in range(3):
        of_all = images(8, seed=step).split(8 // (world * micro_batches))
        for micro in range(micro_batches):
            for level in levels:
                level(of_all[micro * world + rank])
        metrics = after_update(levels, 0, step, 0.0)
    return metrics


def as_a_rank(expected: list[dict[str, Tensor]], metrics: list[dict[str, Tensor]]) -> None:
    levels = two_levels()
    found = train(levels, rank(), world_size(), 2)
    for level, tensors in zip(levels, expected, strict=True):
        assert_same(state(level), tensors)
    for ours, theirs in zip(found, metrics, strict=True):
        assert_same(ours, theirs)


def test_two_processes_equal_one() -> None:
    levels = two_levels()
    metrics = train(levels, 0, 1, 1)
    assert levels[0].codebook.abs().max() < 100
    run_ranks(2, as_a_rank, [state(level) for level in levels], metrics)


# ---------------------------------------------------------------------------------------------------------- restarts


def test_a_starved_code_restarts_at_a_vector_of_the_batch_with_the_mean_count() -> None:
    quantiser = averaged()
    quantiser.codebook[0] = 100.0
    v = images()
    quantiser(v)
    metrics = after_update([quantiser], 0, 0, 0.0)[0]
    rows = v.movedim(1, -1).reshape(-1, DIM)
    assert metrics["restarts"] >= 1
    assert (rows == quantiser.codebook[0]).all(1).any()
    size, total = quantiser.averages()
    torch.testing.assert_close(size[0], torch.tensor(16 / CODES))
    torch.testing.assert_close(total[0], quantiser.codebook[0] * size[0])


def test_a_restarted_code_is_not_restarted_again_by_the_next_update() -> None:
    quantiser = averaged(restart=0.25)
    quantiser.codebook[0] = 100.0
    for step in range(2):
        quantiser(images(64))
        metrics = after_update([quantiser], 0, step, 0.0)[0]
    assert metrics["restarts"] == 0
    assert metrics["perplexity"] > CODES / 2


@pytest.mark.parametrize(("fields", "progress"), [({"restart": 0}, 0.0), ({"restart_until": 0.7}, 0.71)])
def test_none_restarts_where_none_shall(fields: dict[str, float], progress: float) -> None:
    quantiser = averaged(**fields)
    quantiser.codebook[0] = 100.0
    quantiser(images())
    assert after_update([quantiser], 0, 0, progress)[0]["restarts"] == 0
    assert quantiser.codebook[0].abs().sum() == 0


def test_where_a_code_restarts_depends_on_seed_step_and_level() -> None:
    def restarted(seed: int, step: int, level: int) -> Tensor:
        quantiser = averaged()
        quantiser(images(64))
        return quantiser.tally(seed, step, level)[-CODES * DIM :]

    assert torch.equal(restarted(0, 0, 0), restarted(0, 0, 0))
    for other in (1, 0, 0), (0, 1, 0), (0, 0, 1):
        assert not torch.equal(restarted(0, 0, 0), restarted(*other))


# ------------------------------------------------------------------------------------------------- start and metrics


def test_the_first_codes_are_different_vectors_of_the_first_batch() -> None:
    quantiser, v = averaged(), images()
    quantiser.begin(v, 0)
    rows = v.movedim(1, -1).reshape(-1, DIM)
    places = [(rows == code).all(1).nonzero().item() for code in quantiser.codebook]
    assert len(set(places)) == CODES
    assert quantiser.updates == 0


def test_too_few_vectors_are_repeated_with_a_little_noise() -> None:
    quantiser = averaged()
    quantiser.begin(torch.zeros(1, DIM, 1, 1), 0)
    assert quantiser.codebook[0].abs().max() == 0
    assert 0 < quantiser.codebook[1:].abs().max() < 0.1
    assert len(quantiser.codebook.unique(dim=0)) == CODES


def test_a_start_forgets_what_was_learnt() -> None:
    quantiser = averaged(averages="from_one")
    quantiser(images())
    after_update([quantiser], 0, 0, 0.0)
    quantiser.begin(images(), 0)
    assert torch.equal(quantiser.size, torch.ones(CODES))
    assert torch.equal(quantiser.total, quantiser.codebook)


@pytest.mark.parametrize("learning", ["gradient", "averages"])
def test_uniform_first_codes_have_the_width_of_their_dimension(learning: Any) -> None:
    codes = build_quantiser(QuantiserConfig(codes=2000, dim=3, start="uniform", learning=learning)).codebook
    assert 0.99 < codes.abs().max() < 1
    assert build_quantiser(QuantiserConfig(codes=2000, dim=3, start="normal")).codebook.abs().max() > 3


def test_perplexity_counts_codes_that_are_used_alike() -> None:
    assert perplexity(torch.tensor([3.0, 0, 3, 3])) == pytest.approx(3)
    assert perplexity(torch.tensor([0.0, 8])) == pytest.approx(1)
