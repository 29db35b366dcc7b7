"""Makes the rows of samples.jsonl: what a reader wants to see of a completion."""


def samples_of_step(step, tokenizer, rollouts, new_logps, metrics):
    """Returns the rows of samples.jsonl of a step, and those of skipped.jsonl: all, if an update was skipped, or none.

    new_logps: log-probs of the first completions after the step's updates, (n, T). These n are shown.
    """
    shown = samples_of(step, tokenizer, rollouts[: len(new_logps)], new_logps)
    return shown, samples_of(step, tokenizer, rollouts, rollouts.old_logps) if metrics["skipped_updates"] else []


def samples_of(step, tokenizer, rollouts, new_logps):
    """Returns a dict per completion of a step, with what a reader wants to see.

    logp_change: for each token, by how many nats the step's updates have moved its log-prob.
    """
    samples, rewards, advantages = [], rollouts.rewards, rollouts.advantages
    for i, change in enumerate((new_logps - rollouts.old_logps).tolist()):
        start, length = int(rollouts.prompt_lengths[i]), int(rollouts.completion_lengths[i])
        tokens = rollouts.input_ids[i, start : start + length].tolist()
        row = rollouts.prompts[i]
        begun = [{"role": "assistant", "content": row["begun"]}] if row["begun"] else []
        samples.append(
            {
                "step": step,
                "prompt": row["prompt"],
                "messages": [{name: one[name] for name in ("role", "content")} for one in row["messages"] + begun],
                "completion": rollouts.texts[i],
                "reward": rewards[i].sum().item(),
                "advantage": (advantages[i] if advantages.dim() == 1 else advantages[i, :length].mean()).item(),
                "answer": row["answer"],
                "tokens": length,
                "truncated": bool(rollouts.truncated[i]),
                "token_texts": token_texts(tokenizer, tokens),
                "logp_change": [round(value, 4) for value in change[:length]],
            }
        )
    return samples


def token_texts(tokenizer, ids):
    """Returns the text that each token adds to the whole, with special tokens shown.

    If a token ends within a character, it adds nothing. The token that completes the character adds all of it.
    """
    texts, first, before = [], 0, ""
    for t in range(len(ids)):
        now = tokenizer.decode(ids[first : t + 1])
        if now.endswith("\ufffd") and t + 1 < len(ids):  # stands for bytes that are not yet a character
            texts.append("")
            continue
        texts.append(now[len(before) :])
        before = now
        if t - first > 16:  # starts anew, so that no long text is decoded per token
            first, before = t, tokenizer.decode(ids[t : t + 1])
    return texts
