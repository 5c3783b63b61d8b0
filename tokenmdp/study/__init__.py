"""The study: grids of credit methods, seeds and settings, run in parallel processes, with statistics and verdicts."""
