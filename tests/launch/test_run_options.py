import argparse

import pytest

from launch.options import add_arguments, job_fields
from search.spec import Budget, DataSpec, FineTune, SearchSpec


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["m.pt2", "d.npz", "--out", "o", *arguments])


def test_only_what_was_given_is_sent():
    fields = job_fields(parsed("--max-drop", "0.01"), workers=2)
    assert fields["search"] == {"parallel": 2}
    assert fields["fine_tune"] == {}
    assert fields["data_spec"] == {"task": "classification", "transform": {}}


def test_every_option_lands_in_a_field_that_the_service_knows():
    options = parsed(
        *("--max-drop", "0.01", "--metric", "accuracy", "--minimize", "macs", "--minimize", "parameters"),
        *("--trials", "5", "--epochs", "2", "--hours", "1", "--task", "classification"),
        *("--scale", "0.5", "--mean", "0.1,0.2", "--std", "1,2", "--layout", "nhwc", "--augment", "crop"),
    )
    fields = job_fields(options, workers=3)
    data = DataSpec.model_validate(fields["data_spec"])
    assert data.transform.mean == (0.1, 0.2)
    assert data.transform.layout == "nhwc"
    assert SearchSpec.model_validate(fields["search"]).trials == 5
    assert FineTune.model_validate(fields["fine_tune"]).epochs == 2
    Budget.model_validate({k: fields[k] for k in ("metric", "max_drop", "min_value")})
    assert fields["minimize"] == ["macs", "parameters"]


def test_what_keypoints_need_lands_in_the_data_and_the_recipe():
    options = parsed("--max-drop", "0.01", *("--task", "keypoints", "--mirror", "2-5,3-6", "--pck-threshold", "0.2"))
    fields = job_fields(options, workers=1)
    data = DataSpec.model_validate(fields["data_spec"])
    assert (data.mirror, data.pck_threshold) == (((2, 5), (3, 6)), 0.2)
    options = parsed("--max-drop", "0.01", "--mirror", "none", "--heatmap-sigma", "1.5")
    assert job_fields(options, workers=1)["data_spec"]["mirror"] == []
    assert FineTune.model_validate(job_fields(options, workers=1)["fine_tune"]).heatmap_sigma == 1.5


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("resnet20_cifar10", {"name": "resnet20_cifar10"}),
        ('{"name": "mlp", "options": {"depth": 3}}', {"name": "mlp", "options": {"depth": 3}}),
    ],
)
def test_an_architecture_is_a_name_or_json(given, sent):
    assert job_fields(parsed("--max-drop", "0.01", "--architecture", given), workers=1)["architecture"] == sent


def test_an_architecture_that_is_no_json_is_misuse(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--max-drop", "0.01", "--architecture", "{mlp")
    assert end.value.code == 2
    assert "invalid architecture value: '{mlp'" in capsys.readouterr().err


def test_a_budget_is_required_and_only_one():
    with pytest.raises(SystemExit):
        parsed()
    with pytest.raises(SystemExit):
        parsed("--max-drop", "0.1", "--min-value", "0.5")
