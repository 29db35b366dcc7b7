"""The constants of a script: their command-line flags, presets and rules, and the choice of devices.

A script's constants are the lines `NAME = value  # meaning` under its banner `# ---- Constants`. They are the one
source of the flags, their types and `--help`. Nothing here knows an algorithm.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import io
import json
import math
import os
import re
import sys
import time
import tokenize
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 11):  # noqa: UP036, because transformers 5.23 and later need 3.11
    sys.exit(
        f"Python {sys.version.split()[0]} is too old: the scripts need 3.11 or later, as in make PYTHON=python3.11"
    )

HERE = Path(__file__).resolve().parent
ALONE = 10  # seconds that a process other than process 0 waits before it ends early, because that ends all of them

# Named sets of constants. A preset changes only the constants that it lists here or in the script's own `presets`. The
# script's values win over the ones here, and flags win over both.
_GSM8K = {
    "POLICY_MODEL": "Qwen/Qwen3-0.6B",
    "PROMPTS": "openai/gsm8k",
    "PROMPTS_CONFIG": "main",
    "PROMPTS_SPLIT": "train",
    "EVAL_PROMPTS": "openai/gsm8k",
    "EVAL_SPLIT": "test",
    "PROMPT_COLUMN": "question",
    "ANSWER_COLUMN": "answer",
    "SYSTEM_PROMPT": "Reason step by step. End with a line that holds #### and the answer, a number.",
    "REWARDS": "math 1.0, format 0.1",
    "EVAL_REWARD": "math",
    "GROUP_SIZE": 8,
    "BATCH_SIZE": 16,
    "MAX_PROMPT_TOKENS": 512,
    "MAX_COMPLETION_TOKENS": 1024,
    "ADVANTAGE_TYPE": "normalized",
    "ENTROPY_COEF": 0.0,
    "LEARNING_RATE": 1e-6,
    "LR_SCHEDULE": "constant",
    "WARMUP_STEPS": 10,
    "MICRO_BATCH_TOKENS": 8192,
    "GRADIENT_CHECKPOINTING": True,
    "MAX_STEPS": 400,
    "EVAL_EVERY": 50,
    "EVAL_SAMPLES": 1,
    "SAVE_EVERY": 10,
}
# A chat model of 135 M parameters learns word problems of one step, in minutes on a CPU.
_SMALL = "data/models/smollm2-135m-instruct"  # what data/make_smollm2.py writes on a machine without the Hub
_SMOLLM2 = {
    "POLICY_MODEL": _SMALL if (HERE / _SMALL).is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct",
    "PROMPTS": "data/words/train.jsonl",  # stories of one sum or difference, behind two solved ones
    "EVAL_PROMPTS": "data/words/test.jsonl",  # other sums and differences
    "REWARDS": "math 1.0, format 0.2",  # format, because a third of the first completions are cut before an answer
    "EVAL_REWARD": "math",  # accuracy is about answers, not their form
    "BATCH_SIZE": 8,  # 64 completions a step, which take ten seconds to sample on a slow CPU
    "GROUP_SIZE": 8,  # at first one answer in eight is right, so two groups of three have a right one
    "MAX_COMPLETION_TOKENS": 24,  # "14 + 5 = 19\n#### 19" has 15
    "ADVANTAGE_TYPE": "normalized",  # the algorithms' own; rewards are rare at first, and count the more
    "ENTROPY_COEF": 0.0,  # the papers have none
    "KL_COEF": 0.0,  # nor this, and a reference model would be a second copy in memory
    "MINI_BATCHES": 2,  # of four groups each, so that an update has some that are not dead
    "WHOLE_GROUPS": True,  # an update reads each prompt once, and takes 0.88 of the time; learning is the same
    "LEARNING_RATE": 1e-5,  # at 3e-5 a run was lost: it answered every problem with a sum
    "WARMUP_STEPS": 2,  # Adam's moments are rough at first, and 30 steps have no more to spare
    "MAX_STEPS": 30,  # most is learned in 15
    "EVAL_EVERY": 15,  # an evaluation takes as long as four steps
    "EVAL_SIZE": 128,  # enough to see a difference of 0.1, in a minute
    "EVAL_SAMPLES": 2,  # for the same minute
    "SAMPLED_AT_ONCE": 128,  # in an evaluation; their keys and values take 1 GB
    "SAVE_EVERY": 15,  # a checkpoint has 1.6 GB
    "KEEP_CHECKPOINTS": 1,  # for the same reason
}
PRESETS = {
    "smollm2": _SMOLLM2,
    "smollm2-lora": {  # adapters, in 4 GB in place of 5.5
        **_SMOLLM2,
        "LORA_RANK": 16,  # peft's usual ranks are 8 to 64; 5 M weights
        "LEARNING_RATE": 1e-4,  # ten times that of all weights; at 3e-4 the entropy is gone in 11 steps
    },
    "moe": {  # the embedded task with a mixture of experts
        "POLICY_MODEL": "data/models/arithmetic-moe",
        "LEARNING_RATE": 5e-4,  # at 1e-3 grpo.py stays at 0.88 in as many steps, at 2e-3 it falls to 0.03
        "MAX_STEPS": 120,  # an expert sees a quarter of the tokens
    },
    "smoke": {"MAX_STEPS": 2, "BATCH_SIZE": 4, "EVAL_SIZE": 16, "EVAL_SAMPLES": 2, "WARMUP_STEPS": 0},
    "gsm8k": _GSM8K,
    "gsm8k-reward-model": {
        **_GSM8K,
        "REWARD_MODEL": "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        "REWARDS": "reward_model",
    },
}


class InputError(Exception):
    """Something that a person gave cannot be used. The message is one line: the mistake, its place, and the remedy."""


@contextlib.contextmanager
def one_line_errors():
    """Turns an InputError into one line on stderr and exit code 2.

    It does the same, with code 130, to a Ctrl-C that comes before a run handles it.
    """
    _open_streams()
    try:
        yield
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C, before a run began", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        number = os.environ.get("RANK", "0")
        if number != "0":  # the others mostly find the same mistake, and process 0 says it
            time.sleep(ALONE)
        who = "" if number == "0" else f"process {number}: "
        print(f"{Path(sys.argv[0]).name}: error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(ALONE)  # likewise, and torchrun ends this process meanwhile
        raise


def scripts():
    """Returns the paths of the scripts, gspo.py first. A script is a file with the banner of an algorithm."""
    found = [path for path in HERE.glob("*.py") if "\n# ---- Algorithm -" in path.read_text(encoding="utf-8")]
    return sorted(found, key=lambda path: (path.stem != "gspo", path.stem))


def _open_streams():
    """Opens standard streams that are closed, as a daemon may have them, on the null device.

    Without this, the next file to be opened would take the place of a closed stream, and what a library prints would
    land in that file. Characters that a stream cannot show, as in a locale without UTF-8, are printed as escape codes.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = None  # process 0 prints for all
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's or a test's own stream has none
            stream.reconfigure(errors="backslashreplace")


