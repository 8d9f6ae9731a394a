"""The harvested folder: exact bytes of a small package, and that nothing leaks between splits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayembed.config.jobs import HarvestConfig
from rayembed.data.docstrings import harvest, split_of

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omicron sigma tau upsilon omega".split()
Package = Callable[[dict[str, dict[str, str]]], None]


def body(number: int) -> str:
    """A passage of 16 words that shares no run of 8 words with that of another number below 16."""
    return " ".join(f"{word}{'x' * number}" for word in WORDS)


def function(name: str, summary: str, text: str) -> str:
    return f'def {name}():\n    """{summary}\n\n    {text}\n    """\n\n\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Writes the package `fakepack`: module to function to docstring."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(modules: dict[str, dict[str, str]]) -> None:
        for module, functions in modules.items():
            file = tmp_path / "fakepack" / (module.replace(".", "/") + ".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            parts = (function(name, *text.split("\n", 1)) for name, text in functions.items())
            file.write_text("".join(parts))

    return write


def config(tmp_path: Path, **changes: object) -> HarvestConfig:
    return HarvestConfig(**({"output": str(tmp_path / "out"), "packages": ["fakepack"]} | changes))  # type: ignore[arg-type]


def modules_of(split: str, count: int) -> list[str]:
    """Names of modules of fakepack that the hash puts in a split with the default shares."""
    names = (f"m{number}" for number in range(1000))
    return [name for name in names if split_of(f"fakepack.{name}", 0.1, 0.2) == split][:count]


def kept(folder: Path) -> list[str]:
    return [json.loads(line)["_id"] for line in (folder / "corpus.jsonl").read_text().splitlines()]


def test_the_files_are_a_beir_folder(package: Package, tmp_path: Path) -> None:
    (train,), (test,) = modules_of("train", 1), modules_of("test", 1)
    package({train: {"f": f"Sort the größte rows.\n{body(0)}"}, test: {"g": f"Drop the empty rows.\n{body(1)}"}})
    stats = harvest(config(tmp_path))
    out = tmp_path / "out"
    f, g = f"fakepack.{train}.f", f"fakepack.{test}.g"
    rows = {f: ("Sort the größte rows.", body(0)), g: ("Drop the empty rows.", body(1))}
    corpus = [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]
    assert corpus == [{"_id": name, "title": name, "text": rows[name][1]} for name in sorted(rows)]
    queries = [json.loads(line) for line in (out / "queries.jsonl").read_text().splitlines()]
    assert queries == [{"_id": f"q-{name}", "text": rows[name][0]} for name in sorted(rows)]
    header = "query-id\tcorpus-id\tscore\n"
    assert (out / "qrels/train.tsv").read_text() == f"{header}q-{f}\t{f}\t1\n"
    assert (out / "qrels/test.tsv").read_text() == f"{header}q-{g}\t{g}\t1\n"
    assert (out / "qrels/dev.tsv").read_text() == header
    assert json.loads((out / "harvest.json").read_text()) == stats
    assert stats["splits"] == {"train": 1, "dev": 0, "test": 1}
    assert (stats["pairs"], stats["docstrings"], stats["packages"]) == (2, 2, {"fakepack": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fakepack", "out"]


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "two")]  # the second harvest of `two` replaces the first
    for folder in folders:
        harvest(HarvestConfig(output=str(folder), packages=["json", "email"]))
    files = [path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file()]
    assert len(files) == 6
    assert all((folders[0] / file).read_bytes() == (folders[1] / file).read_bytes() for file in files)


def test_a_query_that_fits_several_passages_goes(package: Package, tmp_path: Path) -> None:
    package(
        {
            "m": {
                "a": f"Sort the rows.\n{body(0)}",
                "b": f"sort  the ROWS\n{body(1)}",
                "c": f"Drop the rows.\n{body(2)}",
                "d": f"Keep the rows.\n{body(3)}",
            },
            "n": {"d": f"Keep the rows.\n{body(3)}"},
        }
    )
    stats = harvest(config(tmp_path))
    assert kept(tmp_path / "out") == ["fakepack.m.c", "fakepack.m.d"]
    assert stats["dropped"] == {"duplicate passage": 1, "query fits several passages": 2}


def test_near_copies_keep_the_first_by_name(package: Package, tmp_path: Path) -> None:
    package(
        {
            "m": {
                "b": f"Build a bert model.\n{body(0)}, as BertModel2 does.",
                "a": f"Build a roberta model.\n{body(0)} as RobertaModel does",
                "c": f"Build another model.\n{body(0)} as nobody does",
            }
        }
    )
    stats = harvest(config(tmp_path))
    assert kept(tmp_path / "out") == ["fakepack.m.a", "fakepack.m.c"]
    assert stats["dropped"] == {"near-copy of a passage": 1}


def test_a_test_passage_that_is_half_in_training_goes(package: Package, tmp_path: Path) -> None:
    (train,), (test,) = modules_of("train", 1), modules_of("test", 1)
    package(
        {
            train: {"a": f"Sort the rows.\n{body(0)}", "b": f"Order the rows.\n{body(0)} {body(5)} {body(6)}"},
            test: {
                "a": f"Sort the columns.\n{body(0)} and more",  # 9 of 11 runs
                "b": f"Drop the columns.\n{body(0)} {body(1)} {body(2)}",  # 9 of 41 runs
            },
        }
    )
    stats = harvest(config(tmp_path))
    assert stats["dropped"] == {"dev or test passage is partly in training": 1}
    assert kept(tmp_path / "out") == sorted([f"fakepack.{train}.a", f"fakepack.{train}.b", f"fakepack.{test}.b"])


def test_a_module_and_what_lies_below_it_share_a_split() -> None:
    below = ["torch.nn", "torch.nn.functional", *(f"torch.nn.modules.m{number}" for number in range(30))]
    below += [f"torch.nn.p{number}.m" for number in range(30)]
    assert len({split_of(module, 0.3, 0.4) for module in below}) == 1


def test_shares_are_shares_of_modules() -> None:
    splits = [split_of(f"pack.m{number}", 0.1, 0.2) for number in range(4000)]
    assert splits.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert splits.count("dev") / 4000 == pytest.approx(0.1, abs=0.02)


def test_fewer_pairs_are_some_of_the_same_pairs(package: Package, tmp_path: Path) -> None:
    package({f"m{number}": {"f": f"Sort the rows {'x' * number}.\n{body(number)}"} for number in range(12)})
    harvest(config(tmp_path))
    everything = kept(tmp_path / "out")
    chosen: dict[int, set[str]] = {}
    for limit in (3, 6):
        stats = harvest(config(tmp_path, max_pairs=limit))
        chosen[limit] = set(kept(tmp_path / "out"))
        assert len(chosen[limit]) == stats["pairs"] == limit
        assert stats["dropped"]["over max_pairs"] == len(everything) - limit
    assert chosen[3] < chosen[6] < set(everything)
    assert sorted(everything)[:6] != sorted(chosen[6])  # not simply the first by name


def test_nothing_left_is_an_error_and_leaves_the_old_folder(package: Package, tmp_path: Path) -> None:
    package({"m": {"f": f"Sort the rows.\n{body(0)}"}})
    harvest(config(tmp_path))
    with pytest.raises(ValueError, match=r"no pair is left of 1 docstrings.*short query.*harvest\.min_query_words"):
        harvest(config(tmp_path, min_query_words=9))
    assert kept(tmp_path / "out") == ["fakepack.m.f"]


def test_shares_that_leave_nothing_for_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"harvest\.test_share 0\.6 and harvest\.dev_share 0\.4"):
        harvest(config(tmp_path, test_share=0.6, dev_share=0.4))
