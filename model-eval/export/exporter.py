"""Exports the model to other programs: safetensors, ONNX and a model card, in one folder of the volume.

Each file is compared with the model first; docs/export.md says why ONNX's slow reference implementation does that.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import net
from export.card import model_card
from stage import code, folders, locks
from stage.dataset import DATA_SET
from stage.files import EXPORT
from stage.limits import check_memory
from stage.output import say
from stage.process import Failure

MEMORY = 440_000_000  # bytes that evaluate needs with --export; measured
MAX_DIFFERENCE = 1e-5  # of a probability: sums of float32 in another order
INPUT, OUTPUT = "images", "log_probabilities"  # of the ONNX model


class FromPixels(nn.Module):
    """The network with its normalisation: from images, uint8 [N, H, W] or [N, H, W, C], to log-probabilities."""

    def __init__(self, model: net.Net) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities, float32 [N, classes]."""
        return self.model(net.to_input(images))  # type: ignore[no-any-return]


def check_possible(folder: Path) -> None:
    """Raise Failure if there is too little memory, or something in the place of the folder of the export."""
    check_memory(MEMORY, "evaluate --export")
    folders.check_destination(folder / EXPORT)


def export_model(
    folder: Path,
    sha256: str,
    model: net.Net,
    images: torch.Tensor,
    log_probabilities: torch.Tensor,
    results: Mapping[str, Any],
) -> None:
    """Publish the export of the model in the volume with this sha256.

    The images, uint8 [N, H, W] or [N, H, W, C], are those of the test, with the model's log-probabilities, float32
    [N, classes], and their evaluation. Raise Failure if an exported file does not give the same.
    """
    say(f"evaluate: exporting; comparing model.onnx on {len(images):,} test images takes about a minute")
    metadata = {
        "model_sha256": sha256,
        "data_set": DATA_SET.name,
        "classes": json.dumps(DATA_SET.classes),
        "pixel_mean": json.dumps(DATA_SET.pixel_mean),
        "pixel_std": json.dumps(DATA_SET.pixel_std),
        "accuracy": str(results["Accuracy"]),
    }
    contents = {"model.safetensors": as_safetensors(model, metadata), "model.onnx": as_onnx(model, images, metadata)}
    difference = check_onnx(contents["model.onnx"], images, log_probabilities)
    contents["README.md"] = model_card(results, metadata, code.training_of(folder, sha256), difference).encode()
    with locks.publishing(folder):
        folders.replace_folder(folder / EXPORT, contents)
    sizes = ", ".join(f"{name} ({len(content):,} bytes)" for name, content in contents.items())
    say(f"evaluate: exported to {folder / EXPORT}: {sizes}")


def as_safetensors(model: net.Net, metadata: dict[str, str]) -> bytes:
    """Return the weights as a safetensors file. Raise Failure if it does not give them back."""
    weights = model.state_dict()
    content: bytes = safetensors.torch.save(weights, {"format": "pt", **metadata})
    loaded = safetensors.torch.load(content)
    if loaded.keys() != weights.keys() or not all(loaded[name].equal(weights[name]) for name in weights):
        raise Failure("model.safetensors does not give back the model's weights; nothing is exported")
    return content


def as_onnx(model: net.Net, images: torch.Tensor, metadata: dict[str, str]) -> bytes:
    """Return the network with its normalisation, for any number of images like these, as an ONNX file.

    Raise Failure if torch cannot export the network.
    """
    try:
        # Without torch's warnings about itself, and the graph of a network that it cannot export.
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            program = torch.onnx.export(
                FromPixels(model).eval(),
                (images[:2],),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("N")}},
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise Failure(f"torch cannot export the network of net.py to ONNX ({reason}); nothing is exported") from None
    assert program
    program.model.metadata_props.update(metadata)
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of the source, with the paths of this machine
    content: bytes = program.model_proto.SerializeToString()
    return content


def check_onnx(content: bytes, images: torch.Tensor, log_probabilities: torch.Tensor) -> float:
    """Return the largest difference between the probabilities that an ONNX file gives and those of the model.

    Raise Failure if it is above MAX_DIFFERENCE, or if a prediction is another one.
    """
    file = onnx.load_from_string(content)
    onnx.checker.check_model(file, full_check=True)
    evaluator: Any = ReferenceEvaluator(file)
    parts = [evaluator.run(None, {INPUT: part.numpy()})[0] for part in torch.split(images, 250)]
    outputs = torch.cat([*map(torch.from_numpy, parts)])
    difference = (outputs.exp() - log_probabilities.exp()).abs().max().item()
    others = int((outputs.argmax(1) != log_probabilities.argmax(1)).sum())
    if others or not difference <= MAX_DIFFERENCE:
        raise Failure(
            f"model.onnx predicts {others} of {len(images):,} test images differently from the model, with "
            f"probabilities that differ by up to {difference:.1g}; nothing is exported"
        )
    return difference