# ---- Constants and their flags


class _Constant(NamedTuple):
    source: str  # of the value
    comment: str
    group: str  # the comment line above the constants
    lines: slice  # of the script


@functools.lru_cache(8)
def constants_in(text):
    """Returns the constants in a script's text, {name: _Constant}, in the order of the file.

    A constant may take several lines. Raises InputError if one is set in another way than NAME = value, because its
    value could not be read then, and if the text is no script, as while somebody edits it.
    """
    lines, found = text.splitlines(), {}
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        tree, comments = ast.parse(text), [token for token in tokens if token.type == tokenize.COMMENT]
        banners = {token.start[0]: token.string for token in comments if token.line.startswith("# ---- ")}
        start = next(line for line, banner in banners.items() if banner.startswith("# ---- Constants"))
    except (tokenize.TokenError, SyntaxError, StopIteration) as error:
        raise InputError(f"the script's file cannot be read as it is now ({error!r}); finish the edit there") from None
    end = min((line for line in banners if line > start), default=len(lines) + 1)
    for node in tree.body:
        if not start < node.lineno < end:
            continue
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        target = targets[0] if len(targets) == 1 and isinstance(targets[0], ast.Name) else None
        if target is None:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store) and name.id.isupper():
                    raise InputError(
                        f"line {name.lineno} sets the constant {name.id} together with others or on a condition; write "
                        f"{name.id} = value on a line of its own, or give it a small name"
                    )
        elif target.id.isupper() and node.value:
            after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            above = (line[2:] for line in reversed(lines[start : node.lineno - 1]) if line.startswith("# "))
            place = slice(node.lineno - 1, node.end_lineno)
            found[target.id] = _Constant(ast.unparse(node.value), after.strip().lstrip("# "), next(above, ""), place)
    return found


