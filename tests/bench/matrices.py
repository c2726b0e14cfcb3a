"""Runs in the train image: prints how fast one core multiplies matrices, the limit of what training can reach.

Prints  one line of JSON: GFLOP/s in float32 and bfloat16, medians of the products of two 1024x1024 matrices
"""

import json
import statistics
import time

import torch

SIZE, PRODUCTS, WARM_UP_PRODUCTS = 1024, 40, 5

torch.set_num_threads(1)
speeds = {}
for dtype in (torch.float32, torch.bfloat16):
    one, other = torch.randn(2, SIZE, SIZE).to(dtype)
    seconds = []
    for _ in range(WARM_UP_PRODUCTS + PRODUCTS):
        began = time.monotonic()
        one @ other
        seconds.append(time.monotonic() - began)
    speeds[str(dtype).removeprefix("torch.")] = 2 * SIZE**3 / statistics.median(seconds[WARM_UP_PRODUCTS:]) / 1e9
print(json.dumps(speeds))
