"""load, dump and nearest: what a person may write, and what each mistake is answered with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rayembed.config import Experiment
from rayembed.config.loading import ELSEWHERE, ConfigError, dump, load, nearest
from rayembed.config.schema import sections, settings

MINIMAL = "output_dir: runs/x\nmodel: {name_or_path: some/model}\n"
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> str:
        (tmp_path / "e.yaml").write_text(text)
        return str(tmp_path / "e.yaml")

    return to_file


def refusal(path: str, *overrides: str) -> list[str]:
    """The lines that `load` answers with, the file's folder left out."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value).replace(path, "e.yaml").splitlines()


def test_reads_values_and_fills_in_defaults(write: Write) -> None:
    experiment = load(write(MINIMAL + "train: {learning_rate: 2e-5}\ndata: {train: [a.jsonl], query_max_len: 64}\n"))
    assert experiment.train is not None
    assert experiment.train.learning_rate == 2e-5  # text for PyYAML
    assert experiment.train.adam_beta2 == 0.999
    assert experiment.temperature() == 0.02
    assert (experiment.data.train, experiment.data.query_max_len, experiment.mine) == (["a.jsonl"], 64, None)


def test_one_text_is_understood_where_a_list_of_texts_is_wanted(write: Write) -> None:
    experiment = load(write(MINIMAL + "data: {train: a.jsonl, corpus: c.jsonl}\n"), ["data.train=b.jsonl"])
    assert (experiment.data.train, experiment.data.corpus) == (["b.jsonl"], ["c.jsonl"])


def test_the_run_folder_is_absolute_and_environment_variables_stay_as_written(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.chdir(tmp_path)
    experiment = load(write("output_dir: runs/$HOME/x\nmodel: {name_or_path: a/b}\n"))
    assert experiment.output_dir == f"{tmp_path}/runs/$HOME/x"
    assert experiment.model.name_or_path == "a/b"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.learning_rate=1e-4"], {"train": {"learning_rate": 1e-4, "save_steps": 7}}),
        (["train.save_steps=8", "train.save_steps=9"], {"train": {"save_steps": 9}}),
        (["train={temperature: 0.5}"], {"train": {"temperature": 0.5, "save_steps": 7}}),
        (["train={}"], {"train": {"save_steps": 7}}),
        (["train=null"], {"train": None}),
        (["mine={}"], {"mine": {}, "train": {"save_steps": 7}}),
        (["score.model=teacher"], {"score": {"model": "teacher"}, "train": {"save_steps": 7}}),
        (["train.warmup_steps=null"], {"train": {"save_steps": 7}}),
        (["model.query_instruction_for_retrieval='query: '"], {"query": "query: ", "train": {"save_steps": 7}}),
        (["train.deepspeed.zero_optimization.stage=2"], {"train": {"save_steps": 7, "deepspeed": 2}}),
        (["output_dir=a=b"], {"output_dir": "a=b", "train": {"save_steps": 7}}),
    ],
)
def test_overrides_go_over_the_file(write: Write, overrides: list[str], expected: dict[str, object]) -> None:
    model: dict[str, object] = {"name_or_path": "some/model"}
    if "query" in expected:
        model["query_instruction_for_retrieval"] = expected.pop("query")
    train = expected["train"] if "train" in expected else None
    if isinstance(train, dict) and "deepspeed" in train:
        train["deepspeed"] = {"zero_optimization": {"stage": train["deepspeed"]}}
    same = load(write(yaml.safe_dump({"output_dir": "runs/x", "model": model, **expected})))
    assert load(write(MINIMAL + "train: {save_steps: 7}\n"), overrides) == same


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("train.learning_rate", "'train.learning_rate' is not an override; write section.key=value"),
        ("train..learning_rate=1", "'train..learning_rate=1' is not an override"),
        ("seed=", "seed= has no value; write seed=null for none"),
        ("output_dir=@x", "output_dir=@x: value is not YAML; quote text"),
        ("seed.x=1", "seed.x=1: seed is 7, which has no keys; give the whole value: seed=..."),
        ("train.tempreture=1", "train.tempreture: unknown key; did you mean train.temperature?"),
        ("trian.temperature=1", "trian: unknown key; did you mean train?"),
        ("train.save_steps=0", "train.save_steps: found 0, must be at least 1"),
        ("export.formats=[int8]", 'export.formats[0]: found "int8", must be float16 or bfloat16'),
    ],
)
def test_wrong_overrides_are_said_to_come_from_the_command_line(write: Write, overrides: str, line: str) -> None:
    (answer,) = refusal(write(MINIMAL + "seed: 7\n"), overrides)
    assert answer.startswith(f"command line: {line}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("temperature: 0.02", "temperature: unknown key; did you mean train.temperature?"),
        ("train: {learning_rate: -1}", "train.learning_rate: found -1, must be greater than 0"),
        ("train: {learning_rate: -1e-5}", "train.learning_rate: found -1e-5, must be greater than 0"),
        ("train: {learning_rate: fast}", 'train.learning_rate: found "fast", must be a number, greater than 0'),
        ("train: {save_steps: 1.5}", "train.save_steps: found 1.5, must be a whole number, at least 1"),
        ("train: {bf16: maybe}", 'train.bf16: found "maybe", must be true or false'),
        ("train: {deepspeed: 3}", "train.deepspeed: found 3, must be text, a mapping or null"),
        ("train: {num_train_epochs: null}", "train.num_train_epochs: found null, must be a number, greater than 0"),
        ("data: {train: {a: b}}", 'data.train: found {"a": "b"}, must be a list of texts'),
        (
            "data: {evaluation: 2026-01-02}",
            'data.evaluation: found "2026-01-02", must be text or null; put it in quotes',
        ),
        ("encode: {dtype: int8}", 'encode.dtype: found "int8", must be auto, float32, bfloat16 or float16'),
        ("evaluate: {k_values: [1, x]}", 'evaluate.k_values[1]: found "x", must be a whole number'),
        ("evaluate: {k_values: []}", "evaluate.k_values: found [], must be at least 1 long"),
        ("mine: {range_for_sampling: 10}", "mine.range_for_sampling: found 10, must be text, matching ^\\d+-\\d+$"),
        ("mine: true", "mine: found true, must be a section with keys under it, or null to leave it out"),
        ("data: null", "data: found null, must be a section with keys under it"),
        ("score: {}", "score.model: missing, must be text"),
        ("mine: {range_for_sampling: 9-9}", "mine.range_for_sampling is 9-9; its first rank must be below its last"),
        ("3: 4", "3: unknown key; `rayembed run --help` lists every key"),
    ],
)
def test_each_refused_value_says_what_was_found_and_what_is_allowed(write: Write, text: str, line: str) -> None:
    (answer,) = refusal(write(f"{MINIMAL}{text}\n"))
    assert answer.startswith(f"e.yaml: {line}")


