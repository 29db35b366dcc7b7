"""The pages and logs that a user watches: samples in a browser, TensorBoard files, evaluation, the self-test."""

import contextlib
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
import types
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
from conftest import trainer_of

import configs
import gspo
from bookkeeping import evaluation, sample_page, samples
from scoring import rules

NASTY = "<script>document.title = 'owned'</script>\"'&<img src=x onerror=\"document.title='owned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def sample(step=1, prompt="1+1=", text="2", advantage=0.5, **more):
    tokens = [text[i : i + 3] for i in range(0, len(text), 3)]
    row = {"step": step, "prompt": prompt, "completion": text, "reward": 1.0, "advantage": advantage, "answer": "2"}
    row |= {"tokens": len(tokens), "truncated": False, "token_texts": tokens, "logp_change": [0.25] * len(tokens)}
    return row | more


def write(folder, samples):
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return sample_page.draw_samples(folder)


class Text(html.parser.HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_escapes_whatever_a_model_wrote_and_needs_no_network(tmp_path):
    source = write(tmp_path, [sample(prompt=NASTY, text=NASTY, answer=NASTY)]).read_text()
    parsed = Text(source)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img", "link", "iframe"})
    assert not any(name.startswith("on") or name in ("src", "href") for _, given in parsed.tags for name in given)
    assert parsed.text.count(NASTY) >= 3  # prompt, answer, and the tokens put together


def test_a_prompt_of_several_turns_shows_their_roles_and_one_of_a_single_turn_does_not(tmp_path):
    turns = [("system", ""), ("user", "1+1="), ("assistant", "2\n#2"), ("user", NASTY)]
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = [sample(messages=chat), sample(2, messages=chat[:2]), sample(3, prompt="5+5=")]  # as older runs have it
    for row, shown in zip(rows, ["user1+1=assistant2\n#2user" + NASTY, "1+1=", "5+5="], strict=True):
        assert f"\n{shown}answer: 2\n" in Text(write(tmp_path, [row]).read_text()).text


def test_a_newline_can_be_seen_and_an_end_stands_apart(tmp_path):
    tokens = {"token_texts": ["4\n\n", "<end>"], "logp_change": [0.0, 0.0], "tokens": 2}
    for truncated in (False, True):
        parsed = Text(write(tmp_path, [sample(truncated=truncated, **tokens)]).read_text())
        ends = [given.get("class") for tag, given in parsed.tags if "title" in given]
        assert "4↵\n↵\n<end>" in parsed.text and ends == [None, None if truncated else "end"]


def test_a_run_on_chats_shows_their_roles_in_its_page_and_their_last_message_in_its_summary(small, tmp_path, capsys):
    shot = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "#2"}]
    rows = [{"prompt": [*shot, {"role": "user", "content": f"{a}+5="}], "answer": a + 5} for a in range(40)]
    rows[0]["prompt"].append({"role": "assistant", "content": "0+"})  # a begun answer
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small.PROMPTS = small.EVAL_PROMPTS = str(tmp_path / "chats.jsonl")
    small.MAX_STEPS, small.BATCH_SIZE, small.SAMPLE_GROUPS, small.REWARDS = 1, 40, 40, "exact_match"
    trainer = small.GSPOTrainer()
    trainer.train()
    out = capsys.readouterr().out
    assert all(f"  '{row['messages'][-1]['content']}' (answer {row['answer']})" in out for row in trainer.eval_rows[:3])
    text = Text(sample_page.draw_samples(trainer.run.folder).read_text()).text
    assert "user1+1=assistant#2user7+5=answer: 12" in text and "user0+5=assistant0+answer: 5" in text


def test_a_token_is_coloured_by_the_change_of_its_log_prob(tmp_path):
    row = sample(text="abcdef", token_texts=["abc", "def"], logp_change=[-0.5, 0.25])
    tags = Text(write(tmp_path, [row]).read_text()).tags
    titled = [given for tag, given in tags if "title" in given]
    assert [(given["title"], given["style"]) for given in titled] == [
        ("-0.500", "background: rgba(213, 94, 0, 0.60)"),
        ("+0.250", "background: rgba(0, 114, 178, 0.30)"),
    ]


def test_a_page_reads_the_end_of_the_samples_alone(tmp_path, monkeypatch):
    rows, loads, read = [sample(step) for step in range(1, 500)], json.loads, []
    rows[-1]["logp_change"] = [None] * len(rows[-1]["logp_change"])  # NaN is written as None
    monkeypatch.setattr(sample_page, "MOST_TOKENS", 3 * rows[0]["tokens"])
    monkeypatch.setattr(sample_page.json, "loads", lambda text: (read.append(text), loads(text))[1])
    assert "Steps 497 to 499" in Text(write(tmp_path, rows).read_text()).text
    assert len(read) < 9


