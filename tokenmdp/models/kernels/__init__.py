"""The same numbers, faster; only `tokenmdp.models` imports these modules."""
