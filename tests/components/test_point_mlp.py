"""The perceptron for points, and the kinds of networks."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from components.diffusion.config import DiffusionConfig
from components.diffusion.objective import simple_loss
from components.diffusion.schedule import Schedule
from components.ingest.points import moons
from components.networks.kinds import KINDS, AnyNetworkConfig
from components.networks.point_mlp.config import PointMLPConfig
from components.networks.unet.config import UNetConfig

ANY: TypeAdapter[object] = TypeAdapter(AnyNetworkConfig)


def test_it_starts_at_0_and_keeps_the_shape():
    network = PointMLPConfig(width=16, depth=2).build((2,))
    assert torch.equal(network(torch.randn(5, 2), torch.arange(5)), torch.zeros(5, 2))


def test_a_label_changes_the_estimate_and_none_is_the_label_past_the_classes():
    torch.manual_seed(0)
    network = PointMLPConfig(width=16, depth=2, conditional=True).build((2,), 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(4, 2), torch.arange(4)
    told = [network(x, t, torch.full((4,), label)) for label in range(4)]
    assert torch.equal(network(x, t), told[3])
    assert not torch.allclose(told[0], told[1])
    with pytest.raises(ValueError, match="labels are given to a network without classes"):
        PointMLPConfig(width=16).build((2,))(x, t, torch.zeros(4, dtype=torch.int64))


def test_while_it_samples_a_row_is_computed_alike_whatever_is_beside_it():
    torch.manual_seed(0)
    network = PointMLPConfig(conditional=True).build((2,), 3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, labels = torch.randn(150, 2), torch.randint(0, 100, (150,)), torch.randint(0, 4, (150,))
    whole = network(x, t, labels)
    for first, last in ((0, 1), (3, 8), (100, 150)):
        assert torch.equal(network(x[first:last], t[first:last], labels[first:last]), whole[first:last])
    assert network(x[:0], t[:0]).shape == (0, 2)
    torch.testing.assert_close(network.train()(x, t, labels), whole)


def test_it_learns_more_than_the_best_estimate_that_looks_at_each_coordinate_alone():
    """For Gaussian data of the same variances the best estimate of eps is linear in x_t; on moons it can be beaten."""
    torch.manual_seed(0)
    data = torch.from_numpy(moons(4000, 0)).float()
    data = (data - data.mean(0)) / data.std(0)
    schedule = Schedule(DiffusionConfig(num_steps=100, betas="cosine"))
    network = PointMLPConfig(width=64, depth=3).build((2,))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(1)
    losses, linear = [], []
    for _ in range(700):
        x_0 = data[torch.randint(4000, (256,), generator=draw)]
        eps, t = torch.randn(256, 2, generator=draw), torch.randint(100, (256,), generator=draw)
        loss = simple_loss(network, schedule, x_0, eps, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _, noise = schedule.signal_and_noise(t, x_0)
        losses.append(float(loss.detach()))
        linear.append(float((eps - noise * schedule.add_noise(x_0, eps, t)).square().mean()))
    assert sum(losses[-200:]) < 0.9 * sum(linear[-200:])


def test_a_network_is_read_by_its_kind_and_one_without_is_a_unet():
    assert isinstance(ANY.validate_python({"width": 32, "kind": "point_mlp"}), PointMLPConfig)
    assert ANY.validate_python({"base_channels": 64}) == UNetConfig(base_channels=64)
    with pytest.raises(ValidationError, match="kind is unknown; use autoencoder_kl or dit or point_mlp or unet"):
        ANY.validate_python({"kind": "transformer"})
    assert set(KINDS) == {"autoencoder_kl", "dit", "point_mlp", "unet"}


def test_each_kind_says_which_rows_it_takes():
    with pytest.raises(ValueError, match=r"model\.kind=point_mlp takes points"):
        PointMLPConfig().check_shape((3, 32, 32))
    PointMLPConfig().check_shape((2,))
