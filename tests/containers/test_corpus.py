"""Broken and forged files in real containers: some of the corpus, of which `make chaos` tries every file."""

import pytest

import corpus

SOME = [
    "train-images-idx3-ubyte: a flipped bit (train)",
    "t10k-images-idx3-ubyte: a FIFO (evaluate)",
    "mnist_cnn.pt: a torch file that runs code (evaluate)",
    "mnist_cnn.pt: many bytes (evaluate)",
    "mnist_cnn.pt: forbidden to read (evaluate)",
    "checkpoint.pt: a zip with a pickle that runs code (train)",
    "train_results.json: 100,000 lists in each other (train)",
    "eval_results.json: empty (infer)",
]
CASES = {case.name: case for case in corpus.cases()}


@pytest.mark.parametrize("name", SOME)
def test_a_broken_file_is_named_in_one_line_with_what_fixes_it_and_harms_nothing(complete, tmp_path, name):
    corpus.check(CASES[name], complete, tmp_path, corpus.run_in_container)
