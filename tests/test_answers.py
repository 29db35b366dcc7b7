"""Answers as data sets and models write them: the table of docs/answers.md, and answers that are not right."""

import re

import pytest

import configs
import rewards
from scoring import answers

LINES = [
    [cell.strip().strip("`") for cell in line.split("|")[3:6]]
    for line in (configs.HERE / "docs/answers.md").read_text(encoding="utf-8").splitlines()
    if re.search(r"\| [01] \|$", line)
]
RIGHT = [
    *[
        ("-9", f"#### {text}")
        for text in ("−9", "- 9", "(-9)", "-9.", "-9.0", "`-9`", "**-9**", "－９", "-$9", "x = -9")
    ],
    *[("7.5", f"#### {text}") for text in ("7 1/2", "15/2", "\\frac{15}{2}", "7.50", "75e-1", "7.5 (litres)", "$7.50")],
    *[
        ("48", f"#### {text}")
        for text in ("48 km/h", "48 apples in all", "Area = 48", "6*8=48", "\\$48", "48%", "4.8e1")
    ],
    *[
        ("60", f"#### {text}")
        for text in ("60 m/s", "60 m^2", "60 mL", "60 in", "$60/hour", "$60 an hour", "60^\\circ C")
    ],
    ("B", "\\boxed{\\textbf{(B)}}"),
    ("7:15 a.m.", "#### 7:15 AM"),
    ("5", "\\boxed{\\boldsymbol{5}}"),
    ("\\log_2 5", "\\boxed{\\frac{\\ln 5}{\\ln 2}}"),
    ("B", "Final answer: b)"),
    ("no solution", "\\boxed{\\text{No solution}}"),
    ("9:45", "#### 9:45"),
    ("2025-01-31", "Answer: 2025-01-31"),
    ("0.\\overline{3}", "\\boxed{0.\\overline{3}}"),
    ("2, 9", "either $\\boxed{9}$ or $\\boxed{2}$"),
    ("1, 2", "\\boxed{x = 1 \\text{ or } x = 2}"),
    ("(3, -2)", "\\boxed{(x, y) = (3, -2)}"),
    ("(0,100)", "\\boxed{(0, 100)}"),
    ("y = 3x - 1", "\\boxed{3x-1}"),
    ("5\\sqrt{3}", "#### 5√3"),
    ("\\frac{2}{3}", "#### 0.666667"),
    ("4 \\times 10^{-15}", "#### 4e-15"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"),
    ("14", "#### Step 1: subtract\n20 - 6 = 14\n\nSo it is \\boxed {14}."),
    ("14", "\\fbox{14}\n\n#### Checked\nTwice."),
    ("14", "####\n14\nand so on"),
    *[("B", f"{text}\n\n#### Why A is wrong\nBecause it is.") for text in ("\\boxed{B}", "Answer: B", "#### B")],
    *[("x=3, y=2", f"\\boxed{{{text}}}") for text in ("y=2, x=3", "x=3 \\text{ and } y=2", "(3,2)", "3, 2")],
    ("(3,2)", "\\boxed{x=3, y=2}"),
    ("1/3", "\\boxed{0.\\overline{3}}"),
    ("-0.1\\overline{6}", "#### -1/6"),
    ("1/2", "\\boxed{\\frac 1 2}"),
    ("1.5", "#### 1½"),
    ("-5", "#### —5"),
    ("100, 200, 300", "\\boxed{200, 100, 300}"),
    ("18", "#### 18 of her eggs"),
    ("a", "#### A"),
]
WRONG = [
    *[
        ("7", f"#### {text}")
        for text in ("5 6 7", "6 or 7", "7 or 8", "5=7", "7x", "7:30", "7_8", "7 sin x", "3 to 7", "")
    ],
    *[("7", text) for text in ("7", "", "####", "\\boxed{7", "\\boxed{6, 7}", "\\boxed{2x = 7}", "\\boxed{x + y = 7}")],
    *[("5", f"#### {text}") for text in ("5 million", "5 dozen", "5 halves", "5 factorial", "5xyz", "\\neq 5", "5-")],
    *[("4", f"Answer: {text}") for text in ("3 \\to 4", "3 \\Rightarrow 4", "3 \\mid 4", "\\approx 4")],
    *[
        ("3", f"#### {text}")
        for text in ("3|4", "3?4", "3\\\\4", "3 apples and four pears", "3'4", "3 \\quad 4", "3 @ 4")
    ],
    *[
        ("3", f"\\boxed{{3\\text{{ {text}}}}}")
        for text in ("million", "is false", "or four", "hours } 30\\text{ minutes")
    ],
    ("5\\text{ hours } 30\\text{ minutes}", "\\boxed{5}"),
    *[("7", f"#### {text}") for text in ("7 but actually eight", "7 xyz", "7 lambda")],
    ("X", "\\boxed{x}"),
    ("5 m", "#### 5M"),
    ("100,200", "#### 100, 200"),
    ("1234", "#### 1, 234"),
    *[("x=3, y=2", f"\\boxed{{{text}}}") for text in ("(2,3)", "2, 3", "x=2, y=3", "x=3, z=2", "3")],
    ("(3,2)", "\\boxed{y=3, x=2}"),
    ("B", "\\boxed{B}\n#### C"),
    ("7 (seven days) or one week", "#### 7 (seven days) or one week"),
    ("\\frac{11}{2}", "\\boxed{\\frac{1}{12}}"),
    ("x^2y", "\\boxed{x^{2y}}"),
    ("\\sqrt{3}x", "\\boxed{\\sqrt{3x}}"),
    ("3^{12}", "\\boxed{3^{1}2}"),
    ("2 3/4", "#### 23/4"),
    ("12", "#### 1 2"),
    ("9:45", "#### 9:15"),
    ("2025-01-31", "#### 2025-01-30"),
    ("1993", "#### 2025-01-31"),
    ("0", "\\boxed{0.\\overline{3}}"),
    ("4e-7", "#### 5e-7"),
    ("4 \\times 10^{-15}", "\\boxed{9 \\times 10^{-15}}"),
    ("0", "#### 0.0000001"),
    ("25000000", "#### 25000001"),
    ("100", "\\boxed{(0,100)}"),
    ("(3, -2)", "\\boxed{(-2, 3)}"),
    ("x = 5", "\\boxed{y = 5}"),
    ("B", "\\boxed{D}"),
    ("1", "#### 1.000.000"),
    ("20", "\\boxed{\\text{May 20}}"),
    (
        "She has three and buys four more, so that in the end there are seven of them, and nobody else has any.",
        "#### 7",
    ),
]


@pytest.mark.parametrize(("answer", "completion", "reward"), LINES)
def test_each_line_of_the_table_in_docs(answer, completion, reward):
    assert rewards.math_reward("p", completion, {"answer": answer}) == float(reward)


def test_forms_of_a_right_answer_are_right_and_others_are_not():
    assert [pair for pair in RIGHT if not answers.is_right(*pair)] == []
    assert [pair for pair in WRONG if answers.is_right(*pair)] == []


def test_every_row_of_the_table_covers_its_data_set_both_ways():
    text = (configs.HERE / "docs/answers.md").read_text(encoding="utf-8")
    for name in ("GSM8K", "MATH-500", "DAPO-Math-17k", "AMC", "SVAMP", "AQuA"):
        assert re.search(rf"^\| {name} \| `--\S+-column", text, re.MULTILINE)
    assert len(LINES) > 25 and {reward for _, _, reward in LINES} == {"0", "1"}


def test_marks_in_order_with_boxes_that_follow_one_another_as_one():
    text = "#### 1\nAnswer: 2\n\\boxed{3}, \\boxed{\\frac{4}{5}} and \\boxed{6}; then \\boxed{7} ##### 8 \\boxed{ }"
    assert answers.marked_answers(text) == ["1", "2", "3, \\frac{4}{5}, 6", "7"]
    assert rewards.find_answer(text) == "7" and rewards.find_answer("nothing") == ""
