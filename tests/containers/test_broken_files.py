"""A few of the corpus's broken files, for real; `make chaos` tries them all."""

import corpus
import faults
import pytest

SOME = [
    "train-images-idx3-ubyte: a flipped bit (train)",
    "train-images-idx3-ubyte: forbidden to read (train)",
    "t10k-images-idx3-ubyte: a FIFO (evaluate)",
    "mnist_cnn.pt: a torch file that runs code (evaluate)",
    "mnist_cnn.pt: a zip bomb (evaluate)",
    "mnist_cnn.pt: cut in half (infer)",
    "checkpoint.pt: a zip with a pickle that runs code (train)",
    "checkpoint.pt: more batches than its history (train)",
    "train_results.json: 100,000 lists in each other (train)",
    "train_results.json: a FIFO (train)",
    "eval_results.json: empty (infer)",
]
CASES = {case.name: case for case in corpus.cases()}


@pytest.mark.parametrize("name", SOME)
def test_a_broken_file_is_one_line_and_harms_nothing(pipeline, tmp_path, name):
    faults.IMAGES = pipeline.project.name
    assert corpus.meet(CASES[name], pipeline.volume, tmp_path) == []


def test_the_corpus_has_at_least_60_files_each_under_a_name_of_its_own():
    assert len(CASES) == len(corpus.cases()) >= 60
