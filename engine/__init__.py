"""How a model runs fast and in little memory. What it computes is said in the scripts and their constants."""
