"""Model files: Hugging Face folders and GGUF, and the families they are of."""
