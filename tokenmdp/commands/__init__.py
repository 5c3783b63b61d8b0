"""What the ``tokenmdp`` command does, one module a job; `tokenmdp.cli` parses the arguments and reports errors."""
