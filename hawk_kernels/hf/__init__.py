"""Pruning Hugging Face vision-language models: `prune.py` opens the block, `prefill.py` hooks one call, in six stages.

- read: `prompt.py` fetches the prompt, `question.py` finds the text that ranks, `images.py` where images end.
- score and choose: `choose_tokens.py` asks a method, which sees queries and keys by `projections.py`. It does not know
  which layer it chooses before: `prefill.py` asks before the first, `inside_stack.py` before later ones.
- pack: `packing.py` moves the tokens that stay together, and whatever else a call has for each token.
- run: the model's own code. Where tokens leave after a layer, `layer_cuts.py` cuts what the later layers are called
  with, or `layer_masks.py` hides the tokens from them. `stages.py` reads the stages that a caller names.
- unpack: `packing.py` spreads the hidden states out again, so that logits and labels keep the prompt's length.
- decode: `pruned_cache.py` translates the caller's masks and positions to the shorter cache.

`families.py` holds every fact about a model family, `anatomy.py` finds a model's parts by them, `encoders/` reads the
attention of vision encoders, `stats.py` tells what happened, and `hooks.py` has the helpers that all hooks share.
"""
