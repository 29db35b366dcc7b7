"""Holds the shared parts of the scripts identical: `make sync` copies them, and tests/test_siblings.py checks them.

The docstring, Constants and Algorithm are each script's own. The imports and all other sections are those of gspo.py,
or of the script that PARENTS names, except for the algorithm's name, and except for the functions in EXEMPTIONS, where
"imports" stands for all imports. Each exemption has the reason why the algorithm needs its own.
"""

import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs

ROOT = configs.HERE
SIBLINGS = tuple(path.stem for path in configs.scripts()[1:])
OWN = ("docstring", "Constants", "Algorithm")

PARENTS = {"vapo": "ppo"}  # {script: whose shared sections it has}, where this is not gspo.py

# {script: {function, class or method: why it differs from its parent's}}. The name of a class means its opening lines,
# up to its first method. A function that the parent does not have stays behind the one that it follows.
EXEMPTIONS = {
    "ppo": {
        "imports": "loads a critic and logs its metrics",
        "completion_values": "the critic's values, which no other algorithm here has",
        "PPOTrainer.__init__": "loads the critic, and makes its optimizer",
        "PPOTrainer.compute_values": "the critic's values, which no other algorithm here has",
        "PPOTrainer.add_scores": "values are computed on the critic's device while the policy works",
        "PPOTrainer.compute_advantages": "advantages are GAE of the token rewards, and returns come with them",
        "PPOTrainer.update_policy": "the critic steps beside the policy, which rests in the critic's warm-up",
        "PPOTrainer.update_critic": "the critic has a loss and an optimizer of its own",
        "PPOTrainer.compute_value_gradient": "the critic has a loss and an optimizer of its own",
        "PPOTrainer.losses": "the KL is a part of the rewards, or of the loss if KL_IN_REWARD is off",
        "PPOTrainer.metrics_of_step": "adds the metrics of the critic and its values",
    },
    "cispo": {
        "imports": "puts the overlong penalty on last tokens",
        "CISPOTrainer.score": "the overlong penalty comes on top of the rewards",
    },
    "vapo": {
        "VAPOTrainer.score": "says which completions are right, for the positive loss",
        "VAPOTrainer.compute_advantages": "value pre-training needs Monte-Carlo returns, too",
        "VAPOTrainer.update_policy": "the first steps are value pre-training, on Monte-Carlo returns",
        "VAPOTrainer.losses": "adds the positive loss, and a KL is in the rewards alone",
    },
    "dapo": {
        "imports": "puts the overlong penalty on last tokens",
        "DAPOTrainer": "dynamic sampling has a state: surplus groups, and how many rounds there were",
        "DAPOTrainer.generate_responses_with_group_sampling": "dynamic sampling: drops dead groups and refills",
        "DAPOTrainer.score": "task rewards are known from sampling; the overlong penalty comes on top",
        "DAPOTrainer.mini_batches": "completions that the limit cut are left out of the loss (OVERLONG_FILTER)",
        "DAPOTrainer.add_old_logps": "of a surplus group, π_old is the policy of the step that sampled it",
        "DAPOTrainer.metrics_of_step": "adds what dynamic sampling drew, dropped and kept",
        "DAPOTrainer.sampling_metrics": "what dynamic sampling drew, dropped and kept",
    },
}


def sections(text):
    """Returns the sections of a script, in order: {"docstring": ..., "imports": ..., "Constants": ..., ...}.

    Together they are the whole text.
    """
    end = text.index('"""\n', 3) + 4
    parts = {"docstring": text[:end]}
    banners = list(re.finditer(r"^# ---- (.+?) -+$", text, re.MULTILINE))
    parts["imports"] = text[end : banners[0].start()]
    for banner, following in zip(banners, [*banners[1:], None], strict=True):
        parts[banner[1]] = text[banner.start() : following.start() if following else len(text)]
    return parts


def blocks(section):
    """Returns the blocks of a section, in order, as {name: text}. Together they are all of its lines.

    The names are "" for the first lines, "function", "Class" and "Class.method". The blank lines above a function
    belong to it. Lines between two functions are a block of their own.
    """
    lines = section.splitlines(keepends=True)

    def first_line(node):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        while not lines[first - 2].strip():
            first -= 1
        return first

    starts, defined = {"": 1}, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.parse(section).body:
        if not isinstance(node, defined):
            continue
        starts[node.name] = first_line(node)
        methods = [child for child in node.body if isinstance(node, ast.ClassDef) and isinstance(child, defined)]
        for child in methods:
            starts[f"{node.name}.{child.name}"] = first_line(child)
            starts[f"after {node.name}.{child.name}"] = child.end_lineno + 1
        starts[f"after {node.name}"] = node.end_lineno + 1
    ends = [*list(starts.values())[1:], len(lines) + 1]
    return {name: "".join(lines[a - 1 : b - 1]) for (name, a), b in zip(starts.items(), ends, strict=True)}


def parent_of(name):
    """Returns the name of the script whose shared sections script `name` has."""
    return PARENTS.get(name, "gspo")


def renamed(name):
    """Returns the sections of a script's parent under the script's name."""
    parent = parent_of(name)
    word = re.compile(rf"\b{parent}(?![a-z])|{parent.upper()}(?=Trainer|_|\b)")
    parts = sections((ROOT / f"{parent}.py").read_text(encoding="utf-8"))
    return {
        title: word.sub(lambda found: name if found[0].islower() else name.upper(), text)
        for title, text in parts.items()
    }


def synced(name, text):
    """Returns script `name` with its own parts as in text, and with all other parts as in its parent."""
    own, result = sections(text), []
    for title, section in renamed(name).items():
        exempt = EXEMPTIONS.get(name, {})
        if title in OWN or title == "imports":
            result.append(own[title] if title in OWN or title in exempt else section)
            continue
        here, shared = blocks(own[title]), blocks(section)
        merged = {block: here[block] if block in exempt else lines for block, lines in shared.items()}
        before = ""
        for block in here:  # functions that the parent does not have, and the ends of those that it has
            if block not in shared and block.removeprefix("after ") in exempt:
                order = list(merged)
                place = order.index(before) + 1
                text = here[block] if block in exempt else ""
                merged = {key: merged.get(key, text) for key in [*order[:place], block, *order[place:]]}
            before = block if block in merged else before
        result.extend(merged.values())
    return "".join(result)


def main():
    if sys.argv[1:2] == ["reasons"]:
        names = sys.argv[2:]
        parents = [PARENTS[name] for name in names if name in PARENTS and PARENTS[name] not in names]
        for name in [*parents, *names]:
            for block, reason in EXEMPTIONS.get(name, {}).items():
                print(f"{name}.py has its own {block}: {reason}")
        return
    if sys.argv[1:] != ["sync"]:
        sys.exit("usage: python tests/siblings.py sync, or python tests/siblings.py reasons NAME ...")
    for name in SIBLINGS:
        path = ROOT / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        new = synced(name, text)
        print(f"{path.name}: {'unchanged' if new == text else f'synced from {parent_of(name)}.py'}")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
