"""Runs in the evaluate image: how many images/s judging the test images itself takes, imports and files aside.

Reads   the data set and mnist_cnn.pt, where the container has them
Prints  one line of JSON: the median images/s of PASSES passes, and torch's threads
"""

import json
import statistics
import sys
import time

sys.path.insert(0, "/opt/app")  # the image's own programs
import net
import torch

PASSES, WARM_UP_PASSES = 20, 3


def main():
    """Judges the test images again and again."""
    model, _ = net.load_model(net.MODEL / "mnist_cnn.pt")
    images, _ = net.read_split(net.DATA, "t10k")
    for _ in range(WARM_UP_PASSES):
        net.predict(model, images)
    speed = statistics.median(len(images) / time_pass(model, images) for _ in range(PASSES))
    print(json.dumps({"judged_per_second": speed, "threads": torch.get_num_threads()}))


def time_pass(model, images):
    """The seconds that judging the images takes."""
    began = time.monotonic()
    net.predict(model, images)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
