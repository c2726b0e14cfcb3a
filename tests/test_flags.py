"""The command lines of the three programs: what is refused, and with which exit status."""

import pytest
import stages

WRONG = [
    ("train", "--batch-size", "0"),
    ("train", "--batch-size", "60001"),
    ("train", "--epochs", "0"),
    ("train", "--epochs", "-1"),
    ("train", "--epochs", "1.5"),
    ("train", "--lr", "0"),
    ("train", "--lr", "-0.1"),
    ("train", "--lr", "nan"),
    ("train", "--lr", "inf"),
    ("train", "--lr", "fast"),
    ("train", "--momentum", "-0.5"),
    ("train", "--momentum", "1"),
    ("train", "--seed", "-1"),
    ("train", "--num-processes", "0"),
    ("train", "--num-processes", "two"),
    ("train", "--log-interval", "0"),
    ("train", "--epoch-count", "3"),
    ("train", "extra"),
    ("evaluate", "--min-accuracy", "-1"),
    ("evaluate", "--min-accuracy", "101"),
    ("evaluate", "--min-accuracy", "nan"),
    ("evaluate", "--samples", "5"),
    ("infer", "--samples", "0"),
    ("infer", "--samples", "-5"),
    ("infer", "--samples", "five"),
    ("infer", "--seed", "-1"),
    ("infer", "--epochs", "5"),
]


@pytest.mark.parametrize(("stage", "flag", "value"), [(*wrong, "")[:3] for wrong in WRONG])
def test_a_wrong_request_is_refused_in_one_line_and_touches_nothing(tmp_path, stage, flag, value):
    result = stages.run(stage, flag, *([value] if value else []), model=tmp_path / "volume")
    stages.assert_fails(result, 2, flag)
    assert not (tmp_path / "volume").exists()


@pytest.mark.parametrize("flag", ["--batch-size", "--epochs", "--lr", "--momentum", "--seed", "--num-processes"])
def test_a_flag_without_its_value_is_refused(tmp_path, flag):
    stages.assert_fails(stages.run("train", flag, model=tmp_path / "volume"), 2, flag)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_help_states_the_default_of_every_flag_that_takes_a_value(tmp_path, stage):
    result = stages.run(stage, "--help", model=tmp_path, COLUMNS=1000)
    assert result.returncode == 0
    for flag in result.stdout.split("\n  --")[1:]:
        takes_a_value = flag.split()[1].isupper()
        assert not takes_a_value or "default: " in " ".join(flag.split()), flag