def test_missing_sections_and_keys_are_named(write: Write) -> None:
    assert refusal(write("model: {pooling: cls}\n")) == [
        "e.yaml: output_dir: missing, must be text",
        "e.yaml: model.name_or_path: missing, must be text",
    ]
    assert refusal(write("output_dir: x\n")) == [
        "e.yaml: model: missing, must be a section; at least model.name_or_path"
    ]


def test_all_problems_are_listed_in_the_order_of_the_settings(write: Write) -> None:
    text = MINIMAL + "train: {bogus: 1, save_steps: 0, temperature: 0}\nseed: -1\ndata: {passage_max_len: 1}\n"
    text = text.replace("some/model", "some/model, dropout: 2")
    assert [line.split(": ")[1] for line in refusal(write(text), "ray.num_workers=0")] == [
        "seed",
        "model.dropout",
        "data.passage_max_len",
        "ray.num_workers",
        "train.temperature",
        "train.save_steps",
        "train.bogus",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "e.yaml: empty; an experiment needs at least output_dir"),
        ("# only a remark\n", "e.yaml: empty;"),
        ("- 1\n", "e.yaml: found [1], must be settings and sections"),
        ("a: 1\nb: [1\nc: 2\n", "e.yaml:3:2: not YAML: "),
        ("a: !!python/name:os.system\n", "e.yaml:1:4: not YAML: "),
        ("seed: 1\nmodel: {}\nseed: 2\n", "e.yaml:3: seed: there already on line 1; keep one of them"),
        ("train:\n  bf16: true\n  bf16: true\n", "e.yaml:3: train.bf16: there already on line 2"),
        ("mine:\ntrain: {}\n", "e.yaml:1: mine: nothing under it; write `mine: {}` for its defaults"),
    ],
)
def test_files_that_are_no_experiment_are_refused_with_the_line(write: Write, text: str, line: str) -> None:
    assert refusal(write(text))[0].startswith(line)


