"""The code that a training depends on, and whether a model was trained with the code of this stage.

train notes the sha256 of each part in train_results.json. Comments count too, since whole files are hashed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from stage.dataset import DATA_SET
from stage.files import FRESH_HINT, MAX_RECORD_BYTES, TRAIN_RESULTS, WEIGHTS, read_limited
from stage.process import Failure

TOP = Path(__file__).parents[1]
ALL_STAGES = ("net.py", "stage/images.py")  # what all stages have, besides the data set's entry
TRAINING_STEP = ("hogwild.py", "layers.py", "augmentation.py")
ENTRY = "DATA_SET in stage/dataset.py"


def sha256_by_part() -> dict[str, str]:
    """Return the sha256 of each part of this stage that a training depends on."""
    # Without what changes no training: evaluate's limit, where the files come from, how users' pictures are prepared.
    entry = dataclasses.replace(DATA_SET, min_accuracy=0, preparation="resize", gz_md5={}, mirrors=(), npm_package="")
    files = {name: TOP / name for name in (*ALL_STAGES, *TRAINING_STEP)}
    contents = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    return {name: hashlib.sha256(part).hexdigest() for name, part in (contents | {ENTRY: repr(entry).encode()}).items()}


def training_of(model: Path, sha256: str) -> dict[str, Any]:
    """Return what train_results.json says of the model with this sha256; nothing if the model comes from elsewhere."""
    try:
        record = json.loads(read_limited(model / TRAIN_RESULTS, MAX_RECORD_BYTES, ""))
        return dict(record) if record["model_sha256"] == sha256 else {}
    except (Failure, ValueError, KeyError, TypeError, RecursionError):
        return {}


def check_same(model: Path, sha256: str) -> None:
    """Raise Failure if train_results.json is that of the model with this sha256, and names other code than this."""
    trained_with, here = training_of(model, sha256).get("code"), sha256_by_part()
    for name in (*ALL_STAGES, ENTRY):
        if trained_with and isinstance(trained_with, dict) and trained_with.get(name) != here[name]:
            raise Failure(
                f"{model / WEIGHTS} was trained with another {name} than is in {TOP}. Copy that of model-train with: "
                f"make copies (then build the images again). {FRESH_HINT}"
            )