def test_groups_stand_together_and_a_long_run_shows_its_latest_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_page, "MOST_TOKENS", 8)
    rows = [sample(step, prompt, truncated=True) for step in range(1, 9) for prompt in ("p", "q") for _ in range(2)]
    parsed = Text(write(tmp_path, rows).read_text())
    classes = [given.get("class") for _, given in parsed.tags]
    assert classes.count("group") == 4 and classes.count("card up") == 8
    assert (
        "Steps 7 to 8" in parsed.text
        and "earlier ones are in" in parsed.text
        and parsed.text.count("cut at the limit") == 8
    )


def test_neighbouring_groups_of_the_same_prompt_stay_apart(tmp_path):
    rows = [sample(group=group) for group in (0, 1) for _ in range(3)]
    classes = [given.get("class") for _, given in Text(write(tmp_path, rows).read_text()).tags]
    assert classes.count("group") == 2 and classes.count("card up") == 6
    rows = [sample(prompt=prompt) for prompt in ("p", "q") for _ in range(3)]  # as older runs have them
    classes = [given.get("class") for _, given in Text(write(tmp_path, rows).read_text()).tags]
    assert classes.count("group") == 2


def test_a_run_numbers_the_groups_of_its_samples(small_script):
    small_script.SAMPLE_GROUPS, small_script.MAX_STEPS = 3, 1
    trainer = trainer_of(small_script)
    trainer.train()
    samples = [json.loads(line) for line in (trainer.run.folder / "samples.jsonl").read_text().splitlines()]
    assert [row["group"] for row in samples] == [0] * 4 + [1] * 4 + [2] * 4


def test_the_texts_of_tokens_join_to_the_text_of_all_of_them():
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["one two three"], vocab_size=270, special_tokens=["<end>"], show_progress=False)
    tokenizer, decoded = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>"), []
    text = "naïve 🙂🙃 one 二 two, " * 60  # most characters are two to four tokens
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: decoded.append(len(ids)) or decode(ids)
    texts = samples.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) > 1000 and "".join(texts) == text + "<end>"
    assert "🙂" in texts and "二" in texts and not any("\ufffd" in piece for piece in texts)
    assert sum(decoded) < 16 * len(ids)
    broken = ids[: ids.index(tokenizer("🙂")["input_ids"][0]) + 2]  # cut within a character
    assert "".join(samples.token_texts(tokenizer, broken)) == decode(broken) and decode(broken).endswith("\ufffd")


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"step": 1})])
def test_a_bad_line_of_samples_is_one_line(tmp_path, capsys, line):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as exit_:
        sample_page.main([str(tmp_path)])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and "line 1" in err and err.count("\n") == 1


def in_browser(path, tmp_path):
    """Returns the page as Chromium has it after its scripts, if any, have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,800", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_a_script_in_a_completion_is_text(tmp_path):
    source = in_browser(write(tmp_path, [sample(prompt=NASTY, text=NASTY), sample(text="fine")]), tmp_path)
    shown = Text(source)
    assert "<title>owned" not in source and ": samples</title>" in source
    assert NASTY in shown.text and not [tag for tag, _ in shown.tags if tag in ("script", "img")]


MEASURE = """<script>
const seen = {cards: [], tokens: []};
for (const group of document.querySelectorAll(".group"))
  seen.cards.push([...group.children].map(card => card.getBoundingClientRect()).map(r => [r.x, r.y, r.right]));
for (const token of document.querySelectorAll(".text span"))
  seen.tokens.push(getComputedStyle(token).backgroundColor);
document.title = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_a_group_stands_side_by_side_and_its_tokens_are_coloured(tmp_path):
    changes = [[0.5], [-0.25], [0.0]]
    rows = [
        sample(group=group, prompt="p", text=str(i), logp_change=change)
        for group in (0, 1)
        for i, change in enumerate(changes)
    ]
    path = write(tmp_path, rows)
    path.write_text(path.read_text().replace("</body>", MEASURE))
    (title,) = re.findall("<title>(.*)</title>", in_browser(path, tmp_path))
    seen = json.loads(html.unescape(title))
    assert [len(cards) for cards in seen["cards"]] == [3, 3]
    for cards in seen["cards"]:
        assert len({y for _, y, _ in cards}) == 1  # in one row, each to the right of the one before
        assert all(right <= x for (_, _, right), (x, _, _) in itertools.pairwise(cards))
    assert seen["cards"][0][0][1] < seen["cards"][1][0][1]  # the second group below the first
    assert seen["tokens"] == ["rgba(0, 114, 178, 0.6)", "rgba(213, 94, 0, 0.3)", "rgba(0, 114, 178, 0)"] * 2


