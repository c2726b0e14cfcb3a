"""Runs in the train image: train.py with the flags given, but with two torch threads in each worker.

Only the workers get them: they are forked, so their parent must keep to one thread until then.
"""

import os
import runpy
import sys

import torch

sys.path.insert(0, "/opt/app")  # the image's own programs
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(2))
runpy.run_path("/opt/app/train.py", run_name="__main__")
