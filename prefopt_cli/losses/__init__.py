"""Pure tensor functions, one paper per file: no model, no tokenizer, no I/O."""
