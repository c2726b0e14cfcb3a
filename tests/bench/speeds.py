"""Runs in the stages' images: prints as JSON what the function that is named measures. See bench.py."""

import json
import statistics
import sys
import time
from functools import partial

sys.path.insert(0, "/opt/app")  # the image's own programs
import torch

import net
from stage import files, limits, weights
from stage.images import read_images

SIZE = 1024  # of the matrices


def median_seconds(call, repeats, warm_up=0):
    """The median of the seconds that a call takes."""
    seconds = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm_up:])


def matrices():
    """How fast one core multiplies matrices, the limit of what training can reach: GFLOP/s by dtype."""
    torch.set_num_threads(1)
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        seconds = median_seconds(partial(torch.matmul, *torch.randn(2, SIZE, SIZE).to(dtype)), repeats=40, warm_up=5)
        speeds[str(dtype).removeprefix("torch.")] = 2 * SIZE**3 / seconds / 1e9
    return speeds


def predict_all():
    """How many of the test images/s the model predicts, without imports and files."""
    torch.set_num_threads(limits.count_cores())  # as evaluate.py does
    model = net.Net()
    weights.load_model(model, files.MODEL)
    images, _ = read_images(files.DATA, "test")
    seconds = median_seconds(partial(net.predict, model, images), repeats=20, warm_up=3)
    return {"predicted_per_second": len(images) / seconds, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