# ---- Logging elsewhere


def test_tensorboard_files_hold_the_metrics(small):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = small.GSPOTrainer()
    history = trainer.train()
    events = event_accumulator.EventAccumulator(str(trainer.run.folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (row["step"], pytest.approx(row["reward"], rel=1e-6)) for row in history[1:]
    ]
    assert events.Scalars("eval_accuracy")[0].step == 0
    small.TENSORBOARD = False
    trainer = small.GSPOTrainer()
    trainer.train()
    assert not list(trainer.run.folder.glob("events.*"))


def test_the_run_goes_on_if_tensorboard_cannot_begin(small, monkeypatch, capsys):
    tensorboard, full = pytest.importorskip("torch.utils.tensorboard"), mock.Mock(side_effect=OSError("no space"))
    monkeypatch.setattr(tensorboard, "SummaryWriter", full)
    small.MAX_STEPS = 1
    assert len(small.GSPOTrainer().train()) == 2
    assert "TensorBoard's events cannot be written: no space; training goes on" in "".join(capsys.readouterr())


def test_boards_that_fail_are_a_warning_and_runs_of_one_name_are_two(small, monkeypatch, capsys):
    ids = []

    def init(**options):
        ids.append(options["id"])
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_, **__: 1 / 0)
    small.WANDB_PROJECT, small.MAX_STEPS = "sums", 1
    for name in ("a", "b"):
        monkeypatch.setattr("bookkeeping.folder.time.strftime", lambda *_: "20260102-030405")
        small.OUTPUT_DIR = small.OUTPUT_DIR.rpartition("/")[0] + "/" + name
        assert small.GSPOTrainer().train()[-1]["step"] == 1
    out = capsys.readouterr().out
    assert out.count("Weights & Biases cannot be logged to: No API key configured; training goes on") == 2
    assert out.count("TensorBoard's events cannot be written: division by zero; training goes on") == 2
    assert ids[0] != ids[1] and all(one.startswith("gspo-20260102-030405-") for one in ids)


@pytest.mark.parametrize("broken", ["start", "export_chrome_trace"])
def test_a_profile_that_cannot_be_taken_stops_no_training(small, monkeypatch, capsys, broken):
    monkeypatch.setattr(torch.profiler.profile, broken, mock.Mock(side_effect=OSError("no space")))
    small.PROFILE, small.TENSORBOARD, small.MAX_COMPLETION_TOKENS = True, False, 6
    assert len(small.GSPOTrainer().train()) == 3
    out = "".join(capsys.readouterr())
    assert out.count("the profile could not be taken: no space; training goes on without") == 1


def test_weights_and_biases_only_if_asked_for(small, monkeypatch, capsys):
    calls = []
    board = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    fake = types.SimpleNamespace(init=lambda **options: (calls.append(options), board)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    small.GSPOTrainer().train()
    assert not calls
    small.WANDB_PROJECT = "sums"
    small.GSPOTrainer().train()
    assert calls[0]["project"] == "sums" and calls[0]["config"]["GROUP_SIZE"] == 4
    assert [call[0] for call in calls[1:-1]] == [0, 1, 2] and "reward" in calls[2][1] and calls[-1] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(configs.InputError, match="pip install wandb"):
        small.GSPOTrainer().train()


# ---- Evaluation


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (4, 2), (5, 3), (4, 9)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(samples, k):
    generator = torch.Generator().manual_seed(samples)
    right = (torch.rand(6, samples, generator=generator) < 0.4).double()
    found = evaluation.accuracy_metrics(right.flatten().tolist(), samples, k)
    chosen = [list(choice) for choice in itertools.combinations(range(samples), min(k, samples))]
    naive = sum(max(one[i] for i in choice) for one in right.tolist() for choice in chosen) / 6 / len(chosen)
    assert found["eval_pass_at_k"] == pytest.approx(naive)
    assert found["eval_accuracy"] == pytest.approx(right.mean().item())
    for name in ("eval_accuracy", "eval_pass_at_k"):
        assert 0 <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= 1


def test_wilsons_interval_is_that_of_the_closed_form():
    low, high = evaluation.wilson_interval(0.3, 50)
    for bound in (low, high):  # at a bound, the score test just does not reject
        assert abs(0.3 - bound) / (bound * (1 - bound) / 50) ** 0.5 == pytest.approx(1.96)
    assert evaluation.wilson_interval(1.0, 10)[1] == 1.0 and evaluation.wilson_interval(1.0, 10)[0] < 0.8


# ---- Self-test


def lines_of(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:6] in ("ok    ", "FAIL  ", " " * 6)]
    return {line[6:].split("  ")[0]: (line[:4].strip(), line[6:]) for line in lines}


