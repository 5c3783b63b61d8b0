"""The token MDP behind Gymnasium: its tasks and prompts, single and vector environments, and how they are drawn."""
