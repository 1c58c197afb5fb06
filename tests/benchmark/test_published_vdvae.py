"""The Very Deep VAE in the published arithmetic says what ours says; it is what ours is timed beside."""

import pytest
import torch

from nvae.benchmark.published_vdvae import PublishedVDVAE, as_published
from nvae.benchmark.workloads import WORK, Way, Workload
from nvae.kernels.operations import using
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE

CONFIG = VDVAEConfig.model_validate(
    {
        "image_size": 8,
        "likelihood": {"kind": "logistic_mixture", "components": 2},
        "encoder": "8x2,8d2,4x1,4d4,1x1",
        "decoder": "1x1,4m1,4x1,8m4,8x1",
        "width": 8,
        "widths": "4:16,1:16",
        "latent_channels": 3,
    }
)
WORKLOAD = Workload(CONFIG, batch=2, device=torch.device("cpu"), samples=2)


@pytest.fixture
def model() -> VDVAE:
    """With priors that say something."""
    model = WORKLOAD.trained()
    assert isinstance(model, VDVAE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_loss_and_its_gradients_are_ours(model: VDVAE) -> None:
    noise = [torch.randn(shape) for shape in model.latent_shapes(2)]
    yardstick = as_published(model)
    for each, mode in ((model, "auto"), (yardstick, "plain")):
        with using(mode):
            each.loss(each(WORKLOAD.images, noise), 1.0)[0].backward()
    for (name, ours), theirs in zip(model.named_parameters(), yardstick.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_importance_weights_and_samples_are_ours(model: VDVAE) -> None:
    noise = [torch.randn(shape) for shape in model.latent_shapes(2)]
    yardstick = as_published(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(
            model(WORKLOAD.images, noise).log_weight, yardstick(WORKLOAD.images, noise).log_weight
        )
        torch.testing.assert_close(model.sample(2, 0.7, noise).mean(), yardstick.sample(2, 0.7, noise).mean())


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "as published"])
def test_everything_that_is_timed_runs(model: VDVAE, what: str, plain: bool) -> None:
    WORK[what](WORKLOAD, model, Way(plain=plain))()


def test_other_families_have_no_arithmetic_of_their_own_to_be_timed_beside() -> None:
    assert not isinstance(as_published(torch.nn.Identity()), PublishedVDVAE)
