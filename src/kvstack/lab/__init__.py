"""Reference models trained from scratch: text, tokenizer, tasks, training loop, registry of the bundled checkpoint."""
