"""What the services that `serve` is compared with have in common: the network, and the plainest way to read a picture.

Reads   $MODEL/mnist_cnn.pt, a model of train
"""

import base64
import io
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "model-infer"))
import numpy as np
import torch
from PIL import Image

import net


def load_model():
    """The network of serve, ready to predict."""
    model = net.Net()
    model.load_state_dict(torch.load(Path(os.environ["MODEL"]) / "mnist_cnn.pt", weights_only=True))
    return model.eval()


def predict(model, data_url):
    """The class of a picture, dark on white, as a data URL, and the probabilities of all classes."""
    picture = Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))
    pixels = 255 - np.asarray(picture.convert("L").resize((28, 28)))
    with torch.inference_mode():
        probabilities = model(net.to_input(torch.from_numpy(pixels)[None])).exp()[0]
    return {"prediction": int(probabilities.argmax()), "probabilities": probabilities.tolist()}
