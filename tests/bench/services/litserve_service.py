"""The network behind LitServe, with one worker: MODEL=model python litserve_service.py 8000."""

import sys

import litserve
import plain


class Digits(litserve.LitAPI):
    def setup(self, device):
        self.model = plain.load_model()

    def decode_request(self, request):
        return request["input"]["image"]

    def predict(self, image):
        return plain.predict(self.model, image)

    def encode_response(self, output):
        return {"output": output}


if __name__ == "__main__":
    server = litserve.LitServer(Digits(api_path="/predictions"), accelerator="cpu", workers_per_device=1)
    server.run("127.0.0.1", int(sys.argv[1]), num_api_servers=1, log_level="warning", generate_client_file=False)
