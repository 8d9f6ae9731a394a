"""`rayembed run` in processes of their own, on machines that share nothing but a store."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from rayembed.config import Experiment
from rayembed.config.loading import dump
from tests.s3_server import KEYS, Server

WITHIN = 800  # seconds; a minute on a machine that does nothing else


class Command:
    """`rayembed JOB` in a process of its own, with a scratch folder of its own."""

    def __init__(
        self, experiment: Experiment | str, folder: Path, scratch: str, *, job: str = "run", **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file, self.log = folder / f"{scratch}.yaml", folder / f"{scratch}.log"
        file.write_text(experiment if isinstance(experiment, str) else dump(experiment))
        command = [Path(sys.executable).with_name("rayembed"), job, file]
        environment |= {"RAYEMBED_SCRATCH": str(folder / scratch)}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def end(self, within: float = WITHIN) -> tuple[int, str]:
        """Its exit status, and what it wrote."""
        return self.process.wait(within), self.log.read_text()

    def finish(self, within: float = WITHIN) -> str:
        """What it wrote, when it has ended well."""
        status, output = self.end(within)
        assert status == 0, output
        return output

    def kill(self) -> None:
        """As a machine that loses its power: the command, its Ray, the workers."""
        everyone = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in everyone:
            process.suspend()
        for process in everyone:
            process.send_signal(signal.SIGKILL)
        self.process.wait(30)


def files_without_keys(server: Server, folder: str) -> dict[str, bytes]:
    """What is in a folder of the bucket; no key is in it."""
    there = server.files(folder)
    for name, content in there.items():
        for key in KEYS.values():
            assert key == "true" or key.encode() not in content, name
    return there