def test_equal_keys_in_different_sections_and_merged_anchors_are_fine(write: Write) -> None:
    text = "base: &b {query_max_len: 9}\n" + MINIMAL + "data: {<<: *b, query_max_len: 8}\nencode: {<<: *b}\n"
    (answer,) = refusal(write(text))
    assert answer.startswith("e.yaml: base: unknown key")
    experiment = load(write(MINIMAL + "data: &b {query_max_len: 8}\nencode: {<<: *b, passage_max_len: 8}\n"))
    assert (experiment.data.query_max_len, experiment.encode.query_max_len) == (8, 8)


def test_an_alias_that_holds_itself_is_refused(write: Write) -> None:
    (answer,) = refusal(write(MINIMAL + "train: {deepspeed: &d {a: [*d]}}\n"))
    assert answer == "e.yaml: an alias (*name) holds itself; write out what it stands for"


def test_an_override_stays_in_its_section_where_an_alias_shares_two(write: Write) -> None:
    path = write(MINIMAL + "data: &b {query_max_len: 8}\nencode: *b\n")
    experiment = load(path, ["encode.query_max_len=9"])
    assert (experiment.data.query_max_len, experiment.encode.query_max_len) == (8, 9)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, words in {"none.yaml": "no such file", "binary.yaml": "cannot be read", "": "cannot be read"}.items():
        with pytest.raises(ConfigError, match=words):
            load(str(tmp_path / name))


def test_dump_writes_every_default_and_loads_back_equal(write: Write) -> None:
    text = MINIMAL + "seed: 3\ntrain: {learning_rate: 1e-5, deepspeed: {a: [1, {b: 1e-9}]}}\nmine: {}\n"
    experiment = load(write(text), ["model.query_instruction_for_retrieval='frage: ä\\n'", "harvest={output: '1e-5'}"])
    dumped = dump(experiment)
    assert load(write(dumped)) == experiment
    written = yaml.safe_load(dumped)
    assert list(written) == [key for key in Experiment.__annotations__ if not key.startswith("_")]
    for section in ("train", "mine", "model", "data", "ray"):
        assert {f"{section}.{key}" for key in written[section]} == {
            key for key in settings() if key.startswith(f"{section}.")
        }
    assert written["score"] is None


def test_dump_leaves_out_keys_of_uris(write: Write) -> None:
    uri = "s3://KEY:SECRET@bucket/rows.jsonl?region=eu&session_token=SECRET"
    data = f"data: {{train: ['{uri}', local.jsonl], corpus: '{uri}', evaluation: '{uri}'}}\n"
    dumped = dump(load(write(MINIMAL + data)))
    assert "KEY" not in dumped
    assert "SECRET" not in dumped
    again = load(write(dumped))
    assert again.data.train == ["s3://bucket/rows.jsonl?region=eu", "local.jsonl"]
    assert again.data.evaluation == again.data.corpus[0] == "s3://bucket/rows.jsonl?region=eu"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.tempreture", "train.temperature"),
        ("tempreture", "train.temperature"),
        ("temperature", "train.temperature"),
        ("data.temperature", "train.temperature"),
        ("trian", "train"),
        ("train.num_epochs", "train.num_train_epochs"),
        ("model.name", "model.name_or_path"),
        ("score.trust_remote_cod", "score.trust_remote_code"),
        ("model.trust_remote_cod", "model.trust_remote_code"),
        ("train.sentence_pooling_method", "model.pooling"),
        ("train_data", "data.train"),
        ("mine.candidate_pool", "data.corpus"),
        ("save_total_limit", "train.save_total_limit"),
        ("train.zzz", None),
        ("report_to", None),
    ],
)
def test_nearest_names_what_was_meant(key: str, meant: str | None) -> None:
    assert nearest(key) == meant


def test_every_hint_of_the_table_leads_to_a_setting_and_hides_none() -> None:
    valid = {*settings(), "--overwrite"}
    assert set(ELSEWHERE.values()) <= valid
    assert not set(ELSEWHERE) & {key.rpartition(".")[2] for key in [*settings(), *sections()]}
