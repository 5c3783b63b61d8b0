"""The language model: loading, tokens, scoring and decoding, adapters, the attention rows it gives away."""
