"""The language model: loading, tokens, scoring and decoding, adapters, and its attention rows."""
