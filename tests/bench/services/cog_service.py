"""The network behind Cog's HTTP server, which `cog build` puts into a container: MODEL=model python -m cog.server.http."""

import plain
from cog import BasePredictor


class Digits(BasePredictor):
    def setup(self):
        self.model = plain.load_model()

    def predict(self, image: str) -> dict:
        return plain.predict(self.model, image)
