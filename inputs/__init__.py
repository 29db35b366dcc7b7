"""What a run is made from: prompts, tokenizers and models, checked as they are read."""
