"""SIGTERM and Ctrl-C end a command with one line and a status of their own, whatever Ray would do on them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
LINE = "rayembed: interrupted; the same command goes on from what is done\n"
# A job that starts Ray, and is in the middle of a pass when the signal comes. Ctrl-C reaches what runs in the
# foreground; where these tests run in the background, a shell has told all below it to ignore it.
WAITS = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
module = types.ModuleType("rayembed.jobs.mine")
def run(experiment, *, overwrite=False):
    import ray
    from rayembed.jobs.session import ray_session
    with ray_session(experiment):
        print("started", flush=True)
        ray.get(ray.remote(lambda: __import__("time").sleep(60)).remote())
module.run = run
sys.modules["rayembed.jobs.mine"] = module
from rayembed.cli import main
sys.exit(main(["mine", sys.argv[1]]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_with_a_ray_of_its_own_ends_with_a_line(number: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("output_dir: run\nmodel: {name_or_path: none}\n")
    command = [sys.executable, "-c", WAITS, str(tmp_path / "e.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(0.5)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, LINE)
