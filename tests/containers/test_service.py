"""The life of serve in its container. What it answers is in tests/test_serve.py, the page in test_page.py."""

import pytest

from pipeline import Pipeline, image, in_image
from stages import free_port, wait_until


@pytest.mark.parametrize("owned", [1000], indirect=True)
def test_serve_is_started_again_after_a_crash_and_ended_by_stop_and_down(volume, owned):
    port = {"MNIST_PORT": str(free_port())}
    with Pipeline(volume, owned[0], environment=port, serve={"image": image("infer")}) as project:
        up = project.compose("up", "--wait", "serve")
        assert up.returncode == 0, up.stderr
        serve = project.container("serve")
        first = serve.state()["Pid"]
        # Not by `docker kill`, after which the engine would take it for stopped.
        in_image("infer", f"kill -9 {first}", "--pid", "host", "--privileged")
        wait_until(lambda: serve.state()["Pid"] not in (0, first), "another start")
        project.compose("stop", "serve")
        assert serve.state()["ExitCode"] == 143
        project.compose("--profile", "serve", "down")
        assert project.containers() == []
