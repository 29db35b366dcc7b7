"""The rewards and the evaluation's rule, as the constants say, tried on prompts and answers before the first step."""

from scoring.reward_models import load_reward_model
from scoring.rules import Rewards, check_scoring, find_reward, parse_rewards


def check_reward_names(c):
    """Raises InputError if REWARDS or EVAL_REWARD names no reward: at once, before models are loaded."""
    parse_rewards(c.REWARDS)
    find_reward(c.EVAL_REWARD, "EVAL_REWARD")


def load_rewards(c, device, inputs):
    """The Rewards of REWARDS, and those of EVAL_REWARD. Leaves out held-out rows that EVAL_REWARD does not concern.

    c: the script's constants. device: of the reward model. inputs: of load_inputs.
    """
    weights, reward_model = parse_rewards(c.REWARDS), None
    if "reward_model" in weights:
        reward_model = load_reward_model(c, device, inputs.tokenizer)
    inputs.eval_rows = check_scoring(c, weights, reward_model, inputs.train_rows, inputs.eval_rows)
    return Rewards(weights, reward_model), Rewards({c.EVAL_REWARD: 1.0})
