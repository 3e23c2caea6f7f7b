"""Pictures of a pruned prompt: which part of the caller's image each visual token stands for, drawn and reported."""