class Constants:
    """The constants of a script as they were at one moment, read-only: constants.MAX_STEPS.

    algorithm: the script's name without .py. path: the script. text: the text of the script at that moment. may_change:
    names of the script's own constants that may change when a run is resumed. policy_rests: the name of the constant
    that says in how many first steps the policy rests, while a critic learns, or None. resting_steps: its value, or 0.
    """

    def __init__(self, values, path, text, may_change=(), policy_rests=None):
        resting = values[policy_rests] if policy_rests else 0
        extras = {"may_change": may_change, "policy_rests": policy_rests, "resting_steps": resting}
        vars(self).update(values, algorithm=path.stem, path=path, text=text, **extras)

    def __setattr__(self, name, _):
        raise AttributeError(
            f"{name} cannot be set: these are a run's constants; set the script's own before it begins"
        )

    def evaluation_is_due(self, step):
        """Returns whether an evaluation follows a step; step 0 is before training."""
        return step in (0, self.MAX_STEPS) or (self.EVAL_EVERY > 0 and step % self.EVAL_EVERY == 0)

    def checkpoint_is_due(self, step):
        """Returns whether a checkpoint follows a step."""
        return step > 0 and self.SAVE_EVERY > 0 and (step == self.MAX_STEPS or step % self.SAVE_EVERY == 0)

    def values(self):
        """Returns {name: value}."""
        return {name: value for name, value in vars(self).items() if name.isupper()}


def snapshot(namespace: dict) -> Constants:
    """Checks the constants of a script and returns them as they are now. namespace: the script's globals().

    Raises InputError for the first constant that breaks its rule.
    """
    preset = namespace.get("PRESET", "")
    if preset not in ("", namespace.get("__preset__")):
        raise InputError(
            f"PRESET = {preset!r} changes nothing when it is set from Python; set the constants that it stands for, by "
            f"configs.apply_overrides(vars({Path(namespace['__file__']).stem}), ['--preset', {preset!r}])"
        )
    path = Path(namespace["__file__"])
    text = path.read_text(encoding="utf-8")
    values = {name: namespace[name] for name in constants_in(text) if name in namespace}  # the file may have new ones
    try:
        validate(values, namespace)
        values["OUTPUT_DIR"] = expand_home("OUTPUT_DIR", values["OUTPUT_DIR"])
    except KeyError as error:
        raise InputError(f"{path} has no constant {error} any more, or Python removed it; put it back") from None
    return Constants(values, path, text, namespace.get("may_change", ()), namespace.get("policy_rests"))


def read_constants(namespace):
    """Returns the constants of a script as {name: (value now, comment, group)}, in the order of the file.

    namespace: the globals() of the script.
    """
    constants = constants_in(Path(namespace["__file__"]).read_text(encoding="utf-8"))
    return {name: (namespace[name], one.comment, one.group) for name, one in constants.items() if name in namespace}


def constant_values(namespace):
    """Returns {name: value} of a script's constants."""
    return {name: value for name, (value, _, _) in read_constants(namespace).items()}


