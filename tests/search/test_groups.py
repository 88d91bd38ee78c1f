import pytest

from search.errors import BadRequest
from search.groups import find_groups
from search.spec import LayerInfo, Layers


def layer(name: str, *weight: int, kind: str = "Conv2d", groups: int = 1) -> LayerInfo:
    options = {"groups": groups} if kind != "Linear" else {}
    return LayerInfo(
        name=name, kind=kind, weight=weight, output=(1,), parameters=9, macs=9, compressible=True, options=options
    )


def test_numbers_in_names_are_the_modes_of_the_grid() -> None:
    layers = [layer(f"layer1.{b}.conv{c}", 16, 16, 3, 3) for b in range(3) for c in (1, 2)]
    assert find_groups(layers, Layers()) == {
        "layer1.*.conv*[16x16x3x3]": {f"layer1.{b}.conv{c}": (b, c - 1) for b in range(3) for c in (1, 2)}
    }


def test_numbers_are_counted_as_numbers_and_words_stand_in_the_networks_order() -> None:
    names = [f"blocks.{b}.{part}" for b in (8, 9, 10) for part in ("query", "key")]
    (members,) = find_groups([layer(n, 8, 8, kind="Linear") for n in names], Layers()).values()
    assert members["blocks.10.key"] == (2, 1)
    assert members["blocks.8.query"] == (0, 0)


def test_an_irregular_set_stands_in_one_row() -> None:
    names = ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]
    assert find_groups([layer(n, 4, 4, 3, 3) for n in names], Layers()) == {
        "layer2.*.conv*[4x4x3x3]": {name: (i,) for i, name in enumerate(names)}
    }
    names = ["body.conv1", "body.1.conv"]
    assert find_groups([layer(n, 4, 4, 3, 3) for n in names], Layers()) == {
        "body.*[4x4x3x3]": {name: (i,) for i, name in enumerate(names)}
    }


def test_only_layers_of_one_kind_and_shape_are_grouped_and_none_with_groups_of_channels() -> None:
    layers = [
        *(layer("a1", 4, 4, 3, 3), layer("a2", 4, 4, 3, 3), layer("a3", 8, 4, 3, 3)),
        *(layer("b1", 4, 4, kind="Linear"), layer("b2", 4, 4, kind="Linear")),
        *(layer("c1", 4, 1, 3, 3, groups=4), layer("c2", 4, 1, 3, 3, groups=4)),
    ]
    assert list(find_groups(layers, Layers())) == ["a*[4x4x3x3]", "b*[4x4]"]


def test_groups_may_be_given_by_patterns() -> None:
    layers = [layer(f"features.{i}", 4, 4, 3, 3) for i in (2, 5, 7)]
    found = find_groups(layers, Layers(groups={"late": ("features.5", "features.7")}))
    assert found == {"late": {"features.5": (0,), "features.7": (1,)}}
    assert find_groups(layers, Layers(groups={})) == {}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"one": ("a1",)}, r"matches \{'a1': .*two or more"),
        ({"none": ("z*",)}, "no layer that may change"),
        ({"mixed": ("a1", "b1")}, r"one kind and weight shape"),
        ({"x": ("a*",), "y": ("a1", "a2")}, "a1 is in x already"),
        ({"a1": ("a1", "a2")}, "another name"),
    ],
)
def test_a_group_that_cannot_be_is_refused(groups: dict[str, tuple[str, ...]], message: str) -> None:
    layers = [layer("a1", 4, 4, 3, 3), layer("a2", 4, 4, 3, 3), layer("b1", 8, 4, 3, 3)]
    with pytest.raises(BadRequest, match=message):
        find_groups(layers, Layers(groups=groups))
