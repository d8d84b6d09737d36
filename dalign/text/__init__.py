"""Text and tokens: tokenizers, chat templates, thoughts, packing."""