def as_saved(values):
    """Returns {name: value} in a form that JSON can hold.

    A value that JSON does not have, such as a set, a path or a dtype, becomes its repr.
    """

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, set | frozenset):
            return repr(sorted(map(plain, value), key=repr))  # a set's own order differs between processes
        if value is None or type(value) in (bool, int, str) or type(value) is float and math.isfinite(value):
            return value
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

    return {name: plain(value) for name, value in values.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Raises argparse's complaint as an InputError, and adds the remedy."""
        if unknown := re.match(r"unrecognized arguments: (\S*)", message):
            message = self._unknown(unknown[1].split("=")[0])
        elif missing := re.match(r"argument (--\S+): expected one argument", message):
            message += f"; write {missing[1]}={self._option_string_actions[missing[1]].metavar}"
        elif switch := re.match(r"argument (--\S+)/(--no-\S+): ignored explicit argument", message):
            message = f"{switch[1]} is a switch and takes no value; write {switch[1]} or {switch[2]}"
        raise InputError(message)

    def _unknown(self, word):
        if not word.startswith(("-", "–", "—")):  # word processors turn two dashes into a long one
            remedy = "write --flag value, a value with spaces in quotes, and a switch alone, as --name or --no-name"
            return f"{word!r} belongs to no flag; {remedy}"
        name = word.strip("-–—").lower().replace("_", "-")
        near = difflib.get_close_matches("--" + name, self._option_string_actions, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see --help for all flags"
        constant = name.replace("-", "_").upper()
        others = [path.name for path in scripts() if constant in constants_in(path.read_text(encoding="utf-8"))]
        if others and near[:1] != ["--" + name]:
            remedy = f"it belongs to {' and '.join(others)}; see --help for the flags of this script"
        return f"unknown flag {word}; {remedy}"


class _Given(argparse.Namespace):
    """The values that flags set. A flag that is given twice must have the same value both times.

    If the values differ, nothing says which one is meant.
    """

    def __setattr__(self, name, value):
        if (before := getattr(self, name, value)) != value:
            flag = "--" + name.lower().replace("_", "-")
            raise InputError(f"{flag} is given twice, as {before!r} and as {value!r}; leave out one")
        super().__setattr__(name, value)


def _number_of(kind):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {KINDS[kind]}, got {text!r}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
        return value

    return parse


def _parser_of(namespace, constants):
    """Returns the parser of a script's flags."""
    parser = _Parser(
        usage="%(prog)s [--flag value ...]",
        description=namespace["__doc__"].strip().splitlines()[0],
        epilog="Each flag is a constant at the top of the file: edit it there, or override it here.",
        allow_abbrev=False,
    )
    groups = {}
    for name, (value, comment, group) in constants.items():
        kind = _rule(name, namespace)[0] or type(value)
        if kind not in KINDS:  # a list, for example, that a user added gets no flag
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group.partition(":")[0], group.partition(":")[2].strip() or None)
        options = {"dest": name, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = str if kind is str else _number_of(kind)
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        options["help"] = f"{comment} (default: {value!r})".replace("%", "%%")
        groups[group].add_argument("--" + name.lower().replace("_", "-"), **options)
    return parser


def apply_overrides(namespace, argv=None, resume=None):
    """Sets the script's constants from a preset and the command line, then validates them.

    namespace: the globals() of the script, changed in place. argv: without the program's name; sys.argv[1:] if None.
    resume: Run.constants_to_resume, which returns the constants of a run to resume. Raises InputError on an unknown
    flag, a value of the wrong type, or a value against a rule.
    """
    constants = read_constants(namespace)
    given = vars(_parser_of(namespace, constants).parse_args(argv, _Given()))
    if given.get("RESUME", namespace.get("RESUME")):
        if resume is None:
            raise InputError("RESUME needs a function that reads it; give apply_overrides Run.constants_to_resume, too")
        values = {name: value for name, (value, _, _) in constants.items()}
        namespace.update(resume(Path(namespace["__file__"]), values, given, namespace.get("may_change", ())))
        namespace["__preset__"] = namespace["PRESET"]  # the run's constants include the preset's
        return validate(constant_values(namespace), namespace)
    preset = given.get("PRESET", namespace.get("PRESET", ""))
    own = namespace.get("presets", {})
    if preset not in ("", *PRESETS, *own):
        have = ", ".join(sorted({*PRESETS, *own}))
        raise InputError(f'--preset {preset}: there is no such preset; choose one of {have}, or "" for none')
    for name, value in (PRESETS.get(preset, {}) | own.get(preset, {})).items():
        if name not in given and name in constants and namespace[name] != value:
            print(f"preset {preset}: {name} = {value!r}  (was {namespace[name]!r})")
            namespace[name] = value
    namespace.update(given, __preset__=preset)
    validate(constant_values(namespace), namespace)
    for name in given:
        if name.endswith("_DEVICE"):
            check_device(name, given[name])


def expand_home(name, value):
    """Returns a folder's name with ~ replaced by the home folder."""
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:  # ~name of an unknown user
        flag = "--" + name.lower().replace("_", "-")
        raise InputError(f"{name} = {value!r}: {error}; give {flag} the whole path") from None


# ---- Rules

# The largest value of any number except SEED. A larger one is a slip, and would fail far from its cause.
LARGEST = 1e15
# Completion tokens of a step or of an evaluation. To sample that many takes 16 GB of random numbers.
MOST_TOKENS = 2**31
KINDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "True or False"}


def _positive(value):
    return 0 < value < math.inf


def _not_negative(value):
    return 0 <= value < math.inf


def _is_json_object(text):
    try:
        return not text or isinstance(json.loads(text), dict)
    except ValueError:
        return False


# name: (type, condition or allowed values, the rule and its remedy in words). A name that is not here, but
# ends as one of ENDINGS, has that rule: GRPO_EPOCHS has that of EPOCHS. Other names, such as a user's own, have none.
RULES = {
    "DEVICE": (str, bool, 'a device such as "cpu" or "cuda:0"'),
    "GROUP_SIZE": (int, lambda v: v >= 2, "at least 2, because a group of one has no relative advantage"),
    "BATCH_SIZE": (int, _positive, "at least 1 prompt per step"),
    "MINI_BATCHES": (int, _positive, "at least 1"),
    "EPOCHS": (int, _positive, "at least 1 pass over the rollouts"),
    "MAX_STEPS": (int, _positive, "at least 1 step"),
    "MAX_COMPLETION_TOKENS": (int, _positive, "at least 1 token"),
    "MICRO_BATCH_TOKENS": (int, _positive, "at least 1 token; a single longer sequence still goes through alone"),
    "CLIP_LOW": (float, lambda v: 0 <= v < 1, "an offset from 1, in [0, 1): 0.2 clips the ratio at 0.8"),
    "CLIP_HIGH": (float, _not_negative, "an offset from 1, not negative: 0.28 clips the ratio at 1.28"),
    "DUAL_CLIP": (float, lambda v: v == 0 or 1 < v < math.inf, "0 for off, or a bound above 1 such as 3"),
    "VALUE_CLIP": (float, _not_negative, "0 for off, or a distance such as 0.2"),
    **dict.fromkeys(("GAMMA", "LAMBDA", "LAMBDA_CRITIC"), (float, lambda v: 0 <= v <= 1, "in [0, 1]")),
    "CRITIC_MODEL": (str, lambda v: True, ""),
    "BOOTSTRAP_TRUNCATED": (bool, (True, False), None),
    "ADVANTAGE_TYPE": (str, ("relative", "normalized"), None),
    "EXPERTS": (str, ("eager", "grouped_mm", "batched_mm"), None),
    "ROUTING_REPLAY": (str, ("", "r2", "r3"), None),
    "POLICY_DTYPE": (str, ("float32", "bfloat16"), None),
    "FROZEN_DTYPE": (str, ("auto", "float32", "bfloat16"), None),
    "COMPUTE_DTYPE": (str, ("auto", "float32", "bfloat16"), None),
    "STEP_SEPARATOR": (str, lambda v: True, ""),
    "PRESET": (str, lambda v: True, ""),
    "PROMPTS_CONFIG": (str, lambda v: True, ""),
    "EVAL_PROMPTS": (str, lambda v: True, ""),
    "SYSTEM_PROMPT": (str, lambda v: True, ""),
    "EVAL_SHARE": (float, lambda v: 0 < v < 1, "a share of the prompts, in (0, 1)"),
    "CHAT_TEMPLATE_KWARGS": (
        str,
        _is_json_object,
        """a JSON object, such as '{"reasoning_effort": "low"}', or empty""",
    ),
    "SHARD": (bool, (True, False), None),
    "SAMPLER": (str, ("own", "vllm"), None),
    "SAMPLER_MEMORY": (float, lambda v: 0 < v < 1, "a share of the device's memory, in (0, 1)"),
    "SAMPLER_CORRECTION": (str, ("auto", "", "token", "sequence"), None),
    "SAMPLED_AT_ONCE": (int, _not_negative, "0 for as many as memory has room for, or a number of completions"),
    "MAX_PROMPT_TOKENS": (int, _not_negative, "0 for no limit of its own, or at least 1 token"),
    "LOGITS_AT_ONCE": (int, _positive, "at least 1; 2**26 logits in float32 are a quarter of a GB"),
    "LORA_RANK": (int, lambda v: 0 <= v <= 2**14, "0 to train all weights, or a rank such as 16, at most 16384"),
    "LORA_ALPHA": (float, _positive, "positive; twice the rank is usual"),
    "LR_SCHEDULE": (str, ("constant", "linear", "cosine"), None),
    "LEARNING_RATE": (float, _positive, "positive: 1e-6 for a large model, 1e-3 for a tiny one"),
    "STEPS": (int, _not_negative, "0 or more steps"),
    "WEIGHT_DECAY": (float, _not_negative, "0 or more"),
    "MAX_GRAD_NORM": (float, _positive, "positive; a large number such as 1e9 turns clipping off"),
    "TEMPERATURE": (float, _positive, "positive; evaluation decodes greedily by itself"),
    "TOP_P": (float, lambda v: 0 < v <= 1, "in (0, 1]; 1 is off"),
    "COEF": (float, _not_negative, "0 or more; 0 is off"),
    "KL_COEF": (float, _not_negative, "0 or more; 0 is off, without a reference model"),
    "TARGET_KL": (float, _positive, "positive, in nats per token"),
    "EVAL_EVERY": (int, _not_negative, "0 or more steps; 0 evaluates only before the first step and at the end"),
    "EVAL_SIZE": (int, _positive, "at least 1 held-out prompt"),
    "EVAL_SAMPLES": (int, _positive, "at least 1 completion per held-out prompt"),
    "PASS_AT": (int, _positive, "at least 1"),
    "WANDB_PROJECT": (str, lambda v: True, ""),
    "SAVE_EVERY": (int, _not_negative, "0 or more steps; 0 saves only at the end"),
    "KEEP_CHECKPOINTS": (int, _positive, "at least 1, or there is nothing to resume from"),
    "RESUME": (str, lambda v: True, ""),
    "SAMPLE_GROUPS": (int, _not_negative, "0 or more groups per step"),
    "SEED": (int, lambda v: 0 <= v < 2**63, "in [0, 2^63)"),
    "PANELS": (str, lambda v: len(v.split()) == 8, "the names of eight metrics that plotting.py knows how to draw"),
}

_NAMES = (
    "POLICY_MODEL REWARD_MODEL REVISION PROMPTS PROMPTS_SPLIT EVAL_SPLIT PROMPT_COLUMN ANSWER_COLUMN REWARDS "
    "EVAL_REWARD LORA_TARGETS OUTPUT_DIR"
)
RULES |= dict.fromkeys(_NAMES.split(), (str, bool, "a text that is not empty"))
_SWITCHES = (
    "USE_SEQUENCE_LEVEL_REWARD TRUST_REMOTE_CODE THINKING GRADIENT_CHECKPOINTING MERGE_LORA TENSORBOARD PROFILE "
    "WHOLE_GROUPS SELFTEST ADAPTIVE_KL"
)
RULES |= dict.fromkeys(_SWITCHES.split(), (bool, (True, False), None))


ENDINGS = ("DEVICE", "EPOCHS", "REVISION", "LEARNING_RATE", "LR_SCHEDULE", "STEPS", "COEF")


def _rule(name, namespace):
    rules = RULES | namespace.get("limits", {})
    ending = next((ending for ending in ENDINGS if name.endswith("_" + ending)), None)
    return rules.get(name) or rules.get(ending, (None, None, None))


def validate(values, namespace):
    """Raises InputError for the first constant that breaks its rule. It names constant, value, rule and remedy.

    values: {name: value}. namespace: the script's globals(). Its `limits` are rules of the script's own constants. Its
    `conflicts` are (function of values, message) for values that do not go together. Its `policy_rests` is the name of
    the constant that says in how many first steps the policy rests.
    """
    for name, value in values.items():
        kind, holds, text = _rule(name, namespace)
        if kind is None:
            continue
        flag = "--" + name.lower().replace("_", "-")
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InputError(f"{name} = {value!r} must be {KINDS[kind]}; edit it or give {flag}")
        if isinstance(holds, tuple):
            if value not in holds:
                raise InputError(f"{name} = {value!r} must be one of {', '.join(map(repr, holds))}; give {flag}")
        elif not holds(value):
            raise InputError(f"{name} = {value!r} must be {text}; edit it or give {flag}")
        if kind in (int, float) and value > LARGEST and name != "SEED":
            raise InputError(f"{name} = {value!r} is too large, more than {LARGEST:g}; edit it or give {flag}")
    _validate_together(values, namespace)


def _validate_together(values, namespace):
    """Raises InputError for values that do not go together."""
    for breaks, message in namespace.get("conflicts", ()):
        if breaks(values):
            raise InputError(message.format_map(values))
    if (rests := namespace.get("policy_rests")) and values[rests] >= values["MAX_STEPS"]:
        steps = f"{rests} = {values[rests]} leaves the policy no step of MAX_STEPS = {values['MAX_STEPS']}"
        raise InputError(f"{steps}; lower --{rests.lower().replace('_', '-')}, or raise --max-steps")
    if not values["USE_SEQUENCE_LEVEL_REWARD"] and not re.search(r"\breward_model\b", values["REWARDS"]):
        raise InputError("USE_SEQUENCE_LEVEL_REWARD = False is for a reward model; add it: --rewards reward_model")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and values["SELFTEST"]:
        raise InputError("SELFTEST is for one process; start the script with python")
    if processes > min(values["BATCH_SIZE"], values["EVAL_SIZE"]):
        raise InputError(
            f"{processes} processes have no prompt each; raise --batch-size and --eval-size to at least that"
        )
    if values["SAMPLER"] == "vllm" and values["TOP_P"] < 1:
        raise InputError(
            "SAMPLER = 'vllm' has log-probs of the full distribution only if --top-p is 1; or --sampler own"
        )
    if values["SAMPLER"] == "vllm" and values["ROUTING_REPLAY"] == "r3":
        raise InputError(
            "ROUTING_REPLAY = 'r3' needs the sampler's experts, which vLLM does not tell; r2, or --sampler own"
        )
    together = values["GROUP_SIZE"] if values["WHOLE_GROUPS"] else 1
    if values["MINI_BATCHES"] > values["BATCH_SIZE"] * values["GROUP_SIZE"] // together:
        have = "BATCH_SIZE groups" if values["WHOLE_GROUPS"] else "BATCH_SIZE x GROUP_SIZE completions"
        raise InputError(f"MINI_BATCHES is more than {have}; lower --mini-batches")
    check_size(values, "BATCH_SIZE", "GROUP_SIZE", "MAX_COMPLETION_TOKENS")


def check_size(values, *names, **others):
    """Raises InputError if constants ask for more tokens at once than a machine holds.

    names: the constants to multiply. others: values to use in place of those constants.
    """
    values = {name: others.get(name, values[name]) for name in names}
    if math.prod(values.values()) > MOST_TOKENS:
        asked = " x ".join(f"{name} = {value}" for name, value in values.items())
        flags = ", ".join("--" + name.lower().replace("_", "-") for name in names)
        raise InputError(f"{asked} is more than {MOST_TOKENS} tokens at once, too large for a machine; lower {flags}")


def warn_about_constants(constants):
    """Prints a warning if constants ask for something that cannot work."""
    epochs = next(value for name, value in constants.values().items() if name.endswith("_EPOCHS"))
    if epochs * constants.MINI_BATCHES == 1:
        print("Warning: one update per rollout, so the ratio is always 1 and the clip is dead; raise MINI_BATCHES")
    if constants.SHARD and (constants.LORA_RANK > 0 or int(os.environ.get("WORLD_SIZE", "1")) == 1):
        print("Note: SHARD shares out weights that train among the processes of torchrun; here there are none to share")
    if constants.TOP_P < 1:
        print(f"Warning: TOP_P = {constants.TOP_P} below 1 samples from another distribution than the ratio assumes")


# ---- Devices and paths


def check_device(name, value):
    """Raises InputError unless this machine has that device."""
    import torch  # imported here, because the processes that run rewards do not need it

    try:
        device = torch.device(value)
        there = device.type == "cpu" or device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    except RuntimeError:
        there = False
    if not there:
        have = " or ".join(["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())])
        flag = "--" + name.lower().replace("_", "-")
        raise InputError(f"{name} = {value!r}: this machine has no such device; give {flag} {have}")


def choose_devices(constants):
    """Returns the devices of the models, {"POLICY_DEVICE": torch.device}, and prints a line if they are not as asked.

    `cuda:0` and `cuda:1`, the shipped defaults, fall back to one GPU or to the CPU. Any other device must exist. If
    torchrun has started several processes, each has a GPU of its own, or two.
    """
    import torch

    wanted = {name: value for name, value in constants.values().items() if name.endswith("_DEVICE")}
    if constants.SAMPLER == "own":
        del wanted["SAMPLER_DEVICE"]  # it samples on the policy's
    gpus = torch.cuda.device_count()
    chosen = {
        name: value if value not in ("cuda:0", "cuda:1") or gpus > 1 else "cuda:0" if gpus == 1 else "cpu"
        for name, value in wanted.items()
    }
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > 1 and gpus > 0 and {*wanted.values()} & {"cuda:0", "cuda:1"}:
        if here > gpus:
            raise InputError(
                f"torchrun started {here} processes, and this machine has {gpus} GPUs; lower --nproc-per-node"
            )
        own = dict(zip(("cuda:0", "cuda:1"), own_gpus(gpus, constants), strict=True))
        chosen = wanted = {name: own.get(value, value) for name, value in wanted.items()}
    for name, value in chosen.items():
        check_device(name, value)
    if chosen != wanted:
        found = "one GPU" if gpus else "no GPU"
        print(f"Found {found}: " + ", ".join(f"{name} = {value}" for name, value in chosen.items()))
    return {name: torch.device(value) for name, value in chosen.items()}


def own_gpus(gpus, constants):
    """Returns the GPUs of a process of torchrun in the place of cuda:0 and cuda:1, of so many on its machine.

    They are two if there are two for each process. Sharded models and vLLM have one place for each process.
    """
    number = int(os.environ["LOCAL_RANK"])
    sharded = constants.SHARD and constants.LORA_RANK == 0
    if gpus >= 2 * int(os.environ["LOCAL_WORLD_SIZE"]) and not sharded and constants.SAMPLER == "own":
        return f"cuda:{2 * number}", f"cuda:{2 * number + 1}"
    return f"cuda:{number}", f"cuda:{number}"


def find_path(value, name):
    """Returns the path of a local file or folder: as given, or else beside the scripts.

    Raises InputError if there is none.
    """
    why = ""
    try:
        for path in (Path(value).expanduser(), HERE / value):
            if value and path.exists():
                return path
    except (OSError, RuntimeError) as error:  # name too long, no permission, or ~ of an unknown user
        why = f" ({getattr(error, 'strerror', None) or error})"
    owner, _, rest = value.partition("/")
    if not why and rest and "/" not in rest and any((place / owner).is_dir() for place in (Path(), HERE)):
        why = f" in the folder {owner!r} that is here; to mean the Hub, start where there is no such folder"
    flag = "--" + name.lower().replace("_", "-")
    remedy = f"give {flag} PATH, or owner/name for one on the Hub"
    raise InputError(f"{name} = {value!r:.200}: no such file or folder{why}; {remedy}")


DATA_FILES = (".jsonl", ".json", ".parquet")


def is_hub_id(value):
    """Returns whether a name means `owner/name` on the Hub, and not a path.

    It means a path if a file or folder has that name, or if a folder has the owner's name.
    """
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", value, re.ASCII) or value.endswith(DATA_FILES):
        return False
    return not any((place / part).exists() for place in (Path(), HERE) for part in (value, value.split("/")[0]))


def find_model(value, name):
    """Returns the path of a local folder, or the id of a model on the Hub (`owner/name`).

    Raises InputError if the name can be neither.
    """
    if is_hub_id(value):
        return value
    path = find_path(value, name)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(
            f"{name} = {value!r} holds an adapter alone; give the folder of a whole model, such as the final/ that "
            "a run with --merge-lora saves"
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{name} = {value!r}: the folder has no config.json; give a folder saved by save_pretrained")
    return str(path)
