"""Checks README and docs against the code: constants, flags, metrics and files exist, and quoted defaults are true."""

import ast
import json
import re
import shlex
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from conftest import SCRIPTS, shrink, trainer_of

import configs
import rewards
from scoring import rules

ROOT = Path(configs.HERE)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BY_NAME = {script.__name__: script for script in SCRIPTS}
CONSTANTS = {name: configs.constant_values(vars(script)) for name, script in BY_NAME.items()}
EVERY = {name for values in CONSTANTS.values() for name in values} | {
    name for module in (rewards, rules) for name in vars(module) if name.isupper()
}
over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def flags_of(program):
    """Returns the flags of `python program`. Those of a script come from its constants; a test below checks --help."""
    if program in BY_NAME:
        return {"--" + name.lower().replace("_", "-") for name in CONSTANTS[program]} | {
            "--no-" + name.lower().replace("_", "-")
            for name, value in CONSTANTS[program].items()
            if type(value) is bool
        }
    text = (ROOT / f"{program}.py").read_text()
    of_mechanism = re.findall(r"(\w+)=", "".join(re.findall(r"parse\(__doc__, (.*)\)", text)))
    return {*re.findall(r'add_argument\("(--[a-z0-9-]+)"', text), *("--" + name for name in of_mechanism)}


def rows_of(page, heading):
    """Returns the cells of the table under a heading, without its head."""
    text = page.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@over_pages
def test_every_constant_named_exists(page):
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", page.read_text())) - {
        "HF_HUB_OFFLINE",
        "GOMP_SPINCOUNT",
        "NCCL_DEBUG",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "SLURM_JOB_NODELIST",
        "USE_TOKEN_LEVEL_LOSS",  # names of tutorials, in docs/gspo.md
        "USE_GROUP_NORMALIZATION",
    }
    assert named <= EVERY, f"{page.name} names {sorted(named - EVERY)}"


@over_pages
def test_every_flag_named_exists(page):
    text, known = (
        re.sub(
            r"^    (lm_eval|tensorboard|torchrun|srun torchrun|#SBATCH) .*$", "", page.read_text(), flags=re.MULTILINE
        ),
        set(),
    )
    for program in [
        *BY_NAME,
        "plotting",
        "bookkeeping/sample_page",
        "benchmarks/memory",
        "benchmarks/seeds",
        "benchmarks/compare",
        "benchmarks/choices",
        "benchmarks/crash",
        "benchmarks/critic",
        "benchmarks/against_trl",
        "benchmarks/rollouts",
        "benchmarks/parts",
        "benchmarks/floor",
        "benchmarks/processes",
        "benchmarks/experts",
        *(f"benchmarks/mechanisms/{path.stem}" for path in (ROOT / "benchmarks/mechanisms").glob("*.py")),
        "benchmarks/scaling",
        "data/make_arithmetic",
    ]:
        known |= flags_of(program)
        for command in re.findall(rf"(?:python |`){program}\.py((?: +--?[\w-]+(?:[ =][^\s`|]+)*)+)", text):
            own = re.sub(r'"[^"]*"', "", command)  # without the flags that it gives to a script
            assert set(re.findall(r"--[a-z][a-z0-9-]*", own)) <= flags_of(program) | {"--help"}, command
    of_others = {"--signals-to-handle", "--shutdown-timeout", "--nproc-per-node", "--rdzv-conf"}  # torchrun
    of_others |= {"--limit"}  # lm_eval
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) - {"--help"} - of_others
    assert named <= known, f"{page.name} names {sorted(named - known)}"


@over_pages
def test_every_file_and_link_exists(page):
    text = page.read_text()
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text) for link in link if link
    ]
    for link in links:
        assert link.startswith("https://") or not link or (page.parent / link).exists(), link
    for name in re.findall(r"`([\w./-]+\.(?:py|md|png|ipynb|txt|html|jsonl|json))`", text):
        there = [ROOT / name, page.parent / name]
        assert name in RUN_FOLDER or any(path.exists() for path in there), f"{page.name} names {name}"


RUN_FOLDER = {
    "metrics.jsonl",
    "samples.jsonl",
    "samples.html",
    "reward_failures.jsonl",
    "skipped.jsonl",
    "config.json",
    "metrics.png",
    "checkpoint.json",
    "profile.json.gz",
}


OF_THE_ENGINE = {"SAMPLER", "SAMPLER_DEVICE", "SAMPLER_MEMORY", "SAMPLER_CORRECTION"}  # docs/vllm.md
OF_THE_ENGINE |= {
    "MICRO_BATCH_TOKENS",
    "LOGITS_AT_ONCE",
    "GRADIENT_CHECKPOINTING",
    "MAX_PROMPT_TOKENS",
    "SAMPLED_AT_ONCE",
}


@pytest.mark.parametrize("name", BY_NAME)
def test_quoted_defaults_are_those_of_the_script(name):
    quoted = {}
    for constant, _, value, _ in rows_of(ROOT / "docs" / f"{name}.md", "Constants"):
        quoted[constant.strip("`")] = ast.literal_eval(value.strip("`"))
    assert quoted == {constant: CONSTANTS[name][constant] for constant in quoted}
    groups = configs.read_constants(vars(BY_NAME[name]))
    of_the_paper = {
        constant
        for constant, (_, _, group) in groups.items()
        if group.split(":")[0] not in ("Models and data", "Run", "Devices", "LoRA")
    }
    assert of_the_paper - OF_THE_ENGINE | {"REWARDS"} == set(quoted)