def test_the_selftest_passes_on_the_embedded_task_and_leaves_nothing(small_script, capsys, tmp_path):
    small_script.main(["--selftest"])
    lines = lines_of(capsys)
    marks = [mark for mark, _ in lines.values()]
    of_critic = 4 * hasattr(small_script, "completion_values")
    assert marks == [""] * 2 + ["ok"] * (9 + of_critic)  # prompt and completion are for the reader to judge
    assert not (tmp_path / "outputs").exists()


def test_the_selftest_passes_with_lora_although_its_a_has_no_gradient_at_first(small, capsys):
    small.main(["--selftest", "--lora-rank", "4"])
    mark, text = lines_of(capsys)["weights that the step moved"]
    assert mark == "ok" and "100%" in text and " 0 of " in text
    trainer = trainer_of(small)
    next(p for name, p in trainer.policy.named_parameters() if ".lora_B." in name).register_hook(torch.zeros_like)
    with pytest.raises(SystemExit):
        gspo.selftest(trainer)
    mark, text = lines_of(capsys)["weights that the step moved"]
    assert mark == "FAIL" and " 1 of " in text and "lora_B" in text


def test_the_selftest_shows_rewards_that_all_fail(small, capsys, monkeypatch):
    def raising(file, name, rows, texts):
        return [(0.0, "raised KeyError: 'worth'")] * len(texts)

    monkeypatch.setattr(rules, "score_by_rule", raising)
    monkeypatch.setattr(rules, "check_rules", lambda *_: pytest.fail("that would end it without a table"))
    with pytest.raises(SystemExit) as exit_:
        small.main(["--selftest", "--rewards", "exact_match"])
    lines = lines_of(capsys)
    assert exit_.value.code == 1 and lines["rewards"][0] == "FAIL" and "'worth'" in lines["rewards"][1]
    assert lines["weights that the step moved"][0] == "ok"  # the other lines are there all the same


def test_the_selftest_sums_rewards_per_token(small, capsys, monkeypatch, tmp_path):
    config = transformers.AutoConfig.from_pretrained(configs.HERE / gspo.REWARD_MODEL)
    torch.manual_seed(0)
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "scorer")
    transformers.AutoTokenizer.from_pretrained(configs.HERE / gspo.POLICY_MODEL).save_pretrained(tmp_path / "scorer")
    flags = ["--no-use-sequence-level-reward", "--ratio-level", "sequence_token", "--rewards", "reward_model"]
    small.main(["--selftest", *flags, "--reward-model", str(tmp_path / "scorer")])
    mark, text = lines_of(capsys)["rewards"]
    assert mark == "ok" and "first " in text and "reward_model " in text


@pytest.mark.parametrize(("share", "mark"), [(0.85, "FAIL"), (0.95, "ok")])
def test_the_selftest_asks_that_a_step_move_nine_tenths_of_the_weights(small, capsys, share, mark):
    trainer, step = trainer_of(small), torch.optim.AdamW.step
    generator = torch.Generator().manual_seed(0)

    def partly(*_):
        before = [parameter.detach().clone() for parameter in trainer.trained]
        step(trainer.optimizer)
        with torch.no_grad():
            for parameter, old in zip(trainer.trained, before, strict=True):
                parameter.copy_(torch.where(torch.rand(old.shape, generator=generator) < share, parameter, old))

    trainer.optimizer.step = partly
    with contextlib.suppress(SystemExit):
        gspo.selftest(trainer)
    assert lines_of(capsys)["weights that the step moved"][0] == mark


def test_the_selftest_shows_what_is_wrong(small, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_:  # bfloat16 weights swallow a small step
        small.main(["--selftest", "--policy-dtype", "bfloat16", "--learning-rate", "1e-7"])
    assert exit_.value.code == 1 and lines_of(capsys)["weights that the step moved"][0] == "FAIL"
    small.POLICY_DTYPE, small.LEARNING_RATE = "float32", 1e-3
    completion_logps = gspo.completion_logps
    monkeypatch.setattr(
        gspo, "completion_logps", lambda *a, **k: [x if x is None else x - 0.2 for x in completion_logps(*a, **k)]
    )
    with pytest.raises(SystemExit):
        small.main(["--selftest"])
    assert lines_of(capsys)["log-probs, sampler against trainer"][0] == "FAIL"
    monkeypatch.undo()
    small.OUTPUT_DIR = "unused"
    small.MAX_COMPLETION_TOKENS = 2  # too short for any end
    trainer = trainer_of(small)
    with pytest.raises(SystemExit):
        gspo.selftest(trainer)
    assert lines_of(capsys)["completions that end"][0] == "FAIL"
