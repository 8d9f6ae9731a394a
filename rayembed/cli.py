"""The command `rayembed JOB EXPERIMENT.yaml [section.key=value ...]`.

Nothing but the standard library is imported before the command line is parsed: torch and ray take seconds, and a
mistyped job or `--help` should not wait for them.
"""

import argparse
import difflib
import importlib
import logging
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

USAGE = "rayembed JOB EXPERIMENT.yaml [section.key=value ...] [--dry-run] [--overwrite]"
TRACEBACK = "RAYEMBED_TRACEBACK"
ENVIRONMENT = {  # only where unset
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a run ends this much sooner than with Ray's 2 s
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


class Job(NamedTuple):
    """One verb of the command line.

    Attributes:
        module: Has `run(experiment, *, overwrite=False) -> Path`, and `plan(experiment, *, overwrite=False) -> str`,
            which raises what `run` would refuse before it does anything.
        help: What it does, on one line.
        sections: Sections of the experiment that it reads, its own first; "" is what is in no section.
        needs_file: Whether it does nothing without an experiment file; else `run` and `plan` take None for it.
    """

    module: str
    help: str
    sections: tuple[str, ...]
    needs_file: bool = True


SHARED = ("", "model", "data", "encode", "ray")
FAMILIES = ("m3", "lora", "icl", "reranker")
JOBS = {
    "harvest": Job(
        "rayembed.jobs.harvest", "build a data set from the docstrings of installed packages", ("harvest", "")
    ),
    "check": Job(
        "rayembed.jobs.check", "read all data and say what is wrong, by file, line and field", ("data", "", "model")
    ),
    "mine": Job("rayembed.jobs.mine", "find hard negatives in the corpus", ("mine", "search", "score", *SHARED)),
    "score": Job("rayembed.jobs.score", "have a teacher score queries against their passages", ("score", *SHARED)),
    "train": Job("rayembed.jobs.train", "train the model", ("train", *FAMILIES, *SHARED)),
    "evaluate": Job(
        "rayembed.jobs.evaluate",
        "compare base and tuned model on the evaluation set",
        ("evaluate", "search", *FAMILIES, *SHARED),
    ),
    "encode": Job(
        "rayembed.jobs.encode", "turn the corpus and the queries into vectors", ("encode", "", "model", "data", "ray")
    ),
    "split": Job(
        "rayembed.jobs.split",
        "write the training rows to a file for each range of lengths",
        ("split", "", "model", "data"),
    ),
    "merge": Job(
        "rayembed.jobs.merge", "merge saved adapters into the model, without training", ("merge", "", "model")
    ),
    "export": Job(
        "rayembed.jobs.export", "check the tuned model and write its card and other formats", ("export", *SHARED)
    ),
    "tune": Job(
        "rayembed.jobs.tune",
        "try other values of settings, compare them on the dev split, and say which are best",
        ("tune", "train", "mine", "search", "score", *FAMILIES, *SHARED),
    ),
    "doctor": Job(
        "rayembed.jobs.doctor",
        "look at machine, Ray, storage and models, and say what to do; the experiment file may be left out",
        ("ray", "", "model", "data"),
        needs_file=False,
    ),
    "run": Job(
        "rayembed.jobs.run",
        "do the jobs whose sections the file has, in order, and write the report; skips what is done",
        (*SHARED, *FAMILIES, "harvest", "mine", "search", "score", "tune", "train", "evaluate", "export"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: The words after `rayembed`. None: those of this process.

    Returns:
        The exit status: 0 done, 1 the job failed, 2 the command or the experiment file is wrong, 130 interrupted, 143
        asked to end by SIGTERM.
    """
    words, came = _parse(sys.argv[1:] if arguments is None else arguments), list[int]()
    try:
        if words.help:
            _show(_help_of(words.job))
            return 0
        with _sigterm_interrupts(came):
            return _run(words)
    except (KeyboardInterrupt, SystemExit):  # the latter is how Ray Train ends a training that it interrupts
        print("rayembed: interrupted; the same command goes on from what is done", file=sys.stderr)
        return 128 + (signal.SIGTERM if came else signal.SIGINT)
    except (ValueError, OSError, RuntimeError) as error:  # what jobs raise for people to read; the rest is ours to fix
        return _report(error)


@contextmanager
def _sigterm_interrupts(came: list[int]) -> Iterator[None]:
    """SIGTERM, which schedulers and containers send, ends the command as Ctrl-C does, and is noted in a list."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # no other one may set them
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rayembed", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    words = parser.parse_intermixed_args(arguments)
    if words.version:
        from rayembed import __version__

        print(f"rayembed {__version__}")
        parser.exit(0)
    words.job, words.experiment, words.overrides = None, None, words.words[2:]
    if words.words:
        words.job = words.words[0]
    if words.job is None and words.help:
        _show(_overview())
        parser.exit(0)
    if words.job is None:
        parser.error(f"no job; jobs are {', '.join(JOBS)}; `rayembed --help` says what each does")
    if words.job not in JOBS:
        close = difflib.get_close_matches(words.job, JOBS, n=1)
        parser.error(
            f"unknown job {words.job!r}; " + (f"did you mean {close[0]}?" if close else f"jobs are {', '.join(JOBS)}")
        )
    if len(words.words) > 1:
        words.experiment = words.words[1]
    elif not words.help and JOBS[words.job].needs_file:
        parser.error(f"no experiment file; write rayembed {words.job} EXPERIMENT.yaml")
    return words


def _run(words: argparse.Namespace) -> int:
    from rayembed.config.loading import load
    from rayembed.config.uris import PublicFormatter

    started = time.monotonic()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():  # in a job's log Ray's colours are signs that nobody can read
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(PublicFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("rayembed").setLevel(logging.INFO)
    experiment = None if words.experiment is None else load(words.experiment, words.overrides)
    module = importlib.import_module(JOBS[words.job].module)
    if words.dry_run:
        print(module.plan(experiment, overwrite=words.overwrite))
        return 0
    result = module.run(experiment, overwrite=words.overwrite)
    took = _duration(time.monotonic() - started)
    from rayembed.jobs.run_folder import shown

    print(f"rayembed {words.job}: done in {took}: {shown(result)}")
    return 0


def _report(error: Exception) -> int:
    from rayembed.config.loading import ConfigError
    from rayembed.config.uris import public_text

    if os.environ.get(TRACEBACK) == "1":
        print(public_text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    cause = getattr(error, "cause", None)  # Ray's errors carry the worker's own, and its whole traceback as their text
    message = public_text(str(cause if isinstance(cause, Exception) else error)) or type(error).__name__
    hint = "" if isinstance(error, ConfigError) else f" ({TRACEBACK}=1 shows where)"
    print(f"rayembed: error: {message}{hint}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def _show(text: str) -> None:
    """Print help; a reader that has seen enough, such as `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails again


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _overview() -> str:
    options = {
        "section.key=value": "set any setting, the value in YAML: train.learning_rate=2e-5, mine={}, mine=null",
        "--dry-run": "print what would be done; nothing is written but prepared data in the cache",
        "--overwrite": "replace what was made from other settings or data",
        "--version": "print the version",
        "--help": "after a job: every setting that it reads",
    }
    lines = [f"usage: {USAGE}", "", "jobs:"]
    for name, job in JOBS.items():
        lines += _wrapped(f"  {name:<10}{job.help}", indent=12)
    lines += ["", "options:"]
    for name, text in options.items():
        lines += _wrapped(f"  {name:<21}{text}", indent=23)
    return "\n".join(lines)


def _help_of(job_name: str) -> str:
    """Every setting that a job reads: key, default, type and bounds, and what it means."""
    from rayembed.config.schema import describe, sections

    lines = [f"usage: {USAGE.replace('JOB', job_name)}", "", *_wrapped(f"rayembed {job_name}: {JOBS[job_name].help}")]
    for section in JOBS[job_name].sections:
        lines += ["", *_wrapped(f"{section}: {sections()[section]['description']}" if section else "In no section:")]
        for setting in describe(section):
            default = "" if setting.default == "required" else f" = {setting.default}"
            allowed = ", ".join(filter(None, [setting.type, setting.bounds, "" if default else "required"]))
            lines += _wrapped(f"  {setting.key}{default}  ({allowed})", indent=6)
            lines += _wrapped(f"      {setting.help}", indent=6)
    return "\n".join(lines)


def _wrapped(text: str, *, indent: int = 0) -> list[str]:
    """Lines of the terminal's width, those after the first indented."""
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
