"""The network behind BentoML, with one worker: MODEL=model bentoml serve bentoml_service:Digits."""

import bentoml
import plain
from pydantic import BaseModel


class Input(BaseModel):
    image: str


@bentoml.service(workers=1)
class Digits:
    def __init__(self):
        self.model = plain.load_model()

    @bentoml.api(route="/predictions")
    def predict(self, input: Input) -> dict:
        return {"output": plain.predict(self.model, input.image)}
