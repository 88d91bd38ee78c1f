import pytest
import torch
from torch import nn

from search.decompose import METHODS
from search.surgery import dense_of, named_sites, replace


def test_a_nested_layer_is_replaced_in_place() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    new = nn.Linear(4, 4)
    replace(net, "0.0", new)
    assert net[0][0] is new


def test_a_name_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match=r"0\.7"):
        replace(nn.Sequential(nn.Linear(4, 4)), "0.7", nn.Identity())


def test_a_network_made_dense_computes_the_same_and_has_no_sites() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(12))
    x = torch.randn(2, 8, 6, 6)
    net(x)
    for name, method, ranks in (("0", "tucker2", (3, 4)), ("2", "spatial_svd", (5,)), ("4", "svd", (3,))):
        replace(net, name, METHODS[method].factorize(net.get_submodule(name), ranks).module)
    assert [name for name, _ in named_sites(net)] == ["0", "2", "4"]
    dense = dense_of(net)
    assert list(named_sites(dense)) == []
    assert len(list(named_sites(net))) == 3
    torch.testing.assert_close(dense(x), net(x), rtol=1e-4, atol=1e-5)
