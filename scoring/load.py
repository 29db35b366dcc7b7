"""Loads the rewards and the evaluation's rule that the constants name, and tries them before the first step."""

from inputs.libraries import quiet_libraries
from scoring.reward_models import load_reward_model
from scoring.rules import Rewards, check_scoring, find_reward, parse_rewards


def check_reward_names(c):
    """Raises InputError if REWARDS or EVAL_REWARD names a reward that does not exist.

    This check is quick, so it comes before models are loaded.
    """
    parse_rewards(c.REWARDS)
    find_reward(c.EVAL_REWARD, "EVAL_REWARD")


@quiet_libraries()
def load_rewards(c, device, inputs):
    """Returns the Rewards of REWARDS, and those of EVAL_REWARD.

    It removes the held-out rows that EVAL_REWARD does not concern from the inputs. c: the script's constants. device:
    that of the reward model. inputs: from load_inputs.
    """
    weights, reward_model = parse_rewards(c.REWARDS), None
    if "reward_model" in weights:
        reward_model = load_reward_model(c, device, inputs.tokenizer)
    inputs.eval_rows = check_scoring(c, weights, reward_model, inputs.train_rows, inputs.eval_rows)
    return Rewards(weights, reward_model), Rewards({c.EVAL_REWARD: 1.0}, keep=False)
