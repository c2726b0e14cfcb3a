"""The network behind FastAPI: MODEL=model uvicorn fastapi_service:app."""

import plain
from fastapi import FastAPI
from pydantic import BaseModel


class Input(BaseModel):
    image: str


class PredictionRequest(BaseModel):
    input: Input


app = FastAPI()
model = plain.load_model()


@app.post("/predictions")
def predict(request: PredictionRequest):
    return {"output": plain.predict(model, request.input.image)}