def test_the_advantages_of_a_small_reward_are_those_of_the_function():
    gspo = BY_NAME["gspo"]
    for group, *advantages in rows_of(ROOT / "docs" / "gspo.md", "A small reward"):
        counts = [(int(count), float(reward)) for count, reward in re.findall(r"(\d+) × ([\d.]+)", group)]
        rewards = torch.tensor([reward for count, reward in counts for _ in range(count)])
        assert len(rewards) == 8
        for gspo.ADVANTAGE_TYPE, quoted in zip(("normalized", "relative"), advantages, strict=True):
            found = gspo.compute_relative_advantages(rewards, 8).unique().flip(0)  # from the highest reward down
            quoted = [float(number) for number in quoted.replace("−", "-").split(", ")]
            assert found.tolist() == pytest.approx(quoted, abs=0.0051)  # halves round either way


@pytest.mark.parametrize("name", BY_NAME)
def test_every_logged_metric_is_explained_and_no_other(name, tmp_path):
    trainer = trainer_of(shrink(BY_NAME[name], tmp_path))
    logged = set(trainer.train_step(1)) - {"step"} | set(trainer.evaluate())
    explained = {
        metric
        for row in rows_of(ROOT / "docs" / f"{name}.md", "Metrics")
        for metric in re.findall(r"`([^`]+)`", row[0])
    }
    of_rewards = {metric for metric in logged - explained if metric.startswith("reward_")}
    logged = logged - of_rewards | {"reward_<name>"}
    assert explained - {"reward_cut"} == logged - {"reward_cut"}


def test_the_command_for_a_model_and_data_of_ones_own_trains(tmp_path, capsys):
    """README's command trains. The model is the smallest, and further flags set small sizes."""
    (command,) = re.findall(r"^    python gspo\.py (.*--policy-model MODEL.*)$", (ROOT / "README.md").read_text(), re.M)
    rows = [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, prompts = str(ROOT / "data/models/arithmetic-policy"), str(tmp_path / "mine.jsonl")
    argv = shlex.split(command.replace("MODEL", model).replace("mine.jsonl", prompts))
    argv += ["--output-dir", str(tmp_path), "--max-steps", "1", "--batch-size", "2", "--max-completion-tokens", "24"]
    BY_NAME["gspo"].main(
        [*argv, "--rewards", "exact_match", "--eval-reward", "exact_match", "--system-prompt", "1+1=2"]
    )
    assert BY_NAME["gspo"].LEARNING_RATE == 1e-6 and "Held-out accuracy" in capsys.readouterr().out


def test_the_sums_of_memory_are_those_of_their_parts():
    rows = [(cells[0].strip("*"), float(cells[-1].strip("*"))) for cells in rows_of(ROOT / "docs/memory.md", SIXTEEN)]
    parts, (_, updating), (_, cache), (_, sampling) = dict(rows[:-3]), *rows[-3:]
    assert rows[-3][0] == "update, together" and rows[-1][0] == "sampling, together"
    assert updating == pytest.approx(sum(parts.values()))
    weights, copies = list(parts.values())[:2]
    assert sampling == pytest.approx(weights - 2.4 + copies + cache) and max(updating, sampling) < 16
    assert weights == pytest.approx(596e6 * 16 / 1e9, abs=0.05) and copies == pytest.approx(596e6 * 2 / 1e9, abs=0.05)
    tokens = configs.PRESETS["gsm8k"]["MAX_PROMPT_TOKENS"] + configs.PRESETS["gsm8k"]["MAX_COMPLETION_TOKENS"]
    of_one = tokens * 28 * 8 * 128 * 4 / 1e9
    at_once = configs.PRESETS["gsm8k"]["BATCH_SIZE"] * configs.PRESETS["gsm8k"]["GROUP_SIZE"]
    while at_once * of_one > 0.9 * (16 - weights + 2.4 - copies):
        at_once //= 2
    assert cache == pytest.approx(at_once * of_one, abs=0.05)


SIXTEEN = "Qwen3-0.6B on 16 GB"
SHARED_FLAGS = (
    "max-steps seed output-dir resume preset group-size batch-size micro-batch-tokens policy-model reward-model "
    "prompts learning-rate max-completion-tokens policy-device ref-device reward-device lora-rank prompt-column "
    "answer-column rewards save-every eval-every kl-coef target-kl entropy-coef clip-low clip-high advantage-type "
    "temperature"
).split()


@pytest.mark.parametrize("name", BY_NAME)
def test_help_lists_every_constant_with_its_comment_and_all_scripts_share_their_common_flags(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        BY_NAME[name].main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert {"--" + flag for flag in SHARED_FLAGS} <= flags_of(name)
    for constant, (_, comment, group) in configs.read_constants(vars(BY_NAME[name])).items():
        assert "--" + constant.lower().replace("_", "-") in shown and comment and group
        assert "-" in comment or comment in shown  # argparse may break a line at a dash


def test_the_walkthrough_runs_and_prints_what_it_shows():
    path = ROOT / "docs" / "walkthrough.ipynb"
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        if new.cell_type == "code" and "varies" not in new.metadata.get("tags", []):
            assert printed(new) == printed(old), new.source
    assert sum("image/png" in output.get("data", {}) for cell in fresh.cells for output in cell.get("outputs", [])) == 7


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")
