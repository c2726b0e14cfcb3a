"""Broken and forged files in real containers: some of the corpus, of which `make chaos` tries every file."""

import corpus
import pytest

SOME = [
    "train-images-idx3-ubyte: a flipped bit (train)",
    "train-images-idx3-ubyte: forbidden to read (train)",
    "t10k-images-idx3-ubyte: a FIFO (evaluate)",
    "t10k-labels-idx1-ubyte: cut in half (infer)",
    "mnist_cnn.pt: missing (infer)",
    "mnist_cnn.pt: a torch file that runs code (evaluate)",
    "mnist_cnn.pt: a zip bomb (evaluate)",
    "mnist_cnn.pt: another shape (evaluate)",
    "mnist_cnn.pt: cut in half (infer)",
    "checkpoint.pt: a zip with a pickle that runs code (train)",
    "checkpoint.pt: more batches than its history (train)",
    "train_results.json: 100,000 lists in each other (train)",
    "train_results.json: a FIFO (train)",
    "eval_results.json: empty (infer)",
    "eval_results.json: cut in half (evaluate)",
]
CASES = {case.name: case for case in corpus.cases()}


@pytest.mark.parametrize("name", SOME)
def test_a_broken_file_is_named_in_one_line_with_what_fixes_it_and_harms_nothing(complete, tmp_path, name):
    assert corpus.run_case(CASES[name], complete, tmp_path) == []


def test_the_corpus_has_at_least_60_files_each_under_a_name_of_its_own():
    assert len(CASES) == len(corpus.cases()) >= 60
