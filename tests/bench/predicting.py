"""Runs in the evaluate image: prints how many of the test images/s the model predicts, without imports and files."""

import json
import statistics
import sys
import time

sys.path.insert(0, "/opt/app")  # the image's own programs
import torch

import net
from stage import files, process, weights
from stage.images import read_images

PASSES, WARM_UP_PASSES = 20, 3

torch.set_num_threads(process.count_cores())  # as evaluate.py does
model = net.Net()
weights.load_model(model, files.MODEL)
images, _ = read_images(files.DATA, "test")
seconds = []
for _ in range(WARM_UP_PASSES + PASSES):
    began = time.monotonic()
    net.predict(model, images)
    seconds.append(time.monotonic() - began)
speed = len(images) / statistics.median(seconds[WARM_UP_PASSES:])
print(json.dumps({"predicted_per_second": speed, "threads": torch.get_num_threads()}))
