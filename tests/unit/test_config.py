"""The configuration: what loads, what is refused and in which words, what comes back equal, what makes another run."""

from __future__ import annotations

import pickle
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import RunConfig
from llm.config_changes import MAY_CHANGE, config_differences
from llm.config_file import dump_run, load_run, parse_run
from llm.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]

GOOD = """\
run: {name: tiny, seed: 3}
model: {preset: llama_1m}
data:
  seq_len: 256
  sources:
    - {name: docs, uri: "s3://corpus/docs/*.jsonl.zst", weight: 0.7}
    - {name: code, uri: builtin, weight: 0.3}
parallel: {workers: 4, tensor: 2}
train: {steps: 200, batch_rows: 32, lr: 3e-3}
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str = GOOD, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run(str(path), overrides)

    return load


@pytest.fixture
def problems(load):
    """The lines of the one error that loading raises, without the first."""

    def problems(text: str = GOOD, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        first, *lines = str(caught.value).splitlines()
        assert first.endswith(f"has {len(lines)} problem{'' if len(lines) == 1 else 's'}:"), caught.value
        assert all(line.startswith("  ") for line in lines)
        return [line.strip() for line in lines]

    return problems


# What loads


def test_defaults_then_file_then_overrides(load) -> None:
    config = load(GOOD, "train.steps=400", "run.name='2024'", "train.lr=5e-4")
    assert (config.train.steps, config.run.name, config.train.lr) == (400, "2024", 5e-4)
    assert (config.run.seed, config.train.batch_rows, config.checkpoint.keep) == (3, 32, 3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=3e-4", 3e-4),
        ("train.lr=1", 1.0),
        ("train.lr='3e-4'", 3e-4),
        ("train.steps=1e3", 1000),
        ("train.steps=1_000", 1000),
        ("train.microbatch_rows=auto", "auto"),
        ("train.microbatch_rows=4", 4),
        ("train.betas=[0.8, 0.99]", (0.8, 0.99)),
        ("data.sources.1.weight=0.5", 0.5),
        ("data.clean.lowercase=yes", True),
        ("data.clean.lowercase=off", False),
        ("tokenizer.eos=<|endoftext|>", "<|endoftext|>"),
        ("tokenizer.eos=", None),
        ("tokenizer.eos=no", "no"),
        ("tokenizer.eos=12:30", "12:30"),
        ("tokenizer.eos=2026-01-31", "2026-01-31"),
        ("run.name=010", "010"),
        ("run.storage=s3://bucket/a=b", "s3://bucket/a=b"),
        ("model.config.rope_scaling.factor=2.5", {"rope_scaling": {"factor": 2.5}}),
    ],
)
def test_values_mean_what_they_look_like(load, override: str, expected: Any) -> None:
    value: Any = load(GOOD, override).model_dump()
    for part in override.split("=")[0].split("."):
        if value == expected:
            break
        value = value[int(part)] if isinstance(value, list) else value[part]
    assert value == expected
    assert type(value) is type(expected)


def test_an_empty_section_is_its_defaults(load) -> None:
    assert load(GOOD + "checkpoint:\n  # every_steps: 5\n") == load()


def test_an_override_of_a_section_replaces_it(load) -> None:
    assert load(GOOD + "checkpoint: {every_steps: 5, keep: 9}\n", "checkpoint={every_steps: 7}").checkpoint.keep == 3


def test_anchors_and_merge_keys_work(load) -> None:
    text = GOOD.replace("- {name: docs", "- &base {name: docs").replace("- {name: code,", "- {<<: *base, name: code,")
    assert load(text).data.sources[1].uri == "builtin"


# What is refused, and how


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stps=3", "train.stps is not a known key. Nearest legal key: train.steps"),
        ("train.seq_len=3", "train.seq_len is not a known key. Nearest legal key: data.seq_len"),
        ("eval.steps=3", "eval.steps is not a known key. Nearest legal keys: eval.every_steps, train.steps"),
        ("chekpoint.keep=1", "chekpoint is not a known key. Nearest legal key: checkpoint"),
        (
            "log.zzz=1",
            "log.zzz is not a known key. Legal keys here: every_steps, tensorboard, mlflow_uri, wandb_project, dollars_per_worker_hour",
        ),
        ("data.sources.1.wait=1", "data.sources.1.wait is not a known key. Nearest legal key: data.sources.1.weight"),
        ("parallel.workers=two", "parallel.workers='two' (text) must be a whole number of at least 1"),
        (
            "train.steps=1.5",
            "train.steps=1.5 (a number) must be a whole number of at least 1. Nearest legal values: 1, 2",
        ),
        ("train.steps=0", "train.steps=0 must be a whole number of at least 1. Nearest legal value: 1"),
        ("train.steps=true", "train.steps=true must be a whole number of at least 1"),
        ("train.steps=", "train.steps=null must be a whole number of at least 1"),
        ("train.steps=[1]", "train.steps=[1] (a list) must be a whole number of at least 1"),
        ("train.lr=-1", "train.lr=-1 must be a number above 0"),
        ("train.lr=.inf", "train.lr=.inf must be a number above 0"),
        ("train.lr=.nan", "train.lr=.nan must be a number above 0"),
        ("train.lr=true", "train.lr=true must be a number above 0"),
        ("train.betas=[true, 0.9]", "train.betas=[true, 0.9] must be a list of 2 numbers"),
        ("train.betas=[0.9]", "train.betas=[0.9] must be a list of 2 numbers"),
        ("train.momentum=1", "train.momentum=1 must be a number of at least 0 and under 1"),
        (
            "train.min_lr_frac=1.5",
            "train.min_lr_frac=1.5 must be a number of at least 0 and at most 1. Nearest legal value: 1",
        ),
        (
            "export.sample_tokens=5000",
            "export.sample_tokens=5000 must be a whole number of at least 0 and at most 4096. Nearest legal value: 4096",
        ),
        (
            "train.precision=bfloat16",
            "train.precision='bfloat16' must be one of auto, fp32, bf16, fp16. Nearest legal value: bf16",
        ),
        ("parallel.zero_stage=7", "parallel.zero_stage=7 must be one of 0, 1, 2, 3. Nearest legal value: 3"),
        (
            "train.microbatch_rows=atuo",
            "train.microbatch_rows='atuo' (text) must be a whole number, or auto. Nearest legal value: auto",
        ),
        ("run.storage=7", "run.storage=7 (a whole number) must be text of at least one character. Nearest legal value: '7'"),
        ("log.tensorboard=treu", "log.tensorboard='treu' (text) must be true or false. Nearest legal value: true"),
        (
            "s3.endpoint_url=localhost:9000",
            "s3.endpoint_url='localhost:9000' must be text that matches ^https?://, or null. Nearest legal value: 'http://localhost:9000'",
        ),
        ("model.config={1: 2}", 'model.config={"1": 2} must be a mapping of names to plain values'),
        (
            "parallel=4",
            "parallel=4 must be a section, a mapping of workers, min_workers, tensor, zero_stage, offload, device, wait_nodes_s",
        ),
        ("data.sources.0=docs", "data.sources.0='docs' must be a section, a mapping of name, uri, weight, text_field"),
        (
            "data.sources=[]",
            "data.sources=[] must be a list of at least one mapping of name, uri, weight, text_field",
        ),
        (
            "train.batch_rows=31",
            "train.batch_rows=31 cannot be split over 2 data ranks x 1 rows per microbatch (=2). Nearest legal values: 30, 32, 34",
        ),
        (
            "train.batch_schedule=[{from_step: 9, rows: 64}, {from_step: 20, rows: 129}]",
            "train.batch_schedule.1.rows=129 cannot be split over 2 data ranks x 1 rows per microbatch (=2). "
            "Nearest legal values: 128, 130, 132",
        ),
        (
            "train.batch_schedule=[{from_step: 9, rows: 64}, {from_step: 9, rows: 128}]",
            "train.batch_schedule.1: from_step=9 must be above 9, where the stage before it begins",
        ),
        (
            "train.batch_schedule=[{from_step: 0, rows: 64}]",
            "train.batch_schedule.0.from_step=0 must be a whole number of at least 1. Nearest legal value: 1",
        ),
        (
            "train.lr_batch_rule=sqrt",
            "train.lr_batch_rule=sqrt needs train.lr_batch_rows, the batch at which train.lr=0.003 holds. A legal value: "
            "train.batch_rows=32. Or set train.lr_batch_rule=none",
        ),
        (
            "train.lr_batch_rows=64",
            "train.lr_batch_rows=64 does nothing with train.lr_batch_rule=none. Set it to sqrt or linear, or leave train.lr_batch_rows out",
        ),
        (
            "train.tokens=1e6",
            "train.steps=200 and train.tokens=1000000 do not agree: so many tokens are 123 steps of these batches. Give one of the two, "
            "or set train.steps=null",
        ),
    ],
)
def test_one_bad_override_is_one_line(problems, override: str, line: str) -> None:
    assert problems(GOOD, override) == [f"{line} (from --set)"]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps", "is malformed: write --set section.key=value, for example --set train.lr=3e-4"),
        ("=3", "is malformed"),
        ("train..steps=3", "is malformed"),
        ("train.steps: 3", "is malformed"),
        ("train.betas=[0.9", "cannot be read, line 1"),
        ("tokenizer.eos=@", "Put it in quotes"),
        ("train.lr.x=3", "train.lr is 0.003 and holds no key x"),
        ("data.sources.2.weight=1", "data.sources has no entry 2. Legal values: 0 to 1"),
        ("data.sources.-1.weight=1", "data.sources has no entry -1. Legal values: 0 to 1"),
        ("data.sources.docs.weight=1", "data.sources has no entry docs"),
        ("log={every_steps: 1, every_steps: 2}", "every_steps is given twice"),
    ],
)
def test_an_override_that_cannot_be_laid_over(problems, override: str, part: str) -> None:
    (line,) = problems(GOOD, override)
    assert part in line


def test_every_problem_is_in_one_error_in_the_order_of_the_sections(problems) -> None:
    text = GOOD.replace("steps: 200", "steps: 1.5").replace("seed: 3", "sed: 3").replace("seq_len: 256", "seq_len: x")
    assert problems(text, "eval.rows=-1", "model.init=pretrained", "bogus") == [
        "--set 'bogus' is malformed: write --set section.key=value, for example --set train.lr=3e-4 or --set data.sources.0.weight=0.5",
        "run.sed is not a known key. Nearest legal key: run.seed (line 1)",
        "model.init=pretrained needs model.path, a folder with weights. Or set model.init=random (from --set)",
        "data.seq_len='x' (text) must be a whole number of at least 2 (line 4)",
        "train.steps=1.5 (a number) must be a whole number of at least 1. Nearest legal values: 1, 2 (line 9)",
        "eval.rows=-1 must be a whole number of at least 0. Nearest legal value: 0 (from --set)",
    ]


def test_an_empty_file_lists_every_required_key_and_rule(problems) -> None:
    lines = problems("")
    missing = ["run.name", "data.seq_len", "data.sources", "train.steps", "train.batch_rows", "train.lr"]
    assert [line.split()[0] for line in lines if "is missing" in line] == missing
    assert [line for line in lines if "is missing" not in line] == ["give exactly one of model.preset and model.path"]


@pytest.mark.parametrize(
    "override",
    [
        "parallel.tensor=two",
        "parallel.tensr=2",
        "parallel.workers=x",
        "train.batch_rows=1.5",
        "parallel=2",
    ],
)
def test_no_rule_is_told_that_a_bad_key_may_have_broken(problems, override: str) -> None:
    """batch_rows=31 does not fit 2 data ranks, but who knows how many there will be once the bad key is right."""
    text = GOOD.replace("workers: 4, tensor: 2", "workers: 4").replace("batch_rows: 32", "batch_rows: 31")
    (line,) = problems(text, override)
    assert line.startswith(override.split("=")[0])


def test_two_sources_with_one_name_and_half_the_weights(problems) -> None:
    text = GOOD.replace("name: code", "name: docs").replace(", weight: 0.3", "")
    assert (
        problems(text)
        == [
            "data.sources: two sources are named 'docs'; names must differ (line 5)",
            "data.sources: some sources have a weight and some have none: give all of them one, or none (line 5)",
        ]
        or len(problems(text)) == 2
    )


def test_a_key_given_twice_is_refused_with_both_lines(problems) -> None:
    assert problems(GOOD + "run: {name: other}\n") == ["run is given twice, in lines 1 and 10. Keep one"]
    assert problems(GOOD.replace("{steps: 200,", "{steps: 200, steps: 300,")) == ["train.steps is given twice, in line 9. Keep one"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run: {name: a\nmodel: 3", "line 2"),
        ("run:\n\tname: a\n", "line 2, column 1"),
        ("- run\n- model\n", "must be a mapping of sections"),
        ("tiny\n", "must be a mapping of sections"),
        ("run: &a {name: *a}\n", "not valid YAML"),
        ("run: !!python/object/apply:os.system ['true']\n", "line 1"),
        ("? [a]\n: 1\n", "unhashable"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: \0\n", "not valid YAML"),
        ("[" * 1500, "nested too deeply"),
        ("run: {seed: " + "9" * 5000 + "}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_of_yaml_says_where(load, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tiny_cpu.yaml").write_bytes(b"run: \xff\n")
    for name, part in [
        ("tiny_cpu.yaml", "UTF-8: byte 5"),
        ("tiny_gpu.yaml", f"Nearest: {tmp_path / 'tiny_cpu.yaml'}"),
        ("none/tiny.yaml", "does not exist either"),
        (".", "directory"),
    ]:
        with pytest.raises(ConfigError, match=r".+") as caught:
            load_run(str(tmp_path / name))
        assert part in str(caught.value)


def test_the_error_survives_pickling(load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(GOOD, "train.steps=0")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - what Ray does between processes


def test_a_text_is_read_as_a_file_is(load) -> None:
    assert parse_run(GOOD, "the recorded run", ["run.seed=5"]) == load(GOOD, "run.seed=5")
    with pytest.raises(ConfigError, match=r"^the recorded run has 1 problem:"):
        parse_run(GOOD, "the recorded run", ["run.sed=5"])


def test_a_loaded_run_never_changes(load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 3


# What comes back


def test_dump_is_stable_and_loads_back_equal(load) -> None:
    config = load(GOOD, "model.config={b: [1, null, true], a: {x: .inf}}")
    text = dump_run(config)
    again = load(text)
    assert again == config
    assert dump_run(again) == text
    assert dump_run(load(GOOD, "model.config={a: {x: .inf}, b: [1, null, true]}")) == text


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) | st.sampled_from(
    [
        "no",
        "1e5",
        "3e-4",
        "010",
        "1_0",
        "0x1f",
        "~",
        "null",
        "true",
        ".inf",
        "12:30",
        "2026-01-31",
        " ",
        "a: b",
        "#",
        "<<",
        "=",
        "\x85",
        "\n \n",
    ]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    text=TEXTS,
    plain=st.dictionaries(TEXTS, PLAIN, max_size=4),
    lr=st.floats(min_value=5e-324, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    name=st.text(string.ascii_letters + string.digits, min_size=1, max_size=20),
    stop=st.booleans(),
)
def test_every_run_comes_back_from_its_dump(tmp_path_factory, text, plain, lr, seed, name, stop) -> None:
    config = RunConfig.model_validate(
        {
            "run": {"name": name, "storage": text, "seed": seed, "if_finished": "stop" if stop else "again"},
            "model": {"path": text, "config": plain},
            "tokenizer": {"path": text, "eos": text},
            "data": {"seq_len": 8, "sources": [{"name": name, "uri": text, "text_field": text}]},
            "train": {"steps": 5, "batch_rows": 4, "lr": lr, "compile": stop},
            "export": {"sample_prompt": text},
        }
    )
    path = tmp_path_factory.mktemp("dump", numbered=True) / "config.yaml"
    path.write_text(dump_run(config), encoding="utf-8", newline="")
    assert load_run(str(path)) == config
    assert RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))) == config  # any YAML reader will do


# A budget in tokens

TOKENS = GOOD.replace("steps: 200", "tokens: 1e6")  # 256 x 32 tokens a step


def test_steps_follow_from_tokens_and_are_printed(load) -> None:
    config = load(TOKENS)
    assert (config.train.steps, config.train.tokens) == (123, 1_000_000)
    assert "\n  steps: 123\n  tokens: 1000000\n" in dump_run(config)
    assert load(dump_run(config)) == config
    assert load(GOOD, "train.steps=null", "train.tokens=1000000").train == config.train


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("train.batch_rows=64", 62),
        ("data.seq_len=128", 245),
        ("train.batch_schedule=[{from_step: 2, rows: 64}]", 63),
        ("train.tokens=8192", 1),
        ("train.tokens=8193", 2),
    ],
)
def test_trials_with_other_batches_see_the_same_tokens(load, override: str, steps: int) -> None:
    assert load(TOKENS, override).train.steps == steps


@pytest.mark.parametrize(
    "text", [TOKENS.replace("lr: 3e-3", "lr: -1"), TOKENS.replace("batch_rows: 32", "batch_rows: x"), TOKENS.replace("256", "1")]
)
def test_steps_are_not_missed_where_they_would_follow(problems, text: str) -> None:
    (line,) = problems(text)
    assert "train.steps" not in line


def test_a_printed_budget_is_not_changed_without_a_word(problems, load) -> None:
    (line,) = problems(dump_run(load(TOKENS)), "train.batch_rows=64")
    assert "train.steps=123 and train.tokens=1000000 do not agree: so many tokens are 62 steps" in line


def test_warm_up_is_given_once(problems) -> None:
    (line,) = problems(GOOD, "train.warmup_steps=5", "train.warmup_frac=0.1")
    assert "train.warmup_steps=5 and train.warmup_frac=0.1 say the same thing twice" in line


def test_a_budget_of_tokens_may_grow_and_not_shrink(load) -> None:
    assert config_differences(load(TOKENS), load(TOKENS, "train.tokens=2e6")) == []
    assert config_differences(load(TOKENS), load(TOKENS, "train.tokens=9e5")) == [
        "train.steps: 123 -> 110",
        "train.tokens: 1000000 -> 900000",
    ]


# What makes another run


def test_a_run_differs_from_itself_in_nothing(load) -> None:
    assert config_differences(load(), load()) == []


def test_differences_name_key_old_and_new(load) -> None:
    assert config_differences(load(), load(GOOD, "train.lr=1e-3", "run.seed=4", "data.clean.lowercase=true")) == [
        "run.seed: 3 -> 4",
        "data.clean.lowercase: false -> true",
        "train.lr: 0.003 -> 0.001",
    ]
    more = load(GOOD, "model.config={rope_theta: 1e6}")
    assert config_differences(load(), more) == [
        "model.config: {} -> (absent)",
        "model.config.rope_theta: (absent) -> 1000000.0",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "run.storage=elsewhere",
        "run.if_finished=again",
        "data.windows_ahead=5",
        "data.max_bad_frac=0.5",
        "parallel.workers=2",
        "parallel.zero_stage=3",
        "train.microbatch_rows=2",
        "train.steps=400",
        "checkpoint.keep=1",
        "checkpoint.every_steps=5",
        "eval.every_steps=5",
        "export.enabled=false",
        "log.every_steps=7",
        "s3.region=x",
    ],
)
def test_what_a_resumed_run_may_change(load, override: str) -> None:
    assert config_differences(load(), load(GOOD, override)) == []


@pytest.mark.parametrize(
    "override",
    [
        "model.preset=llama_8b",
        "tokenizer.eos=x",
        "data.seq_len=128",
        "data.window_slices=5",
        "data.slice_bytes=8192",
        "data.isolate_documents=true",
        "data.sources.0.weight=0.6",
        "run.seed=1",
        "train.steps=100",
        "train.batch_rows=16",
        "train.optimizer=sgd",
        "train.schedule=cosine",
        "train.warmup_steps=3",
        "train.precision=fp32",
        "train.betas=[0.9,0.9]",
        "train.grad_clip=0.5",
        "eval.rows=32",
    ],
)
def test_what_makes_another_run(load, override: str) -> None:
    (line,) = config_differences(load(), load(GOOD, override))
    assert line.startswith(override.split("=")[0])


def test_every_key_that_may_change_exists() -> None:
    for key in MAY_CHANGE:
        section: Any = RunConfig
        for part in key.split("."):
            section = section.model_fields[part].annotation


# What ships


RECIPES = sorted((REPO / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(recipe: Path) -> None:
    assert load_run(str(recipe)).run.name


def test_loading_is_quick() -> None:
    """0.3 s of CPU time on the machines that this was written on; the bound leaves room for slower ones."""
    code = "import time; from llm.config_file import load_run; print(time.process_time())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, check=True)
    assert float(ran.stdout) < 1.0


@pytest.mark.parametrize(("override", "told"), [
    ("train.steps=99999999999999999999", "is more than any run takes"),
    ('export.sample_prompt="\\ud83d"', "half of a surrogate pair"),
    ("s3.endpoint_url=http://127.0.0.1:99999", "is no address"),
    ("data.sources.0.weight=1e20", "at most 1000000000"),
    ("parallel.workers=!!bool foo", "cannot be read"),
    ("parallel.workers=0x" + "f" * 5000, "cannot be read"),
    ("data.schedule=[{from_step: 5, weights: {nobody: 1.0}}]", "Nearest legal names: docs, code"),
    ("data.schedule=[{from_step: 5, weights: {docs: 1.0}}, {from_step: 5, weights: {code: 1.0}}]", "must be above 5"),
])  # fmt: skip
def test_what_an_attacker_tried_is_one_line(problems, override: str, told: str) -> None:
    [line] = problems(GOOD, override)
    assert told in line


def test_aliases_of_aliases_are_not_spelt_out(load) -> None:
    nested = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]\n    " for i in range(9))
    with pytest.raises(ConfigError, match="aliases spell out"):
        load(GOOD.replace("model: {preset: llama_1m}", f"model:\n  preset: llama_1m\n  config:\n    {nested}"))
