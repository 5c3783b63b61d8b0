"""Agents, one readable file each; installed as ``tokenmdp.agents``. They import tokenmdp, nothing imports them."""
