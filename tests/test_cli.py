"""The command line: quick help, exit statuses, one line an error, and what a job is called with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from rayembed import __version__
from rayembed.cli import ENVIRONMENT, JOBS, TRACEBACK, _duration, main
from rayembed.config import Experiment
from rayembed.config.schema import describe, sections

EXPERIMENT = "output_dir: runs/x\nmodel: {name_or_path: some/model}\n"
Calls = list[tuple[Experiment, bool]]


@pytest.fixture
def experiment_file(tmp_path: Path) -> str:
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    return str(tmp_path / "e.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stands in for the train job, and lists what it is called with."""
    seen: Calls = []

    def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
        seen.append((experiment, overwrite))
        return Path(experiment.output_dir) / "train"

    def planned(experiment: Experiment, *, overwrite: bool) -> str:
        return f"plan for {experiment.output_dir}" + (" anew" if overwrite else "")

    install(monkeypatch, run=run, plan=planned)
    return seen


def install(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    module = ModuleType("rayembed.jobs.train")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "rayembed.jobs.train", module)
    for name in ENVIRONMENT:  # put back afterwards: main sets them
        monkeypatch.setenv(name, os.environ.get(name, "unset"))


def install_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
        raise error

    install(monkeypatch, run=run)


def exit_status(*words: str) -> int:
    """Of one command line, whether main returns it or argparse exits with it."""
    try:
        return main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_answers_at_once_and_imports_nothing_heavy(option: str) -> None:
    code = (
        "import sys\nfrom rayembed.cli import main\n"
        f"try: main([{option!r}])\nexcept SystemExit as ended: assert not ended.code, ended\n"
        "heavy = {'torch', 'ray', 'pydantic', 'yaml', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("words", ["--help", "train --help"])
def test_a_reader_that_closes_early_is_no_error(words: str) -> None:
    """The pipe is closed before anything is written, as it is when `head` has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; from rayembed.cli import main; sys.exit(main({words.split()!r}))"
    ended = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_overview_names_every_job_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--help") == 0
    shown = capsys.readouterr().out
    for name, job in JOBS.items():
        assert f"\n  {name:<10}{job.help.split(',')[0]}" in shown
    assert "nothing is written but prepared data in the cache" in " ".join(shown.split())
    made = ["harvest", "check", "mine", "score", "train", "evaluate", "encode", "split", "merge", "export"]
    made += ["tune", "doctor", "run"]
    assert list(JOBS) == made
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"rayembed {__version__}\n"


@pytest.mark.parametrize("name", JOBS)
def test_help_of_a_job_lists_every_key_of_its_sections(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert exit_status(name, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(" ".join(lines).split())
    for section in JOBS[name].sections:
        for setting in describe(section):
            default = "" if setting.default == "required" else f" = {setting.default}"
            required = ", required" if not default else ""
            bounds = f", {setting.bounds}" if setting.bounds else ""
            assert f"{setting.key}{default} ({setting.type}{bounds}{required}) {setting.help}" in words
    assert max(len(line) for line in lines[1:]) <= 70
    assert JOBS[name].module == f"rayembed.jobs.{name}"


def test_help_of_run_has_every_section_but_those_of_jobs_that_are_no_part_of_it() -> None:
    assert {*JOBS["run"].sections} == {*sections()} - {"split", "merge"}


@pytest.mark.parametrize(
    "name", ["mine", "score", "train", "evaluate", "encode", "split", "merge", "export", "harvest"]
)
def test_help_of_a_job_begins_with_its_own_section(name: str) -> None:
    assert JOBS[name].sections[0] == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "e.yaml"], "unknown job 'trian'; did you mean train?"),
        (["xyzzy", "--help"], "unknown job 'xyzzy'; jobs are harvest, check, mine"),
        ([], "no job; jobs are harvest"),
        (["train"], "no experiment file; write rayembed train EXPERIMENT.yaml"),
        (["train", "e.yaml", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["train", "e.yaml", "--over"], "unrecognized arguments: --over"),
    ],
)
def test_wrong_commands_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(*words) == 2
    assert f"rayembed: error: {message}" in capsys.readouterr().err


def test_a_job_gets_the_experiment_with_overrides_wherever_they_stand(
    experiment_file: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("train", experiment_file, "seed=7", "--overwrite", "train.learning_rate=-0.0e0") == 2
    assert "command line: train.learning_rate: found" in capsys.readouterr().err
    assert exit_status("train", experiment_file, "seed=7", "--overwrite", "train.temperature=0.5") == 0
    ((experiment, overwrite),) = calls
    assert experiment.train is not None
    assert (experiment.seed, experiment.train.temperature, overwrite) == (7, 0.5, True)
    assert capsys.readouterr().out == f"rayembed train: done in 0.0 s: {Path('runs/x/train').absolute()}\n"
    assert exit_status("train", experiment_file) == 0
    assert calls[1][1] is False


def test_dry_run_prints_the_plan_and_runs_nothing(
    experiment_file: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("train", experiment_file, "--dry-run") == 0
    assert exit_status("train", experiment_file, "--dry-run", "--overwrite") == 0
    out = Path("runs/x").absolute()
    assert (capsys.readouterr().out, calls) == (f"plan for {out}\nplan for {out} anew\n", [])


def test_environment_is_set_before_the_job_only_where_unset(
    experiment_file: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert exit_status("train", experiment_file) == 0
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"


@pytest.mark.parametrize("error", [ValueError("line one\nline two"), FileNotFoundError("a.jsonl"), RuntimeError("r")])
def test_expected_failures_are_said_in_words(
    error: Exception, experiment_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_failing(monkeypatch, error)
    monkeypatch.delenv(TRACEBACK, raising=False)
    assert exit_status("train", experiment_file) == 1
    assert capsys.readouterr().err == f"rayembed: error: {error} (RAYEMBED_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv(TRACEBACK, "1")
    assert exit_status("train", experiment_file) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "raise error" in shown


def test_an_error_of_a_ray_worker_is_said_in_its_own_words(
    experiment_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class RayTaskError(ValueError):  # as Ray builds it: text is the worker's traceback, cause the worker's error
        cause = ValueError("data/a.jsonl:3: pos is empty")

    install_failing(monkeypatch, RayTaskError("Traceback\n  many lines"))
    assert exit_status("train", experiment_file) == 1
    assert capsys.readouterr().err.startswith("rayembed: error: data/a.jsonl:3: pos is empty (")


def test_errors_of_ours_are_not_hidden(experiment_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_failing(monkeypatch, AssertionError("ours"))
    with pytest.raises(AssertionError, match="ours"):
        main(["train", experiment_file])


def test_wrong_experiments_exit_with_2_and_interrupts_with_130(
    experiment_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("train", "none.yaml") == 2
    assert capsys.readouterr().err.startswith("rayembed: error: none.yaml: no such file")
    install_failing(monkeypatch, KeyboardInterrupt())
    assert exit_status("train", experiment_file) == 130


@pytest.mark.parametrize("how", ["the signal", "the exit that Ray Train makes of Ctrl-C"])
def test_sigterm_ends_a_command_as_an_interrupt_does(
    how: str, experiment_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
        if how == "the signal":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        sys.exit(0)

    install(monkeypatch, run=run)
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    assert exit_status("train", experiment_file) == (143 if how == "the signal" else 130)
    assert time.monotonic() - started < 5
    assert capsys.readouterr().err == "rayembed: interrupted; the same command goes on from what is done\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_progress_of_rayembed_goes_to_stderr_as_plain_lines(tmp_path: Path) -> None:
    """In a process of its own, since pytest has its own handlers."""
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    code = (
        "import logging, sys, types\nfrom pathlib import Path\n"
        "def run(experiment, *, overwrite=False):\n"
        "    logging.getLogger('rayembed.x').info('step 1'); logging.getLogger('other').info('hidden')\n"
        "    logging.getLogger('other').warning('seen'); return Path('p')\n"
        "module = types.ModuleType('rayembed.jobs.train'); module.run = run\n"
        "sys.modules['rayembed.jobs.train'] = module\n"
        "from rayembed.cli import main\nsys.exit(main(['train', sys.argv[1]]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "e.yaml")], capture_output=True, text=True, check=True
    )
    times, texts = zip(*(line.split(" ", 1) for line in ended.stderr.splitlines()), strict=True)
    assert texts == ("step 1", "seen")
    assert all(len(stamp) == 8 and stamp[2] == stamp[5] == ":" for stamp in times)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (8.25, "8.2 s"), (83, "1 min 23 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert _duration(seconds) == words
