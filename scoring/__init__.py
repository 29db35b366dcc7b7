"""From completions to numbers, safely: rules in processes of their own, and reward models."""
