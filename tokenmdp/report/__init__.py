"""What a run looks like: learning curves, credit heat maps (terminal and HTML) and samples."""
