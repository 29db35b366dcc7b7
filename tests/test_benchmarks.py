"""The benchmarks that take a step apart, at their smallest."""

import importlib
import sys

import pytest
import torch

import configs


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(configs.HERE / "benchmarks")


@pytest.mark.parametrize(("name", "rows"), [("floor", 4), ("rollouts", 3)])
def test_a_benchmark_prints_its_table(name, rows, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "embedded", "--rounds", "1"])
    importlib.import_module(name).main()
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("| ")][1:]  # without the head
    assert len(table) == rows, out
    assert not any("nan" in line or "None" in line for line in table)


def test_the_ways_of_computing_experts_are_compared(monkeypatch, capsys):
    flags = "--preset moe --batch-size 2 --group-size 4 --max-completion-tokens 8"
    monkeypatch.setattr(sys, "argv", ["experts", "--rounds", "1", "--flags", flags])
    monkeypatch.delitem(sys.modules, "experts", raising=False)  # a mechanism has the same name
    importlib.import_module("experts").main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| eager", "| grouped_mm", "| batched_mm"]
    assert rows[0][-2:] == ["0 of 1", "0e+00 |"]


def test_each_way_of_saving_time_can_be_left_out():
    import parts

    trainer, works = parts.works_of("embedded")
    for _, work, without in parts.parts_of(trainer):
        with without():
            assert len(works[work](0)) > 0


def test_the_floor_counts_operators_forward_and_backward():
    import floor

    x = torch.ones(3, requires_grad=True)
    with floor.Counting() as alone, torch.no_grad():
        x.exp().sum()
    with floor.Counting() as trained:
        x.exp().sum().backward()
    assert alone.calls == 2 and trained.calls >= 4
