"""The command lines: which values of which flags are refused, and what their help says."""

import typing

import msgspec
import pytest

import stages
from training import settings

FOLDERS = ["--data=", "--model="]
WRONG = {
    "train": [
        *("--batch-size 0", "--batch-size 1000001", "--epochs 0", "--epochs -1", "--epochs 1.5", "--lr 0", "--lr -0.1"),
        *("--lr nan", "--lr inf", "--lr fast", "--momentum -0.5", "--momentum 1", "--seed -1", "--seed 4294967296"),
        *("--num-processes 0", "--num-processes 65", "--num-processes two", "--schedule cosine", "--dropout 1"),
        *("--dropout -0.1", "--augmentation -1", "--averaging 0.9", "--weight-decay -1", "--max-grad-norm 0"),
        *("--log-interval 0", "--log-interval " + 5_000 * "9", "--epoch-count 3", "extra", "--epochs", "--lr"),
        *("--schedule", *FOLDERS),
    ],
    "evaluate": [*FOLDERS, "--min-accuracy -1", "--min-accuracy 101", "--min-accuracy nan", "--samples 5"],
    "infer": [
        *(*FOLDERS, "--samples 0", "--samples -5", "--samples 101", "--samples five", "--seed -1", "--epochs 5"),
        *("--samples 3 photo.png", "--seed 3 photo.png"),  # they are for test images
    ],
}


@pytest.mark.parametrize(("stage", "flags"), [(stage, flags) for stage in WRONG for flags in WRONG[stage]])
def test_a_wrong_flag_is_refused_in_one_line_and_nothing_is_touched(tmp_path, stage, flags):
    result = stages.call(stage, *flags.split(), model=tmp_path / "volume")
    stages.assert_fails(result, 2, flags.replace("=", " ").split()[0])
    assert "parse_" not in result.stderr  # argparse names the function that raises a ValueError
    assert not (tmp_path / "volume").exists()


@pytest.mark.parametrize("stage", stages.STAGES)
def test_help_states_the_default_of_every_flag_that_takes_a_value(tmp_path, monkeypatch, stage):
    monkeypatch.setenv("COLUMNS", "1000")
    result = stages.call(stage, "--help", model=tmp_path)
    assert result.returncode == 0
    for flag in result.stdout.split("\n  --")[1:]:
        takes_a_value = flag.split()[1].isupper()
        assert not takes_a_value or "default: " in " ".join(flag.split()), flag


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_a_setting_accepts_its_default_and_both_ends_of_its_range(name):
    kind, meta = typing.get_args(settings.SETTINGS[name].type)
    ends = typing.get_args(kind) or (kind(meta.ge), kind(meta.le))
    for value in (settings.SETTINGS[name].default, *ends):
        assert settings.parse(name, str(value)) == value
        assert msgspec.convert({name: value}, settings.Settings) == settings.Settings(**{name: value})


@pytest.mark.parametrize("name", settings.SETTINGS)
@pytest.mark.parametrize("value", [None, "2", -1, float("nan"), True, []])
def test_a_setting_refuses_values_that_make_no_sense(name, value):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({name: value}, settings.Settings)


def test_the_flags_that_a_message_names_are_those_that_were_given():
    assert settings.Settings().as_flags() == "default settings"
    assert settings.Settings(lr=0.2, schedule="constant").as_flags() == "--lr 0.2 --schedule constant"
