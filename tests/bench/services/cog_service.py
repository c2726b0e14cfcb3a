"""The network behind the HTTP server that `cog build` puts into an image: MODEL=model python -m cog.server.http."""

import plain
from cog import BasePredictor


class Digits(BasePredictor):
    def setup(self):
        self.model = plain.load_model()

    def predict(self, image: str) -> dict:
        return plain.predict(self.model, image)
