""".ci/prepare, far from a real engine: its path has only the programs that it may use here."""

import shutil
import subprocess

import stages

UNAME = "#!/bin/sh\necho aarch64\n"
DOCKER = '#!/bin/sh\ncase "$1" in info|compose) exit 0;; esac\nexit 1\n'  # an engine that runs, and has no image


def test_another_kind_of_machine_is_refused_in_one_line(tmp_path):
    for name in ("bash", "sh", "sed", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, script in (("uname", UNAME), ("docker", DOCKER)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("bash"), stages.TREE / ".ci" / "prepare"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    said = (result.stdout + result.stderr).splitlines()
    assert result.returncode == 1, said
    assert len(said) == 1
    assert "aarch64" in said[0]
