"""Pictures of a run: learning curves, credit heat maps (terminal and HTML) and samples."""
