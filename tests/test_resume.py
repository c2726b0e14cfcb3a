"""Which trainings train goes on with, finished or not, by what it is asked for and what the volume's files say."""

import os
import shutil
import signal

import corpus
import faults
import pytest
import stages

SETTINGS = ("batch_size", "lr", "momentum", "seed", "num_processes")
OTHER_DATA = dict.fromkeys(stages.RAW_FILES, "0" * 64)


def results(folder):
    """What train_results.json says, or {} where there is none."""
    path = folder / "train_results.json"
    return stages.read_json(path) if path.exists() else {}


def edit_both(folder, edit):
    """Changes the results of a training by a function, in train_results.json and in checkpoint.pt."""
    corpus.in_results(folder / "checkpoint.pt", edit)
    corpus.edit_json(folder / "train_results.json", edit)


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The volume of a training of three epochs whose processes were all killed in the second."""
    folder = tmp_path_factory.mktemp("killed")
    with stages.running(stages.command("train", "--epochs", "3", model=folder)) as process:
        faults.wait_until(lambda: results(folder).get("history") or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
    assert len(results(folder)["history"]) == 1
    return folder


@pytest.fixture
def unfinished(killed, tmp_path):
    """A copy of the volume of a training that was killed in the second of three epochs."""
    return shutil.copytree(killed, tmp_path / "unfinished")


@pytest.fixture
def either(request, tmp_path):
    """A copy of a volume, by the name of its fixture: `trained` or `killed`."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "either")


# Fewer epochs than before ---------------------------------------------------------------------------------------------


def in_the_second_epoch(killed, trained, folder):
    """A volume of a training of three epochs that was killed in the second."""
    shutil.copytree(killed, folder)


def at_the_end_of_the_first_epoch(killed, trained, folder):
    """A volume of a training of three epochs that was killed as the first ended."""
    shutil.copytree(trained, folder)
    (folder / "mnist_cnn.pt").unlink()
    edit_both(folder, lambda results: (results.update(finished=False), results["settings"].update(epochs=3)))


def between_checkpoint_and_results(killed, trained, folder):
    """A volume of a training of three epochs whose train_results.json is still in the first, unlike its checkpoint."""
    shutil.copytree(killed, folder)
    corpus.edit_json(folder / "train_results.json", lambda results: results.update(batches=100, history=[]))


@pytest.mark.parametrize("kill", [in_the_second_epoch, at_the_end_of_the_first_epoch, between_checkpoint_and_results])
def test_a_killed_training_is_not_finished_by_asking_for_fewer_epochs(killed, trained, tmp_path, kill):
    kill(killed, trained, tmp_path / "volume")
    before = stages.contents(tmp_path / "volume")
    stages.assert_fails(stages.run("train", "--epochs", "1", model=tmp_path / "volume"), 2, "--epochs")
    assert stages.contents(tmp_path / "volume") == before


def test_a_killed_training_goes_on_with_the_epochs_that_it_had(unfinished):
    done = results(unfinished)["batches"]
    with stages.running(stages.command("train", "--epochs", "3", "--log-interval", "10", model=unfinished)) as process:
        assert "after 1 of 3 epochs" in process.stdout.readline()
        stages.await_progress(process)
        process.terminate()
        assert process.wait(10) == 143
    assert results(unfinished)["batches"] > done


# Settings of other versions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_finished_training_without_a_setting_has_its_default(volume, name):
    edit_both(volume, lambda results: results["settings"].pop(name))
    before = stages.contents(volume)
    result = stages.run("train", model=volume)
    assert result.returncode == 0, result.stderr
    assert stages.contents(volume) == before


def test_an_unfinished_training_without_a_setting_goes_on_with_its_default(unfinished):
    edit_both(unfinished, lambda results: results["settings"].pop("momentum"))
    with stages.running(stages.command("train", "--log-interval", "10", model=unfinished)) as process:
        assert "--momentum 0.8" in process.stdout.readline(), process.stderr.read()
        stages.await_progress(process)
        process.terminate()
        assert process.wait(10) == 143
    assert results(unfinished)["settings"]["momentum"] == 0.8


@pytest.mark.parametrize(("version", "named"), [("7.8.9", "7.8.9"), (None, "an unknown version")])
@pytest.mark.parametrize("either", ["trained", "killed"], indirect=True)
def test_a_training_with_an_unknown_setting_is_refused(either, version, named):
    def edit(results):
        results["settings"]["dropout"] = 0.5
        results.pop("version", None)
        results.update({"version": version} if version else {})

    edit_both(either, edit)
    before = stages.contents(either)
    stages.assert_fails(stages.run("train", model=either), 1, "dropout", named)
    assert stages.contents(either) == before


# Data of other versions -----------------------------------------------------------------------------------------------


def test_an_unfinished_training_names_its_data(killed, data):
    expected = {name: stages.sha256(data / "MNIST" / "raw" / name) for name in stages.RAW_FILES}
    assert results(killed)["data_sha256"] == expected


@pytest.mark.parametrize("either", ["trained", "killed"], indirect=True)
def test_a_training_on_other_data_is_refused(either):
    edit_both(either, lambda results: results.update(data_sha256=OTHER_DATA))
    before = stages.contents(either)
    stages.assert_fails(stages.run("train", model=either), 2, "other data", "--fresh")
    assert stages.contents(either) == before


def test_a_checkpoint_of_other_data_is_not_trained_on_from(unfinished):
    corpus.in_results(unfinished / "checkpoint.pt", lambda results: results.update(data_sha256=OTHER_DATA))
    before = stages.contents(unfinished)
    stages.assert_fails(stages.run("train", model=unfinished), 2, "other data", "--fresh")
    assert stages.contents(unfinished) == before


# A stop that takes too long -------------------------------------------------------------------------------------------


def test_a_stop_that_a_batch_holds_up_ends_without_a_new_checkpoint_and_says_so(unfinished):
    with stages.running(stages.command("train", "--log-interval", "10", model=unfinished)) as process:
        stages.await_progress(process)
        for worker in workers(process):
            os.kill(worker, signal.SIGSTOP)
        before = stages.contents(unfinished)
        process.terminate()
        assert process.wait(10) == 143
        assert "the last checkpoint" in (line := process.stderr.read())
    assert len(line.splitlines()) == 1
    assert stages.contents(unfinished) == before


def workers(process):
    """The process ids of a training's workers."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(number) for number in file.read().split()]
