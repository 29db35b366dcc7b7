"""The scripts of benchmarks/mechanisms at their smallest: each prints its table and draws its picture."""

import importlib
import sys

import pytest
import torch
import transformers

import configs

sys.path.insert(0, str(configs.HERE / "data"))
import make_arithmetic
from conftest import FEW

FOLDER = configs.HERE / "benchmarks" / "mechanisms"
SMALLEST = {
    "adaptive_kl": "--seeds 2 --steps 3",
    "clip_higher": "--seeds 2 --steps 2",
    "clip_share": "--seeds 1 --prompts 8 --steps 1",
    "dead_groups": "--seeds 2 --prompts 4 --steps 1",
    "difficulty": "",
    "dual_clip": "--seeds 2 --prompts 4",
    "experts": "--seeds 2 --prompts 4 --steps 1",
    "kl_estimators": "--seeds 2 --steps 50",
    "length_bias": "--seeds 2 --steps 2",
    "overlong": "--seeds 2 --steps 2",
    "rare_tokens": "--seeds 2 --prompts 8 --steps 1",
    "ratio_and_length": "--seeds 2 --prompts 8 --steps 1",
    "value_pretraining": "--seeds 2 --steps 2 --pretraining 1",
}


def small_mixture(folder):
    """Returns the folder of a random mixture with the embedded task's tokenizer."""
    torch.manual_seed(0)
    config = make_arithmetic.make_config(transformers.Qwen3MoeConfig, **make_arithmetic.EXPERTS)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = make_arithmetic.EOS
    model.save_pretrained(folder)
    make_arithmetic.make_tokenizer().save_pretrained(folder)
    return folder


def run(name, tmp_path, monkeypatch, capsys):
    """Returns the rows of the table that a script prints, {first cell: [other cells]}."""
    monkeypatch.syspath_prepend(FOLDER)
    model = ["--model", str(small_mixture(tmp_path / "model"))] if name == "experts" else []
    monkeypatch.setattr(sys, "argv", [name, *SMALLEST[name].split(), *model, "--pictures", str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)  # a benchmark may have the same name
    module = importlib.import_module(name)
    for script in (module.__dict__.get("gspo"), module.__dict__.get("dapo"), importlib.import_module("gspo")):
        if script is not None:
            script.PROMPTS, script.EVAL_PROMPTS = f"{FEW.name}/train.jsonl", f"{FEW.name}/test.jsonl"
    module.main()
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {
        cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in (line[2:-2].split(" | ") for line in lines)
    }


def test_each_mechanism_is_run_here():
    assert set(SMALLEST) == {path.stem for path in FOLDER.glob("*.py")} - {"common"}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_mechanism_prints_its_table_and_draws_its_picture(name, tmp_path, monkeypatch, capsys):
    rows = run(name, tmp_path, monkeypatch, capsys)
    assert len(rows) >= 3 and len({len(cells) for cells in rows.values()}) == 1
    if name == "kl_estimators":
        assert rows["k1"][1] == "0.000 ± 0.000" and rows["k2"][1] == rows["ratio_k3"][1] == "1.000 ± 0.000"
        assert rows["k3"][2] == "1.000 ± 0.000" and not rows["k3"][1].startswith("1.000")
    if name == "difficulty":
        closed, found = (rows[f"G = 8{text}"] for text in (": 2 p (1 − p) (G − 1) / G", ", without the std"))
        assert list(map(float, closed)) == pytest.approx(list(map(float, found)), abs=0.0011)  # halves round either way
    if name == "clip_share":
        assert float(rows["GSPO"][0]) > float(rows["GSPO"][-3]) == 0.0
