"""Overrides, presets and rules, and the messages for input that cannot be used."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SCRIPTS

import configs
import dapo
import grpo
import gspo
from bookkeeping.folder import sha256_of_rewards
from bookkeeping.run import Run


def run_main(capsys, *argv):
    """Returns the exit code and stderr of `python gspo.py argv`, run in this process."""
    with pytest.raises(SystemExit) as exit_:
        gspo.main([str(word) for word in argv])
    return exit_.value.code, capsys.readouterr().err


def assert_refused(capsys, tmp_path, words, *argv):
    """Asserts exit code 2, one line that holds the words, and nothing written."""
    code, err = run_main(capsys, "--output-dir", tmp_path / "outputs", *argv)
    assert code == 2
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert not (tmp_path / "outputs").exists()


def test_an_aggregation_without_its_divisor_is_refused():
    dapo.LOSS_AGGREGATION = "constant"
    with pytest.raises(
        configs.InputError, match="must be one of 'token_mean', 'sequence_mean'; give --loss-aggregation"
    ):
        configs.snapshot(vars(dapo))


# ---- Overrides


def test_every_constant_is_a_flag_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        gspo.main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    constants = configs.read_constants(vars(gspo))
    assert len(constants) > 35
    for name, (value, comment, group) in constants.items():
        assert "--" + name.lower().replace("_", "-") in text
        assert comment and group
        if "-" not in comment:  # argparse may break a line at a dash
            assert comment in text
        assert f"(default: {value!r})" in text or "-" in repr(value)


def test_flags_set_constants_of_every_type():
    configs.apply_overrides(
        vars(gspo),
        [
            "--group-size",
            "16",
            "--learning-rate=3e-4",
            "--no-adaptive-kl",
            "--advantage-type",
            "normalized",
            "--top-p",
            "1",
        ],
    )
    assert (gspo.GROUP_SIZE, gspo.LEARNING_RATE, gspo.ADAPTIVE_KL) == (16, 3e-4, False)
    assert (gspo.ADVANTAGE_TYPE, gspo.TOP_P) == ("normalized", 1.0)


def test_a_preset_prints_what_it_changes_and_flags_win_over_it(capsys):
    configs.apply_overrides(vars(gspo), ["--preset", "smoke", "--max-steps", "7"])
    out = capsys.readouterr().out
    assert gspo.MAX_STEPS == 7 and gspo.BATCH_SIZE == configs.PRESETS["smoke"]["BATCH_SIZE"]
    assert "BATCH_SIZE" in out and "MAX_STEPS" not in out


def test_functions_read_constants_when_called():
    assert gspo.next_kl_coef(0.1, 1000.0) == pytest.approx(0.15)
    gspo.TARGET_KL = 1e6
    assert gspo.next_kl_coef(0.1, 1000.0) == pytest.approx(0.05)


def test_a_script_run_from_the_command_line_fails_in_one_line(tmp_path):
    command = [sys.executable, str(configs.HERE / "gspo.py"), "--group-sise", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gspo.py: error: unknown flag --group-sise; did you mean --group-size?\n"
    assert not list(tmp_path.iterdir())  # nor does an import leave anything


# ---- What cannot be used


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--groupsize", "8"], ["unknown flag --groupsize", "--group-size"]),
        (["--xyzzy"], ["unknown flag --xyzzy", "--help"]),
        (["stray"], ["stray"]),
        (["--group-size", "eight"], ["--group-size", "whole number", "'eight'"]),
        (["--group-size", "8.5"], ["--group-size", "whole number"]),
        (["--group-size"], ["--group-size", "expected one argument"]),
        (["--learning-rate", "fast"], ["--learning-rate", "number", "'fast'"]),
        (["--learning-rate", "nan"], ["--learning-rate", "finite"]),
        (["--learning-rate", "0"], ["LEARNING_RATE = 0.0", "positive"]),
        (["--adaptive-kl", "maybe"], ["maybe"]),
        (["--group-size", "1"], ["GROUP_SIZE = 1", "at least 2", "--group-size"]),
        (["--group-size", "-3"], ["GROUP_SIZE = -3", "at least 2"]),
        (["--clip-low", "-0.1"], ["CLIP_LOW = -0.1", "offset from 1"]),
        (["--clip-low", "1.0"], ["CLIP_LOW = 1.0", "offset from 1"]),
        (["--clip-high", "-1"], ["CLIP_HIGH = -1.0", "offset from 1"]),
        (["--temperature", "0"], ["TEMPERATURE = 0.0", "positive"]),
        (["--top-p", "1.5"], ["TOP_P = 1.5", "(0, 1]"]),
        (["--max-steps", "0"], ["MAX_STEPS = 0"]),
        (["--gspo-epochs", "0"], ["GSPO_EPOCHS = 0"]),
        (["--mini-batches", "1000"], ["MINI_BATCHES", "--mini-batches"]),
        (["--whole-groups", "--mini-batches", "17"], ["MINI_BATCHES", "BATCH_SIZE groups"]),
        (["--ratio-level", "word"], ["RATIO_LEVEL = 'word'", "'sequence'", "'token'"]),
        (["--advantage-type", "zscore"], ["ADVANTAGE_TYPE", "'relative'", "'normalized'"]),
        (["--lr-schedule", "step"], ["LR_SCHEDULE", "'cosine'"]),
        (["--preset", "huge"], ["--preset huge", "smoke"]),
        (["--rewards", "exact_macht"], ["exact_macht", "exact_match"]),
        (["--rewards", "exact_match much"], ["exact_match much", "weight"]),
        (["--rewards", ""], ["REWARDS = ''", "not empty"]),
        (["--rewards", "exact_match 1,"], ["REWARDS", "weight"]),
        (["--eval-reward", "reward_model"], ["EVAL_REWARD", "reward_model", "exact_match"]),
        (["--policy-device", "cuda:7"], ["POLICY_DEVICE = 'cuda:7'", "no such device", "cpu"]),
        (["--reward-device", "gpu"], ["REWARD_DEVICE = 'gpu'", "no such device"]),
        (["--policy-model", "no/such/folder"], ["POLICY_MODEL = 'no/such/folder'", "--policy-model"]),
        (["--policy-model", "nobody/nothing"], ["POLICY_MODEL = 'nobody/nothing'"]),
        (["--policy-model", "data"], ["POLICY_MODEL = 'data'", "config.json"]),
        (["--reward-model", "no-such-folder"], ["REWARD_MODEL = 'no-such-folder'"]),
        (["--prompts", "missing.jsonl"], ["PROMPTS = 'missing.jsonl'", "--prompts"]),
        (["--eval-prompts", "missing.jsonl"], ["EVAL_PROMPTS = 'missing.jsonl'"]),
        (["--prompts", "data"], ["PROMPTS", "data"]),
        (["--prompt-column", "question"], ["train.jsonl, line 1", "'question'", "PROMPT_COLUMN"]),
        (["--answer-column", "solution"], ["train.jsonl, line 1", "'solution'", "ANSWER_COLUMN"]),
    ],
)
def test_bad_flags(capsys, tmp_path, argv, words):
    assert_refused(capsys, tmp_path, words, *argv)


def test_a_default_device_asked_for_explicitly_must_exist(capsys, tmp_path):
    assert_refused(capsys, tmp_path, ["REF_DEVICE = 'cuda:1'", "no such device"], "--ref-device", "cuda:1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["holds no prompts"]),
        (b"\n\n", ["holds no prompts"]),
        (b'{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n', ["line 2", "not JSON"]),
        (b'{"prompt": "1+1=", "answer": "2"}\n\n[1, 2]\n', ["line 3", "JSON object", "list"]),
        (b'{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n', ["line 2", "no field 'answer'"]),
        (b'{"answer": "2"}\n', ["line 1", "no field 'prompt'"]),
        (b'{"prompt": "", "answer": "2"}\n', ["line 1", "'prompt'", "not empty"]),
        (b'{"prompt": 5, "answer": "2"}\n', ["line 1", "'prompt'", "text"]),
        (b'\xff\xfe{"prompt"', ["UTF-8"]),
        (b'{"prompt": "1+1=", "answer": null}\n', ["line 1", "'answer' is null"]),
        (b'{"prompt": "1+1=", "answer": "2"}\n', ["1 prompts are too few to hold some out", "--eval-prompts"]),
        (
            b"".join(b'{"prompt": "%d' % i + b"+1" * 60 + b'=", "answer": "61"}\n' for i in range(2)),
            ["each prompt is longer"],
        ),
    ],
)
def test_bad_prompt_files(capsys, tmp_path, content, words):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert_refused(capsys, tmp_path, ["prompts.jsonl", *words], "--prompts", path)


def test_a_reward_model_needs_one_logit(capsys, tmp_path):
    config = transformers.AutoConfig.from_pretrained(configs.HERE / gspo.REWARD_MODEL)
    config.num_labels = 2
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "two")
    transformers.AutoTokenizer.from_pretrained(configs.HERE / gspo.REWARD_MODEL).save_pretrained(tmp_path / "two")
    assert_refused(capsys, tmp_path, ["REWARD_MODEL", "2 logits"], "--reward-model", tmp_path / "two")


def test_missing_weights_are_an_error_never_random_numbers(capsys, tmp_path):
    """A causal model loaded as a classifier has no score head: transformers would make one up."""
    assert_refused(capsys, tmp_path, ["REWARD_MODEL", "score.weight"], "--reward-model", gspo.POLICY_MODEL)


def test_constants_edited_to_nonsense_are_named():
    for name, value, words in (
        ("GROUP_SIZE", "8", "whole number"),
        ("LEARNING_RATE", None, "number"),
        ("ADVANTAGE_TYPE", 3, "text"),
        ("SEED", True, "whole number"),
        ("ADAPTIVE_KL", "no", "True or False"),
        ("POLICY_MODEL", None, "text"),
    ):
        before = getattr(gspo, name)
        setattr(gspo, name, value)
        with pytest.raises(configs.InputError, match=re.escape(f"{name} = {value!r}")) as error:
            gspo.GSPOTrainer()
        assert words in str(error.value)
        setattr(gspo, name, before)


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, err = run_main(capsys, "--preset", "smoke", "--output-dir", tmp_path / "file")
    assert code == 2 and err.count("\n") == 1 and "OUTPUT_DIR" in err


def test_a_tilde_in_the_output_folder_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    configs.apply_overrides(vars(gspo), ["--output-dir=~/runs"])
    assert configs.snapshot(vars(gspo)).OUTPUT_DIR == str(tmp_path / "runs")


# ---- What cannot be resumed


@pytest.fixture
def runs(tmp_path):
    """Makes folders like those of runs of gspo.py and grpo.py, with the files that --resume reads first."""
    for name, script in (("gspo-1", "gspo.py"), ("gspo-2", "gspo.py"), ("grpo-3", "grpo.py")):
        folder = tmp_path / "runs" / name
        for part in ("final", "checkpoints/step-4"):
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text('{"model_type": "llama"}')
        shutil.copy(configs.HERE / script, folder)
        namespace = vars(gspo if script == "gspo.py" else grpo)
        config = {"constants": configs.constant_values(namespace), "fingerprints": {}}
        (folder / "config.json").write_text(json.dumps(config))
    return tmp_path / "runs"


def refused_resume(capsys, *argv):
    code, err = run_main(capsys, *argv)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nobody-here/x", ["no such folder", "home directory", "latest"]),
        ("a" * 300, ["no such folder", "latest"]),
        ("{runs}/gspo-1/checkpoints/step-4", ["part of a run", "give {runs}/gspo-1\n"]),
        ("{runs}/gspo-1/checkpoints", ["part of a run", "give {runs}/gspo-1\n"]),
        ("{runs}/gspo-1/final", ["part of a run", "give {runs}/gspo-1\n"]),
        ("{runs}/grpo-3", ["a run of grpo.py; use python grpo.py"]),
        ("{runs}", ["a folder of runs", "such as {runs}/gspo-2, or latest"]),
    ],
)
def test_the_message_for_a_folder_that_is_no_run_says_what_to_give(capsys, runs, name, words):
    err = refused_resume(capsys, "--resume", name.format(runs=runs))
    for word in words:
        assert word.format(runs=runs) in err, err


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"constants": null}', '{"constants": []}'])
def test_a_run_without_its_constants_cannot_be_resumed(capsys, runs, content):
    (runs / "gspo-1" / "config.json").write_text(content)
    err = refused_resume(capsys, "--resume", runs / "gspo-1")
    assert "cannot read its config.json" in err and f"--policy-model {runs}/gspo-1/checkpoints/step-N" in err


@pytest.mark.parametrize(("name", "value"), [("RESUME", True), ("RESUME", 5), ("OUTPUT_DIR", None)])
def test_constants_of_resuming_edited_to_nonsense_are_named(capsys, name, value):
    vars(gspo).update({"RESUME": "latest", name: value})
    assert f"{name} = {value!r} must be text" in refused_resume(capsys)


def test_the_latest_run_is_found_beside_links_that_lead_nowhere(runs):
    for folder in runs.iterdir():
        (folder / "link").symlink_to("nowhere")
    configs.apply_overrides(vars(gspo), ["--resume", "latest", "--output-dir", str(runs)], Run.constants_to_resume)
    assert gspo.RESUME.startswith(str(runs / "gspo-"))


def test_the_latest_run_is_the_one_that_logged_last_whatever_was_drawn_since(runs):
    for name, logged in (("gspo-1", 2e9), ("gspo-2", 1e9)):
        for log in ("config.json", "metrics.jsonl"):
            (runs / name / log).touch()
            os.utime(runs / name / log, (logged, logged))
    (runs / "gspo-2" / "metrics.png").touch()
    os.utime(runs / "gspo-2" / "metrics.png", (3e9, 3e9))
    configs.apply_overrides(vars(gspo), ["--resume", "latest", "--output-dir", str(runs)], Run.constants_to_resume)
    assert str(runs / "gspo-1") == gspo.RESUME


def test_files_of_a_run_with_fingerprints_may_move(capsys, runs):
    moved = ["--resume", runs / "gspo-1", "--prompts", "elsewhere.jsonl", "--policy-model", "elsewhere"]
    configs.apply_overrides(vars(gspo), [str(word) for word in moved], Run.constants_to_resume)
    assert (gspo.PROMPTS, gspo.POLICY_MODEL) == ("elsewhere.jsonl", "elsewhere")
    config = json.loads((runs / "gspo-1" / "config.json").read_text())
    (runs / "gspo-1" / "config.json").write_text(json.dumps({"constants": config["constants"]}))
    assert "PROMPTS = " in refused_resume(capsys, *moved)


def test_code_that_changed_since_a_run_began_is_named(capsys, runs, monkeypatch):
    resume = ["--resume", str(runs / "gspo-1")]
    config = json.loads((runs / "gspo-1" / "config.json").read_text())
    config["rewards_sha256"] = sha256_of_rewards()
    (runs / "gspo-1" / "config.json").write_text(json.dumps(config))
    configs.apply_overrides(vars(gspo), resume, Run.constants_to_resume)
    assert "Warning" not in capsys.readouterr().out
    (runs / "gspo-1" / "config.json").write_text(json.dumps(config | {"rewards_sha256": "0" * 64}))
    with open(runs / "gspo-1" / "gspo.py", "a") as file:
        file.write("# another line\n")
    configs.apply_overrides(vars(gspo), resume, Run.constants_to_resume)
    (line,) = capsys.readouterr().out.splitlines()
    assert "gspo.py and rewards.py have changed since the run began" in line


# ---- Devices


def chosen_devices(**constants):
    constants = {"SAMPLER": "vllm"} | constants
    devices = configs.choose_devices(configs.Constants(constants, configs.HERE / "gspo.py", ""))
    assert list(devices) == [name for name in constants if name.endswith("_DEVICE")]
    return [str(device) for device in devices.values()]


def test_the_shipped_devices_fall_back_and_say_so(monkeypatch, capsys):
    for gpus, chosen, said in (
        (0, ["cpu"] * 3, "no GPU"),
        (1, ["cuda:0"] * 3, "one GPU"),
        (2, ["cuda:0", "cuda:1", "cuda:1"], ""),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert chosen_devices(POLICY_DEVICE="cuda:0", REF_DEVICE="cuda:1", REWARD_DEVICE="cuda:1") == chosen
        out = capsys.readouterr().out
        assert said in out and out.count("\n") == (gpus < 2)
    assert chosen_devices(POLICY_DEVICE="cpu", REF_DEVICE="cpu", REWARD_DEVICE="cpu") == ["cpu"] * 3
    assert chosen_devices(POLICY_DEVICE="cpu", SAMPLER_DEVICE="cpu") == ["cpu", "cpu"]
    assert configs.choose_devices(configs.Constants({"SAMPLER": "own", "SAMPLER_DEVICE": "cuda:7"}, Path(), "")) == {}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("gpus", "constants", "chosen"),
    [
        (2, {}, ["cuda:1"] * 3),
        (4, {}, ["cuda:2", "cuda:3", "cuda:3"]),
        (4, {"SHARD": True}, ["cuda:1"] * 3),
        (4, {"SHARD": True, "LORA_RANK": 8}, ["cuda:2", "cuda:3", "cuda:3"]),  # adapters are not sharded
        (4, {"SAMPLER": "vllm"}, ["cuda:1"] * 4),
        (0, {}, ["cpu"] * 3),
    ],
)
def test_each_of_several_processes_has_a_gpu_or_two(gpus, constants, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    values = {"SAMPLER": "own", "SHARD": False, "LORA_RANK": 0, "SAMPLER_DEVICE": "cuda:0"} | constants
    values |= {"POLICY_DEVICE": "cuda:0", "REF_DEVICE": "cuda:1", "REWARD_DEVICE": "cuda:1"}
    devices = configs.choose_devices(configs.Constants(values, configs.HERE / "gspo.py", ""))
    assert [str(device) for device in devices.values()] == chosen


# ---- Rewards


@pytest.mark.parametrize(
    ("completion", "right"),
    [("#132", 1), ("7+5=12#132", 1), ("#13#132", 1), ("132", 0), ("#1321", 0), ("#132#", 0), ("", 0), ("# 132 ", 1)],
)
def test_exact_match(completion, right):
    from rewards import exact_match

    assert exact_match("47+85=", completion, {"answer": "132"}) == right


@pytest.mark.parametrize("text", ["", "SEED = (0\n", "# ---- Constants -\nSEED = 0\n# ---- Algorithm -\n"])
def test_a_script_that_somebody_is_editing_is_one_line(tmp_path, monkeypatch, text):
    (tmp_path / "gspo.py").write_text(text)
    monkeypatch.setitem(vars(gspo), "__file__", str(tmp_path / "gspo.py"))
    with pytest.raises(configs.InputError, match="finish the edit there|has no constant .* put it back"):
        gspo.GSPOTrainer()


def test_a_switch_of_a_script_edited_to_something_else_is_refused(tmp_path):
    for script in SCRIPTS:
        text = (configs.HERE / f"{script.__name__}.py").read_text()
        switches = [name for name, value in configs.constant_values(vars(script)).items() if type(value) is bool]
        for name in switches:
            (tmp_path / "mine.py").write_text(re.sub(rf"(?m)^{name} = \w+", f'{name} = "yes"', text))
            namespace = vars(script) | {"__file__": str(tmp_path / "mine.py"), name: "yes"}
            with pytest.raises(configs.InputError, match=f"{name} = 'yes' must be True or False"):
                configs.snapshot(namespace)


@pytest.mark.parametrize(("name", "value"), [("BONUS_REWARDS", 3), ("MY_SEED", "x"), ("DECAY_STEPS", 10)])
def test_a_constant_of_a_users_own_has_no_rule_unless_its_ending_says_what_it_is(name, value):
    values = configs.constant_values(vars(gspo))
    configs.validate(values | {name: value}, vars(gspo))
    with pytest.raises(configs.InputError, match="DECAY_STEPS = -1 must be 0 or more steps"):
        configs.validate(values | {"DECAY_STEPS": -1}, vars(gspo))
