"""Uses an export where torch is not installed: prints as JSON the accuracies on the test images, in percent.

python tests/exported.py EXPORT data/MNIST/raw
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors import safe_open


def main():
    """Predict all test images with both files."""
    assert importlib.util.find_spec("torch") is None
    export, raw = map(Path, sys.argv[1:])
    images = np.fromfile(raw / "t10k-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.fromfile(raw / "t10k-labels-idx1-ubyte", np.uint8, offset=8)
    session = onnxruntime.InferenceSession(export / "model.onnx")
    (by_onnx,) = session.run(None, {"images": images})
    parts = [run_by_hand(export / "model.safetensors", part) for part in np.split(images, 20)]
    by_hand = np.concatenate(parts)
    probabilities = np.exp(by_onnx), np.exp(by_hand - np.logaddexp.reduce(by_hand, axis=1, keepdims=True))
    accuracies = [100 * float((found.argmax(1) == labels).mean()) for found in probabilities]
    difference = float(np.abs(probabilities[0] - probabilities[1]).max())
    print(json.dumps({"model.onnx": accuracies[0], "model.safetensors": accuracies[1], "difference": difference}))


def run_by_hand(path, images):
    """The logits, float32 [N, 10], of the network of MNIST for images, uint8 [N, 28, 28], in numpy."""
    with safe_open(path, "numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        mean, std = (np.float32(json.loads(file.metadata()[name])) for name in ("pixel_mean", "pixel_std"))
    x = ((images / np.float32(255) - mean) / std)[:, None]
    for name in ("conv1", "conv2"):
        patches = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(2, 3))
        x = np.einsum("nchwij,ocij->nohw", patches, weights[f"{name}.weight"], optimize=True)
        x += weights[f"{name}.bias"][:, None, None]
        n, channels, height, width = x.shape
        x = np.maximum(x.reshape(n, channels, height // 2, 2, width // 2, 2).max((3, 5)), 0)
    x = np.maximum(x.reshape(len(x), -1) @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
    return x @ weights["fc2.weight"].T + weights["fc2.bias"]


if __name__ == "__main__":
    main()
