"""The model card: README.md of an export, with the block of metadata that Hugging Face's hub reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from stage.dataset import DATA_SET

TEMPLATE = Path(__file__).with_name("card.md")
MEASURED = Path(__file__).with_name("digits.md")
OF_TRAINING = ("settings", "training_images", "nodes", "precision", "seconds", "version", "versions")


def model_card(
    results: Mapping[str, Any], metadata: Mapping[str, str], training: Mapping[str, Any], difference: float
) -> str:
    """Return the card, from an evaluation, the metadata of the exported files, and the record of the training, if any.

    The difference is the largest one between a probability of the model and of the exported file.
    """
    channels, height, width = DATA_SET.shape
    names = [name.replace("|", "\\|") for name in DATA_SET.classes]
    keys = ("precision", "recall", "f1")
    classes = [(*(f"{line[key]:.4f}" for key in keys), line["count"]) for line in results["classes"]]
    recorded = {name: training[name] for name in OF_TRAINING if name in training}
    values = {
        "name": f"{DATA_SET.name.lower()}-cnn",
        "dataset_id": DATA_SET.name.lower(),
        "count": len(names),
        "class_names": ", ".join(names),
        "images": f"[N, {height}, {width}{', 3' if channels == 3 else ''}]",
        "ratio": round(results["Accuracy"] / 100, 6),
        "loss": f"{results['Test loss']:.4f}",
        "test_images": f"{sum(line['count'] for line in results['classes']):,}",
        "difference": f"{difference:.1g}",
        "rows": as_rows(names, classes),
        "columns": as_rows([""], [names]) + "\n|" + " --- |" * (1 + len(names)),
        "matrix": as_rows(names, results["confusion_matrix"]),
        "training": f"```json\n{json.dumps(recorded, indent=1)}\n```"
        if recorded
        else "The model comes from elsewhere.",
        "measured": MEASURED.read_text() if DATA_SET.preparation == "digit" else "",
    }
    return Template(TEMPLATE.read_text()).substitute(metadata, **values)


def as_rows(names: list[str], rows: list[Any]) -> str:
    """Return rows of a table in Markdown, each with its name first."""
    return "\n".join(f"| {' | '.join([name, *map(str, row)])} |" for name, row in zip(names, rows, strict=True))
