"""Every broken or forged file of corpus.py: named in one line with what fixes it, soon, and without much memory."""

import multiprocessing
import os
import resource
from unittest import mock

import pytest

import corpus
import stages

MEMORY = 500_000_000  # the most bytes that a stage may take in addition to those of this process
SECONDS = 20  # far more than any case needs
CASES = [case for case in corpus.cases() if case.fault != "forbidden to read" or os.geteuid()]  # root may read all


def call_and_measure(words, folders):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mock.patch("stage.limits.count_cores", return_value=1):  # torch's own threads would hang after a fork
        result = stages.call(*words, **folders)
    return result, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def call_forked(*words, **folders):
    """stages.call(), but in a process of its own, which is killed if it takes too long."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result, memory = pool.apply_async(call_and_measure, (words, folders)).get(SECONDS)
    assert memory < MEMORY
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_file_is_named_in_one_line_with_what_fixes_it_and_harms_nothing(finished, tmp_path, monkeypatch, case):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])  # where nobody listens
    corpus.check(case, finished, tmp_path, call_forked)
