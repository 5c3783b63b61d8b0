"""The parts of `build_imdb_assets.py`: corpus, language model, reward model and their quality."""
