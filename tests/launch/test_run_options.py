import argparse
import json

import pytest

from launch.options import add_arguments, submission
from search.spec import Budget, DataSpec, FineTune, JobSpec, SearchSpec


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["m.pt2", "d.npz", "--out", "o", *arguments])


def test_only_what_was_given_is_sent():
    fields = submission(parsed("--max-drop", "0.01"), workers=2)
    assert fields["search"] == {"parallel": 2}
    assert fields["budget"] == {"max_drop": 0.01}
    assert not {"fine_tune", "minimize", "storage"} & fields.keys()
    assert fields["data_spec"] == {"task": "classification", "transform": {}}


def test_every_option_lands_in_a_field_that_the_service_knows():
    options = parsed(
        *("--max-drop", "0.01", "--metric", "accuracy", "--minimize", "macs", "--minimize", "parameters"),
        *("--trials", "5", "--epochs", "2", "--hours", "1", "--task", "classification"),
        *("--scale", "0.5", "--mean", "0.1,0.2", "--std", "1,2", "--layout", "nhwc", "--augment", "crop"),
    )
    fields = submission(options, workers=3)
    data = DataSpec.model_validate(fields["data_spec"])
    assert data.transform.mean == (0.1, 0.2)
    assert data.transform.layout == "nhwc"
    assert SearchSpec.model_validate(fields["search"]).trials == 5
    assert FineTune.model_validate(fields["fine_tune"]).epochs == 2
    Budget.model_validate(fields["budget"])
    assert fields["minimize"] == ["macs", "parameters"]


def test_what_keypoints_need_lands_in_the_data_and_the_recipe():
    options = parsed("--max-drop", "0.01", *("--task", "keypoints", "--mirror", "2-5,3-6", "--pck-threshold", "0.2"))
    fields = submission(options, workers=1)
    data = DataSpec.model_validate(fields["data_spec"])
    assert (data.mirror, data.pck_threshold) == (((2, 5), (3, 6)), 0.2)
    options = parsed("--max-drop", "0.01", "--mirror", "none", "--heatmap-sigma", "1.5")
    assert submission(options, workers=1)["data_spec"]["mirror"] == []
    assert FineTune.model_validate(submission(options, workers=1)["fine_tune"]).heatmap_sigma == 1.5


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("resnet20_cifar10", {"name": "resnet20_cifar10"}),
        ('{"name": "mlp", "options": {"depth": 3}}', {"name": "mlp", "options": {"depth": 3}}),
    ],
)
def test_an_architecture_is_a_name_or_json(given, sent):
    assert submission(parsed("--max-drop", "0.01", "--architecture", given), workers=1)["architecture"] == sent


def test_an_architecture_that_is_no_json_is_misuse(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--max-drop", "0.01", "--architecture", "{mlp")
    assert end.value.code == 2
    assert "invalid architecture value: '{mlp'" in capsys.readouterr().err


def test_a_budget_is_required_and_only_one():
    with pytest.raises(ValueError, match="exactly one of --max-drop and --min-value"):
        submission(parsed(), workers=1)
    with pytest.raises(SystemExit):
        parsed("--max-drop", "0.1", "--min-value", "0.5")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--hours", value) for value in ("nan", "inf", "0", "-1")),
        *(("--epochs", value) for value in ("nan", "-1")),
        *(("--max-drop", value) for value in ("nan", "-0.1")),
        *((option, "nan") for option in ("--min-value", "--scale", "--mean", "--pck-threshold", "--heatmap-sigma")),
        *((option, "0") for option in ("--trials", "--workers")),
    ],
)
def test_numbers_that_make_no_sense_are_misuse(option, value, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(f"{option}={value}")
    assert end.value.code == 2
    assert f"argument {option}: got {value}: " in capsys.readouterr().err


def test_options_win_over_a_spec_file(tmp_path):
    spec = {
        "budget": {"max_drop": 0.01, "min_value": None, "confidence": 0.95},
        "methods": ["svd"],
        "minimize": ["macs"],
        "fine_tune": {"epochs": 3, "sequential": 0.25},
    }
    file = tmp_path / "job.json"
    file.write_text(json.dumps(spec))
    fields = submission(parsed("--spec", str(file)), workers=2)
    assert JobSpec.model_validate(_of_job(fields)) == JobSpec.model_validate({**spec, "search": {"parallel": 2}})
    fields = submission(parsed("--spec", str(file), "--min-value", "0.9", "--minimize", "bytes", "--epochs", "0"), 1)
    assert fields["budget"] == {"min_value": 0.9, "confidence": 0.95}
    assert fields["fine_tune"] == {"epochs": 0, "sequential": 0.25}
    assert (fields["methods"], fields["minimize"]) == (["svd"], ["bytes"])


def _of_job(fields):
    return {name: value for name, value in fields.items() if name not in ("architecture", "data_spec")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "give a JSON object"),
        ('{"search": {"hours": NaN}}', "not JSON compliant"),
        ('{"max_drop": 0.1, "data": 1}', "has data, max_drop: "),
        (None, "No such file"),
    ],
)
def test_a_spec_file_that_cannot_be_read_is_misuse(text, says, tmp_path, capsys):
    file = tmp_path / "job.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as end:
        parsed("--spec", str(file))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert "job.json" in said
